"""What users write for budgets, methods, frozen layers, pruning and memory, read the same way by every command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shortzip.reduction.configuration_pruning import PRUNING_METHODS
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.selectors import BUDGET_KEYS, VISIONZIP, merges, parameters_of, settled


def parse_budget(text: str) -> dict[str, int]:
    """``"54+10"`` -> ``{"dominant": 54, "contextual": 10}``. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*\+\s*(\d+)\s*", text)
    if match is None:
        raise ReductionError(f"budget {text!r}: write it as dominant+contextual, for instance 54+10.")
    return {"dominant": int(match[1]), "contextual": int(match[2])}


def format_budget(visionzip: Mapping[str, Any]) -> str:
    """``{"dominant": 54, "contextual": 10}`` -> ``"54+10"``."""
    return f"{visionzip['dominant']}+{visionzip['contextual']}"


def parse_method(text: str) -> dict[str, Any]:
    """``"vispruner:important=0.25"`` -> ``{"method": "vispruner", "important": 0.25}``; several parameters are joined
    by +. Raises ValueError for anything else; what a method takes, `settled` checks (selectors.py)."""
    method, colon, listed = (piece.strip() for piece in text.partition(":"))
    named: dict[str, Any] = {"method": method}
    for part in listed.split("+") if colon else []:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value) or name in (*named, *BUDGET_KEYS):
            raise ReductionError(
                f"method {text!r}: write its name, and parameters like {method}:NAME=VALUE, several joined by +"
            )
        named[name] = parse_value(value)
    return named


def budget_by(budget: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The `visionzip` key for as many tokens as `budget` by the method of a word: all of them dominant where it merges
    nothing. Raises ValueError for a method that there is not, or that does not take its parameters."""
    named = {"dominant": budget["dominant"], "contextual": budget["contextual"], **parse_method(method)}
    if not merges(named):
        named |= {"dominant": named["dominant"] + named["contextual"], "contextual": 0}
    return settled(named)


def parse_value(text: str) -> bool | int | float | str:
    """A parameter as a word, as the value it is: true, 4, 0.5; what is none of these stays a word."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def format_method(visionzip: Mapping[str, Any]) -> str:
    """``{"method": "vispruner", "important": 0.25, …}`` -> ``"vispruner:important=0.25"``; parameters at their
    defaults are left out."""
    method = str(visionzip.get("method", VISIONZIP))
    defaults = {name: parameter.default for name, parameter in parameters_of(method).items()}
    given = {key: value for key, value in visionzip.items() if key not in BUDGET_KEYS and value != defaults[key]}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in given.items()]
    return f"{method}:{'+'.join(words)}" if words else method


def parse_layers(text: str) -> list[int]:
    """``"31+29+30"`` -> ``[31, 29, 30]``, ``"none"`` -> ``[]``. Raises ValueError for anything else."""
    if text == "none":
        return []
    if re.fullmatch(r"\s*\d+(\s*\+\s*\d+)*\s*", text) is None:
        raise ReductionError(f"layers is {text!r}: write indices like 31+29+30, or none")
    return [int(part) for part in text.split("+")]


def parse_fastv(text: str) -> dict[str, Any] | None:
    """The `fastv` key of ``"2+0.5"`` (FastV: layer, share), ``"pyramiddrop:8+16+24:0.5+0.25+0.125"`` (layers, what is
    kept at each; ``:original`` keeps positions), ``"sparsevlm:2+6+15:66+30+17"`` or ``"sparsevlm+:…"``; None of
    ``"none"``. Raises ValueError for anything else."""
    if text == "none":
        return None
    method, *parts = text.strip().split(":")
    if method in PRUNING_METHODS and parts:
        return _parse_stages(text, method, parts)
    layer, _, keep = text.partition("+")
    try:
        return {"layer": int(layer), "keep": float(keep)}
    except ValueError as error:
        raise ReductionError(
            f"fastv is {text!r}: write the layer and the share kept, like 2+0.5, or none; of other methods "
            "METHOD:LAYERS:KEPT, like pyramiddrop:8+16+24:0.5+0.25+0.125 or sparsevlm:2+6+15:66+30+17"
        ) from error


