"""Batch samplers: steps shared evenly by several processes, and batches of like length within a budget."""

import heapq
from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Protocol

import numpy as np
from torch.utils.data import BatchSampler, Sampler


class Order(Sized, Protocol):
    """A sampler of indices that knows how many there are."""

    def __iter__(self) -> Iterator[int]:
        """Iterate over the indices."""


class EvenBatchSampler(BatchSampler):
    """
    Share every step evenly by all ranks, with each utterance in one batch.

    Every `ranks` batches in a row make one step, one batch for each rank, as accelerate distributes them. A step takes
    what one process with a batch `ranks` times as large would take. The last step is divided as evenly as possible,
    where the samplers of torch and accelerate repeat or drop utterances; when there are fewer utterances than ranks for
    it, they join the step before.

    Args:
        sampler: the order of the data set, the same on all ranks; accelerate replaces it by its seeded one.
        batch_size: utterances of one rank in a full step.
        ranks: number of processes.
        drop_last: leave out a last step that is not full.

    Raises:
        ValueError: for fewer utterances than ranks.
    """

    # No `batch_size`: accelerate would look for batches of just that size.
    def __init__(self, sampler: Order, batch_size: int, ranks: int, drop_last: bool = False):
        if len(sampler) < ranks:
            raise ValueError(f"{len(sampler)} utterances are too few for {ranks} processes: each must have one.")
        self.sampler: Order = sampler  # accelerate reads and replaces this attribute
        self.per_rank = batch_size
        self.ranks = ranks
        self.drop_last = drop_last

    def _steps(self) -> Iterator[list[int]]:
        size, order = self.per_rank * self.ranks, iter(self.sampler)
        step = list(islice(order, size))
        while step:
            following = list(islice(order, size))
            if 0 < len(following) < self.ranks and not self.drop_last:
                step, following = step + following, []
            if len(step) >= size or not self.drop_last:
                yield step
            step = following

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            for rank in range(self.ranks):
                yield step[len(step) * rank // self.ranks : len(step) * (rank + 1) // self.ranks]

    def __len__(self) -> int:
        steps, remainder = divmod(len(self.sampler), self.per_rank * self.ranks)
        has_smaller_step = remainder > 0 and not self.drop_last and (remainder >= self.ranks or not steps)
        return (steps + has_smaller_step) * self.ranks


def budget_shares(lengths: Sequence[Sequence[float]] | np.ndarray, budgets: Sequence[float]) -> np.ndarray:
    """
    Return the largest share that each utterance takes of any budget.

    Utterances fit one batch when their number times the largest of their shares is at most 1, because the others are
    padded to the longest.

    Args:
        lengths: of every utterance by each measure (seconds, tokens, …), shape `(utterances, measures)`.
        budgets: of a batch by each measure, padding included.

    Returns:
        `np.ndarray` of shape `(utterances,)`.
    """
    return (np.asarray(lengths, dtype=np.float64) / np.asarray(budgets, dtype=np.float64)).max(axis=1)


class LengthBatchSampler(Sampler[list[int]]):
    """
    Batch utterances of like length within a budget, each utterance once.

    In every epoch, utterances are shuffled among the batches of the same size; the number of batches, and so of steps,
    stays the same. Every `ranks` batches in a row make one step, one batch for each rank, as accelerate distributes
    them; they are of like length, so that no rank waits for another.

    Args:
        shares: of the budget, by utterance, each above 0 and at most 1 (see `budget_shares`).
        ranks: number of processes. Where it does not divide the number of batches, the largest are halved.
        seed: decides the order, together with the epoch.

    Raises:
        ValueError: for a share above 1, or fewer utterances than ranks.
    """

    # No `batch_size`: accelerate would look for batches of just that size.
    def __init__(self, shares: Sequence[float] | np.ndarray, ranks: int = 1, seed: int = 0):
        shares = np.asarray(shares, dtype=np.float64)
        if len(shares) < ranks:
            raise ValueError(f"{len(shares)} utterances are too few for {ranks} processes: each must have one.")
        if shares.max() > 1:
            raise ValueError(f"the longest utterance takes {shares.max():.2f} times the budget of a batch.")
        self.ranks = ranks
        self.seed = seed
        self.epoch = 0
        self._order = np.argsort(-shares, kind="stable")
        self._groups = self._group(shares[self._order])

    def _group(self, shares: np.ndarray) -> list[tuple[int, int, list[int]]]:
        """
        Divide utterances, the longest first, into groups whose batches have the same size.

        Each member of a group fits any of its batches, because even the longest, its first, does.

        Args:
            shares: in descending order.

        Returns:
            The start and the end of each group in `shares`, and the sizes of its batches.
        """
        groups: list[tuple[int, int, list[int]]] = []
        start = 0
        while start < len(shares):
            size = int(1 / shares[start] + 1e-9)
            # Up to the first utterance that is short enough for one more in a batch, but in full batches.
            end = int(np.searchsorted(-shares, -1 / (size + 1), side="left"))
            end = min(start + -(-(end - start) // size) * size, len(shares))
            groups.append((start, end, [min(size, end - first) for first in range(start, end, size)]))
            start = end
        return self._halve_largest(groups)

    def _halve_largest(self, groups: list[tuple[int, int, list[int]]]) -> list[tuple[int, int, list[int]]]:
        """Halve the largest batches until their number is a multiple of the number of ranks."""
        largest = [(-size, number) for number, (_, _, sizes) in enumerate(groups) for size in sizes]
        heapq.heapify(largest)
        while len(largest) % self.ranks:
            size, number = heapq.heappop(largest)
            if size == -1:
                raise ValueError(
                    f"{groups[-1][1]} batches of one utterance cannot be divided among {self.ranks} processes: raise "
                    "the budget of a batch."
                )
            heapq.heappush(largest, (size // 2, number))
            heapq.heappush(largest, (size - size // 2, number))
        sizes: list[list[int]] = [[] for _ in groups]
        for size, number in sorted(largest):
            sizes[number].append(-size)
        return [(start, end, of_group) for (start, end, _), of_group in zip(groups, sizes, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, before its iterator is created."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(sizes) for _, _, sizes in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = []
        for start, end, sizes in self._groups:
            indices = rng.permutation(self._order[start:end])
            batches += np.split(indices, np.cumsum(sizes)[:-1])
        for step in rng.permutation(len(batches) // self.ranks):
            for rank in rng.permutation(self.ranks):
                yield batches[step * self.ranks + rank].tolist()
