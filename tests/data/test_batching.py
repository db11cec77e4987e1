"""The samples of a global batch depend on seed and position alone; every process gets as many micro-batches."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortzip.data.batching import (
    BatchPlan,
    GlobalBatch,
    cut_into_groups,
    micro_batches_of,
    padding_share,
    permutation,
)
from shortzip.data.generated.mixture import estimated_length, rows_of_the_mix

LENGTHS = [int(length) for length in 40 + permutation(100, 7, 7) % 61]


def plan(**settings: object) -> BatchPlan:
    given: dict[str, object] = {"seed": 3, "num_epochs": 2, "micro_batch_size": 4, **settings}
    return BatchPlan(LENGTHS, 16, **given)  # type: ignore[arg-type]


def rows_of(batch: GlobalBatch) -> list[int]:
    return [row for process in batch.micro_batches for micro in process for row in micro]


def splitmix64(value: int) -> int:
    """The published generator (Steele, Lea, Flood 2014) in Python's whole numbers."""
    limit = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & limit
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & limit
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & limit
    return value ^ (value >> 31)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (5, 2), (2**40, 1), (-1, 3)])
def test_the_order_is_the_same_on_every_machine(seed: int, epoch: int) -> None:
    salt = splitmix64(splitmix64(seed & (1 << 64) - 1) ^ epoch)
    expected = sorted(range(1000), key=lambda number: splitmix64(number ^ salt))
    assert permutation(1000, seed, epoch).tolist() == expected


