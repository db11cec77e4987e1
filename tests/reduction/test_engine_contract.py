"""What engines do with a checkpoint: count its placeholders, build it without a head, embed images, decode embeddings.

The calls are those of vLLM's Transformers backend (vllm/model_executor/models/transformers/multimodal.py).
"""

import json

import pytest
import torch
from PIL import Image
from reduced_models import SHORTV, VISIONZIP, build, make_row
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shortzip.reduction import ReducedLlavaProcessor
from shortzip.reduction.errors import ReductionError

families = pytest.mark.parametrize("next_", [False, True], ids=["llava", "llava_next"])
AttentionInterface.register("an_engines_own", sdpa_attention_forward)


def as_engine(config):
    """The model as vLLM builds it: its own attention, no weights yet."""
    config.text_config._attn_implementation = "an_engines_own"
    return AutoModel.from_config(config).eval()


def row_of(model, next_):
    row = make_row(model, "tIttt")
    if not next_:
        return row, {}
    sizes = torch.tensor([[16, 16]])
    pixels = row["pixel_values"][:, None].repeat(1, 3, 1, 1, 1)
    tiles = model.model._token_counts(pixels, sizes, None)[0]
    ids = row["input_ids"][0].tolist()
    ids = ids[:1] + [model.config.image_token_id] * tiles + ids[-3:]
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}, {"image_sizes": sizes}


@families
def test_the_decoder_reads_the_embeddings_of_images_as_generate_does(tmp_path, next_):
    model = build(next_=next_, reduction="visionzip")
    model.save_pretrained(tmp_path)
    row, more = row_of(model, next_)
    engine = as_engine(AutoConfig.from_pretrained(tmp_path))
    engine.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        expected = model.model(**row, **more).last_hidden_state
        features = engine.get_image_features(row["pixel_values"], **more).pooler_output
        embeds = engine.get_input_embeddings()(row["input_ids"])
        embeds[row["input_ids"] == model.config.image_token_id] = torch.cat(list(features))
        torch.testing.assert_close(engine(inputs_embeds=embeds).last_hidden_state, expected)


@families
@pytest.mark.parametrize("key", ["shortv", "fastv"])
def test_a_reduction_in_the_decoder_is_refused_when_the_engine_builds_the_model(next_, key):
    config = build(next_=next_, reduction="none").config
    setattr(config, key, SHORTV if key == "shortv" else {"layer": 2, "keep": 0.5})
    with pytest.raises(
        ReductionError, match=rf"{key}: attention 'an_engines_own'.* --hf-overrides '{{\"{key}\": null}}'"
    ):
        as_engine(config)
    setattr(config, key, None)
    as_engine(config)


@families
def test_positions_that_an_engine_would_not_keep_are_refused_when_it_builds_the_model(next_):
    config = build(next_=next_, reduction="visionzip", positions="original").config
    with pytest.raises(ReductionError, match=r"numbered as they come.*--hf-overrides '{\"positions\": \"compact\"}'"):
        as_engine(config)
    config.positions = "compact"
    as_engine(config)


@pytest.mark.parametrize("key", ["shortv", "fastv"])
def test_embeddings_alone_name_the_switch(key):
    keys = {"reduction": "shortv"} if key == "shortv" else {"reduction": "none", "fastv": {"layer": 2, "keep": 0.5}}
    with pytest.raises(ReductionError, match=rf"{key}: inputs_embeds alone.*switch it off.*hf-overrides"):
        build(**keys).model(inputs_embeds=torch.zeros(1, 3, 32))


@families
def test_auto_classes_are_named_and_give_the_same_model(tmp_path, next_):
    model = build(next_=next_)
    model.save_pretrained(tmp_path)
    classes = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(classes) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert classes["AutoModel"].rpartition(".")[2] == type(model.model).__name__
    without_head = AutoModel.from_pretrained(tmp_path)
    assert type(without_head) is type(model.model)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    row, more = row_of(model, next_)
    with torch.no_grad():
        hidden = without_head(**row, **more).last_hidden_state
        torch.testing.assert_close(whole(**row, **more).logits, model.lm_head(hidden))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises((OSError, ReductionError)):  # never random weights
        AutoModel.from_pretrained(tmp_path)


def test_placeholders_are_counted_marked_and_replaced_alike(tiny_release, tmp_path):
    ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=VISIONZIP).save_pretrained(tmp_path)
    assert "AutoProcessor" in json.loads((tmp_path / "processor_config.json").read_text())["auto_map"]
    processor, budget = AutoProcessor.from_pretrained(tmp_path), sum(VISIONZIP.values())
    sizes = [(10_000, 10_000), (24, 60)]  # an engine profiles with the first
    assert processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [budget] * 2
    images = [Image.new("RGB", size[::-1]) for size in [(300, 300), sizes[1]]]
    inputs = processor(
        images=images,
        text="<image> hello <image>",
        return_mm_token_type_ids=True,
        return_text_replacement_offsets=True,
    )
    assert [sum(row) for row in inputs["mm_token_type_ids"]] == [2 * budget]
    replaced = [offset["replacement"] for offset in inputs["text_replacement_offsets"][0]]
    assert replaced == [processor.replace_image_token(inputs, index) for index in range(2)] == ["<image>" * budget] * 2
