"""A budget for each image: `visionzip: {…, per_image: {chooser: …}}`, or the numbers themselves in a call.

fixed       every image the budget that `dominant` and `contextual` say, where a call does not say others
coverage    the smallest budget whose dominant patches reach the share `coverage` of the image's total score (attention
            of CLS, without CLS the attention received): found in the pass of the tower that also gives the tokens
image       `scale` times the detail of the picture's thumbnail: known before the tower runs

A budget is visual tokens of an image, in LLaVA-NeXT of each of its tiles: one number for all tiles of an image. Of it,
dominant and contextual tokens have the shares that they have in `visionzip`. N is the number of images, P of patches.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from .configuration_pruning import is_whole
from .configuration_reduced_llava import TOWER_HAS_CLS, selected_block
from .errors import ReductionError
from .extras import extra
from .positions import ImagePositions, PlacedFeatures, takes_encoded_images
from .selectors import BASELINES, VISIONZIP, selector_of
from .visionzip import score_patches
from .visual_tokens import VisualTokens, run_to_block, tokens_of_block

FIXED, COVERAGE, IMAGE = "fixed", "coverage", "image"
# Of each chooser, the keys beside its name: its parameter first (scripts/calibrate_budget.py finds it).
CHOOSERS: dict[str, tuple[str, ...]] = {
    FIXED: (),
    COVERAGE: ("coverage", "min", "max"),
    IMAGE: ("scale", "min", "max"),
}
_FORMS = {
    FIXED: "{chooser: fixed}",
    COVERAGE: "{chooser: coverage, coverage: above 0 to 1, min: at least 1, max: at least min}",
    IMAGE: "{chooser: image, scale: above 0, min: at least 1, max: at least min}",
}
THUMBNAIL = 32  # pixels on a side


def divided(visionzip: Mapping[str, Any], tokens: int) -> dict[str, int]:
    """As many tokens in the shares that dominant and contextual ones have in `visionzip`: the contextual ones rounded,
    and at least one dominant."""
    whole = visionzip["dominant"] + visionzip["contextual"]
    contextual = min(round(tokens * visionzip["contextual"] / whole), tokens - 1)
    return {"dominant": tokens - contextual, "contextual": contextual}


def budget_of(visionzip: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """The `visionzip` key of as many tokens for every image, `divided`."""
    key = {name: value for name, value in visionzip.items() if name != "per_image"}
    return {**key, **divided(visionzip, tokens)}


def chooser_of(visionzip: Mapping[str, Any] | None) -> str:
    """What chooses an image's budget by a valid `visionzip` key."""
    per_image = None if visionzip is None else visionzip.get("per_image")
    return FIXED if per_image is None else str(per_image["chooser"])


def validate_per_image(visionzip: Mapping[str, Any]) -> None:
    """What can be said of `visionzip.per_image` without a model.

    Raises:
        ReductionError: no chooser, keys that it does not take or that are missing, a value out of range, or a method
            whose images cannot be told apart so.
    """
    per_image = visionzip["per_image"]
    if not isinstance(per_image, dict) or per_image.get("chooser") not in list(CHOOSERS):
        forms = ", ".join(_FORMS.values())
        raise ReductionError(f"visionzip.per_image must be null or one of {forms}; got {per_image!r}")
    chooser = per_image["chooser"]
    form, keys = f"visionzip.per_image must be {_FORMS[chooser]}", CHOOSERS[chooser]
    if missing := [key for key in keys if per_image.get(key) is None]:
        raise ReductionError(f"{form}; {', '.join(missing)} missing in {per_image!r}")
    if other := sorted(set(per_image) - {"chooser", *keys}):
        raise ReductionError(f"{form}; got {other[0]}: {per_image[other[0]]!r}, which {chooser} does not take")
    if chooser == FIXED:
        return
    parameter, least, most = (per_image[key] for key in keys)
    is_number = type(parameter) in (int, float) and math.isfinite(parameter) and parameter > 0
    if not is_number or (chooser == COVERAGE and parameter > 1):
        raise ReductionError(f"{form}; got {keys[0]}: {parameter!r}")
    if not is_whole(least) or least < 1:
        raise ReductionError(f"{form}; got min: {least!r}")
    if not is_whole(most) or most < least:
        raise ReductionError(f"{form}; got max: {most!r}, with min: {least}")
    _refuse_method(visionzip, chooser)


