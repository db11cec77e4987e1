"""A budget for each image: what chooses it, what is refused, and the placeholders that the processors write."""

import pytest
import torch
from PIL import Image
from reduced_models import VISIONZIP
from tiny import write_next_release

from shortzip.reduction import ReducedLlavaNextProcessor, ReducedLlavaProcessor
from shortzip.reduction.configuration_reduced_llava import validate_visionzip
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.image_budgets import (
    budget_of,
    budgets_by_coverage,
    budgets_by_detail,
    check_budgets,
    covered,
    detail,
    most_tokens,
    validate_per_image,
)
from shortzip.reduction.reductions import Reductions

COVERAGE = {"chooser": "coverage", "coverage": 0.6, "min": 2, "max": 9}
BY_IMAGE = {"chooser": "image", "scale": 40.0, "min": 3, "max": 20}


def by(per_image, **key):
    return {**VISIONZIP, **key, "per_image": per_image}


def pictures():
    """Flat, and one with much in it."""
    noise = torch.randint(0, 256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.new("RGB", (40, 40), (90, 90, 90)), Image.fromarray(noise.numpy())]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, (1, 0)), (2, (1, 1)), (3, (2, 1)), (6, (4, 2)), (9, (6, 3)), (16, (11, 5))],
)
def test_dominant_and_contextual_keep_the_shares_of_the_config(tokens, expected):
    key = budget_of(by(COVERAGE), tokens)
    assert (key["dominant"], key["contextual"]) == expected
    assert "per_image" not in key
    assert budget_of({"dominant": 1, "contextual": 10}, 1) == {"dominant": 1, "contextual": 0}  # one is dominant


def test_coverage_is_the_fewest_patches_that_reach_the_share():
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(20, 16, generator=generator) ** 4
    for share in (0.05, 0.3, 0.6, 0.9, 1.0):
        key = {"dominant": 6, "contextual": 0, "method": "fastervlm", "per_image": {**COVERAGE, "coverage": share}}
        for scores, found in zip(attention, budgets_by_coverage(attention, key, cls=0), strict=True):
            by_hand, ranked = 0, sorted(scores.double().tolist(), reverse=True)
            while sum(ranked[:by_hand]) < share * sum(ranked) - 1e-9:
                by_hand += 1
            assert found == min(max(by_hand, 2), 9)


def test_coverage_counts_the_dominant_patches_of_a_budget_that_merges():
    """4 + 2 with CLS: 9 tokens are 6 dominant, CLS and 5 patches; these must reach the share."""
    attention = torch.tensor([[5.0, 1, 1, 1, 1, 1], [2.0, 2, 2, 2, 1, 1]])
    # dominant patches of 2 to 9 tokens: 0 1 2 2 3 4 4 5
    assert budgets_by_coverage(attention, by({**COVERAGE, "coverage": 0.5}), cls=1) == [3, 6]
    assert budgets_by_coverage(attention, by({**COVERAGE, "coverage": 1.0}), cls=1) == [9, 9]


def test_coverage_adds_up_over_the_tiles_of_an_image():
    attention = torch.tensor([[8.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 1, 1, 1]])
    shares = covered(attention, [0, 1, 4], [2, 1])
    torch.testing.assert_close(shares, torch.tensor([[0, 9 / 12, 1], [0, 1 / 4, 1]], dtype=torch.float64))


def test_coverage_is_the_same_whatever_else_is_in_the_batch():
    attention = torch.rand(33, 144, generator=torch.Generator().manual_seed(2))
    key = by({**COVERAGE, "max": 100})
    together = budgets_by_coverage(attention, key, cls=1)
    assert together == [budgets_by_coverage(row[None], key, cls=1)[0] for row in attention]
    assert len(set(together)) > 3


def test_detail_grows_with_what_is_to_be_seen():
    flat = torch.full((1, 3, 64, 64), 0.7)
    edge = flat.clone()
    edge[..., 32:] = -0.7
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    values = detail(torch.cat([flat, edge, noise])).tolist()
    assert values[0] == 0 < values[1] < values[2]
    assert values[1] == pytest.approx(1.4 / 31)  # one step in each row of a thumbnail of 32
    assert detail(noise).tolist() == values[2:]


def test_detail_is_scaled_and_held_between_min_and_max():
    assert budgets_by_detail([0.0, 0.1, 0.26, 9.0], BY_IMAGE) == [3, 4, 10, 20]


@pytest.mark.parametrize(
    ("per_image", "words"),
    [
        ("coverage", "got 'coverage'"),
        ({"chooser": "most"}, r"\{chooser: image"),
        ({"chooser": ["fixed"]}, "got"),
        ({"chooser": "fixed", "min": 3}, "min: 3, which fixed does not take"),
        ({"chooser": "coverage", "coverage": 0.5}, "min, max missing"),
        ({"chooser": "coverage", "coverage": 0.5, "min": 3, "max": None}, "max missing"),
        ({**COVERAGE, "scale": 1.0}, "scale: 1.0, which coverage does not take"),
        ({**COVERAGE, "coverage": 1.5}, r"above 0 to 1.*got coverage: 1.5"),
        ({**COVERAGE, "coverage": 0}, "got coverage: 0"),
        ({**COVERAGE, "coverage": True}, "got coverage: True"),
        ({**COVERAGE, "coverage": float("nan")}, "got coverage: nan"),
        ({**COVERAGE, "min": 0}, "got min: 0"),
        ({**COVERAGE, "min": 2.5}, "got min: 2.5"),
        ({**COVERAGE, "max": 1}, "got max: 1, with min: 2"),
        ({**BY_IMAGE, "scale": -1}, "got scale: -1"),
    ],
)
def test_what_is_no_budget_per_image(per_image, words):
    with pytest.raises(ReductionError, match=words):
        validate_per_image(by(per_image))
    with pytest.raises(ReductionError, match=words):
        validate_visionzip(by(per_image))


