"""Stream training data from manifests, tar shards and `datasets` while training goes on."""

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from seam.data.bad_audio import SkippedAudio, read_batch
from seam.data.corpora.utterances import is_elsewhere
from seam.data.dataset import SpeechReader
from seam.data.manifest import Utterance, check_text, iter_manifest
from seam.data.samplers import LengthBatchSampler
from seam.data.shards import iter_tar, read_duration

# The first of these columns in a row of `datasets` is its transcript; the last two are those of WebDataset shards.
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "txt", "json")
SPEAKER_COLUMNS = ("speaker", "speaker_id")
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True)
class AudioInMemory:
    """The bytes of an audio file."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the content of the audio file."""
        return self.content


def expand_paths(names: list[str]) -> list[Path]:
    """
    Return the files and folders that names or patterns (`shards/*.tar`) stand for, in order.

    Raises:
        FileNotFoundError: for a name or pattern that matches nothing.
    """
    paths = []
    for name in names:
        found = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise FileNotFoundError(f"{name}: no such manifest or shard.")
        paths += found
    return paths


def iter_utterances(path: Path, split: str | None = None, skipped: SkippedAudio | None = None) -> Iterator[Utterance]:
    """Yield the utterances of a shard (`.tar`, see `iter_tar`) or a manifest, by default of all splits."""
    return iter_tar(path, split, skipped) if path.suffix == ".tar" else iter_manifest(path, split)


