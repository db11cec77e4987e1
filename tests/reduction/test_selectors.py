"""What holds of every selector, and each of them against its authors' own choices."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from reduced_models import build
from safetensors.torch import load_file
from selector_cases import METHODS, choose, mapped, merges, tokens, tower_states
from torch.utils._python_dispatch import TorchDispatchMode

from shortzip.reduction.configuration_reduced_llava import validate_visionzip
from shortzip.reduction.divprune import spread_patches
from shortzip.reduction.dpp import choose_determinant, scale_quality
from shortzip.reduction.duet import Duet
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.scope import cover_patches
from shortzip.reduction.selectors import SELECTORS, TowerStates, selector_of
from shortzip.reduction.vispruner import prune_alike
from shortzip.scripts.benchmarks.memory import peak_tensor_bytes

REDUCTION = Path(__file__).parents[2] / "reduction"
GOLDEN = Path(__file__).parents[1] / "golden" / "selectors"
EVERY = pytest.mark.parametrize("name", METHODS)


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("space", ["projected", "features"])
@pytest.mark.parametrize("count", [7, 16])
def test_divprune_chooses_as_the_authors(space: str, count: int, dtype: torch.dtype) -> None:
    recorded = golden("divprune")
    chosen = spread_patches(recorded[f"p64.{space}"].to(dtype), count)
    assert torch.equal(chosen, recorded[f"p64.{space}.n{count}.kept_order"])


def test_divprune_takes_every_distinct_patch_before_a_duplicate() -> None:
    recorded = golden("divprune")["duplicates.projected"]
    chosen = spread_patches(recorded[None], 16)[0].tolist()
    assert len(set(chosen)) == 16
    assert {patch % 8 for patch in chosen[:8]} == set(range(8))
    assert chosen[8:] == sorted(chosen[8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("count", "alpha"), [(16, 1.0), (7, 1.0), (16, 0.5), (16, 2.0), (10, 0.0)])
def test_scope_chooses_as_the_authors(count: int, alpha: float, dtype: torch.dtype) -> None:
    recorded = golden("scope")
    attention = recorded["p64.cls_attention"].sum(dim=1).to(dtype)
    chosen = cover_patches(recorded["p64.features"].to(dtype), attention, count, alpha)
    case = f"alpha{alpha}" if alpha else "coverage_only"
    assert torch.equal(chosen, recorded[f"p64.n{count}.{case}.kept_order"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_vispruner_chooses_as_the_authors_and_by_the_formula_where_their_loop_fails(dtype: torch.dtype) -> None:
    recorded = golden("vispruner")
    attention = recorded["p64.cls_attention"].sum(dim=1).to(dtype)
    orders = [case for case in recorded if case.endswith("_order")]
    assert len(orders) == 14
    for case in orders:
        _, count, ratio = case.rsplit(".", 1)[0].split(".", 2)
        chosen = prune_alike(recorded["p64.features"].to(dtype), attention, int(count[1:]), float(ratio[1:]))
        assert torch.equal(chosen, recorded[case]), case


@pytest.mark.parametrize("count", [7, 16])
def test_a_determinant_with_attention_as_quality_chooses_as_cdpruner_s_code(count: int) -> None:
    recorded = golden("cdpruner")
    quality = scale_quality(recorded["p64.attention_mean"])
    chosen = choose_determinant(recorded["p64.projected"], quality, count)
    assert torch.equal(chosen, recorded[f"p64.attention_quality.n{count}.order"])
    states = TowerStates(recorded["p64.projected"], attention=recorded["p64.attention_mean"])
    assert torch.equal(choose("dpp", states, count).order, chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("rank", "width"), [(8, 8), (64, 64), (128, 128), (60, 128)])
def test_behind_as_many_patches_as_there_are_dimensions_a_determinant_goes_by_quality(
    rank: int, width: int, dtype: torch.dtype
) -> None:
    """Any further patch makes the determinant 0: what is left of it is rounding, which is no order."""
    generator = torch.Generator().manual_seed(rank)
    states = torch.randn(6, 144, rank, generator=generator, dtype=dtype)
    states = states if rank == width else states @ torch.randn(rank, width, generator=generator, dtype=dtype)
    quality = torch.randint(1, 20, (6, 144), generator=generator).to(dtype) / 20  # with equals
    order = choose_determinant(states, quality, 144)
    assert torch.equal(choose_determinant(states, quality, rank + 5), order[:, : rank + 5])
    for scores, image in zip(quality.tolist(), order.tolist(), strict=True):
        assert sorted(image) == list(range(144))
        assert image[rank:] == sorted(image[rank:], key=lambda patch: (-scores[patch], patch))


@pytest.mark.parametrize("case", ["d12_c4_w4", "d5_c3_w4", "d12_c4_w1", "d12_c4_w2", "d12_c4_w100", "d12_c5_w3"])
def test_duet_merges_as_the_authors(case: str) -> None:
    recorded = golden("duet_v2v")
    dominant, contextual, window = (int(part[1:]) for part in case.split("_"))
    states = TowerStates(
        patches=recorded["p64.hidden_states"][:, 1:],
        cls=recorded["p64.hidden_states"][:, :1],
        attention=recorded["p64.cls_attention"].sum(dim=1),
        keys=recorded["p64.keys_mean"][:, 1:],
    )
    selection = Duet(window).select(states, dominant - 1, contextual)
    assert torch.equal(selection.order + 1, recorded[f"p64.{case}.dominant_order"][:, 1:])
    assert torch.equal(selection.targets, recorded[f"p64.{case}.formula_anchors"])
    out = torch.cat([states.cls, tokens(states, selection)], dim=1)
    torch.testing.assert_close(out, recorded[f"p64.{case}.out"], rtol=0, atol=1e-5)
    in_pool = min(contextual * window, 64 - dominant + 1)
    assert (selection.groups >= 0).sum(dim=1).tolist() == [in_pool, in_pool]


@EVERY
@pytest.mark.parametrize("dominant", [1, 7, 16, 36])
def test_each_patch_is_kept_once_and_none_that_is_merged(name: str, dominant: int) -> None:
    contextual = min(5, 36 - dominant) if merges(name) else 0
    selection = choose(name, tower_states(3, 36), dominant, contextual)
    assert selection.order.shape == (3, dominant)
    assert selection.order.dtype == torch.long
    for image, order in enumerate(selection.order.tolist()):
        assert len(set(order)) == dominant
        assert set(order) <= set(range(36))
        if contextual:
            assert selection.groups[image][order].tolist() == [-1] * dominant
            assert selection.groups[image][selection.targets[image]].tolist() == list(range(contextual))


@pytest.mark.parametrize("name", ["divprune", "scope", "dpp"])
def test_the_choice_of_a_smaller_budget_is_the_beginning_of_a_larger_one_s(name: str) -> None:
    states = tower_states(2, 64)
    assert torch.equal(choose(name, states, 7).order, choose(name, states, 40).order[:, :7])


@EVERY
def test_an_image_is_chosen_from_alone_as_beside_others(name: str) -> None:
    states = tower_states(5, 100, seed=3)
    together = choose(name, states, 20, 6)
    for image in range(5):
        alone = choose(name, mapped(states, lambda part, image=image: part[image : image + 1]), 20, 6)
        assert torch.equal(alone.order[0], together.order[image])
        for one, all_of_them in zip(alone[1:], together[1:], strict=True):
            if one is not None:
                torch.testing.assert_close(one[0], all_of_them[image], rtol=0, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_coarse_states_are_compared_as_finely_as_float32(name: str, dtype: torch.dtype) -> None:
    coarse = tower_states(2, 64, dtype=dtype)
    chosen = choose(name, coarse, 16, 4)
    fine = choose(name, mapped(coarse, torch.Tensor.float), 16, 4)
    assert torch.equal(chosen.order, fine.order)
    for merged, exact in ((chosen.kept, fine.kept), (chosen.contextual, fine.contextual)):
        if merged is not None:
            assert merged.dtype == dtype
            torch.testing.assert_close(merged.float(), exact, rtol=2**-7, atol=1e-2)


@EVERY
def test_of_equal_patches_the_lowest_index_wins_and_none_is_taken_twice(name: str) -> None:
    states = mapped(tower_states(2, 49, seed=1), lambda part: part[:, :1].expand(-1, part.shape[1], *part.shape[2:]))
    states = states._replace(attention=torch.full((2, 49), 0.01))
    for dominant in (7, 49):
        kept = choose(name, states, dominant).order.tolist()
        assert [sorted(set(row)) for row in kept] == [sorted(row) for row in kept]
        if METHODS[name]["method"] not in ("vispruner", "prumerge+"):  # which also go by place
            assert kept == [list(range(dominant))] * 2
    twins = mapped(tower_states(2, 24, seed=2), lambda part: torch.cat([part, part], dim=1))
    for dominant in (24, 40):
        for row in choose(name, twins, dominant).order.tolist():
            assert len(set(row)) == dominant
            if METHODS[name]["method"] in ("divprune", "scope", "dpp"):
                assert set(row[:24]) == set(range(24))


class Unread(TorchDispatchMode):
    """Refuses what waits for a device: reading a number back, or a shape that depends on numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        assert name.split(".")[0] not in self.WAITING, f"{name} waits for the device"
        masks = [part for part in arguments[1] or () if part is not None] if name.startswith("index") else []
        assert not any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks), name
        return function(*arguments, **(keywords or {}))


