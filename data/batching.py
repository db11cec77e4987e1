"""Which samples stand in which global batch, and how a global batch is cut into micro-batches.

A run is a stream of samples: epoch after epoch, each a permutation of all samples. A global batch is the next
`global_batch_size` samples of the stream. So the position in a run is a count of samples, and the samples of a global
batch depend on (seed, position) alone, on no process count, micro-batch size or machine.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shortzip.data.errors import UserError

# A micro-batch costs about as much as this many tokens before its first token (kernel launches, the gradient's
# all-reduce): one more micro-batch must save more padding than that.
MICRO_BATCH_OVERHEAD = 256


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step's samples.

    Attributes:
        position: samples of the run before this global batch.
        samples: sample numbers, in the order of the stream.
        micro_batches: per process, the micro-batches (lists of sample numbers); the same number on every process. A
            micro-batch may be empty where there are fewer samples than processes: the process still takes part.
    """

    position: int
    samples: list[int]
    micro_batches: list[list[list[int]]]

    @property
    def next_position(self) -> int:
        """Where the next global batch begins."""
        return self.position + len(self.samples)


class BatchPlan:
    """The global batches of a run.

    Args:
        lengths: tokens of each sample, visual tokens included.
        global_batch_size: samples per optimizer step.
        seed: of the order.
        num_epochs: how often each sample is seen; a fraction is allowed (0.5: half of the samples). None: without end.
        num_processes: how many processes share a global batch.
        micro_batch_size: most rows in a micro-batch.
        max_tokens_per_micro_batch: most tokens in a micro-batch, padding included; a row longer than that stands
            alone. Give one of the two or both.

    Attributes:
        in_time: what gives the lengths [n] int64 of samples at a position, where they change in the course of a run.

    Raises:
        ValueError: no samples, no limit on the micro-batch, or a number below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        *,
        seed: int = 0,
        num_epochs: float | None = 1,
        num_processes: int = 1,
        micro_batch_size: int | None = None,
        max_tokens_per_micro_batch: int | None = None,
    ) -> None:
        if not len(lengths):
            raise UserError("there are no samples to batch: the dataset is empty, or every row was dropped")
        limits = {
            "global_batch_size": global_batch_size,
            "num_processes": num_processes,
            "micro_batch_size": micro_batch_size,
            "max_tokens_per_micro_batch": max_tokens_per_micro_batch,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; at least 1")
        if micro_batch_size is None and max_tokens_per_micro_batch is None:
            raise UserError("give micro_batch_size, max_tokens_per_micro_batch, or both")
        if num_epochs is not None and num_epochs <= 0:
            raise UserError(f"num_epochs is {num_epochs}; above 0, or None for no end")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_processes = num_processes
        self.micro_batch_size = micro_batch_size
        self.max_tokens = max_tokens_per_micro_batch
        self.total_samples = None if num_epochs is None else max(1, round(len(lengths) * num_epochs))
        self.in_time: Callable[[int, Sequence[int]], np.ndarray] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run; the last global batch may be smaller. None: without end."""
        return None if self.total_samples is None else -(-self.total_samples // self.global_batch_size)

    def samples(self, position: int, count: int) -> list[int]:
        """Sample numbers `position` to `position + count` of the stream, over the ends of epochs."""
        numbers: list[int] = []
        while len(numbers) < count:
            epoch, offset = divmod(position + len(numbers), len(self.lengths))
            numbers += self._epoch(epoch)[offset : offset + count - len(numbers)].tolist()
        return numbers

    def global_batch(self, position: int) -> GlobalBatch:
        """The global batch that begins at a position, cut into micro-batches.

        Args:
            position: samples of the run before it, 0 or more.

        Raises:
            ValueError: the position is negative, or the run has ended there.
        """
        left = self.global_batch_size
        if self.total_samples is not None:
            left = min(left, self.total_samples - position)
        if position < 0 or left <= 0:
            raise UserError(f"position {position} is outside the run of {self.total_samples} samples")
        samples = self.samples(position, left)
        return GlobalBatch(position, samples, self._cut(samples, self.lengths_of(position, samples)))

    def batches(self, position: int = 0) -> Iterator[GlobalBatch]:
        """Every global batch from a position on, to the end of the run."""
        while self.total_samples is None or position < self.total_samples:
            batch = self.global_batch(position)
            yield batch
            position = batch.next_position

    def lengths_of(self, position: int, samples: Sequence[int]) -> np.ndarray:
        """Tokens of samples in the global batch that begins at a position: [n] int64."""
        return self.lengths[samples] if self.in_time is None else self.in_time(position, samples)

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(len(self.lengths), self.seed, epoch))
        return self._order[1]

    def _cut(self, samples: list[int], lengths: np.ndarray) -> list[list[list[int]]]:
        order = np.argsort(-lengths, kind="stable")
        groups = cut_into_groups(
            lengths[order], self.micro_batch_size, self.max_tokens, multiple_of=self.num_processes
        )
        # Largest first to the process with the least so far, each getting its share of the count: nobody waits long.
        micro_batches: list[list[list[int]]] = [[] for _ in range(self.num_processes)]
        loads = [0] * self.num_processes
        per_process = len(groups) // self.num_processes
        costs = [int(lengths[order[start]]) * (end - start) if end > start else 0 for start, end in groups]
        for number in sorted(range(len(groups)), key=lambda group: (-costs[group], group)):
            open_to = [process for process in range(self.num_processes) if len(micro_batches[process]) < per_process]
            process = min(open_to, key=lambda candidate: (loads[candidate], candidate))
            start, end = groups[number]
            micro_batches[process].append([samples[place] for place in order[start:end]])
            loads[process] += costs[number]
        return micro_batches