def _refuse_method(visionzip: Mapping[str, Any], chooser: str) -> None:
    """Refuses a chooser whose numbers a method cannot give, or that reads what the method does not."""
    method = visionzip.get("method", VISIONZIP)
    if method in BASELINES:
        on_a_grid = extra("baselines", f"visionzip: method {method}").ON_A_GRID
        if method in on_a_grid:
            raise ReductionError(
                f"visionzip.per_image: chooser {chooser} gives any number from min to max, and method {method} takes "
                "only those that make a grid: choose chooser fixed, and give budgets in the call, or another method"
            )
        reads: frozenset[str] = frozenset()
    else:
        reads = selector_of(visionzip).reads
    if chooser == COVERAGE and "attention" not in reads:
        raise ReductionError(
            f"visionzip.per_image: chooser coverage adds up attention, and method {method} looks at none: choose "
            f"another method, or chooser {IMAGE}"
        )


def refuse_beside(visionzip: Mapping[str, Any], fastv: Any, limit: int) -> None:
    """What of `visionzip.per_image` the rest of a config does not allow. `limit`: the most tokens that an image has.

    Raises ReductionError.
    """
    refuse_own_budgets(fastv, "visionzip.per_image")
    per_image = visionzip["per_image"]
    if per_image["chooser"] != FIXED and per_image["max"] > limit:
        raise ReductionError(
            f"visionzip.per_image: max is {per_image['max']}; an image has {limit} tokens: it must be "
            f"{per_image['min']} to {limit}"
        )


def refuse_own_budgets(fastv: Any, key: str) -> None:
    """Refuses budgets per image, which `key` gives, where something else cannot take them."""
    if fastv is not None:
        raise ReductionError(
            f"{key} and fastv do not go together: what is pruned inside the language model is told for one budget. "
            "Set one of them to null"
        )
    if not takes_encoded_images():
        raise ReductionError(
            f"{key}: needed is transformers 5.18, this is {transformers.__version__}: pip install 'transformers>=5.18'"
        )


def most_tokens(visionzip: Mapping[str, Any], side: int, has_cls: bool) -> int:
    """The most tokens that an image of `side` by `side` patches has: these, and CLS where the method keeps it."""
    method = visionzip.get("method", VISIONZIP)
    keeps_cls = method not in BASELINES and selector_of(visionzip).keeps_cls
    return side * side + int(has_cls and keeps_cls)


def check_budgets(budgets: Any, images: int, limit: int) -> list[int]:
    """A call's budgets as whole numbers, one for each image.

    Args:
        budgets: [N] int64, or a list.
        images: N.
        limit: the most tokens that an image (a tile) has.

    Raises ReductionError for anything else, naming the number, its place and the range.
    """
    values: Any = budgets.tolist() if isinstance(budgets, Tensor) else budgets
    if not isinstance(values, (list, tuple)):
        raise ReductionError(f"budgets is {budgets!r}; needed is a list of whole numbers, one for each image")
    if len(values) != images:
        raise ReductionError(f"budgets has {len(values)} numbers, and there are {images} images: give one for each")
    for place, value in enumerate(values):
        if not is_whole(value) or not 1 <= value <= limit:
            raise ReductionError(f"budgets[{place}] is {value!r}; it must be a whole number from 1 to {limit}")
    return list(values)


def check_shapes(visionzip: Mapping[str, Any], budgets: Sequence[int], side: int) -> None:
    """Refuses budgets of which a baseline makes no grid of `side` by `side` patches. Raises ReductionError."""
    method = visionzip.get("method", VISIONZIP)
    if method in BASELINES:
        for tokens in sorted(set(budgets)):
            extra("baselines", f"visionzip: method {method}").check_grid(method, tokens, side)


def dominant_patches(visionzip: Mapping[str, Any], cls: int) -> list[int]:
    """How many patches are kept as they are under each budget from `per_image`'s min to its max. `cls`: 1 where CLS is
    counted among the dominant tokens."""
    least, most = visionzip["per_image"]["min"], visionzip["per_image"]["max"]
    return [max(0, budget_of(visionzip, tokens)["dominant"] - cls) for tokens in range(least, most + 1)]