def _parse_stages(text: str, method: str, parts: Sequence[str]) -> dict[str, Any]:
    if method == "fastv":
        return parse_fastv("+".join(parts)) or {}
    number = float if method == "pyramiddrop" else int
    try:
        layers, keep, *positions = parts
        fastv: dict[str, Any] = {
            "method": method,
            "layers": [int(layer) for layer in layers.split("+")],
            "keep": [number(kept) for kept in keep.split("+")],
        }
        if len(positions) > 1:
            raise ValueError(text)
        return {**fastv, "positions": positions[0]} if positions else fastv
    except ValueError as error:
        form = "pyramiddrop:8+16+24:0.5+0.25+0.125" if method == "pyramiddrop" else f"{method}:2+6+15:66+30+17"
        raise ReductionError(f"fastv is {text!r}: write METHOD:LAYERS:KEPT, like {form}, or none") from error


def format_fastv(fastv: Mapping[str, Any] | None) -> str:
    """What `parse_fastv` reads."""
    if fastv is None:
        return "none"
    if "layer" in fastv:
        return f"{fastv['layer']}+{float(fastv['keep'])}"
    kept = map(float, fastv["keep"]) if fastv["method"] == "pyramiddrop" else fastv["keep"]
    parts = [fastv["method"], "+".join(map(str, fastv["layers"])), "+".join(map(str, kept))]
    return ":".join([*parts, "original"] if fastv.get("positions") == "original" else parts)


def pruned_title(words: str) -> str:
    """The words of a `fastv` key with its method's name in front: ``"2+0.5"`` -> ``"FastV 2+0.5"``."""
    method, _, parts = words.partition(":")
    return f"{PRUNING_METHODS[method].name} {parts}" if method in PRUNING_METHODS else f"FastV {words}"


def parse_bytes(text: str) -> int:
    """``"24GiB"`` (or ``24``, ``24 GB``) -> bytes. A bare number means GiB. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)?\s*", text)
    if match is None or float(match[1]) == 0:
        raise ReductionError(f"memory {text!r}: write it as 24GiB, 80GB or 512MiB, more than zero.")
    return int(float(match[1]) * {"GB": 10**9, "MB": 10**6, "MiB": 2**20}.get(match[2], 2**30))


def read_freeze(text: str) -> int | float | list[int]:
    """What ``--freeze`` says, of any model: ``"19"`` -> 19, ``"60%"`` -> 0.6, ``"31,29,30"`` -> that list.

    Raises ValueError for anything else, for a share above 100 % and for a layer given twice.
    """
    stripped = text.strip().removeprefix("[").removesuffix("]")
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", stripped)
    if share is not None:
        if float(share[1]) > 100:
            raise ReductionError(f"freeze {text!r}: a share of the layers is at most 100%.")
        return float(share[1]) / 100
    if re.fullmatch(r"\d+", stripped) and stripped == text.strip():
        return int(stripped)
    if re.fullmatch(r"\d+(\s*,\s*\d+)*", stripped):
        layers = [int(layer) for layer in stripped.split(",")]
        if len(set(layers)) != len(layers):
            raise ReductionError(f"freeze {text!r}: must be distinct layers.")
        return layers
    raise ReductionError(f"freeze {text!r}: write a number of layers (19), a share (60%) or a list (31,29,30).")


def parse_freeze(text: str, num_layers: int) -> int | list[int]:
    """What ``--freeze`` says of a model with ``num_layers``: ``"19"`` -> 19, ``"60%"`` -> that share of them,
    ``"31,29,30"`` -> that list. None frozen is 0, and null in a config: see `format_shortv`.

    Raises ValueError for anything else, for layers that are not there, and for a number that is not 0..num_layers.
    """
    found = read_freeze(text)
    if isinstance(found, list):
        if max(found) >= num_layers:
            raise ReductionError(f"freeze {text!r}: must be distinct layers from 0 to {num_layers - 1}.")
        return found
    number = found if isinstance(found, int) else round(found * num_layers)
    if number > num_layers:
        raise ReductionError(f"freeze {text!r}: the language model has {num_layers} layers.")
    return number


def format_shortv(layers: Sequence[int] | None) -> str:
    """``[2, 5]`` -> ``{layers: [2, 5]}``, and no layer -> ``null``, as a config wants it."""
    return f"{{layers: {list(layers)}}}" if layers else "null"
