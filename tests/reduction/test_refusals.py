"""What bad input gets: a refusal that names the value, the allowed range and the cure.

The limits of the references that are not refusals here are rows of the other tables: a tower of another depth or grid
(test_visionzip), lists of images, images anywhere and several of them, padding, text-only rows, a continued cache
(test_input_matrix), gradient checkpointing (test_gradients), eager attention (test_shortv).
"""

import pytest
import torch
from reduced_models import IMAGE_TOKEN, SHORTV, VISIONZIP, build, make_row

from shortzip.reduction import (
    ReducedLlavaConfig,
    ReducedLlavaForConditionalGeneration,
    ReducedLlavaNextConfig,
    ReducedLlavaProcessor,
)

TOWER = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "num_hidden_layers": 3}
DECODER = {"model_type": "llama", "num_hidden_layers": 4}
VISIONZIP_FORM = r"visionzip must be null or \{dominant: at least 1, contextual: at least 0\}"
SHORTV_FORM = r"shortv must be null or \{layers: \[indices of decoder layers, each once\]\}"
BAD_VISIONZIP = {
    "text": ("54+10", VISIONZIP_FORM + ".*got '54\\+10'"),
    "a list": ([54, 10], VISIONZIP_FORM),
    "true": (True, VISIONZIP_FORM),
    "empty": ({}, VISIONZIP_FORM),
    "no contextual": ({"dominant": 4}, VISIONZIP_FORM),
    "unknown key": (
        {"dominant": 4, "contextual": 2, "layer": -2},
        "method visionzip has no parameter .layer.: it takes no parameters",
    ),
    "text as number": ({"dominant": "4", "contextual": 2}, VISIONZIP_FORM + ".*got dominant: '4'"),
    "float": ({"dominant": 4.0, "contextual": 2}, VISIONZIP_FORM + ".*got dominant: 4.0"),
    "bool as number": ({"dominant": 4, "contextual": True}, VISIONZIP_FORM + ".*got contextual: True"),
    "none as number": ({"dominant": 4, "contextual": None}, VISIONZIP_FORM),
    "no dominant tokens": ({"dominant": 0, "contextual": 2}, VISIONZIP_FORM + ".*got dominant: 0"),
    "negative": ({"dominant": 4, "contextual": -1}, VISIONZIP_FORM + ".*got contextual: -1"),
}
TOO_MUCH = {
    "over the grid": ({"dominant": 16, "contextual": 2}, r"16 \+ contextual 2 = 18 exceeds the 17 tokens.*4 by 4"),
    "dominant over the grid": ({"dominant": 18, "contextual": 0}, "the sum must be 1 to 17"),
}
BAD_SHORTV = {
    "text": ("2,5,7", SHORTV_FORM + ".*got '2,5,7'"),
    "a bare list": ([1, 2], SHORTV_FORM),
    "unknown key": ({"layers": [1], "ratio": 0.6}, SHORTV_FORM),
    "layers as text": ({"layers": "1,2"}, SHORTV_FORM + ".*got layers: '1,2'"),
    "a layer as text": ({"layers": [1, "2"]}, SHORTV_FORM),
    "a float": ({"layers": [1.0]}, SHORTV_FORM),
    "a bool": ({"layers": [True]}, SHORTV_FORM),
    "a number": ({"layers": 3}, SHORTV_FORM),
    "empty": ({"layers": []}, "empty list: to freeze no layer, set shortv to null"),
    "duplicates": ({"layers": [2, 1, 2]}, r"got \[2\] more than once"),
}
NOT_THERE = {
    "over the last layer": ({"layers": [1, 4]}, r"layers \[4\] do not exist: this model has layers 0 to 3"),
    "negative": ({"layers": [-1]}, r"layers \[-1\] do not exist"),
}


def table(cases):
    return pytest.mark.parametrize(("value", "message"), list(cases.values()), ids=list(cases))


@pytest.mark.parametrize("config_class", [ReducedLlavaConfig, ReducedLlavaNextConfig], ids=["llava", "llava_next"])
@table(BAD_VISIONZIP | TOO_MUCH)
def test_bad_budgets(config_class, value, message):
    with pytest.raises(ValueError, match=message):
        config_class(vision_config=TOWER, text_config=DECODER, visionzip=value)


@pytest.mark.parametrize("config_class", [ReducedLlavaConfig, ReducedLlavaNextConfig], ids=["llava", "llava_next"])
@table(BAD_SHORTV | NOT_THERE)
def test_bad_layers(config_class, value, message):
    with pytest.raises(ValueError, match=message):
        config_class(vision_config=TOWER, text_config=DECODER, shortv=value)


@table(BAD_VISIONZIP)
def test_the_processor_refuses_bad_budgets(tiny_release, value, message):
    with pytest.raises(ValueError, match=message):
        ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("visionzip", *case) for case in BAD_VISIONZIP.values()),
        *(("shortv", *case) for case in BAD_SHORTV.values()),
        ("visionzip", {"dominant": 36, "contextual": 2}, "exceeds the 37 tokens of an image"),
        ("shortv", {"layers": [4]}, "this model has layers 0 to 3"),
    ],
)
def test_from_pretrained_refuses_what_the_config_does(tiny_release, key, value, message):
    """It sets its keyword arguments on a finished config, so the model looks again."""
    with pytest.raises(ValueError, match=message):
        ReducedLlavaForConditionalGeneration.from_pretrained(tiny_release, **{key: value})


