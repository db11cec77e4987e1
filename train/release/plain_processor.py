"""The files of a processor that also takes videos, written without it: transformers' own asks for torchvision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OF_FRAMES = ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "rescale_factor")


@dataclass(frozen=True)
class PlainProcessor:
    """A tokenizer, an image processor (Pillow backend) whose settings are also those of frames, and a template."""

    stem: str
    """What transformers' classes are called after: LlavaOnevision for a LlavaOnevisionProcessor."""
    tokenizer: Any
    image_processor: Any
    settings: Mapping[str, Any]
    """The processor's own, beside those of its parts."""
    chat_template: str
    image_stem: str | None = None
    """What its image processor's class is called after; None: as its own."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes them as releases in transformers' layout have them."""
        self.tokenizer.save_pretrained(folder)
        images = {
            **json.loads(self.image_processor.to_json_string()),
            "image_processor_type": f"{self.image_stem or self.stem}ImageProcessor",
        }
        videos = {
            **{key: images[key] for key in _OF_FRAMES if images.get(key) is not None},
            "video_processor_type": f"{self.stem}VideoProcessor",
        }
        for name, held in (
            ("preprocessor_config.json", images),
            ("video_preprocessor_config.json", videos),
            ("processor_config.json", {**self.settings, "processor_class": f"{self.stem}Processor"}),
        ):
            (folder / name).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