@torch.no_grad()
def covered(attention: Tensor, patches: Sequence[int], tiles: Sequence[int]) -> Tensor:
    """The share of its total score that each image's highest patches have: [N, len(patches)] float64, rising.

    Args:
        attention: [tiles of all images, P], scores of at least 0.
        patches: numbers of patches per tile, rising.
        tiles: of each image.
    """
    ranked = attention.double().sort(dim=-1, descending=True).values
    sums = torch.nn.functional.pad(ranked.cumsum(dim=-1), (1, 0))
    reached = sums[:, [*patches, sums.shape[1] - 1]]
    of_images = torch.stack([part.sum(dim=0) for part in reached.split(list(tiles))])
    return of_images[:, :-1] / of_images[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)


def budgets_by_coverage(
    attention: Tensor, visionzip: Mapping[str, Any], cls: int, tiles: Sequence[int] | None = None
) -> list[int]:
    """Each image's budget by chooser `coverage`: the smallest whose dominant patches reach the share, else max.

    Args:
        attention: [tiles of all images, P], as TowerStates has it.
        visionzip: the config's key.
        cls: 1 where CLS is counted among the dominant tokens.
        tiles: of each image; None: one each. Scores are added up over an image's tiles.
    """
    per_image = visionzip["per_image"]
    shares = covered(attention, dominant_patches(visionzip, cls), tiles or [1] * len(attention))
    return smallest_reaching(shares, per_image["coverage"], per_image["min"])


def smallest_reaching(shares: Tensor, coverage: float, least: int) -> list[int]:
    """The first budget of each image whose share is reached. `shares` [N, max - min + 1], of the budgets from `least`
    on."""
    below = (shares < coverage - 1e-12).sum(dim=-1).clamp(max=shares.shape[1] - 1)  # rounding is no missing patch
    return [least + int(count) for count in below.tolist()]


@torch.no_grad()
def detail(pixel_values: Tensor) -> Tensor:
    """How much is to be seen in each image: [N] float64 of [N, 3, S, S], as the tower is given them.

    The mean difference between neighbouring pixels of a grey thumbnail, sideways plus downwards.
    """
    grey = pixel_values.detach().to("cpu", torch.float64).mean(dim=1, keepdim=True)
    side = min(THUMBNAIL, grey.shape[-1])
    small = torch.nn.functional.adaptive_avg_pool2d(grey, side)
    return sum(small.diff(dim=way).abs().mean(dim=(1, 2, 3)) for way in (-1, -2))  # type: ignore[return-value]


def budgets_by_detail(details: Sequence[float], per_image: Mapping[str, Any]) -> list[int]:
    """Each image's budget by chooser `image`, of what `detail` gives (of LLaVA-NeXT's images, of the base tile)."""
    scaled = (round(value * per_image["scale"]) for value in details)
    return [min(max(value, per_image["min"]), per_image["max"]) for value in scaled]


def with_budget(model: Any, visionzip: dict[str, Any]) -> Any:
    """A reduced model without a head that has one budget for all images, and the weights of `model`."""
    view = copy.copy(model)
    view.config = copy.copy(model.config)
    view.config.visionzip = visionzip
    view._reductions = {**model._reductions, "visionzip": visionzip}
    return view


def features_of_images(
    model: Any,
    pixel_values: Tensor,
    image_budgets: Any = None,
    tiles: Sequence[int] | None = None,
    image_sizes: Any = None,
    *,
    layer: Any = None,
    strategy: str | None = None,
) -> PlacedFeatures:
    """As `get_image_features` of a reduced model, each image under a budget of its own; the tower runs once.

    Args:
        model: a reduced LLaVA without its head.
        pixel_values: [tiles of all images, 3, S, S].
        image_budgets: [N]; None: as the config's chooser finds them.
        tiles: of each image; None: one each.
        image_sizes: [N, 2], of LLaVA-NeXT's images before tiling.
        layer, strategy: what a call says in the place of the config's `vision_feature_layer` and
            `vision_feature_select_strategy`.

    Raises ReductionError for budgets that are not in range, or without `visionzip` to keep fewer by.
    """
    budgets, of_rows = chosen_tokens(model, pixel_values, image_budgets, tiles, layer)
    return placed(model, budgets, of_rows, tiles, image_sizes, strategy)


Chosen = Callable[[Tensor, Any], VisualTokens]
"""Of tiles [n] int64 on the CPU, and a model with their budget: their visual tokens."""


