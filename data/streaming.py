"""Training data that is read while training goes on, and never held as a whole."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from seam.data.batching import SpeechReader
from seam.data.length_batches import LengthBatches
from seam.data.manifest import Utterance
from seam.data.skipped import Skipped, read_batch
from seam.data.sources import DATASETS, expand, utterances_in, utterances_of_datasets

Batch = list[dict[str, torch.Tensor]]


class SpeechStream(IterableDataset):
    """
    Batches (lists of items) of manifests and tar shards, pass after pass without end.

    Every process and worker reads the same lines and headers in the same order, which is little work, puts them in a
    buffer and makes the same batches of it; the batches it deals out in turn, and only the audio of its own it reads
    and decodes. So each utterance is in one batch of a pass, however many shards, processes and workers there are, and
    the batches of a process are the same for any number of workers.

    From `datasets` (`datasets:PATH`), whose rows hold the audio, each worker reads its own share alone and makes its
    batches of it: the batches depend on the number of processes and workers then.

    Args:
        names: manifests, shards or patterns of them, or data sets of `datasets`.
        reader: makes the items.
        shares: gives each utterance's share of the budget of a batch (see `LengthBatches`).
        split: keep only the utterances of this split.
        buffer: number of utterances that are shuffled and made into batches together.
        seed: decides all order, and with the place what an augmentation draws.
        rank, ranks: this process, and their number.
        skipped: notes utterances that cannot be read, as in [`SpeechDataset`].
        passes: number of passes; `None` for no end.
    """

    def __init__(
        self,
        names: list[str],
        reader: SpeechReader,
        shares: Callable[[Sequence[Utterance]], Sequence[float]],
        split: str | None = None,
        buffer: int = 10000,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        skipped: Skipped | None = None,
        passes: int | None = None,
    ):
        of_datasets = [name.startswith(DATASETS) for name in names]
        if any(of_datasets) != all(of_datasets):
            raise ValueError(f"{', '.join(names)}: either all or none can be of {DATASETS}.")
        self.is_dealt_out = any(of_datasets)  # already, by `datasets`
        self.names = names if self.is_dealt_out else expand(names)
        self.reader = reader
        self.shares = shares
        self.split = split
        self.buffer = buffer
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.skipped = skipped
        self.passes = passes
        self.first = 0

    def start_at(self, number: int) -> None:
        """
        Instead of the first `number` batches of this process give empty ones, without reading their audio. A training
        that is resumed drops them. Of `datasets` all audio is read.
        """
        self.first = number

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        place, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (seed, buffer, batch) in enumerate(self._batches()):
            step, rank = divmod(number, self.ranks)
            if self.is_dealt_out:
                yield self._items(seed, buffer, batch)
            elif rank == self.rank and step % workers == place:
                yield [] if step < self.first else self._items(seed, buffer, batch)

    def _batches(self) -> Iterator[tuple[tuple[int, int], list[Utterance], list[int]]]:
        """The number of every buffer with the seed, the buffer, and the places in it that make a batch."""
        numbers = count()
        for epoch in count() if self.passes is None else range(self.passes):
            utterances = self._utterances(epoch)
            buffer = list(islice(utterances, self.buffer))
            if not buffer:
                if self.is_dealt_out:
                    return  # more workers than there are shares
                raise ValueError(
                    f"{', '.join(map(str, self.names))}: no utterance"
                    + (f" of split {self.split!r}." * bool(self.split))
                )
            while buffer:
                number = next(numbers)
                batches = LengthBatches(self.shares(buffer), seed=self.seed)
                batches.set_epoch(number)
                for batch in batches:
                    yield (self.seed, number), buffer, batch
                buffer = list(islice(utterances, self.buffer))

    def _utterances(self, epoch: int) -> Iterator[Utterance]:
        for index in np.random.default_rng([self.seed, epoch]).permutation(len(self.names)):
            if self.is_dealt_out:
                yield from utterances_of_datasets(self.names[index], self.split, self.rank, self.ranks)
            else:
                yield from utterances_in(self.names[index], self.split)

    def _items(self, seed: tuple[int, int], buffer: list[Utterance], batch: list[int]) -> Batch:
        def read(place: int) -> dict[str, torch.Tensor]:
            return self.reader(buffer[place], (*seed, place), lambda number: buffer[number % len(buffer)])

        return read_batch(read, buffer, batch, self.skipped)
