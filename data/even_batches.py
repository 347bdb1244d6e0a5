"""Batches for several processes (ranks) that together are the data set, once."""

from collections.abc import Iterator
from itertools import islice

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
