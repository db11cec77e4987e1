"""A checkpoint of shape `engine`, used as vLLM's Transformers backend uses one: its files, its counts, its weights.

The calls are those of vllm/model_executor/models/transformers/{base,multimodal}.py; no engine has run here.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import write_next_release
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from shortzip.reduction.reductions import Reductions
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release, release_projector
from shortzip.train.release.writing import write_reduced_checkpoint

AttentionInterface.register("an_engines_own", sdpa_attention_forward)
REDUCTIONS = {
    "visionzip": Reductions({"dominant": 5, "contextual": 3}, {"layers": [0, 2]}, None, "original"),
    "scope": Reductions({"dominant": 7, "contextual": 0, "method": "scope"}, None, {"layer": 2, "keep": 0.5}),
    "all tokens": Reductions(shortv={"layers": [1]}),
}
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))
# Height, width: of one tile (and the base one), two, two and four in LLaVA-NeXT; the third loses patches to padding.
SIZES = [(24, 24), (10, 300), (300, 10), (31, 57), (1000, 999)]
TRUSTED = {"trust_remote_code": True}


PUBLISHED = [("llava", "visionzip"), ("llava", "scope"), ("llava_next", "visionzip"), ("llava_next", "all tokens")]


@pytest.fixture(scope="module", params=PUBLISHED, ids=", ".join)
def published(request: pytest.FixtureRequest, tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, name = request.param
    root = tmp_path_factory.mktemp("published")
    folder = root / "checkpoint"
    source = tiny_release if family == "llava" else write_next_release(root / "next", grids=GRIDS)
    release, reductions = open_release(str(source)), REDUCTIONS[name]
    _, processor = load_release(release, reductions)
    projector = {name: tensor + 0.05 for name, tensor in release_projector(release).items()}
    write_reduced_checkpoint(folder, release, projector, processor, reductions, shape="engine")
    return folder


def as_engine(folder: Path) -> Any:
    """The model without its head as vLLM builds it, with the file's weights under the names that vLLM gives them."""
    config = AutoConfig.from_pretrained(folder, **TRUSTED)
    config.text_config._attn_implementation = "an_engines_own"
    model = AutoModel.from_config(config, **TRUSTED).eval()
    assert type(model).is_backend_compatible()
    renamings = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
    children = [*dict(model.named_children()), *dict(model.named_parameters(recurse=False))]
    named = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        name = re.sub(rf"^(?!model\.)(({'|'.join(children)}).*)", r"model.\1", name)
        name = re.sub(r"^model\.(.+\.)*(lm_head.+)", r"\2", name)
        named[name] = tensor
    named.pop("lm_head.weight")  # the engine has a head of its own
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in named.items()}, strict=True)
    return model


def images(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    return [Image.effect_noise((width, height), 90).convert("RGB") for height, width in sizes]


def test_counts_placeholders_and_features_agree_for_every_size(published: Path) -> None:
    engine, processor = as_engine(published), AutoProcessor.from_pretrained(published, **TRUSTED)
    for some in *([size] for size in SIZES), SIZES:
        counted = processor._get_num_multimodal_tokens(image_sizes=some)
        inputs = processor(
            images=images(some), text=" and ".join(["<image>"] * len(some)), return_tensors="pt",
            return_text_replacement_offsets=True, return_mm_token_type_ids=True,
        )  # fmt: skip
        written = [
            processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
            for entry in inputs["text_replacement_offsets"][0]
        ]
        assert [set(ids) for ids in written] == [{processor.image_token_id}] * len(some)
        assert list(map(len, written)) == counted["num_image_tokens"]
        assert int(inputs["mm_token_type_ids"].sum()) == sum(counted["num_image_tokens"])
        assert len(inputs["pixel_values"]) == sum(counted["num_image_patches"])
        more = {key: inputs[key] for key in ("image_sizes",) if key in inputs}
        with torch.no_grad():
            features = engine.get_image_features(inputs["pixel_values"], **more).pooler_output
        assert list(map(len, features)) == counted["num_image_tokens"]
    # Images of several requests that were padded differently come one by one, each in a batch of its own.
    for index, together in enumerate(features):
        own = {key: value[index : index + 1] for key, value in more.items()}
        item = inputs["pixel_values"][index : index + 1]
        with torch.no_grad():
            alone = engine.get_image_features(item[None] if own else item, **own).pooler_output
        torch.testing.assert_close(torch.cat(list(alone)), together)
    assert processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000)])["num_image_tokens"][0] > 0


def test_the_engines_decoder_reads_what_transformers_model_reads(published: Path) -> None:
    engine, processor = as_engine(published), AutoProcessor.from_pretrained(published, **TRUSTED)
    inputs = processor(images=images(SIZES[1:2]), text="USER: <image>\nhi ASSISTANT:", return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(published, **TRUSTED)
    more = {key: inputs[key] for key in ("image_sizes",) if key in inputs}
    with torch.no_grad():
        embeds = engine.get_input_embeddings()(inputs["input_ids"])
        features = engine.get_image_features(inputs["pixel_values"], **more).pooler_output
        embeds[inputs["input_ids"] == model.config.image_token_id] = torch.cat(list(features))
        positions = torch.arange(embeds.shape[1])[None]
        hidden = engine(
            input_ids=None, inputs_embeds=embeds, position_ids=positions, use_cache=False, return_dict=False,
            attention_instances={},
        )[0]  # fmt: skip
        torch.testing.assert_close(model.lm_head(hidden), model(**inputs).logits)
