"""Code that a checkpoint needs only where its config asks for it: selectors, baselines, budgets per image, and pruning
inside the LLM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ReductionError

# Never executed: transformers copies into a checkpoint every file that it reads in a line like these. Where one does
# not use them, `leave_out_extras` (train/release/writing.py) takes out lines and files.
if TYPE_CHECKING:
    pass
    from .baselines import baseline_tokens  # noqa: F401
    from .divprune import DivPrune  # noqa: F401
    from .dpp import DeterminantalPoints  # noqa: F401
    from .duet import Duet  # noqa: F401
    from .fastv import FastV  # noqa: F401
    from .image_budgets import budget_of  # noqa: F401
    from .prumerge import PruMergePlus  # noqa: F401
    from .pruning import PrunedLayer  # noqa: F401
    from .pyramiddrop import PyramidDrop  # noqa: F401
    from .scope import Scope  # noqa: F401
    from .sparsevlm import SparseVLM  # noqa: F401
    from .visionzip import VisionZip  # noqa: F401
    from .vispruner import VisPruner  # noqa: F401


def extra(name: str, key: str) -> Any:
    """The module `name`, for which the config's `key` asks. Raises ReductionError where it was left out."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        raise ReductionError(
            f"{key}: this checkpoint was published for other reductions, without the code of this one ({name}.py): "
            "load it with ShortZip's own classes, which have it"
        ) from error
