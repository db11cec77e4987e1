"""The `budgets` key: the budgets that one projector was tuned for, of which `visionzip` is one.

It changes nothing of what a model computes. A model that is loaded with another budget is loaded, and says so.
"""

from collections.abc import Mapping
from typing import Any

from transformers.utils import logging

from .configuration_pruning import is_whole
from .errors import ReductionError

logger = logging.get_logger(__name__)

_FORM = (
    "budgets must be null or a list of two or more {dominant: at least 1, contextual: at least 0}, each of another "
    "number of tokens"
)


def validate_budgets(budgets: Any) -> None:
    """What can be said of the `budgets` key without a model.

    Raises:
        ValueError: it is neither null nor two budgets or more, each of another number of tokens.
    """
    if budgets is None:
        return
    if not isinstance(budgets, (list, tuple)) or len(budgets) < 2:
        raise ReductionError(f"{_FORM}; got {budgets!r}")
    for budget in budgets:
        if not isinstance(budget, dict) or set(budget) != {"dominant", "contextual"}:
            raise ReductionError(f"{_FORM}; got {budget!r}")
        for key, least in (("dominant", 1), ("contextual", 0)):
            if not is_whole(budget[key]) or budget[key] < least:
                raise ReductionError(f"{_FORM}; got {key}: {budget[key]!r}")
    tokens = [tokens_of(budget) for budget in budgets]
    if again := [count for count in tokens if tokens.count(count) > 1]:
        raise ReductionError(f"{_FORM}; got {again[0]} tokens {tokens.count(again[0])} times")


def check_budgets(config: Any, has_cls: bool) -> None:
    """Refuses budgets that no image has the tokens for, and says where `visionzip` is none of them.

    `has_cls`: whether the tower's first token is CLS. Raises ValueError, with the budget and the range.
    """
    if config.budgets is None:
        return
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    limit = side * side + has_cls
    for budget in config.budgets:
        if tokens_of(budget) > limit:
            raise ReductionError(
                f"budgets: dominant {budget['dominant']} + contextual {budget['contextual']} = {tokens_of(budget)} "
                f"exceeds the {limit} tokens of an image: the sum must be 1 to {limit}"
            )
    if config.visionzip is not None and not is_listed(config.visionzip, config.budgets):
        logger.warning_once(other_budget(config.visionzip, config.budgets))


def is_listed(visionzip: Mapping[str, Any] | None, budgets: Any) -> bool:
    """Whether a config's `visionzip` key has one of these budgets."""
    return visionzip is not None and {key: visionzip[key] for key in ("dominant", "contextual")} in list(budgets)


def other_budget(visionzip: Mapping[str, Any], budgets: Any) -> str:
    """What is said of a budget that the projector was not tuned for."""
    named = ", ".join(_words(budget) for budget in budgets)
    return f"visionzip: {_words(visionzip)} is none of the budgets that this projector was tuned for: {named}"


def tokens_of(budget: Mapping[str, Any]) -> int:
    """Visual tokens of an image (of a tile in LLaVA-NeXT)."""
    return int(budget["dominant"] + budget["contextual"])


def _words(budget: Mapping[str, Any]) -> str:
    return f"{budget['dominant']}+{budget['contextual']}"