def chosen_tokens(
    model: Any, pixel_values: Tensor, image_budgets: Any = None, tiles: Sequence[int] | None = None, layer: Any = None
) -> tuple[list[int], Chosen]:
    """The budget of each image, and what gives tiles' tokens under it, after one pass of the tower.

    Arguments and errors as of `features_of_images`.
    """
    zipped, tower = model.config.visionzip, model.vision_tower
    if zipped is None:
        raise ReductionError("image_budgets are given, and visionzip is null, which keeps every visual token")
    tiles = tiles or [1] * len(pixel_values)
    side, has_cls = tower.config.image_size // tower.config.patch_size, TOWER_HAS_CLS[tower.config.model_type]
    budgets = None
    if image_budgets is not None:
        refuse_own_budgets(model.config.fastv, "image_budgets")
        budgets = check_budgets(image_budgets, len(tiles), most_tokens(zipped, side, has_cls))
        check_shapes(zipped, budgets, side)
    elif chooser_of(zipped) == IMAGE:
        first = [sum(tiles[:image]) for image in range(len(tiles))]
        budgets = budgets_by_detail(detail(pixel_values[first]).tolist(), zipped["per_image"])
    elif chooser_of(zipped) == FIXED:
        budgets = [zipped["dominant"] + zipped["contextual"]] * len(tiles)
    if budgets is not None and zipped.get("method") in BASELINES:
        return budgets, lambda rows, view: view.get_visual_tokens(pixel_values[rows], layer)
    selector = selector_of(zipped)
    layer = model.config.vision_feature_layer if layer is None else layer
    selected = selected_block(layer, len(tower.encoder.layers))
    reads_attention = bool(selector.reads & {"attention", "keys"})
    hidden, queries, keys, scale = run_to_block(tower, pixel_values, selected, has_cls, reads_attention)
    if budgets is None:
        assert queries is not None
        assert keys is not None
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            attention = score_patches(queries, keys, scale, has_cls)
        budgets = budgets_by_coverage(attention, zipped, int(has_cls and selector.keeps_cls), tiles)

    def of_rows(rows: Tensor, view: Any) -> VisualTokens:
        of_queries, of_keys = (None if part is None else part[rows] for part in (queries, keys))
        key, projector, pixels = view.config.visionzip, model.multi_modal_projector, pixel_values[rows]
        return tokens_of_block(hidden[rows], of_queries, of_keys, scale, selector, key, has_cls, projector, pixels)

    return budgets, of_rows


def tokens_of_budgets(model: Any, pixel_values: Tensor, budgets: Sequence[dict[str, Any]]) -> list[VisualTokens]:
    """As Family.tokens_of_budgets, where the tower is all that the tokens come of. `pixel_values`: [N, 3, S, S]."""
    views = [with_budget(model, visionzip) for visionzip in budgets]
    if budgets[0].get("method") in BASELINES:  # which look at the image in ways of their own
        return [view.get_visual_tokens(pixel_values) for view in views]
    rows, (_, of_rows) = torch.arange(len(pixel_values)), chosen_tokens(model, pixel_values)
    return [of_rows(rows, view) for view in views]


def placed(
    model: Any,
    budgets: Sequence[int],
    of_rows: Chosen,
    tiles: Sequence[int] | None = None,
    image_sizes: Any = None,
    strategy: str | None = None,
) -> PlacedFeatures:
    """Projected features of images, each of its budget, in their order. Arguments as of `features_of_images`."""
    tiles = tiles or [1] * len(budgets)
    starts = [sum(tiles[:image]) for image in range(len(tiles))]
    features: list[Any] = [None] * len(budgets)
    places: list[Any] = [None] * len(budgets)
    lengths = [0] * len(budgets)
    for tokens in sorted(set(budgets)):
        images = [image for image, budget in enumerate(budgets) if budget == tokens]
        rows = [starts[image] + tile for image in images for tile in range(tiles[image])]
        view = with_budget(model, budget_of(model.config.visionzip, tokens))
        sizes = None if image_sizes is None else [image_sizes[image] for image in images]
        visual: Any = of_rows(torch.tensor(rows), view)
        positions = view.image_positions(visual.kept, visual.targets, sizes, strategy)
        for number, (image, made) in enumerate(
            zip(images, view.project(visual.tokens, visual.kept, sizes), strict=True)
        ):
            features[image] = made
            if positions is not None:
                places[image], lengths[image] = positions.tokens[number], positions.lengths[number]
    where = None if places and places[0] is None else ImagePositions(places, lengths)
    joined: Any = features
    return PlacedFeatures(last_hidden_state=torch.cat(features), pooler_output=joined, positions=where)
