"""`python scripts/estimate_cost.py`: its figures are the papers', and it needs no weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from reduced_configs import tiny_config

from shortzip.reduction import flops
from shortzip.scripts.estimate_cost import EstimateConfig, estimate, known_release, main, read_config, report
from shortzip.train.step import memory as training_cost

ROOT = Path(__file__).parents[2]


def test_papers_figures_for_known_releases():
    expected = {
        "llava-1.5-7b": ("19", 8.504, 4.694),
        "llava-1.5-13b": ("24", 16.576, 9.074),
        "llava-next-7b": ("60%", 42.675, 21.560),
        "llava-next-13b": ("60%", 81.806, 41.037),
    }
    for model, (freeze, plain, frozen) in expected.items():
        _, rows = estimate(EstimateConfig(model=model, freeze=freeze))
        assert [row.name.split()[0] for row in rows] == ["none", "VisionZip", "ShortV", "both"]
        assert round(rows[0].prefill_flops / 1e12, 3) == plain
        assert round(rows[2].prefill_flops / 1e12, 3) == frozen
        assert rows[3].prefill_flops < min(rows[1].prefill_flops, rows[2].prefill_flops)


def test_equal_tokens_cost_the_same_but_for_what_a_method_reads_of_the_tower():
    rows = {
        method: estimate(EstimateConfig(budget="64+0", freeze="19", method=method))[1][1]
        for method in ("visionzip", "scope:alpha=0.5", "divprune", "divprune:space=projected", "pool")
    }
    zipped, scope, divprune, projected, pool = rows.values()
    assert [row.name for row in (zipped, scope)] == ["VisionZip 64+0", "scope:alpha=0.5 64+0"]
    assert len({(row.visual_tokens, row.prefill_flops, row.training_bytes) for row in rows.values()}) == 1
    assert zipped.tower_flops == scope.tower_flops > divprune.tower_flops == pool.tower_flops
    assert projected.tower_flops - divprune.tower_flops == 9 * (
        divprune.tower_flops - flops.vision_tower_flops(read_config("llava-1.5-7b"))
    ), "the projector on all patches, not on 64 alone"
    assert scope.tower_flops < 1.01 * divprune.tower_flops
    assert estimate(EstimateConfig(method="scope"))[1][1].visual_tokens == 64
    with pytest.raises(ValueError, match="method scope merges nothing"):
        estimate(EstimateConfig(budget="54+10", method="scope"))


def test_rows_of_llava_1_5_7b():
    config, (none, visionzip, shortv, both) = estimate(EstimateConfig(budget="54+10", freeze="19"))
    assert round(flops.parameter_counts(config).total / 1e9, 2) == 7.06
    assert [row.visual_tokens for row in (none, visionzip, shortv, both)] == [576, 64, 576, 64]
    assert [row.frozen_layers for row in (none, visionzip, shortv, both)] == [0, 0, 19, 19]
    assert none.kv_cache_bytes == shortv.kv_cache_bytes == 640 * 2**19
    assert visionzip.kv_cache_bytes == both.kv_cache_bytes == 128 * 2**19
    assert none.training_flops > shortv.training_flops > visionzip.training_flops > both.training_flops
    for row in (none, visionzip, shortv, both):
        assert row.training_bytes == sum(row.memory.values())


def test_largest_micro_batch_is_the_largest_that_fits():
    settings = EstimateConfig(memory="24GiB")
    config, rows = estimate(settings)
    for row in rows:

        def memory(samples: int, row=row) -> int:
            step = training_cost.TrainingStep(
                text_tokens=512, visual_tokens=row.visual_tokens, frozen_layers=row.frozen_layers,
                micro_batch_size=samples,
            )  # fmt: skip
            return training_cost.training_step_memory(config, step).total

        assert memory(row.largest_micro_batch) <= 24 * 2**30 < memory(row.largest_micro_batch + 1)
    small = EstimateConfig(memory="8GiB")
    _, rows = estimate(small)
    assert {row.largest_micro_batch for row in rows} == {0}
    last = report(config, rows, small).splitlines()[-4].split()
    assert last[0] == "both"
    assert last[-2:] == ["NO", "none"]
    _, rows = estimate(EstimateConfig(memory="8GiB", weights="4bit"))
    assert min(row.largest_micro_batch for row in rows) > 0


def test_next_counts_tiles_and_groups_of_heads():
    _, rows = estimate(EstimateConfig(model="llava-next-mistral-7b", budget="28+5"))
    assert [row.visual_tokens for row in rows] == [2880, 165, 2880, 165]
    assert rows[0].prefill_flops_grouped < rows[0].prefill_flops
    assert rows[0].kv_cache_bytes == (2880 + 64) * 32 * 2 * 1024 * 2
    _, rows = estimate(EstimateConfig(model="llava-next-7b", budget="54+10", tiles=3))
    assert [row.visual_tokens for row in rows[:2]] == [3 * 576, 3 * 64]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_folder_with_a_config_and_nothing_else(family, tmp_path):
    config = tiny_config(family)
    config.to_json_file(tmp_path / "config.json")
    _, rows = estimate(EstimateConfig(model=str(tmp_path), budget="4+2", freeze="1"))
    tiles = 5 if family == "llava_next" else 1
    assert [row.visual_tokens for row in rows] == [16 * tiles, 6 * tiles, 16 * tiles, 6 * tiles]
    assert rows[0].prefill_flops == flops.llm_prefill_flops(config.text_config, 64, 16 * tiles)


def test_reduced_checkpoint_brings_its_own_reductions(tmp_path):
    config = tiny_config("llava", visionzip={"dominant": 3, "contextual": 2}, shortv={"layers": [0, 2]})
    config.to_json_file(tmp_path / "config.json")
    _, rows = estimate(EstimateConfig(model=str(tmp_path)))
    assert (rows[3].visual_tokens, rows[3].frozen_layers) == (5, 2)
    _, rows = estimate(EstimateConfig(model=str(tmp_path), budget="4+2", freeze="[1]"))
    assert (rows[3].visual_tokens, rows[3].frozen_layers) == (6, 1)


def test_writes_json(tmp_path, capsys):
    main(["--output", str(tmp_path / "new" / "cost.json")])
    printed = capsys.readouterr().out
    assert "8.504" in printed
    values = json.loads((tmp_path / "new" / "cost.json").read_text())
    assert [row["visual_tokens"] for row in values["rows"]] == [576, 64, 576, 64]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": "570+10"}, "at most 577"),
        ({"budget": "64"}, r"54\+10"),
        ({"freeze": "33"}, "has 32 layers"),
        ({"freeze": "0,32"}, "from 0 to 31"),
        ({"memory": "a lot"}, "24GiB"),
        ({"per_device_train_batch_size": 0}, "micro_batch_size=0"),
        ({"tiles": 0}, "tiles=0"),
        ({"text_tokens": -1}, "text_tokens=-1"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        estimate(EstimateConfig(**values))


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llava_llama"}')
    with pytest.raises(ValueError, match="model_type is 'llava_llama'"):
        read_config(str(tmp_path))
    assert known_release("llava-2") is None


def test_as_a_command():
    command = [sys.executable, str(ROOT / "scripts" / "estimate_cost.py")]
    ended = subprocess.run([*command, "--buget", "54+10"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "budget" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_video_is_frames_times_tokens(tmp_path: Path):
    """LLaVA-OneVision's: 196 pooled tokens of a frame or the budget, and one newline; the tower sees every frame."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "model_type": "qwen2"}  # fmt: skip
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
              "image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"}  # fmt: skip
    config = {"model_type": "llava_onevision", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = EstimateConfig(model=str(tmp_path), budget="70+10", freeze="60%", frames=32)
    config, (none, reduced, _, _) = estimate(settings)
    assert (none.visual_tokens, reduced.visual_tokens) == (32 * 196 + 1, 32 * 80 + 1)
    tower = flops.vision_tower_flops(config, 32)
    assert none.tower_flops == tower + flops.projector_flops(config, 32 * 729)
    assert reduced.tower_flops - flops.projector_flops(config, reduced.visual_tokens) >= tower
    assert none.training_flops > reduced.training_flops
    assert "64 text tokens and a video of 32 frames" in report(config, [none, reduced], settings)
    taught = EstimateConfig(model=str(tmp_path), budget="70+10", freeze="60%", frames=32, distill=True)
    assert estimate(taught)[1][1].training_flops > reduced.training_flops
    with pytest.raises(ValueError, match="budgets and frames are both given"):
        estimate(EstimateConfig(model=str(tmp_path), budgets=["40", "80"], frames=8))
    with pytest.raises(ValueError, match="tiles 2 and frames 8 are both given"):
        estimate(EstimateConfig(model=str(tmp_path), tiles=2, frames=8))
    with pytest.raises(ValueError, match=r"a LLaVA-1\.5 takes no videos"):
        estimate(EstimateConfig(frames=8))
    with pytest.raises(ValueError, match=r"729|patches"):
        estimate(EstimateConfig(model=str(tmp_path), budget="900+10", frames=8))


def test_one_projector_for_several_budgets_takes_their_mean_in_the_memory_of_the_largest():
    asked = {"budgets": ["64", "128", "162+30"], "freeze": "19"}
    _, (_, *rows, together) = estimate(EstimateConfig(**asked))
    assert [row.name for row in rows] == ["54+10, 19 frozen", "108+20, 19 frozen", "162+30, 19 frozen"]
    for row, budget in zip(rows, ("54+10", "108+20", "162+30"), strict=True):
        _, (_, _, _, alone) = estimate(EstimateConfig(budget=budget, freeze="19"))
        assert (row.visual_tokens, row.training_flops, row.memory) == (
            alone.visual_tokens, alone.training_flops, alone.memory,
        )  # fmt: skip
    assert together.training_flops == sum(row.training_flops for row in rows) // 3
    assert together.memory == rows[-1].memory
    _, sandwiched = estimate(EstimateConfig(**asked, sandwich=True))
    assert sandwiched[-1].training_flops == sum(row.training_flops for row in rows)
    assert sandwiched[-1].training_bytes > together.training_bytes == sandwiched[-2].training_bytes
    assert sandwiched[-1].memory["sandwich"] > sandwiched[0].memory["sandwich"] == 0
    _, taught = estimate(EstimateConfig(**asked, sandwich=True, distill=True))
    _, alone = estimate(EstimateConfig(budget="54+10", freeze="19", distill=True))
    teacher = alone[3].training_flops - rows[0].training_flops
    assert taught[-1].training_flops - sandwiched[-1].training_flops == teacher, "it is asked once"
    assert "one for all, sandwich" in report(read_config("llava-1.5-7b"), taught, EstimateConfig(**asked))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budgets": ["64"]}, "two or more are needed"),
        ({"budgets": ["64", "54+10"]}, r"54\+10 has 64 tokens"),
        ({"sandwich": True}, "sandwich is true, and there are no budgets"),
    ],
)
def test_lists_that_cannot_be_estimated_are_refused(asked, words):
    with pytest.raises(ValueError, match=words):
        estimate(EstimateConfig(**asked))
