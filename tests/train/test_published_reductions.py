"""What a run was tuned with is what is published, converted, evaluated and told, in every shape."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import finish, with_lineage, with_setting
from tiny import write_release

from shortzip.data.errors import UserError
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.convert_release import main as convert
from shortzip.scripts.evaluate_models import candidates_for, read_arguments, runs_of
from shortzip.train.evaluation.answers import Evaluation
from shortzip.train.evaluation.comparison import table_of
from shortzip.train.finish import candidates_of
from shortzip.train.publish.push import prepare
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.writing import SHAPES, WHOLE
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import load_config

COMMIT = "5" * 40
WITH_ALL = [shape for shape in SHAPES if shape != "engine"]
REDUCTIONS = {
    "fastv": Reductions({"dominant": 5, "contextual": 3}, None, {"layer": 2, "keep": 0.5}),
    "pyramiddrop": Reductions(fastv={"method": "pyramiddrop", "layers": [1, 3], "keep": [0.5, 0.25]}),
    "random": Reductions(
        {"dominant": 7, "contextual": 0, "method": "random", "seed": 3}, {"layers": [0, 2]}, None, "original"
    ),
    "scope": Reductions({"dominant": 7, "contextual": 0, "method": "scope", "alpha": 0.5}),
    "nothing": Reductions(),
}


@pytest.fixture(autouse=True)
def _the_hub_has_the_same_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortzip.train.publish.push._same_on_hub", lambda *_: COMMIT)


@pytest.fixture(scope="module")
def runs(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {
        name: finish(root / name, tiny_release, reductions, vision_tower="openai/clip")
        for name, reductions in REDUCTIONS.items()
    }


def published_config(run: Path, shape: Any) -> tuple[dict[str, Any], str]:
    base = None if shape in WHOLE else "maker/llava"
    with prepare(run, "user/llava-tuned", shape, base=base, say=lambda _: None) as publication:
        return json.loads(publication.files["config.json"].read_text()), publication.card


@pytest.mark.parametrize("shape", WITH_ALL)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_part_of_a_reduction_is_published(runs: dict[str, Path], name: str, shape: str) -> None:
    config, card = published_config(runs[name], shape)
    assert Reductions.from_config(config) == REDUCTIONS[name]
    introduction, recipe = card.split("## Use")[0], card.split("## How it was made")[1].split("```")[0]
    if name == "fastv":
        for part in (introduction, recipe):
            assert "8 of 36 visual tokens per image (5 dominant, CLS counted among them, and 3 contextual)" in part
            assert "FastV, 0.5 of the visual tokens kept after 2 of 4 layers" in part
        assert "arxiv.org/abs/2504.00502" not in introduction, "no layer is frozen"
    elif name == "pyramiddrop":
        for part in (introduction, recipe):
            assert "PyramidDrop: 0.5, 0.25 of the visual tokens kept before layers 1, 3 of 4" in part
        assert "The pruning is [PyramidDrop](https://arxiv.org/abs/2410.17247)'s." in introduction
    elif name == "random":
        for part in (introduction, recipe):
            drawn = "chosen by the baseline random:seed=3, not by VisionZip; original positions"
            assert f"7 of 36 visual tokens per image ({drawn})" in part
            assert "2 of 4 (layers 0, 2)" in part
        assert "are chosen by [VisionZip]" not in introduction
    elif name == "scope":
        for part in (introduction, recipe):
            assert "7 of 36 visual tokens per image (patches as they are, chosen by SCOPE: scope:alpha=0.5)" in part
        assert "are chosen by [SCOPE](https://arxiv.org/abs/2510.24214)." in introduction
        assert "- scope\n" in card.split("---")[1]
        assert "--visionzip.alpha 0.5" in card
    else:
        assert "on all visual tokens" in introduction
        assert "arxiv.org" not in introduction


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("fastv", ["FastV: 0.5 of them kept after layer 2 (an engine prunes nothing)"]),
        ("random", ["2 frozen layers (an engine runs every layer", "original positions (an engine numbers tokens as"]),
        ("scope", []),
    ],
)
def test_for_an_engine_what_it_cannot_do_is_left_out_and_told(
    runs: dict[str, Path], name: str, lost: list[str]
) -> None:
    said: list[str] = []
    with prepare(runs[name], "user/llava-tuned", "engine", say=said.append) as publication:
        config, files = json.loads(publication.files["config.json"].read_text()), publication.files
    assert Reductions.from_config(config) == REDUCTIONS[name].before_an_engine
    assert (config["shortv"], config["fastv"], config["positions"]) == (None, None, "compact")
    assert "AutoModel" in config["auto_map"]
    assert config["base_release"] is None
    assert {"model.safetensors", "processing_reduced_llava.py"} <= set(files)
    assert not {"fastv.py", "pruning.py"} & set(files)
    introduction, use, measured, *_, made = publication.card.split("\n## ")[:5]
    assert "vllm serve user/llava-tuned --trust-remote-code --model-impl transformers" in use
    assert 'AutoProcessor.from_pretrained("user/llava-tuned"' in use
    assert [line.startswith("not published: ") for line in said] == [True] * len(lost)
    for words in lost:
        assert all(words in text for text in ("".join(said), measured, made))
        assert not any(words in introduction for words in ("arxiv.org/abs/2504.00502", "inside it"))
    assert ("goes without it" in measured) == ("published without" in made) == bool(lost)


@pytest.mark.parametrize("name", ["random", "scope"])
def test_for_an_engine_figures_are_claimed_where_they_are_its_own(runs: dict[str, Path], name: str) -> None:
    row = Evaluation(
        "all tokens", 0.5, 1.0, questions=3, supervised_tokens=9, visual_tokens=8.0, frozen_layers=0, llm_flops=1e9,
        prefill_ms=1.0, prefill_batch=1, seconds=1.0,
    )  # fmt: skip
    rows = [asdict(row), asdict(replace(row, name="reduced + tuned", frozen_layers=2))]
    (runs[name] / "evaluation.json").write_text(json.dumps({"rows": rows}))
    try:
        _, card = published_config(runs[name], "engine")
    finally:
        (runs[name] / "evaluation.json").unlink()
    assert "| reduced + tuned | 50.0% |" in card
    own = REDUCTIONS[name].before_an_engine == REDUCTIONS[name]
    assert ("The figures are those of the model as it was tuned" in card) == (not own)
    assert ("model-index:" in card) == ("- language model, one prompt:" in card) == own


def test_for_an_engine_the_release_needs_no_name(runs: dict[str, Path]) -> None:
    with (
        pytest.raises(ValueError, match="base maker/llava is for shapes projector and llava: shape engine holds"),
        prepare(runs["scope"], "user/llava-tuned", "engine", base="maker/llava"),
    ):
        pass


def test_conversion_to_llavas_layout_keeps_every_part(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("fastv", "pyramiddrop", "random"):
        target = tmp_path / f"llava-{name}"
        options = ["--base", "maker/llava", "--vision_tower", "openai/clip", "--output", str(target)]
        convert([str(runs[name]), "--to", "llava", *options])
        assert Reductions.from_config(json.loads((target / "config.json").read_text())) == REDUCTIONS[name]


def test_the_lineage_tells_every_part(runs: dict[str, Path], tmp_path: Path) -> None:
    again = finish(tmp_path / "again", runs["fastv"] / "final", Reductions.parse("4+2"))
    _, card = published_config(again, "full")
    assert "final: 5+3 visual tokens, FastV: 0.5 of them kept after layer 2" in card.split("## Lineage")[1]


def test_all_tokens_means_no_reduction_at_all(runs: dict[str, Path], tmp_path: Path) -> None:
    """Also where the release that was tuned is itself a checkpoint with a reduction inside its language model."""
    again = finish(tmp_path / "again", runs["fastv"] / "final", Reductions.parse("4+2"))
    config = load_config(["--config", str(again / "config.yaml")])
    rows = {row.name: row for row in candidates_of(config, again, open_release(str(again)))}
    assert rows["all tokens"].reductions == Reductions()
    assert rows["reduced, untuned"].reductions == Reductions.parse("4+2")
    model, _ = load_release(rows["all tokens"].spec, rows["all tokens"].reductions)
    assert Reductions(model.config.visionzip, model.config.shortv, model.config.fastv).is_empty


def test_a_fastv_run_has_its_untuned_row(runs: dict[str, Path]) -> None:
    config = load_config(["--config", str(runs["fastv"] / "config.yaml")])
    rows = candidates_of(config, runs["fastv"], open_release(str(runs["fastv"])))
    assert [row.reductions for row in rows] == [Reductions(), REDUCTIONS["fastv"], None]


# ---- the run's record


@pytest.fixture
def run(tiny_release: Path, tmp_path: Path) -> Path:
    return finish(tmp_path / "run", tiny_release, Reductions.parse("5+3", "1"), learning_rate=0.01)


def rows_for(run: Path) -> list[Any]:
    config = read_arguments(["--model", str(run), "--data.instructions", "d.json"])
    return candidates_for(config, runs_of(config))


@pytest.mark.parametrize("shape", SHAPES)
def test_another_release_in_the_runs_config_is_refused(run: Path, tmp_path: Path, shape: str) -> None:
    other = write_release(tmp_path / "other", seed=5)
    with_setting(run, model=str(other))
    message = (
        f"config.yaml names {other}, and .*final was tuned over other weights: put the run's own config.yaml back"
    )
    with pytest.raises(ConfigError, match=message):
        published_config(run, shape)
    with pytest.raises(ConfigError, match=message):
        rows_for(run)


def test_a_release_that_differs_in_its_projector_alone_is_refused(
    run: Path, tiny_release: Path, tmp_path: Path
) -> None:
    projector = finish(tmp_path / "b", tiny_release, Reductions()) / "final"
    with_setting(run, model=str(projector))
    for check in (lambda: published_config(run, "full"), lambda: rows_for(run)):
        with pytest.raises(ConfigError, match="began with another projector"):
            check()


@pytest.mark.parametrize("key", ["learning_rate", "visionzip", "data.fraction"])
def test_settings_of_another_run_are_refused(run: Path, key: str) -> None:
    values = {"learning_rate": 0.5, "visionzip": None, "data.fraction": 0.25}
    if key == "data.fraction":
        with_setting(run, data={"instructions": "rows.json", "fraction": 0.25})
    else:
        with_setting(run, **{key: values[key]})
    message = f"config.yaml: {key} is {values[key]}, and .*final was tuned with"
    with pytest.raises(ConfigError, match=message):
        published_config(run, "full")
    with pytest.raises(ConfigError, match=message):
        rows_for(run)


def test_what_may_change_when_a_run_is_continued_is_no_other_run(
    run: Path, tiny_release: Path, tmp_path: Path
) -> None:
    """The release lies elsewhere, and evaluations ask for more."""
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_release)
    with_setting(run, model=str(moved), eval_batch_size=3)
    assert published_config(run, "projector")[0]["base_release"]["name"] == "maker/llava"
    assert [row.name for row in rows_for(run)] == ["all tokens", "reduced, untuned", "reduced + tuned"]


def test_a_run_of_before_the_record_is_published_and_evaluated(run: Path) -> None:
    (run / "final" / "tuned_with.json").unlink()
    (run / "final" / "lineage.json").unlink()
    _, card = published_config(run, "full")
    assert "--learning_rate 0.01" in card
    assert len(rows_for(run)) == 3


def test_a_full_checkpoint_needs_its_release_no_more(run: Path, tmp_path: Path) -> None:
    with_setting(run, model=str(tmp_path / "gone"))
    config, card = published_config(run, "full")
    assert config["shortv"] == {"layers": [1]}
    assert "whose card names no licence" in card
    with pytest.raises(FileNotFoundError, match="gone does not exist"):
        published_config(run, "llava")


def test_a_run_over_a_projector_alone(tiny_release: Path, tmp_path: Path) -> None:
    """Its release's weights lie in another folder, which its config names."""
    first = finish(tmp_path / "first", tiny_release, Reductions.parse("5+3"))
    with prepare(first, "user/llava-x", "projector", base="maker/llava", say=lambda _: None) as publication:
        folder = publication.files["config.json"].parent
        config = json.loads((folder / "config.json").read_text())
        config["base_release"] |= {"name": str(tiny_release), "revision": None}
        (folder / "config.json").write_text(json.dumps(config))
        second = finish(tmp_path / "second", folder, Reductions.parse("4+2"))
        assert len(rows_for(second)) == 3
        assert published_config(second, "full")[0]["visionzip"] == {"dominant": 4, "contextual": 2}