def test_the_order_of_published_runs_stays() -> None:
    """Changing the order would change every seed's run, and no resumed run would notice."""
    digest = hashlib.sha256(permutation(1000, 5, 2).astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("56bb8da651f7b788")


def test_each_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    orders = [permutation(500, seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(500))
    for one, other in itertools.combinations(orders, 2):
        # Two independent permutations agree in one place on average.
        assert (one == other).sum() < 8


@pytest.mark.parametrize("settings", [{"micro_batch_size": 1}, {"num_processes": 3}, {"num_processes": 8}])
def test_global_batches_do_not_depend_on_processes_or_micro_batches(settings: dict[str, int]) -> None:
    for one, other in zip(plan().batches(), plan(**settings).batches(), strict=True):
        assert one.samples == other.samples
        assert sorted(rows_of(one)) == sorted(rows_of(other)) == sorted(one.samples)


def test_a_run_sees_every_sample_once_an_epoch() -> None:
    batches = list(plan().batches())
    assert len(batches) == plan().total_steps == 13
    stream = [sample for batch in batches for sample in batch.samples]
    assert sorted(stream[:100]) == sorted(stream[100:]) == list(range(100))
    assert stream[:100] != stream[100:]
    # The last global batch is what is left, and a global batch may reach over the end of an epoch.
    assert [len(batch.samples) for batch in batches] == [16] * 12 + [8]


@pytest.mark.parametrize(("epochs", "samples"), [(0.5, 50), (1, 100), (1.25, 125), (0.001, 1)])
def test_a_fraction_of_an_epoch(epochs: float, samples: int) -> None:
    batches = list(plan(num_epochs=epochs).batches())
    assert sum(len(batch.samples) for batch in batches) == samples
    assert batches[-1].next_position == samples


@pytest.mark.parametrize("position", [0, 1, 15, 16, 99, 100, 131])
def test_a_run_goes_on_from_any_sample(position: int) -> None:
    stream = [sample for batch in plan().batches() for sample in batch.samples]
    resumed = [sample for batch in plan().batches(position) for sample in batch.samples]
    assert resumed == stream[position:]


def test_another_global_batch_size_goes_on_with_the_same_stream() -> None:
    stream = [sample for batch in plan().batches() for sample in batch.samples]
    wider = BatchPlan(LENGTHS, 50, seed=3, num_epochs=2, micro_batch_size=4)
    assert [sample for batch in wider.batches(32) for sample in batch.samples] == stream[32:]


@pytest.mark.parametrize(("before", "after"), [((2, 4), (1, 4)), ((1, 4), (2, 4)), ((2, 4), (2, 3)), ((3, 5), (2, 7))])
@pytest.mark.parametrize("position", [16, 80, 96])  # within the first epoch, and at and after its end
def test_a_run_that_goes_on_with_other_processes_and_cuts_leaves_out_no_sample_and_takes_none_twice(
    before: tuple[int, int], after: tuple[int, int], position: int
) -> None:
    """By listing what all processes are given: two epochs, each sample once in each."""

    def seen(cut: tuple[int, int], start: int) -> list[list[int]]:
        processes, rows = cut
        cut_plan = plan(num_processes=processes, micro_batch_size=rows)
        samplers = [micro_batches_of(cut_plan.batches(start), process) for process in range(processes)]
        steps = []
        for batch in cut_plan.batches(start):
            counts = [len(micro_batches) for micro_batches in batch.micro_batches]
            taken = [next(sampler) for sampler, count in zip(samplers, counts, strict=True) for _ in range(count)]
            steps.append([sample for micro_batch in taken for sample in micro_batch])
        assert all(next(sampler, None) is None for sampler in samplers)
        return steps

    first = [step for number, step in enumerate(seen(before, 0)) if number < position // 16]
    ids = [sample for step in first + seen(after, position) for sample in step]
    assert sorted(ids) == sorted([*range(len(LENGTHS))] * 2)
    expected = [sorted(batch.samples) for batch in plan().batches()]
    assert [sorted(step) for step in first + seen(after, position)] == expected


def test_a_run_without_end() -> None:
    endless = plan(num_epochs=None)
    assert endless.total_steps is None
    assert sum(len(batch.samples) for batch in itertools.islice(endless.batches(), 50)) == 800


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    processes=st.integers(1, 5),
    max_rows=st.none() | st.integers(1, 9),
    max_tokens=st.none() | st.integers(1, 900),
)
def test_any_cut_keeps_its_limits_and_its_rows(
    lengths: list[int], processes: int, max_rows: int | None, max_tokens: int | None
) -> None:
    if max_rows is None and max_tokens is None:
        max_rows = 3
    made = BatchPlan(
        lengths,
        len(lengths),
        num_processes=processes,
        micro_batch_size=max_rows,
        max_tokens_per_micro_batch=max_tokens,
    )
    batch = made.global_batch(0)
    assert sorted(rows_of(batch)) == list(range(len(lengths)))
    assert len(batch.micro_batches) == processes
    assert len({len(micro_batches) for micro_batches in batch.micro_batches}) == 1
    for micro in itertools.chain.from_iterable(batch.micro_batches):
        assert max_rows is None or len(micro) <= max_rows
        held = [lengths[row] for row in micro]
        assert max_tokens is None or len(held) <= 1 or len(held) * max(held) <= max_tokens
    assert made.global_batch(0).micro_batches == batch.micro_batches


def cost(groups: list[tuple[int, int]], lengths: list[int], overhead: int) -> int:
    return sum((end - start) * (lengths[start] if end > start else 0) + overhead for start, end in groups)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    max_rows=st.integers(1, 8),
    max_tokens=st.none() | st.integers(20, 200),
    multiple=st.integers(1, 3),
    overhead=st.sampled_from([0, 5, 40]),
)
def test_no_cut_computes_less(
    lengths: list[int], max_rows: int, max_tokens: int | None, multiple: int, overhead: int
) -> None:
    lengths = sorted(lengths, reverse=True)
    count = len(lengths)
    found = cut_into_groups(np.asarray(lengths), max_rows, max_tokens, multiple, overhead)
    assert len(found) % multiple == 0
    best = None
    for places in range(count):
        for cuts in itertools.combinations(range(1, count), places):
            groups = list(itertools.pairwise((0, *cuts, count)))
            if any(end - start > max_rows for start, end in groups):
                continue
            if max_tokens and any(
                end - start > 1 and (end - start) * lengths[start] > max_tokens for start, end in groups
            ):
                continue
            groups += [(count, count)] * (-len(groups) % multiple)
            total = cost(groups, lengths, overhead)
            best = total if best is None else min(best, total)
    assert cost(found, lengths, overhead) == best


def test_fewer_samples_than_processes_leave_some_with_an_empty_micro_batch() -> None:
    batch = BatchPlan([5, 6], 2, num_processes=4, micro_batch_size=8).global_batch(0)
    assert sorted(len(rows) for process in batch.micro_batches for rows in process) == [0, 0, 1, 1]


def test_processes_get_about_the_same_work() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5.5, 0.5, 256).astype(int).tolist()
    made = BatchPlan(lengths, 128, num_processes=4, micro_batch_size=4)
    for batch in made.batches():
        work = [
            sum(len(rows) * max(lengths[row] for row in rows) for rows in process) for process in batch.micro_batches
        ]
        assert max(work) < 1.1 * min(work)


def test_padding_at_the_default_recipe_stays_under_5_percent() -> None:
    rows = [row for row in rows_of_the_mix(0, 1500) if "image" in row]
    lengths = [estimated_length(row, visual_tokens=64) for row in rows]
    chosen = BatchPlan(lengths, 128, micro_batch_size=8)
    assert padding_share(chosen) < 0.05
    random_order = BatchPlan(lengths, 8, micro_batch_size=8)
    # cut_into_groups may split a batch of 8 rows too, so this is less than what plain random batches pad.
    assert padding_share(random_order) > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batch_size": None}, "give micro_batch_size"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; at least 1"),
        ({"max_tokens_per_micro_batch": -1}, "max_tokens_per_micro_batch is -1; at least 1"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**settings)


def test_an_empty_dataset_and_positions_outside_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        BatchPlan([], 4, micro_batch_size=1)
    for position in (-1, 200):
        with pytest.raises(ValueError, match=f"position {position} is outside the run of 200 samples"):
            plan().global_batch(position)
    assert list(plan().batches(200)) == []