def micro_batches_of(batches: Iterable[GlobalBatch], process_index: int = 0) -> Iterator[list[int]]:
    """One process's micro-batches, in order: a `batch_sampler` for torch's DataLoader, for one pass."""
    for batch in batches:
        yield from batch.micro_batches[process_index]


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … count - 1, [count] int64, the same on every machine and library version.

    The numbers are sorted by a hash (splitmix64) of seed, epoch and number: integer arithmetic only.
    """
    key = np.asarray([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
    with np.errstate(over="ignore"):
        salt = _splitmix64(_splitmix64(key[:1]) ^ key[1:])
        hashed = _splitmix64(np.arange(count, dtype=np.uint64) ^ salt)
    return np.argsort(hashed, kind="stable")


def _splitmix64(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def cut_into_groups(
    lengths: np.ndarray,
    max_rows: int | None,
    max_tokens: int | None,
    multiple_of: int = 1,
    overhead: int = MICRO_BATCH_OVERHEAD,
) -> list[tuple[int, int]]:
    """Cut rows, sorted by falling length, into runs of neighbours so that as little as possible is computed.

    Minimises the sum over groups of (rows x longest row + overhead), exactly, by dynamic programming.

    Args:
        lengths: [n] int64, falling.
        max_rows: most rows of a group; None: no limit.
        max_tokens: most rows x longest row of a group; None: no limit. A row longer than that stands alone.
        multiple_of: the number of groups is a multiple of this; empty groups are added when rows run out.
        overhead: cost of a group in tokens.

    Returns:
        Ranges (start, end) in order, the first `len` of them not empty.
    """
    count = len(lengths)
    rows_from = [_most_rows(int(length), max_rows, max_tokens, count) for length in lengths]
    # cheapest[r, i]: cost of cutting the first i rows into a number of groups that leaves r modulo `multiple_of`.
    infinite = np.iinfo(np.int64).max // 4
    cheapest = np.full((multiple_of, count + 1), infinite, dtype=np.int64)
    came_from = np.zeros((multiple_of, count + 1), dtype=np.int64)
    cheapest[0, 0] = 0
    for start in range(count):
        reach = min(count, start + rows_from[start])
        sizes = np.arange(1, reach - start + 1, dtype=np.int64)
        for rest in range(multiple_of):
            if cheapest[rest, start] >= infinite:
                continue
            costs = cheapest[rest, start] + sizes * lengths[start] + overhead
            after = (rest + 1) % multiple_of
            better = costs < cheapest[after, start + 1 : reach + 1]
            cheapest[after, start + 1 : reach + 1][better] = costs[better]
            came_from[after, start + 1 : reach + 1][better] = start
    # With fewer rows than the multiple, or a count that cannot be split further, empty groups make up the number.
    totals = [int(cheapest[rest, count]) + (-rest % multiple_of) * overhead for rest in range(multiple_of)]
    rest = int(np.argmin(totals))
    empty = -rest % multiple_of
    return _read_back(came_from, rest) + [(count, count)] * empty


def _read_back(came_from: np.ndarray, rest: int) -> list[tuple[int, int]]:
    """The groups in order, from where each cheapest cut's last group begins (`came_from`: [multiple, rows + 1])."""
    groups: list[tuple[int, int]] = []
    end = came_from.shape[1] - 1
    while end > 0:
        start = int(came_from[rest, end])
        groups.append((start, end))
        rest, end = (rest - 1) % came_from.shape[0], start
    return groups[::-1]


def _most_rows(length: int, max_rows: int | None, max_tokens: int | None, count: int) -> int:
    rows = count if max_rows is None else max_rows
    if max_tokens is not None:
        rows = min(rows, max_tokens // max(length, 1))
    return max(rows, 1)


def padding_share(plan: BatchPlan, steps: int | None = None) -> float:
    """Share of computed tokens that are padding over the first `steps` global batches (None: all), 0 to 1."""
    computed = held = 0
    for number, batch in enumerate(plan.batches()):
        if steps is not None and number >= steps:
            break
        for process in batch.micro_batches:
            for rows in process:
                if rows:
                    lengths = plan.lengths[rows]
                    computed += int(lengths.max()) * len(rows)
                    held += int(lengths.sum())
    return 1 - held / computed if computed else 0.0
