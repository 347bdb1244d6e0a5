"""
Training data that is read while training goes on, and never held as a whole: from manifests, tar shards and `datasets`.
"""

import glob
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count, islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch.utils.data import IterableDataset, get_worker_info

from seam.data.bad_audio import SkippedAudio, read_batch
from seam.data.dataset import SpeechReader
from seam.data.manifest import Utterance, iter_manifest, optional_fields, stated_duration
from seam.data.samplers import LengthBatchSampler

AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus"}
# In the order in which they are looked for in a row of `datasets`; the last two are those of WebDataset shards.
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "txt", "json")
DATASETS = "datasets:"


@dataclass(frozen=True)
class TarredAudio:
    """A recording in a tar file that is not compressed: `size` bytes from `offset` on."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class AudioInMemory:
    """The bytes of an audio file."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.content


def expand(names: list[str]) -> list[Path]:
    """
    Files and folders by their names or patterns (`shards/*.tar`), in order.

    Raises:
        FileNotFoundError: for what is not there.
    """
    paths = []
    for name in names:
        found = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise FileNotFoundError(f"{name}: no such manifest or shard.")
        paths += found
    return paths


def utterances_in(path: Path, split: str | None = None) -> Iterator[Utterance]:
    """Of a shard (`.tar`) or a manifest, one by one. `split`: keep only these."""
    return utterances_in_tar(path, split) if path.suffix == ".tar" else iter_manifest(path, split)


def utterances_in_tar(path: Path, split: str | None = None) -> Iterator[Utterance]:
    """
    The utterances of a shard as WebDataset has them: files that follow each other and have the same name up to the
    first dot are one; `.json` holds the fields of a manifest's line without the audio, `.txt` a transcript alone.

    Only headers and texts are read. `datasets` has a reader of such shards too, but one that reads all audio, so that
    processes could not share a shard without each reading the whole of it, and that needs torchcodec.

    Raises:
        ValueError: no tar file, a compressed one, or an utterance without audio or text, by its name.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            key, parts = None, {}
            for member in tar:
                tar.members.clear()  # or they are all kept
                if not member.isfile():
                    continue
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                if key not in (None, name.parent / stem):
                    yield from _paired(path, key, parts, split)
                    parts = {}
                key = name.parent / stem
                _read_member(tar, member, f".{suffix.lower()}", parts, path)
            if key is not None:
                yield from _paired(path, key, parts, split)
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar file that is not compressed: {error}.") from error


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, parts: dict, path: Path) -> None:
    if suffix in (".txt", ".json"):
        try:
            parts[suffix] = tar.extractfile(member).read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}/{member.name} is not UTF-8: {error}.") from error
    elif suffix in AUDIO_SUFFIXES:
        parts["audio"] = TarredAudio(path, member.name, member.offset_data, member.size)
        parts["header"] = tar.extractfile(member)


def _paired(path: Path, key: PurePosixPath, parts: dict, split: str | None) -> Iterator[Utterance]:
    """The utterance of files that belong together, if it is of the split."""
    if "audio" not in parts:
        raise ValueError(f"{path}/{key} has no audio.")
    if ".json" not in parts and ".txt" not in parts:
        raise ValueError(f"{path}/{key} has neither a .txt nor a .json beside its audio.")
    try:
        row = {"text": parts.get(".txt"), **json.loads(parts.get(".json", "{}"))}
        duration = stated_duration(row)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}/{key}.json: {error}.") from error
    if row["text"] is None:
        raise ValueError(f"{path}/{key}.json lacks the field 'text'.")
    duration = duration_of(parts["header"]) if duration is None else duration
    utterance = Utterance(parts["audio"], row["text"], duration, **optional_fields(row))
    if split in (None, utterance.split):
        yield utterance


def duration_of(file: BinaryIO) -> float:
    """Seconds, as the header says; 0 where it cannot be read, which is reported when the audio is to be decoded."""
    try:
        return soundfile.info(file).duration
    except soundfile.LibsndfileError:
        return 0.0


def utterances_of_datasets(name: str, split: str | None, rank: int, ranks: int) -> Iterator[Utterance]:
    """
    The share of a process, and in a loader's worker that of the worker, of a data set that `datasets` streams. It deals
    out the files of a data set where they are enough, and else to processes the rows of each.

    Args:
        name: `datasets:PATH` or `datasets:PATH:CONFIGURATION`; a Hub id or a folder.
        split: of the data set, by default `train`.

    Raises:
        ValueError: no column of audio, or none of text.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    path, _, configuration = name.removeprefix(DATASETS).partition(":")
    rows = datasets.load_dataset(path, configuration or None, split=split or "train", streaming=True)
    columns = [column for column, kind in (rows.features or {}).items() if isinstance(kind, datasets.Audio)]
    if not columns:
        raise ValueError(f"{name} has no column of audio.")
    rows = rows.cast_column(columns[0], datasets.Audio(decode=False))  # decoded where all audio is: by the processor
    for number, row in enumerate(split_dataset_by_node(rows, rank, ranks)):
        audio, text = row[columns[0]], next((row[one] for one in TEXT_COLUMNS if row.get(one) is not None), None)
        text = text.get("text") if isinstance(text, dict) else text
        if text is None:
            raise ValueError(f"{name} has no column of text; accepted: {', '.join(TEXT_COLUMNS)}.")
        label = audio["path"] or f"row {number} of process {rank}"
        content = audio["bytes"] if audio["bytes"] is not None else Path(audio["path"]).read_bytes()
        yield Utterance(
            AudioInMemory(f"{name}/{label}", content),
            text,
            duration_of(BytesIO(content)),
            str(row.get("speaker") or row.get("speaker_id") or ""),
        )


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
        shares: gives each utterance's share of the budget of a batch (see `LengthBatchSampler`).
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
        skipped: SkippedAudio | None = None,
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

    def skip_batches(self, number: int) -> None:
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
                batches = LengthBatchSampler(self.shares(buffer), seed=self.seed)
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