@pytest.mark.parametrize("layer", [[-2, -1], [-2]], ids=str)
def test_visionzip_refuses_a_list_of_feature_layers(layer):
    with pytest.raises(ValueError, match=r"make it a single whole number, or set visionzip to null"):
        build(reduction="visionzip", vision_feature_layer=layer)
    build(reduction="shortv", vision_feature_layer=layer)


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_visionzip_refuses_a_feature_layer_that_is_no_block(layer):
    with pytest.raises(ValueError, match=f"vision_feature_layer {layer} is no block.*choose -3 to -1 or 1 to 3"):
        build(reduction="visionzip", vision_feature_layer=layer)
    model = build(reduction="visionzip")
    with pytest.raises(ValueError, match="is no block"):
        model(**make_row(model, "tI"), vision_feature_layer=layer)


def test_unknown_towers_and_decoders_are_refused():
    with pytest.raises(ValueError, match=r"the tower is a pixtral; it must be one of \['clip_vision_model', 'siglip"):
        ReducedLlavaConfig(vision_config={"model_type": "pixtral"}, text_config=DECODER, visionzip=VISIONZIP)
    with pytest.raises(ValueError, match=r"the language model is a gemma; it must be one of \['llama', 'mistral'"):
        ReducedLlavaConfig(vision_config=TOWER, text_config={"model_type": "gemma"}, shortv=SHORTV | {"layers": [1]})
    # Without the reduction in question they are transformers' business.
    ReducedLlavaConfig(vision_config={"model_type": "pixtral"}, text_config={"model_type": "gemma"})


def test_visual_tokens_are_chosen_by_visionzip_only():
    with pytest.raises(ValueError, match="visionzip is null"):
        build(reduction="shortv").model.get_visual_tokens(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("extra", [1, -1, 10], ids="{:+} placeholders".format)
def test_placeholders_that_the_images_do_not_fill(extra):
    model = build()
    row = make_row(model, "ttIt")
    row["input_ids"] = torch.tensor([[5] + [IMAGE_TOKEN] * (6 + extra) + [7]])
    row.pop("attention_mask")
    with pytest.raises(ValueError, match=rf"hold {6 + extra} image placeholders, the images give 6 visual tokens"):
        model(**row)
    with pytest.raises(ValueError, match="image placeholders"):
        model.generate(**row, max_new_tokens=2)


@pytest.mark.parametrize("reduction", ["visionzip", "shortv", "both"])
def test_placeholders_without_images(reduction):
    model = build(reduction=reduction)
    row = make_row(model, "ttIt")
    row.pop("pixel_values")
    with pytest.raises(ValueError, match=r"there are 0 visual tokens: pass the pixel_values of their images"):
        model(**row)
    # One alone is a token that the model wrote, a few after the prompt may be guesses; an image is neither.
    model(input_ids=torch.tensor([[IMAGE_TOKEN]]))
    cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True).past_key_values
    model(input_ids=torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN]]), past_key_values=cache)
    with pytest.raises(ValueError, match="pass the pixel_values"):
        model(input_ids=row["input_ids"], past_key_values=cache)


def test_a_chunk_cut_inside_an_image_by_hand():
    """generate(prefill_chunk_size=…) encodes images first and may cut anywhere; pixels cannot be cut."""
    model = build()
    row = make_row(model, "ttIt")
    with pytest.raises(ValueError, match="hold 3 image placeholders, the images give 6 visual tokens"):
        model(input_ids=row["input_ids"][:, :5], pixel_values=row["pixel_values"])


def test_embeddings_that_do_not_say_which_positions_are_visual():
    model = build(reduction="shortv")
    embeds = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="pass input_ids and pixel_values, or mm_token_type_ids"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"mm_token_type_ids has shape \(1, 4\), inputs_embeds is \(1, 5\) positions"):
        model(inputs_embeds=embeds, mm_token_type_ids=torch.zeros(1, 4))
    build(reduction="visionzip")(inputs_embeds=embeds)


def test_attention_that_cannot_leave_queries_out():
    model = build(reduction="shortv")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attention 'flash_attention_2' .* one of \['eager', 'sdpa'\]"):
        model(**make_row(model, "tIt"))


def test_a_layer_list_changed_after_loading():
    model = build(reduction="shortv")
    row, plain = make_row(model, "tIt"), build(reduction="none")
    model.config.shortv = {"layers": [1]}
    with pytest.raises(ValueError, match=r"loaded with \[0, 2, 3\] frozen: load it again"):
        model(**row)
    model.config.shortv = None  # nothing is frozen then, as it says
    assert torch.equal(model(**row).logits, plain(**row).logits)
    plain.config.shortv = SHORTV
    with pytest.raises(ValueError, match=r"loaded with \[\] frozen: load it again"):
        plain(**row)


def test_attention_maps_of_frozen_layers():
    model = build(reduction="shortv", attention="eager")
    with pytest.raises(ValueError, match="load the model with shortv=None to look at attention"):
        model(**make_row(model, "tIt"), output_attentions=True)
    reduced = build(reduction="visionzip", attention="eager")
    assert len(reduced(**make_row(reduced, "tIt"), output_attentions=True).attentions) == 4


@pytest.mark.parametrize("shape", [(3, 5, 3, 16, 16), (2, 2, 3, 16, 16), (4, 3, 16, 16)], ids=str)
def test_next_tiles_that_image_sizes_do_not_say(shape):
    model = build(reduction="visionzip", next_=True)
    sizes = torch.tensor([[16, 40], [30, 30]])
    with pytest.raises(ValueError, match=r"image_sizes says 2 images of \[3, 5\] tiles"):
        model.get_image_features(torch.zeros(shape), sizes)
