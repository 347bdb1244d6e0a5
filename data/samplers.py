"""Batches: for several processes that together are the data set, once; of like length, within a budget."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import BatchSampler, Sampler


class EvenBatches(BatchSampler):
    """
    Batches of which `ranks` in turn make one step, as accelerate deals them out: one to each rank. A step takes what
    one process with a batch `ranks` times as large would take, and every utterance is taken once: the last step is
    shared out as evenly as can be, where samplers of torch and accelerate repeat or drop utterances. Fewer than one for
    each rank go with the step before.

    Args:
        sampler: the order of the data set, the same on all ranks; accelerate puts in its seeded one.
        batch_size: utterances of one rank in a full step.
        ranks: number of processes.
        drop_last: leave out a last step that is not full.

    Raises:
        ValueError: for fewer utterances than ranks.
    """

    # No `batch_size`: accelerate would look for batches of just that size.
    def __init__(self, sampler: Sampler[int], batch_size: int, ranks: int, drop_last: bool = False):
        if len(sampler) < ranks:
            raise ValueError(f"{len(sampler)} utterances are too few for {ranks} processes: each must have one.")
        self.sampler = sampler
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
        steps, rest = divmod(len(self.sampler), self.per_rank * self.ranks)
        more = rest and not self.drop_last and (rest >= self.ranks or not steps)
        return (steps + bool(more)) * self.ranks


def budget_shares(lengths: Sequence[Sequence[float]], budgets: Sequence[float]) -> np.ndarray:
    """
    The largest part that an utterance takes of any budget. Utterances fit one batch when their number times the largest
    of their shares is at most 1: the others are padded to the longest of them.

    Args:
        lengths: of every utterance by each measure, shape `(utterances, measures)`.
        budgets: of a batch by each measure, padding included.

    Returns:
        `np.ndarray` of shape `(utterances,)`.
    """
    return (np.asarray(lengths, dtype=np.float64) / np.asarray(budgets, dtype=np.float64)).max(axis=1)


class LengthBatches(Sampler[list[int]]):
    """
    Batches of places in a data set, which together are the data set, once. Utterances change places with those that
    make batches of the same size, anew in every epoch; the number of batches, and so of steps, stays the same.

    `ranks` batches in turn make one step, as accelerate deals them out, one to each rank; they are of like length, so
    that no rank waits for another.

    Args:
        shares: of the budget, by utterance, each above 0 and at most 1 (see `budget_shares`).
        ranks: number of processes. Where it does not divide the number of batches, the largest are halved.
        seed: with the epoch decides the order.

    Raises:
        ValueError: for a share above 1, or fewer utterances than ranks.
    """

    # No `batch_size`: accelerate would look for batches of just that size.
    def __init__(self, shares: Sequence[float], ranks: int = 1, seed: int = 0):
        shares = np.asarray(shares, dtype=np.float64)
        if len(shares) < ranks:
            raise ValueError(f"{len(shares)} utterances are too few for {ranks} processes: each must have one.")
        if shares.max() > 1:
            raise ValueError(f"the longest utterance takes {shares.max():.2f} times the budget of a batch.")
        self.ranks = ranks
        self.seed = seed
        self.epoch = 0
        self._order = np.argsort(-shares, kind="stable")
        self._groups = self._grouped(shares[self._order])

    def _grouped(self, shares: np.ndarray) -> list[tuple[int, int, list[int]]]:
        """
        Of `shares` in descending order, the stretches in which batches hold equally many: first, end, and the sizes of
        the batches. Each member of a stretch fits any of its batches, because even its first does.
        """
        groups = []
        start = 0
        while start < len(shares):
            size = int(1 / shares[start] + 1e-9)
            # On to the first that is small enough for one more in a batch, but in whole batches.
            end = int(np.searchsorted(-shares, -1 / (size + 1), side="left"))
            end = min(start + -(-(end - start) // size) * size, len(shares))
            groups.append((start, end, [min(size, end - first) for first in range(start, end, size)]))
            start = end
        largest = [(-size, number) for number, (_, _, sizes) in enumerate(groups) for size in sizes]
        heapq.heapify(largest)
        while len(largest) % self.ranks:
            size, number = heapq.heappop(largest)
            if size == -1:
                raise ValueError(
                    f"{len(shares)} batches of one utterance cannot be shared out to {self.ranks} processes: raise the "
                    "budget of a batch."
                )
            heapq.heappush(largest, (size // 2, number))
            heapq.heappush(largest, (size - size // 2, number))
        for _, _, sizes in groups:
            sizes.clear()
        for size, number in sorted(largest):
            groups[number][2].append(-size)
        return groups

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins, before its iterator is made."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(len(sizes) for _, _, sizes in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = []
        for start, end, sizes in self._groups:
            places = rng.permutation(self._order[start:end])
            batches += np.split(places, np.cumsum(sizes)[:-1])
        for step in rng.permutation(len(batches) // self.ranks):
            for rank in rng.permutation(self.ranks):
                yield batches[step * self.ranks + rank].tolist()