def iter_dataset(
    name: str, split: str | None, rank: int, ranks: int, skipped: SkippedAudio | None = None
) -> Iterator[Utterance]:
    """
    Yield the shard of a process, in a loader's worker that of the worker, of a dataset that `datasets` streams.

    `datasets` shards by files where there are enough of them, and otherwise by rows.

    Args:
        name: `datasets:PATH` or `datasets:PATH:CONFIGURATION`; a Hub id or a folder.
        split: of the dataset, by default `train`.
        rank, ranks: this process, and the number of processes.
        skipped: receives rows that cannot be read; `None` raises for the first.

    Raises:
        ValueError: no column of audio, or none of text.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    path, _, configuration = name.removeprefix(DATASETS_PREFIX).partition(":")
    rows = datasets.load_dataset(path, configuration or None, split=split or "train", streaming=True)
    columns = [column for column, kind in (rows.features or {}).items() if isinstance(kind, datasets.Audio)]
    if not columns:
        raise ValueError(f"{name} has no column of audio.")
    rows = rows.cast_column(columns[0], datasets.Audio(decode=False))  # the processor decodes all audio
    for number, row in enumerate(split_dataset_by_node(rows, rank, ranks)):
        label = f"{name}/{row[columns[0]]['path'] or f'row {number} of process {rank}'}"
        try:
            yield _utterance(row, row[columns[0]], path, label)
        except (OSError, ValueError) as error:
            if skipped is None:
                raise
            skipped.add(label, error)


def _utterance(row: dict[str, Any], audio: dict[str, Any], source: str, label: str) -> Utterance:
    columns = [one for one in TEXT_COLUMNS if one in row]
    if not columns:
        raise ValueError(f"{label} has no column of text; accepted: {', '.join(TEXT_COLUMNS)}.")
    text = next((row[one] for one in columns if row[one] is not None), None)
    try:
        text = text.get("text") if isinstance(text, dict) else text
        text = check_text("text", text, "a string, empty where nothing is said")
    except ValueError as error:
        raise ValueError(f"{label}: {error}.") from error
    content = audio["bytes"]
    if content is None:
        if is_elsewhere(audio["path"] or "", source):
            raise ValueError(f"{label}: {audio['path']} is not in the dataset: it is not read.")
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        place = audio["path"] if "://" in audio["path"] else str(folder / audio["path"])
        with fsspec.open(place, "rb") as file:
            content = file.read()
    speaker = next((row[one] for one in SPEAKER_COLUMNS if row.get(one) is not None), "")
    return Utterance(AudioInMemory(label, content), text, read_duration(BytesIO(content)), str(speaker))


Batch = list[dict[str, torch.Tensor]]


class SpeechStream(IterableDataset):
    """
    Stream batches (lists of items) from manifests and tar shards, pass after pass without end.

    Every process and worker reads the same lines and headers in the same order, which is little work, fills a buffer
    with them and divides it into the same batches. It then reads and decodes the audio of its own batches only, which
    are assigned in turn. So each utterance is in one batch of a pass, whatever the number of shards, processes and
    workers, and the batches of a process are the same for any number of workers.

    In a dataset of `datasets` (`datasets:PATH`), rows contain the audio: each worker reads its own shard and makes
    batches of it, which depend on the number of processes and workers.

    Args:
        names: manifests, shards or patterns of them, or datasets of `datasets`.
        reader: makes the items.
        shares: returns each utterance's share of the budget of a batch (see `LengthBatchSampler`).
        split: read only the utterances of this split.
        buffer: number of utterances that are shuffled and batched together.
        seed: decides all order and, together with an utterance's position, what an augmentation draws.
        rank, ranks: this process, and the number of processes.
        skipped: receives recordings that cannot be read, as in [`SpeechDataset`], and what a shard has lost.
        passes: number of passes; `None` for no end.
    """

    def __init__(
        self,
        names: list[str],
        reader: SpeechReader,
        shares: Callable[[Sequence[Utterance]], Sequence[float] | np.ndarray],
        split: str | None = None,
        buffer: int = 10000,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        skipped: SkippedAudio | None = None,
        passes: int | None = None,
    ):
        of_datasets = [name.startswith(DATASETS_PREFIX) for name in names]
        if any(of_datasets) != all(of_datasets):
            raise ValueError(f"{', '.join(names)}: either all or none can begin with {DATASETS_PREFIX}.")
        self.is_sharded = any(of_datasets)  # by `datasets`
        self.names = names
        self.paths = [] if self.is_sharded else expand_paths(names)
        self.reader = reader
        self.shares = shares
        self.split = split
        self.buffer = buffer
        self.seed = seed
        self.rank, self.ranks = rank, ranks
        self.skipped = skipped
        self.passes = passes
        self.n_skipped_batches = 0

    def skip_batches(self, number: int) -> None:
        """
        Yield empty batches instead of the first `number` of this process, without reading their audio.

        A resumed training drops them. From `datasets`, all audio is read.
        """
        self.n_skipped_batches = number

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, (seed, buffer, batch) in enumerate(self._batches()):
            step, rank = divmod(number, self.ranks)
            if self.is_sharded:
                yield self._items(seed, buffer, batch)
            elif rank == self.rank and step % workers == worker_id:
                yield [] if step < self.n_skipped_batches else self._items(seed, buffer, batch)

    def _batches(self) -> Iterator[tuple[tuple[int, int], list[Utterance], list[int]]]:
        """Yield the seed and number of a buffer, the buffer, and the indices of a batch in it."""
        numbers = count()
        for epoch in count() if self.passes is None else range(self.passes):
            utterances = self._utterances(epoch)
            buffer = list(islice(utterances, self.buffer))
            if not buffer:
                if self.is_sharded:
                    return  # more workers than shards
                of_split = f" of split {self.split!r}" if self.split else ""
                raise ValueError(f"{', '.join(map(str, self.paths))}: no utterance{of_split}.")
            while buffer:
                number = next(numbers)
                batches = LengthBatchSampler(self.shares(buffer), seed=self.seed)
                batches.set_epoch(number)
                for batch in batches:
                    yield (self.seed, number), buffer, batch
                buffer = list(islice(utterances, self.buffer))

    def _utterances(self, epoch: int) -> Iterator[Utterance]:
        sources = self.names if self.is_sharded else self.paths
        for index in np.random.default_rng([self.seed, epoch]).permutation(len(sources)):
            if self.is_sharded:
                yield from iter_dataset(self.names[index], self.split, self.rank, self.ranks, self.skipped)
            else:
                yield from iter_utterances(self.paths[index], self.split, self.skipped)

    def _items(self, seed: tuple[int, int], buffer: list[Utterance], batch: list[int]) -> Batch:
        def read(index: int) -> dict[str, torch.Tensor]:
            return self.reader(buffer[index], (*seed, index), lambda number: buffer[number % len(buffer)])

        return read_batch(read, buffer, batch, self.skipped)
