"""ShortV against the authors' outputs and against its definition."""

import json
from pathlib import Path

import pytest
import torch
from reduced_models import DECODERS, IMAGE_TOKEN, SHORTV, build, freeze_naively, make_batch, make_row
from safetensors.torch import load_file

from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaForConditionalGeneration
from shortzip.reduction.shortv import active_rows, forward_active

GOLDEN = Path(__file__).parents[1] / "golden" / "shortv"
LAYER_SETS = {"none": None, "7-5-2": [7, 5, 2], "0": [0], "all": [0, 1, 2, 3, 4, 5, 6, 7]}
layer_sets = pytest.mark.parametrize("layers", list(LAYER_SETS))
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def load(layers, attention, text, vision, weights):
    frozen = LAYER_SETS[layers]
    model = ReducedLlavaForConditionalGeneration(
        ReducedLlavaConfig(
            text_config={"model_type": "llama", **text},
            vision_config={"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **vision},
            image_token_index=text["vocab_size"] - 1,
            shortv=frozen and {"layers": frozen},
            attn_implementation=attention,
        )
    )
    own = {}
    for name, weight in weights.items():
        name = name.replace("model.mm_projector.0", "model.multi_modal_projector.linear_1")
        name = name.replace("model.mm_projector.2", "model.multi_modal_projector.linear_2")
        name = name.replace("model.vision_tower.vision_tower.vision_model", "model.vision_tower")
        if name.startswith(("model.embed_tokens", "model.layers", "model.norm")):
            name = name.replace("model.", "model.language_model.", 1)
        own[name] = weight
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected
    return model.eval(), missing


@attentions
@layer_sets
def test_logits_equal_the_authors(layers, attention, record_property):
    spec = json.loads((GOLDEN / "shortv_mha.json").read_text())["variants"]["mha"]
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, missing = load(
        layers, attention, spec["config"], vision, load_file(GOLDEN / "shortv_mha_weights.safetensors")
    )
    assert all("vision_tower" in name or "projector" in name for name in missing)
    expected = load_file(GOLDEN / "shortv_mha_io.safetensors")
    cases = [case for case in spec["prefill"] if case["logits"].endswith(f"set_{layers}")]
    assert len(cases) == 3
    for case in cases:
        embeds = expected[case["inputs_embeds"]]
        visual = torch.zeros(embeds.shape[:2], dtype=torch.long)
        visual[:, case["image_start"] : case["image_start"] + case["n_visual"]] = 1
        unchanged, at = [], visual.bool()

        def compare(module, args, output, at=at, unchanged=unchanged):
            unchanged.append(torch.equal(args[0][at], output[at]))

        hooks = [layer.register_forward_hook(compare) for layer in model.model.language_model.layers]
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, mm_token_type_ids=visual).logits
        for hook in hooks:
            hook.remove()
        difference = (logits - expected[case["logits"]]).abs().max().item()
        record_property("difference", difference)
        assert difference <= 5e-5
        # The authors' last layer does not put visual tokens back, which nobody reads; ours does.
        frozen = [index for index, same in enumerate(unchanged[:7]) if same]
        assert frozen == case["layers_whose_visual_rows_are_bitwise_frozen"]


@attentions
@pytest.mark.parametrize("layers", ["none", "7-5-2", "all"])
def test_greedy_tokens_equal_the_authors(layers, attention, record_property):
    spec = json.loads((GOLDEN / "shortv_generate.json").read_text())
    expected = load_file(GOLDEN / "shortv_generate_io.safetensors")
    text = {key: value for key, value in spec["config"].items() if not key.startswith(("mm_", "tune_"))}
    weights = load_file(GOLDEN / "shortv_generate_weights.safetensors")
    model, missing = load(layers, attention, text, spec["vision_config"], weights)
    assert missing == []
    # Their ids hold one -200 for the image.
    ids = expected["input_ids"][0].tolist()
    at = ids.index(-200)
    ids[at : at + 1] = [model.config.image_token_id] * 64
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values=expected["pixel_values"],
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert out.sequences[0, len(ids) :].tolist() == expected[f"tokens_set_{layers}"].tolist()
    difference = (torch.cat(out.scores) - expected[f"scores_set_{layers}"]).abs().max().item()
    record_property("difference", difference)
    assert difference <= 5e-5


@attentions
@pytest.mark.parametrize("decoder", list(DECODERS))
def test_every_decoder_equals_the_definition(decoder, attention):
    """Frozen means: what a plain layer computes, with the visual tokens put back as they were."""
    model = build(decoder, reduction="shortv", attention=attention)
    plain = build(decoder, plain=True, attention=attention)
    freeze_naively(plain, SHORTV["layers"])
    batch = make_batch([make_row(model, layout) for layout in ("ttItttt", "IttI", "ttt")], "left")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[mask], plain(**batch).logits[mask], rtol=0, atol=1e-5)


def test_hidden_states_of_visual_tokens_pass_frozen_layers_unchanged():
    model = build(reduction="shortv")
    row = make_row(model, "tttIttIt")
    with torch.no_grad():
        hidden = model(**row, output_hidden_states=True).hidden_states
    visual = row["input_ids"] == IMAGE_TOKEN
    for layer, frozen in enumerate([True, False, True]):  # the last one's is normed
        assert torch.equal(hidden[layer][visual], hidden[layer + 1][visual]) is frozen
        assert not torch.equal(hidden[layer][~visual], hidden[layer + 1][~visual])


def test_frozen_layers_compute_queries_and_ffn_for_text_alone():
    model = build(reduction="shortv")
    row = make_row(model, "tttIttIt")  # 6 text and 32 visual tokens
    rows = {}
    for index, layer in enumerate(model.model.language_model.layers):
        attention, ffn = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj",)
        for part, names in ((layer.self_attn, attention), (layer.mlp, ffn)):
            for name in names:
                part.get_submodule(name).register_forward_pre_hook(
                    lambda module, args, key=(index, name): rows.__setitem__(key, args[0].shape[1])
                )
    with torch.no_grad():
        model(**row)
    for index in range(4):
        few = 6 if index in SHORTV["layers"] else 38
        expected = {"q_proj": few, "k_proj": 38, "v_proj": 38, "o_proj": few, "up_proj": few}
        assert {name: rows[index, name] for name in expected} == expected


def test_active_rows_fill_up_with_distinct_positions():
    frozen = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    rows = active_rows(frozen)
    assert rows.positions.tolist() == [[0, 3, 4], [4, 0, 1], [0, 1, 2]]
    assert rows.is_active.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_a_layer_without_active_positions_returns_its_input_and_fills_the_cache():
    from transformers import DynamicCache

    model = build(reduction="shortv")
    layer, hidden, cache = model.model.language_model.layers[0], torch.randn(2, 3, 32), DynamicCache()
    angles = model.model.language_model.rotary_emb(hidden, torch.arange(3)[None])
    rows = active_rows(torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(forward_active(layer, hidden, rows, past_key_values=cache, position_embeddings=angles), hidden)
    assert cache.get_seq_length() == 3


def test_a_layer_needs_its_rotary_positions():
    layer = build(reduction="shortv").model.language_model.layers[0]
    with pytest.raises(ValueError, match="position_embeddings"):
        forward_active(layer, torch.randn(1, 2, 32), active_rows(torch.zeros(1, 2, dtype=torch.bool)))