@EVERY
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    states = tower_states(2, 64)
    with Unread():
        on_cpu = choose(name, states, 16, 4)
    shapes = choose(name, mapped(states, lambda part: part.to("meta")), 16, 4)
    for part, shape in zip(on_cpu, shapes, strict=True):
        assert (part is None) == (shape is None)
        assert part is None or (part.shape == shape.shape and part.dtype == shape.dtype)


@EVERY
@pytest.mark.parametrize("dominant", [64, 256])
def test_no_second_matrix_of_patches_by_patches(name: str, dominant: int) -> None:
    states = tower_states(2, 256, width=16)
    chosen = peak_tensor_bytes(lambda: choose(name, states, dominant), torch.device("cpu"))
    assert chosen < 1.9 * 2 * 256 * 256 * 4


@EVERY
def test_what_is_kept_and_merged_keeps_its_gradient(name: str) -> None:
    states = mapped(tower_states(2, 36), lambda part: part.requires_grad_())
    selection = choose(name, states, 9, 3)
    assert not selection.order.requires_grad
    tokens(states, selection).sum().backward()
    touched = states.patches.grad.abs().sum(dim=-1) > 0
    assert touched.gather(1, selection.order).all()
    if selection.groups is not None:
        assert touched.gather(1, selection.targets).all()
    assert all(part.grad is None for part in (states.attention, states.keys, states.projected))