def test_options_that_would_mean_nothing_are_refused(run: Path, tiny_release: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="base maker/llava is for shapes projector and llava"),
        prepare(run, "user/x", "full", base="maker/llava"),
    ):
        pass
    with pytest.raises(UserError, match="--base maker/llava is for --to llava"):
        convert([str(tiny_release), "--base", "maker/llava", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_release_is_looked_for_at_the_commit_that_was_tuned(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def opened(spec: ReleaseSpec) -> Any:
        asked.append((spec.name, spec.revision))
        raise FileNotFoundError

    with_setting(run, model="maker/llava", revision="main")
    with_lineage(run, name="maker/llava", revision=COMMIT)
    monkeypatch.setattr("shortzip.train.release.lineage.open_release", opened)
    monkeypatch.setattr("shortzip.train.publish.model_card.fetch", lambda *_: (run, None))
    published_config(run, "full")
    assert asked == [("maker/llava", COMMIT)]
    config = load_config(["--config", str(run / "config.yaml")])
    assert candidates_of(config, run, open_release(str(run)))[0].spec.revision == COMMIT


def test_the_card_says_in_which_precision_was_measured_and_is_loaded(tmp_path: Path) -> None:
    release = write_release(tmp_path / "half", dtype=torch.float16)
    run = finish(tmp_path / "run", release, Reductions.parse("5+3"))
    row = {
        "name": "reduced + tuned", "exact_match": 0.5, "loss": 1.0, "visual_tokens": 8, "frozen_layers": 0,
        "llm_flops": 1, "prefill_ms": 1.0, "questions": 3, "prefill_batch": 1, "fastv": "2+0.5",
    }  # fmt: skip
    for entry, words in (
        ({}, "the published weights in fp32;"),  # of a run that kept no such word: its own precision
        ({"dtype": "bfloat16"}, "the published weights in bf16 (projector fp32);"),
        ({"dtype": "float32", "load_in_4bit": True}, "in fp32, the language model's layers in 4 bits (NF4);"),
    ):
        (run / "evaluation.json").write_text(json.dumps({"rows": [row], **entry}))
        card = published_config(run, "full")[1]
        assert "| reduced + tuned | 50.0% | 1.0000 | 8, FastV 2+0.5 | 0 |" in card
        assert words in " ".join(card.split())
        assert "The untrained weights are loaded in float16, as they are stored, and the projector in float32." in card


def test_the_runs_table_names_the_pruning() -> None:
    row = Evaluation(
        "reduced", 0.5, 1.0, questions=3, supervised_tokens=9, visual_tokens=8.0, frozen_layers=0, llm_flops=1.0,
        prefill_ms=1.0, prefill_batch=1, seconds=1.0, fastv="2+0.5",
    )  # fmt: skip
    cells = [list(column.cells) for column in table_of([row, replace(row, fastv="none")], "t").columns]
    assert cells[3] == ["8, FastV 2+0.5", "8"]
