"""The config's `fastv` key: what is pruned inside the language model, and how.

    {"layer": 2, "keep": 0.5}                                                           FastV (fastv.py)
    {"method": "pyramiddrop", "layers": [8, 16, 24], "keep": [0.5, 0.25, 0.125]}        PyramidDrop (pyramiddrop.py)
    {"method": "sparsevlm", "layers": [2, 6, 15], "keep": [66, 30, 17]}                 SparseVLM 1.5 (sparsevlm.py)
    {"method": "sparsevlm+", "layers": [2, 6, 15], "keep": [66, 34, 20]}                SparseVLM+ (sparsevlm.py)

Named after its first method, as `visionzip` is, and FastV where no method is named.
"""

from itertools import pairwise
from typing import Any, NamedTuple

from .errors import ReductionError


class MethodFacts(NamedTuple):
    """A method's module, which travels where it is used, its name in tables, and its paper's number at arXiv."""

    module: str
    name: str
    paper: str


PRUNING_METHODS = {
    "fastv": MethodFacts("fastv", "FastV", "2403.06764"),
    "pyramiddrop": MethodFacts("pyramiddrop", "PyramidDrop", "2410.17247"),
    "sparsevlm": MethodFacts("sparsevlm", "SparseVLM", "2410.04417"),
    "sparsevlm+": MethodFacts("sparsevlm", "SparseVLM+", "2410.04417"),
}
POSITIONS = ("compact", "original")
_FORMS = {
    "fastv": "fastv must be null or {layer: layers passed before pruning, keep: share of visual tokens kept, above "
    "0}, like {layer: 2, keep: 0.5}",
    "pyramiddrop": "fastv: method pyramiddrop takes {layers: indices of the layers before which it prunes, from 1, "
    "ascending, keep: for each the share of all visual tokens that is left, from 1 to 0, not rising, positions: "
    "compact or original}, like {method: pyramiddrop, layers: [8, 16, 24], keep: [0.5, 0.25, 0.125]}",
    "sparsevlm": "takes {layers: indices of the layers after which it prunes, from 0, ascending, keep: for each the "
    "number of visual tokens kept, at least 1, not rising}, like {layers: [2, 6, 15], keep: [66, 30, 17]}",
}


def pruning_method(fastv: Any) -> str:
    """The method that a valid `fastv` key names."""
    return str(fastv.get("method", "fastv"))


def with_positions(fastv: Any, positions: str) -> Any:
    """A valid `fastv` key in which PyramidDrop has positions: its own or, where it names none, the config's."""
    return {"positions": positions, **fastv} if pruning_method(fastv) == "pyramiddrop" else fastv


def validate_fastv(fastv: Any) -> None:
    """What can be said of the `fastv` key without a model: None, or a method and what it takes.

    Raises:
        ValueError: anything else.
    """
    if fastv is None:
        return
    method = fastv.get("method", "fastv") if isinstance(fastv, dict) else "fastv"
    if method not in PRUNING_METHODS:
        raise ReductionError(f"fastv: method is {method!r}; it must be one of {list(PRUNING_METHODS)}")
    if method == "fastv":
        _validate_single(fastv)
    else:
        _validate_stages(fastv, method)


def _validate_single(fastv: Any) -> None:
    form = _FORMS["fastv"]
    if not isinstance(fastv, dict) or set(fastv) - {"method"} != {"layer", "keep"}:
        raise ReductionError(f"{form}; got {fastv!r}")
    if not is_whole(fastv["layer"]) or fastv["layer"] < 1:
        raise ReductionError(f"{form}; got layer: {fastv['layer']!r}, at least 1 is needed")
    if not _is_share(fastv["keep"]) or fastv["keep"] == 0:
        raise ReductionError(f"{form}; got keep: {fastv['keep']!r}, at most 1 is needed")


def _validate_stages(fastv: dict[str, Any], method: str) -> None:
    shares = method == "pyramiddrop"
    form = _FORMS["pyramiddrop"] if shares else f"fastv: method {method} {_FORMS['sparsevlm']}"
    optional = {"method", "positions"} if shares else {"method"}
    if set(fastv) - optional != {"layers", "keep"}:
        raise ReductionError(f"{form}; got {fastv!r}")
    layers, keep = fastv["layers"], fastv["keep"]
    least = 1 if shares else 0
    if not isinstance(layers, (list, tuple)) or not all(is_whole(layer) and layer >= least for layer in layers):
        raise ReductionError(f"{form}; got layers: {layers!r}")
    if not layers or any(later <= layer for layer, later in pairwise(layers)):
        raise ReductionError(f"{form}; got layers: {list(layers)}, at least one and ascending ones are needed")
    fits = _is_share if shares else _is_count
    if not isinstance(keep, (list, tuple)) or not all(map(fits, keep)):
        raise ReductionError(f"{form}; got keep: {keep!r}")
    if len(keep) != len(layers) or any(later > before for before, later in pairwise(keep)):
        raise ReductionError(f"{form}; got keep: {list(keep)} for layers {list(layers)}")
    if fastv.get("positions", POSITIONS[0]) not in POSITIONS:
        raise ReductionError(f"{form}; got positions: {fastv['positions']!r}")


def check_pruned_layers(fastv: Any, depth: int) -> None:
    """Refuses a valid `fastv` key whose layers a decoder of `depth` layers does not have.

    Raises:
        ReductionError: with the allowed range.
    """
    method = pruning_method(fastv)
    if method == "fastv" and fastv["layer"] >= depth:
        raise ReductionError(
            f"fastv: layer {fastv['layer']}: this model has {depth} layers, and at least "
            f"one must come after the pruning: choose 1 to {depth - 1}"
        )
    if method == "fastv":
        return
    first, last = (1, depth - 1) if method == "pyramiddrop" else (0, depth - 2)
    missing = [layer for layer in fastv["layers"] if layer > last]
    if missing:
        raise ReductionError(
            f"fastv: method {method}: layers {missing}: this model has layers 0 to {depth - 1}, and at least one must "
            f"come after the pruning: choose from {first} to {last}"
        )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
