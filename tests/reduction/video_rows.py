"""Models that take images and videos, rows and batches of both for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from reduced_models import PAD, REDUCTIONS
from torch import Tensor

from shortzip.reduction.families import family_named
from shortzip.scripts.tiny import llava_next_video, llava_onevision

IMAGE, VIDEO = 90, 91
FRAMES = 3
LAYOUTS = {  # S and T are images that stand together in a row, I is one alone; V is a video
    "one image": ["ttItt"],
    "several images": ["tSttTt"],
    "a video": ["tVtt"],
    "an image and a video": ["tItVttt", "tVtIt"],
    "a mixed batch": ["ttItttt", "tSTVtt", "ttttt", "tVVt"],
}


@dataclass(frozen=True)
class Reads:
    """What a family makes of images and videos."""

    side: int
    sizes: dict[str, list[int]]
    """Height and width of the images that a layout's letters stand for."""
    per_frame: int
    """Tokens of a frame where nothing is reduced."""
    ends: int = 0
    """Tokens of a video beside its frames'."""
    cuts_lone_images_only: bool = False


READS = {
    "llava_onevision": Reads(
        llava_onevision.SIDE, {"I": [50, 58], "S": [20, 44], "T": [30, 30]}, 9, ends=1, cuts_lone_images_only=True
    ),
    "llava_next_video": Reads(llava_next_video.SIDE, {"I": [50, 58], "S": [20, 44], "T": [24, 24]}, 9),
}
_PLAIN = {
    "llava_onevision": (llava_onevision.onevision_config, llava_onevision.plain_onevision),
    "llava_next_video": (llava_next_video.next_video_config, llava_next_video.plain_next_video),
}


def build_with_videos(name: str, reduction: str, plain: bool = False, **keys: Any) -> Any:
    """A family's model with the weights of transformers' own, or that one. `keys`: of the config."""
    config_of, model_of = _PLAIN[name]
    base = model_of(config_of(92, IMAGE, VIDEO, pad_token_id=PAD, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        base.lm_head.weight[IMAGE:] = 0  # it would write placeholders
    if plain:
        return base
    family = family_named(name)
    model = family.model_class(family.config_class(**{**base.config.to_dict(), **REDUCTIONS[reduction], **keys}))
    model.load_state_dict(base.state_dict())
    return model.eval()


def row_of(reads: Reads, model: Any, layout: str, seed: int) -> dict[str, Any]:
    """One row as ids, and its images ([tiles, 3, S, S], size) and videos, in their order."""
    generator = torch.Generator().manual_seed(seed)
    uncut = reads.cuts_lone_images_only and sum(layout.count(name) for name in reads.sizes) > 1
    ids: list[int] = []
    images: list[Tensor] = []
    videos: list[Tensor] = []
    for part in layout:
        if part in reads.sizes:
            size = [[0, 0] if uncut else reads.sizes[part]]
            tiles = model.model._tiles(size)[0]
            ids += [IMAGE] * model.model._token_counts(None, size, None)[0]
            images.append(torch.randn(tiles, 3, reads.side, reads.side, generator=generator))
        elif part == "V":
            budget = model.config.visionzip
            each = reads.per_frame if budget is None else budget["dominant"] + budget["contextual"]
            ids += [VIDEO] * (FRAMES * each + reads.ends)
            videos.append(torch.randn(FRAMES, 3, reads.side, reads.side, generator=generator))
        else:
            ids.append(int(torch.randint(3, IMAGE, (1,), generator=generator)))
    sizes = [reads.sizes[part] for part in layout if part in reads.sizes]
    return {"ids": ids, "images": images, "sizes": sizes, "videos": videos, "counted": reads.cuts_lone_images_only}


def batch_of(rows: list[dict[str, Any]], side: str = "right") -> dict[str, Tensor]:
    """What a model is given of rows, padded on one side."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row["ids"])) if side == "right" else slice(length - len(row["ids"]), length)
        ids[number, place] = torch.tensor(row["ids"])
        mask[number, place] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    images = [image for row in rows for image in row["images"]]
    if images:
        most = max(map(len, images))
        filled = [torch.cat([image, image.new_zeros(most - len(image), *image.shape[1:])]) for image in images]
        batch["pixel_values"] = torch.stack(filled)
        batch["image_sizes"] = torch.tensor([size for row in rows for size in row["sizes"]])
        if any(row["counted"] for row in rows):
            batch["batch_num_images"] = torch.tensor([len(row["images"]) for row in rows if row["images"]])
    videos = [video for row in rows for video in row["videos"]]
    return batch | ({"pixel_values_videos": torch.stack(videos)} if videos else {})


def logits(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch, **more).logits
    return found