@pytest.mark.parametrize("method", ["divprune", "random"])
def test_coverage_needs_a_method_that_looks_at_attention(method):
    with pytest.raises(ReductionError, match=f"method {method} looks at none"):
        validate_visionzip(by(COVERAGE, contextual=0, method=method))
    validate_visionzip(by(BY_IMAGE, contextual=0, method=method))


@pytest.mark.parametrize("method", ["grid", "pool", "downsample"])
def test_a_chooser_gives_numbers_that_make_no_grid(method):
    with pytest.raises(ReductionError, match=f"method {method} takes only those that make a grid"):
        validate_visionzip(by(BY_IMAGE, contextual=0, method=method))
    validate_visionzip(by({"chooser": "fixed"}, contextual=0, method=method))


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ([16], "1 numbers, and there are 2 images"),
        ([16, 64, 3], "3 numbers"),
        (16, "needed is a list"),
        ([16, 0], r"budgets\[1\] is 0; it must be a whole number from 1 to 37"),
        ([38, 1], r"budgets\[0\] is 38; it must be a whole number from 1 to 37"),
        ([4, 2.0], r"budgets\[1\] is 2.0"),
        ([True, 4], r"budgets\[0\] is True"),
    ],
)
def test_budgets_of_a_call_are_checked(tiny_release, budgets, words):
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=VISIONZIP)
    with pytest.raises(ReductionError, match=words):
        processor(images=pictures(), text="<image> and <image>", budgets=budgets)
    with pytest.raises(ReductionError, match=words):
        check_budgets(budgets, 2, most_tokens(VISIONZIP, 6, has_cls=True))


def test_budgets_where_there_is_nothing_to_choose(tiny_release):
    plain = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=None)
    with pytest.raises(ReductionError, match="visionzip is null"):
        plain(images=pictures(), text="<image><image>", budgets=[3, 4])
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=VISIONZIP)
    with pytest.raises(ReductionError, match="no images"):
        processor(text="hello", budgets=[3])
    pool = ReducedLlavaProcessor.from_pretrained(
        tiny_release, visionzip={"dominant": 6, "contextual": 0, "method": "pool"}
    )
    with pytest.raises(ReductionError, match="7 tokens make no grid"):
        pool(images=pictures(), text="<image><image>", budgets=[6, 7])


def counts_of(processor, inputs):
    return (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()


def test_a_processor_writes_each_image_its_budget(tiny_release):
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=VISIONZIP)
    texts = ["<image> hello", "hello", "<image> what <image>"]
    images = [*pictures(), pictures()[0]]
    inputs = processor(images=images, text=texts, budgets=[3, 16, 1], padding=True, return_tensors="pt")
    assert counts_of(processor, inputs) == [3, 0, 17]
    assert inputs["image_budgets"].tolist() == [3, 16, 1]
    assert counts_of(processor, processor(images=images, text=texts, padding=True, return_tensors="pt")) == [6, 0, 12]


def test_a_processor_of_tiles_takes_a_budget_for_each_tile_of_an_image(tmp_path):
    processor = ReducedLlavaNextProcessor.from_pretrained(write_next_release(tmp_path), visionzip=VISIONZIP)
    images = [Image.new("RGB", (50, 20)), Image.new("RGB", (24, 24))]
    inputs = processor(
        images=images, text=["<image> a", "<image> b"], budgets=[4, 7], padding=True, return_tensors="pt"
    )
    sizes = inputs["image_sizes"].tolist()
    announced = processor._get_num_multimodal_tokens(image_sizes=sizes, budgets=[4, 7])["num_image_tokens"]
    assert counts_of(processor, inputs) == announced
    assert announced[0] % 4 == 0
    assert announced[1] % 7 == 0


def test_the_picture_alone_tells_a_processor_its_budget(tiny_release):
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=by(BY_IMAGE))
    inputs = processor(images=pictures(), text=["<image> a", "<image> b"], padding=True, return_tensors="pt")
    expected = budgets_by_detail(detail(inputs["pixel_values"]).tolist(), BY_IMAGE)
    assert counts_of(processor, inputs) == expected == inputs["image_budgets"].tolist()
    assert expected[0] == 3 < expected[1]
    given = processor(images=pictures(), text=["<image> a", "<image> b"], budgets=[5, 5], return_tensors="pt")
    assert counts_of(processor, given) == [5, 5]


def test_what_a_size_alone_does_not_tell_is_refused(tiny_release):
    """As engines ask that build the model themselves."""
    for per_image in (COVERAGE, BY_IMAGE):
        processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=by(per_image))
        with pytest.raises(ReductionError, match="its size alone does not tell"):
            processor._get_num_multimodal_tokens(image_sizes=[[24, 24]])
    with pytest.raises(ReductionError, match="coverage finds an image's budget in a pass of the tower"):
        ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=by(COVERAGE))(
            images=pictures()[0], text="<image>"
        )


def test_it_is_saved_with_the_processor_and_is_part_of_a_reduction(tmp_path, tiny_release):
    processor = ReducedLlavaProcessor.from_pretrained(tiny_release, visionzip=by(COVERAGE))
    processor.save_pretrained(tmp_path)
    assert ReducedLlavaProcessor.from_pretrained(tmp_path).visionzip == by(COVERAGE)
    reductions = Reductions(by(COVERAGE))
    assert Reductions.from_config(reductions.as_config()) == reductions
    assert reductions.visionzip["per_image"] == COVERAGE
    assert Reductions(by(None)) == Reductions(VISIONZIP)
