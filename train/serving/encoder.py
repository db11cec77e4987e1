"""Tower, selection and projector of several checkpoints: what is left where an engine has the language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shortzip.data.dataset import Collator, Sample
from shortzip.data.images import open_image
from shortzip.data.pixels import pixel_values
from shortzip.data.supervision import Encoded, Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import has_own_budgets
from shortzip.train.release.loading import lay_projector, reduced_config
from shortzip.train.release.opening import Release, model_classes, open_release, release_projector
from shortzip.train.release.processors import release_processor
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.release.tensor_files import open_tensors, weight_files
from shortzip.train.release.towers import load_tower, tower_digest
from shortzip.train.release.writing import weights_folder
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.serving import Listed

_NOTHING = Encoded([], [], [], 0)


@dataclass(frozen=True)
class Pixels:
    """An image, ready for the tower.

    Attributes:
        values: float32, [3, H, W], for LLaVA-NeXT [tiles, 3, H, W].
        size: (height, width) in pixels, before it was resized.
    """

    values: Tensor
    size: tuple[int, int]


class ImageEncoder:
    """One checkpoint's images as its language model reads them.

    Attributes:
        name: what requests call it.
        reductions: what was saved; those in the language model, and original positions, are left to the engine, which
            has none.
    """

    def __init__(self, name: str, release: Release, model: Any, processor: Any, saved: Reductions) -> None:
        self.name, self.release, self.model, self.reductions = name, release, model, saved
        self.supervision = Supervision(processor, max_length=None)
        self.hidden_size = int(model.config.text_config.hidden_size)
        self.longest = int(model.config.text_config.max_position_embeddings)
        plain = release_processor(release, reduced_config(release, Reductions()))
        self._all_tokens = Supervision(plain, max_length=None)

    def read(self, content: bytes) -> Pixels:
        """The pixels of an encoded image. Raises `BadImage`, as `open_image`."""
        image: Image.Image = open_image(content)
        return Pixels(pixel_values(image, self.supervision.processor.image_processor), (image.height, image.width))

    def tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of an image of (height, width) pixels."""
        return self.supervision.placeholders(size)

    def saved_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens that the plain release would make of it beyond these."""
        return self._all_tokens.placeholders(size) - self.tokens(size)

    @torch.inference_mode()
    def encode(self, images: Sequence[Pixels]) -> list[Tensor]:
        """Each image's tokens [tokens, hidden size of the decoder] on the CPU, in the tower's dtype.

        Raises RuntimeError for what is not as announced: an engine would fail at it, or answer about something else.
        """
        sample = Sample("", _NOTHING, [image.values for image in images], [image.size for image in images])
        inputs = Collator.of(self.supervision)([sample]).inputs
        tower = next(self.model.model.vision_tower.parameters())
        more = {key: inputs[key] for key in ("image_sizes",) if key in inputs}
        pixels = inputs["pixel_values"].to(tower.device, tower.dtype)
        features = self.model.model.get_image_features(pixels, **more).pooler_output
        made = [image.to(tower.dtype).cpu() for image in features]
        for image, tensor in zip(images, made, strict=True):
            needed = (self.tokens(image.size), self.hidden_size)
            if tuple(tensor.shape) != needed or not bool(torch.isfinite(tensor).all()):
                raise RuntimeError(f"{self.name}: an image gave {tuple(tensor.shape)} or no numbers, needed: {needed}")
        return made


def load_encoders(listed: Sequence[Listed], device: torch.device, dtype: torch.dtype) -> dict[str, ImageEncoder]:
    """The encoders by name; equal towers are held once. No language model is read.

    Raises `ConfigError` for models that one engine cannot serve together, and what `open_release` raises.
    """
    encoders: dict[str, ImageEncoder] = {}
    towers: dict[str, torch.nn.Module] = {}
    for entry in listed:
        release = open_release(ReleaseSpec(entry.model, dtype=dtype))
        saved = release.saved_reductions
        if entry.visionzip is not None:
            if not saved.is_empty:
                raise ConfigError(f"model {entry.model}: it was saved with {saved.describe()}; @ is for releases")
            saved = Reductions(entry.visionzip)
        if has_own_budgets(saved.visionzip):
            raise ConfigError(
                f"model {entry.model}: its images have a budget each ({saved.describe()}), and prompts are measured "
                "before images are encoded: serve a checkpoint with one budget"
            )
        encoder = _load(entry.name, release, saved, device, towers)
        for first in list(encoders.values())[:1]:
            _check_alike(first, encoder)
        encoders[entry.name] = encoder
    return encoders


def _load(
    name: str, release: Release, saved: Reductions, device: torch.device, towers: dict[str, torch.nn.Module]
) -> ImageEncoder:
    config = reduced_config(release, saved.before_an_engine)
    _, model_class, _ = model_classes(release.config["model_type"])
    folder = weights_folder(release)
    with torch.device("meta"):
        model = model_class(config)
    tower = load_tower(folder, config, release.spec.dtype)
    model.model.vision_tower = towers.setdefault(tower_digest(tower), tower.to(device))
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    lay_projector(model, release_projector(release))
    model.model.multi_modal_projector.to(device)
    if "image_newline" in dict(model.model.named_parameters(recurse=False)):
        model.model.image_newline = torch.nn.Parameter(_newline(release).to(device, release.spec.dtype))
    model.eval().requires_grad_(False)
    return ImageEncoder(name, release, model, release_processor(release, config), saved)


def _newline(release: Release) -> Tensor:
    for path in weight_files(weights_folder(release)):
        with open_tensors(path) as tensors:
            for name in tensors:
                if re.search(r"(^|\.)image_newline$", name):
                    return tensors[name].clone()
    raise ConfigError(f"model {release.name}: its weights hold no image_newline")


def _check_alike(first: ImageEncoder, other: ImageEncoder) -> None:
    """Raises `ConfigError` for two that cannot be of the one release that the engine runs."""
    if first.supervision.template != other.supervision.template:
        raise ConfigError(
            f"models {first.name} and {other.name} were tuned with different chat templates, and an engine has one: "
            "start a server and an engine for each"
        )
    texts = [encoder.model.config.text_config.to_dict() for encoder in (first, other)]
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    for key in keys:
        if texts[0][key] != texts[1][key]:
            raise ConfigError(
                f"models {first.name} and {other.name}: {key} of their language models is {texts[0][key]} and "
                f"{texts[1][key]}, and one engine runs one release: start a server for each"
            )