@EVERY
def test_budgets_that_the_grid_cannot_fill_are_refused(name: str) -> None:
    states = tower_states(1, 9)
    assert choose(name, states, 0).order.shape == (1, 0)
    for dominant in (-1, 10):
        with pytest.raises(ReductionError, match=f"cannot keep {dominant} dominant patches of 9: choose 0 to 9"):
            choose(name, states, dominant)
    if merges(name):
        with pytest.raises(ReductionError, match="cannot merge 4 remaining patches into 5 contextual tokens"):
            choose(name, states, 5, 5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@EVERY
def test_a_model_fills_the_budget_with_every_method(name: str, tower: str) -> None:
    contextual = 2 if merges(name) else 0
    model = build(tower=tower, reduction="none")
    model.config.visionzip = {**METHODS[name], "dominant": 6, "contextual": contextual}
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    reduced = model.model.get_visual_tokens(pixels)
    selector = selector_of({**METHODS[name], "dominant": 6, "contextual": contextual})
    cls = int(tower == "clip" and selector.keeps_cls)
    assert reduced.tokens.shape == (2, 6 + contextual, 24)
    assert reduced.kept.shape == (2, 6 - cls)
    assert (reduced.kept.diff(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"method": "divprune", "space": "keys"}, "divprune: space is 'keys'; it must be one of"),
        ({"method": "vispruner", "important": 1.5}, "vispruner: important is 1.5; it must be a number from 0 to 1"),
        ({"method": "vispruner", "important": "half"}, "vispruner: important is 'half'; "),
        ({"method": "vispruner", "important": True}, "vispruner: important is True"),
        ({"method": "scope", "alpha": -0.5}, "scope: alpha is -0.5; it must be a number from 0"),
        ({"method": "scope", "alpha": float("nan")}, "scope: alpha is nan"),
        ({"method": "scope", "alpha": float("inf")}, "scope: alpha is inf"),
        ({"method": "duet", "window": 0}, "duet: window is 0; it must be a whole number from 1"),
        ({"method": "duet", "window": 2.5}, "duet: window is 2.5"),
        ({"method": "dpp", "alpha": 1}, "method dpp has no parameter 'alpha': it takes no parameters"),
        ({"method": "scope", "window": 1}, "method scope has no parameter 'window': it takes alpha"),
    ],
    ids=lambda part: " ".join(map(str, part.values())) if isinstance(part, dict) else "",
)
def test_parameters_out_of_range_are_refused(key: dict[str, object], message: str) -> None:
    with pytest.raises(ReductionError, match=message):
        validate_visionzip({"dominant": 4, "contextual": 0, **key})


def test_every_method_can_travel_to_the_hub() -> None:
    extras = (REDUCTION / "extras.py").read_text()
    for file, name in SELECTORS.values():
        assert re.search(rf"from \.{file} import \w", extras), f"extras.py does not import {name}"


def test_the_readme_s_new_method_is_a_selector(monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r'```python\n("""Keep the patches.*?)```', (REDUCTION / "README.md").read_text(), re.DOTALL)
    assert code is not None
    module = types.ModuleType("shortzip.reduction.longest")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code[1], module.__dict__)
    monkeypatch.setitem(SELECTORS, "longest", ("longest", "Longest"))
    selector = selector_of({"method": "longest", "power": 1.0})
    states = tower_states(2, 16)
    lengths = states.patches.abs().sum(dim=-1)
    assert torch.equal(selector.select(states, 4, 0).order, lengths.topk(4).indices)
    with pytest.raises(ReductionError, match="method longest has no parameter 'alpha': it takes power"):
        selector_of({"method": "longest", "alpha": 1.0})


def test_every_method_has_a_case() -> None:
    assert {case["method"] for case in METHODS.values()} == set(SELECTORS)
