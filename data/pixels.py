"""From a picture to the pixels that a vision tower reads, and padding to a square."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from shortzip.data import images


def pixel_values(image: Image.Image, image_processor: Any) -> torch.Tensor:
    """What a release's image processor makes of an RGB image: float32 [3, H, W], for LLaVA-NeXT [tiles, 3, H, W]."""
    return image_processor(shrunk(image, image_processor), return_tensors="pt")["pixel_values"][0]


def pixels_of_row(images: Sequence[Image.Image], image_processor: Any, several: bool) -> list[torch.Tensor]:
    """As `pixel_values`, of the (first) images of one row, which has `several` in all: then LLaVA-OneVision pads each
    to a square and cuts none, [1, 3, H, W]."""
    if several and images and cuts_lone_images_only(image_processor):
        rows = [list(images) if len(images) > 1 else [images[0], images[0]]]
        return list(image_processor(rows, return_tensors="pt")["pixel_values"][: len(images)])
    return [pixel_values(image, image_processor) for image in images]


def frames_pixels(frames: Iterator[Image.Image], processor: Any) -> torch.Tensor:
    """The pixels [F, 3, H, W] float32 of a video's RGB frames, as the processor of a family with videos makes them.

    One is made at a time, since those of a file may be large and those of a folder of different sizes.
    """
    return torch.stack([processor.pixels_of_frame(frame) for frame in frames])


def cuts_lone_images_only(image_processor: Any) -> bool:
    """Whether an image is cut into tiles only where it is the one of its row."""
    return isinstance(image_processor, LlavaOnevisionImageProcessorPil)


def shrunk(image: Image.Image, image_processor: Any) -> Image.Image:
    """The image as it is; where padding it to a square would take more than `MAX_PIXELS`, padded and resized.

    `image_processor` makes the same pixels of both, without the gigabytes of the square: of a wide image exactly, of a
    high one but for a grey level here and there.
    """
    long = max(image.size)
    pads = isinstance(image_processor, LlavaImageProcessorPil) and image_processor.do_pad and image_processor.do_resize
    if not pads or long * long <= images.MAX_PIXELS or image.width == image.height:
        return image
    size = image_processor.size
    side = size.shortest_edge or size.height
    if side != (size.shortest_edge or size.width):
        return image
    mean = image_processor.image_mean
    colour = tuple(int(value * 255) for value in mean) if mean else (0, 0, 0)
    resample = image_processor.resample
    # Pillow resizes each row first, and then each column; rows of one colour stay what they are.
    if image.width == long:
        rows, left = image.resize((side, image.height), resample), 0
    else:
        rows, left = _padded_rows(image, side, colour, resample)
    strip = Image.new("RGB", (side, long), colour)
    strip.paste(rows, (left, (long - image.height) // 2))
    return strip.resize((side, side), resample)


def _padded_rows(image: Image.Image, side: int, colour: tuple[int, ...], resample: int) -> tuple[Image.Image, int]:
    """The rows of a high image, padded to a square and resized to `side`: of them, the columns in which something of
    the image is seen, and the number of the first."""
    long = image.height
    start, scale = (long - image.width) // 2, long / side
    reach = math.ceil((3 if resample == Image.Resampling.LANCZOS else 2) * scale) + 1  # of the filter, in pixels
    first = max(int((start - reach) / scale), 0)
    last = min(math.ceil((start + image.width + reach) / scale), side)
    begin, end = max(int(first * scale) - reach, 0), min(math.ceil(last * scale) + reach, long)
    rows = Image.new("RGB", (last - first, long), colour)
    for top in range(0, long, 1024):
        bottom = min(top + 1024, long)
        near = Image.new("RGB", (end - begin, bottom - top), colour)
        near.paste(image.crop((0, top, image.width, bottom)), (start - begin, 0))
        box = (first * scale - begin, 0, last * scale - begin, near.height)
        rows.paste(near.resize((last - first, near.height), resample, box=box), (0, top))
    return rows, first


def joined(features: list[torch.Tensor]) -> torch.Tensor:
    """Images' features [tiles, n, …] one behind the other, filled up with zeros where n differs."""
    if len({of_image.shape[1:] for of_image in features}) == 1:
        return torch.cat(features)
    most = max(of_image.shape[1] for of_image in features)
    filled = []
    for of_image in features:
        missing = of_image.new_zeros(len(of_image), most - of_image.shape[1], *of_image.shape[2:])
        filled.append(torch.cat([of_image, missing], dim=1) if missing.shape[1] else of_image)
    return torch.cat(filled)


def stacked(pixels: list[torch.Tensor]) -> torch.Tensor:
    """Images to one tensor; LLaVA-NeXT's, which differ in their number of tiles, are filled up with zero tiles."""
    most = max(image.shape[0] for image in pixels)
    if pixels[0].dim() == 4 and any(image.shape[0] != most for image in pixels):
        pixels = [torch.cat([image, image.new_zeros(most - len(image), *image.shape[1:])]) for image in pixels]
    return torch.stack(pixels).to(torch.float32)
