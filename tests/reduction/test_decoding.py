"""What a step of an answer costs: as much as in plain LLaVA, whatever is reduced; and what it is compiled to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from reduced_models import DECODERS, REDUCTIONS, build, make_batch, make_row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, StaticCache


class Operations(TorchDispatchMode):
    """Counts the operations that are started."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_step(model: Any, rows: int, static: bool) -> Counter[str]:
    batch = make_batch([make_row(model, "ttItt", seed) for seed in range(rows)], "left")
    text = model.config.text_config
    cache = StaticCache(config=text, max_cache_len=64) if static else DynamicCache(config=text)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        mask = torch.cat([batch["attention_mask"], torch.ones(rows, 1, dtype=torch.long)], 1)
        step = {"input_ids": torch.full((rows, 1), 5), "attention_mask": mask, "past_key_values": cache}
        with Operations() as operations:
            model(**step)
    return operations.counts


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_a_step_starts_the_operations_of_plain_llava(reduction: str, rows: int, static: bool) -> None:
    plain = operations_of_a_step(build(plain=True), rows, static)
    assert operations_of_a_step(build(reduction=reduction), rows, static) == plain


def test_a_frozen_layer_in_a_prompt_starts_few_more_than_a_plain_one() -> None:
    counts = []
    for reduction in ("visionzip", "both"):
        model = build(reduction=reduction)
        row = make_row(model, "ttItt")
        with torch.no_grad(), Operations() as operations:
            model(**row, past_key_values=DynamicCache(config=model.config.text_config))
        counts.append(operations.counts)
    layers, more = len(REDUCTIONS["both"]["shortv"]["layers"]), counts[1] - counts[0]
    assert more["aten.gather.default"] <= 1  # of the positions, for all layers
    views = ("view", "unsqueeze", "expand", "slice", "transpose")
    assert sum(count for name, count in more.items() if name.split(".")[1] not in views) < 20 * layers


def answer(model: Any, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    ids = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    return list(ids[:, batch["input_ids"].shape[1] :].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["llama", "qwen2-window"])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "original"])
def test_a_step_is_compiled_whole(reduction: str, decoder: str) -> None:
    """With a static cache, as generate does on a GPU: one graph without a break, and the same tokens."""
    assert decoder in DECODERS
    torch.compiler.reset()
    keys = {"reduction": "both", "positions": "original"} if reduction == "original" else {"reduction": reduction}
    model = build(decoder, **keys)
    batch = make_batch([make_row(model, layout, seed) for seed, layout in enumerate(("ttIt", "tIttI"))], "left")
    assert 0 < len(compiled_as_plainly(model, batch, fullgraph=True)) <= 2


PRUNINGS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 2, "keep": 0.5},
    "pyramiddrop": {"method": "pyramiddrop", "layers": [1, 3], "keep": [0.5, 0.25]},
    "sparsevlm": {"method": "sparsevlm", "layers": [0, 2], "keep": [5, 3]},
    "sparsevlm+": {"method": "sparsevlm+", "layers": [0, 2], "keep": [5, 3]},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", PRUNINGS)
def test_a_step_of_a_model_that_prunes_compiles_to_the_same_tokens(method: str) -> None:
    """Not to one graph: its code is imported where a pass needs it."""
    torch.compiler.reset()
    model = build(reduction="visionzip", fastv=PRUNINGS[method])
    batch = make_batch([make_row(model, layout, seed) for seed, layout in enumerate(("ttIt", "tIttI"))], "left")
    assert compiled_as_plainly(model, batch, fullgraph=False)


def compiled_as_plainly(model: Any, batch: dict[str, Tensor], fullgraph: bool) -> list[Any]:
    """The graphs of a greedy answer with a static cache and compiled steps; its tokens are those of plain steps."""
    graphs = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    no_mode: Any = None  # its default is inductor's alone
    config: Any = CompileConfig(fullgraph=fullgraph, backend=backend, mode=no_mode)
    config._compile_all_devices = True
    assert answer(model, batch, cache_implementation="static", compile_config=config) == answer(model, batch)
    return graphs
