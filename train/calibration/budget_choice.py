"""The parameter with which images get a budget each whose mean is as asked (reduction/image_budgets.py).

One pass over a sample tells what every parameter would give: of chooser coverage, the share of its attention that an
image's patches hold under each budget; of chooser image, the picture's detail. Both rise with the parameter, which is
therefore found by halving.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortzip.data.batching import permutation
from shortzip.data.drops import BadSample, DropLog
from shortzip.data.errors import UserError
from shortzip.data.images import BadImage, ImageSource, open_image
from shortzip.data.instructions import Conversation
from shortzip.data.pixels import pixel_values
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.image_budgets import (
    CHOOSERS,
    COVERAGE,
    IMAGE,
    budgets_by_detail,
    covered,
    detail,
    dominant_patches,
    smallest_reaching,
)
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import selector_of
from shortzip.train.calibration.measuring import calibration_conversations
from shortzip.train.release.loading import load_viewer
from shortzip.train.release.opening import open_release
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.settings.calibrating import CalibrateBudgetConfig

BATCH = 16
DIGITS = 6  # of a parameter: near a share of 1, where scores are concentrated, the fourth tells several tokens apart
HALVINGS = 60


@dataclass(frozen=True)
class FoundBudgets:
    """What calibration found.

    Attributes:
        visionzip: the config's key, `per_image` with its parameter.
        budgets: of each image of the sample.
        dropped: images that could not be read, counted by why.
    """

    visionzip: dict[str, Any]
    budgets: list[int]
    dropped: dict[str, int]

    @property
    def mean(self) -> float:
        return sum(self.budgets) / len(self.budgets)


def calibrate(settings: CalibrateBudgetConfig) -> FoundBudgets:
    """The `visionzip` key whose budgets have the mean that is asked, on a sample of images.

    Raises UserError for a mean that no parameter gives, or no image; ReductionError for what the model cannot take.
    """
    release = open_release(ReleaseSpec(settings.model, settings.revision))
    saved = release.saved_reductions
    given = saved if settings.budget is None else Reductions.parse(settings.budget, method=settings.method)
    if given.visionzip is None:
        raise UserError(f"{settings.model} keeps every visual token: give the shares of a budget, like --budget 12+4")
    # With a parameter that is allowed: what the model cannot take is refused before an image is read.
    key, parameter = dict(given.visionzip), CHOOSERS[settings.chooser][0]
    key["per_image"] = {"chooser": settings.chooser, parameter: 1.0, "min": settings.min, "max": settings.max}
    model, processor = load_viewer(release, Reductions(key))
    drops = DropLog(settings.on_bad_sample, 1)
    conversations, root = calibration_conversations(settings, drops)
    images = _pixels(conversations, root, processor.image_processor, settings, drops)
    if settings.chooser == COVERAGE:
        shares = torch.cat([_shares(model, key, batch) for batch in _batches(images, settings.samples)])
        value, budgets = parameter_for(settings.mean, 1.0, lambda c: smallest_reaching(shares, c, settings.min))
    else:
        whole = [image[0] if image.dim() == 4 else image for image in images]
        details = [float(detail(image[None])) for image in whole]
        value, budgets = scale_for(settings.mean, details, key["per_image"])
    key["per_image"] = {**key["per_image"], parameter: value}
    return FoundBudgets(Reductions(key).as_config()["visionzip"], budgets, drops.counts)


def scale_for(mean: float, details: Sequence[float], per_image: Mapping[str, Any]) -> tuple[float, list[int]]:
    """The scale with which images of these details have this mean budget, and their budgets. Raises UserError."""
    least = min((value for value in details if value > 0), default=0.0)
    if least == 0.0:
        raise UserError(f"chooser {IMAGE}: the {len(details)} pictures are all of one colour: give others")
    highest = 2 * per_image["max"] / least  # at which all but flat pictures have the most
    return parameter_for(mean, highest, lambda scale: budgets_by_detail(details, {**per_image, "scale": scale}))


def parameter_for(mean: float, highest: float, budgets: Callable[[float], list[int]]) -> tuple[float, list[int]]:
    """The parameter up to `highest`, to `DIGITS` digits, whose budgets have a mean nearest to `mean`; and these.

    `budgets`: of each image by a parameter, none of which falls as it rises. Raises UserError where `highest` does not
    reach the mean.
    """

    def mean_at(value: float) -> float:
        found = budgets(value)
        return sum(found) / len(found)

    if mean_at(highest) < mean:
        raise UserError(
            f"mean is {mean:g}, and these images have {mean_at(highest):.1f} at the most: lower mean, or raise max"
        )
    low, high = 0.0, highest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    near = {rounded for value in (low, high) for rounded in _rounded(value) if 0 < rounded <= highest}
    best = min(sorted(near), key=lambda value: abs(mean_at(value) - mean))
    return best, budgets(best)


def _rounded(value: float) -> tuple[float, float]:
    """The numbers of `DIGITS` digits below and above."""
    if value == 0:
        return 0.0, 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - DIGITS + 1)
    return tuple(float(f"{round_to(value / step) * step:.{DIGITS}g}") for round_to in (math.floor, math.ceil))  # type: ignore[return-value]


def _pixels(
    conversations: Sequence[Conversation],
    root: str | None,
    image_processor: Any,
    settings: CalibrateBudgetConfig,
    drops: DropLog,
) -> Iterator[Tensor]:
    """What the tower is given of `samples` images, each once, in an order drawn with the seed."""
    seen: set[ImageSource] = set()
    for index in permutation(len(conversations), settings.seed, 0).tolist():
        for source in conversations[index].images:
            if source in seen:
                continue
            if len(seen) == settings.samples:
                return
            seen.add(source)
            try:
                yield pixel_values(open_image(source, root), image_processor)
            except BadImage as error:
                seen.discard(source)
                drops.add(BadSample(error.problem, conversations[index].id, str(error), error.file))
    if not seen:
        raise UserError(f"{settings.instructions}: no image to calibrate on. {drops.summary()}.")


def _batches(images: Iterator[Tensor], total: int) -> Iterator[list[Tensor]]:
    batch: list[Tensor] = []
    done = 0
    for image in images:
        batch.append(image if image.dim() == 4 else image[None])
        if len(batch) == BATCH:
            yield batch
            done, batch = done + len(batch), []
            _progress(done, total)
    if batch:
        yield batch


@torch.no_grad()
def _shares(model: Any, visionzip: Mapping[str, Any], images: Sequence[Tensor]) -> Tensor:
    """`covered` of a batch of images [tiles, 3, S, S], of every budget from min to max."""
    has_cls = TOWER_HAS_CLS[model.config.vision_config.model_type]
    patches = dominant_patches(visionzip, int(has_cls and selector_of(visionzip).keeps_cls))
    pixels = torch.cat(list(images)).to(next(model.model.vision_tower.parameters()))
    attention = model.model.get_visual_tokens(pixels).attention
    return covered(attention, patches, [len(image) for image in images])


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rimages: {done}/{total}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
