"""What is left of a checkpoint without its language model gives the tokens that the whole one gives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import write_next_release, write_release

from shortzip.data.supervision import Supervision, load_template
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release
from shortzip.train.serving.encoder import Pixels, _check_alike, load_encoders
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.serving import Listed

BUDGETS = [None, {"dominant": 4, "contextual": 2}]
METHODS = {
    "": {"dominant": 5, "contextual": 2},
    ":vispruner:important=0.25": {"dominant": 7, "contextual": 0, "method": "vispruner", "important": 0.25},
    ":divprune:space=projected": {"dominant": 7, "contextual": 0, "method": "divprune", "space": "projected"},
    ":duet:window=2": {"dominant": 5, "contextual": 2, "method": "duet", "window": 2},
    ":random:seed=3": {"dominant": 7, "contextual": 0, "method": "random", "seed": 3},
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    return {"llava": write_release(folder / "llava"), "llava_next": write_next_release(folder / "next")}


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_tokens_of_the_whole_model(releases: dict[str, Path], family: str, budget: dict[str, int] | None) -> None:
    model, _ = load_release(str(releases[family]), Reductions(budget))
    encoder = load_encoders([Listed("x", str(releases[family]), budget)], torch.device("cpu"), torch.float32)["x"]
    assert encoder.model.lm_head.weight.is_meta
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((60, 20), (24, 24), (10, 50))]
    pixels = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pixels.append(encoder.read(buffer.getvalue()))
    prompts = [encode_prompt(encoder.supervision, [("user", "<image>\nhello")], [image]) for image in images]
    inputs = batch_prompts(encoder.supervision, prompts, model.device)
    more = {key: inputs[key] for key in ("image_sizes",) if key in inputs}
    with torch.no_grad():
        expected = model.model.get_image_features(inputs["pixel_values"], **more).pooler_output
    for made, whole, image in zip(encoder.encode(pixels), expected, pixels, strict=True):
        torch.testing.assert_close(made, whole)
        assert len(made) == encoder.tokens(image.size)
        assert encoder.saved_tokens(image.size) >= 0
    assert (budget is None) == (encoder.saved_tokens(pixels[0].size) == 0)


@pytest.mark.parametrize("word", METHODS)
def test_a_listed_release_is_reduced_by_any_method(releases: dict[str, Path], word: str) -> None:
    listed = Listed.parse(f"it={releases['llava']}@5+2{word}")
    encoder = load_encoders([listed], torch.device("cpu"), torch.float32)["it"]
    assert encoder.reductions == Reductions(METHODS[word])
    model, _ = load_release(str(releases["llava"]), Reductions(METHODS[word]))
    pixels = Pixels(torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(0)), (24, 24))
    with torch.no_grad():
        expected = model.model.get_image_features(pixels.values[None]).pooler_output[0]
    torch.testing.assert_close(encoder.encode([pixels])[0], expected)


def test_equal_towers_are_held_once_and_other_language_models_refused(releases: dict[str, Path]) -> None:
    llava = str(releases["llava"])
    listed = [Listed("a", llava, None), Listed("b", llava, BUDGETS[1])]
    one, other = load_encoders(listed, torch.device("cpu"), torch.float32).values()
    assert one.model.model.vision_tower is other.model.model.vision_tower
    other.model.config.text_config.num_hidden_layers = 5
    with pytest.raises(ConfigError, match="models a and b: num_hidden_layers of their language models is 4 and 5"):
        _check_alike(one, other)

    other.supervision = Supervision(other.supervision.processor, load_template("chatml"), max_length=None)
    with pytest.raises(ConfigError, match="models a and b were tuned with different chat templates"):
        _check_alike(one, other)


def test_a_shape_that_is_not_as_announced_is_never_sent(releases: dict[str, Path]) -> None:
    encoder = load_encoders([Listed("x", str(releases["llava"]), BUDGETS[1])], torch.device("cpu"), torch.float32)["x"]
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    pixels = encoder.read(buffer.getvalue())
    encoder.encode([pixels])
    with torch.no_grad():
        encoder.model.model.multi_modal_projector.linear_2.bias[0] = float("nan")
    with pytest.raises(RuntimeError, match="or no numbers"):
        encoder.encode([pixels])
    encoder.hidden_size = 31
    with pytest.raises(RuntimeError, match=r"needed: \(6, 31\)"):
        encoder.encode([pixels])
