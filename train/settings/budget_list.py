"""Several budgets for one projector (`budgets`), and what they learn of each other (`sandwich`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shortzip.reduction.configuration_pruning import pruning_method
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.parsing import format_budget, parse_budget
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.checks import ConfigError

# Of pruning inside the language model, what keeps numbers of tokens, which are meant for one budget, not shares.
_KEEPS_NUMBERS = ("sparsevlm", "sparsevlm+")


def check_budgets(
    budgets: Sequence[str | int],
    sandwich: bool,
    visionzip: VisionZipConfig | None,
    fastv: Mapping[str, Any] | None,
    others: Mapping[str, object],
) -> list[str]:
    """The budgets of a run as commands take them, fewest tokens first.

    `budgets`: as they are written, 12+4, or a number of tokens. `fastv`: the config's key. `others`: what does not go
    with several budgets, by key; None where it is not asked.

    Raises ConfigError for a list that no projector can be tuned for, and for what does not go with one.
    """
    if not budgets:
        if sandwich:
            raise ConfigError(
                "sandwich is true, and budgets is empty: it compares the budgets of a list. Set budgets to two or "
                "more, or sandwich to false"
            )
        return []
    if visionzip is None:
        raise ConfigError(f"budgets is {budgets}, and visionzip is null: set visionzip to one of them")
    for key in [key for key, value in others.items() if value is not None]:
        raise ConfigError(f"budgets and {key} do not go together: each says a step's budget. Set one of them to null")
    if visionzip.per_image is not None:
        raise ConfigError(
            "budgets and visionzip.per_image do not go together: each says an image's budget. Set budgets to [], or "
            "visionzip.per_image to null"
        )
    if fastv is not None and pruning_method(fastv) in _KEEPS_NUMBERS:
        raise ConfigError(
            f"budgets and fastv.method {pruning_method(fastv)} do not go together: fastv.keep {fastv['keep']} is "
            "numbers of tokens, meant for one budget. Choose fastv or pyramiddrop, which keep shares, or set budgets "
            "to []"
        )
    if fastv is not None and sandwich:
        raise ConfigError("sandwich and fastv do not go together: set sandwich to false, or fastv to null")
    listed = listed_budgets(budgets, visionzip)
    own = format_budget(visionzip.as_key())
    words = [format_budget(budget.as_key()) for budget in listed]
    if own not in words:
        raise ConfigError(
            f"visionzip is {own}, and budgets are {', '.join(words)}: it is the one that the checkpoint is loaded "
            "with where none is asked for, and must be one of them"
        )
    return words


def listed_budgets(budgets: Sequence[str | int], visionzip: VisionZipConfig) -> list[VisionZipConfig]:
    """`visionzip` under each of the budgets, fewest tokens first; a number is divided in the shares of `visionzip`.

    Raises ConfigError for a single one, two of as many tokens, and what its method does not take.
    """
    found: dict[int, VisionZipConfig] = {}
    for written in budgets:
        budget = _read(written, visionzip)
        tokens = budget.dominant + budget.contextual
        if tokens in found:
            twice = format_budget(found[tokens].as_key())
            also = "" if twice == format_budget(budget.as_key()) else f" (as {twice})"
            raise ConfigError(f"budgets: {written} has {tokens} tokens, and so has another one{also}: give it once")
        found[tokens] = budget
    if len(found) < 2:
        raise ConfigError(
            f"budgets is {list(budgets)}: two or more are needed. For a single one set visionzip, and budgets to []"
        )
    return [found[tokens] for tokens in sorted(found)]


def _read(written: str | int, visionzip: VisionZipConfig) -> VisionZipConfig:
    """Raises ConfigError, naming the budget."""
    from shortzip.reduction.image_budgets import divided  # torch: --help does not wait

    try:
        if isinstance(written, int) or written.strip().isdigit():
            if int(written) < 1:
                raise ConfigError(f"budgets: {written} is no number of tokens: at least 1 is needed")
            budget = divided(visionzip.as_key(), int(written))
        else:
            budget = parse_budget(written)
        if budget["dominant"] < 1:
            raise ConfigError(f"budgets: {written} has no dominant token: at least 1 is needed")
        return replace(visionzip, dominant=budget["dominant"], contextual=budget["contextual"])
    except ReductionError as error:
        raise ConfigError(f"budgets: {error}") from error
