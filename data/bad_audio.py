"""Recordings that cannot be read: a training leaves them out and keeps a list of them."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from seam.data.manifest import Utterance

T = TypeVar("T")

logger = logging.getLogger(__name__)


class SkippedAudio:
    """
    List the skipped recordings in a file, one JSON object with `audio` and `reason` a line.

    All workers and processes append to the same file, and a resumed training goes on with it.

    Args:
        path: the file; it is created when the first recording is skipped.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def names(self) -> list[str]:
        """Return the names of the recordings, each once, though every epoch meets them again."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(json.loads(line)["audio"] for line in lines))

    def __len__(self) -> int:
        return len(self.names())

    def add(self, audio: object, error: Exception) -> None:
        """Append a recording to the list and log what is wrong with it, the first time that it is met."""
        if str(audio) in self.names():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"audio": str(audio), "reason": str(error)})
        with self.path.open("a", encoding="utf-8") as file:  # one short append: other processes' lines stay intact
            file.write(f"{line}\n")
        logger.warning("%s: skipped; %d so far, see %s", error, len(self), self.path)


def read_batch(
    read: Callable[[int], T], utterances: Sequence[Utterance], indices: Sequence[int], skipped: SkippedAudio | None
) -> list[T]:
    """
    Read a batch of utterances, without those that cannot be read.

    A batch in which nothing is left gets the next utterance that can be read, because every process needs a batch for
    its step.

    Args:
        read: reads the utterance at an index.
        indices: positions of the batch in `utterances`.
        skipped: receives the recordings that cannot be read; `None` raises their errors instead.

    Raises:
        ValueError: none of the utterances can be read.
    """
    if skipped is None:
        return [read(index) for index in indices]
    items = list(_readable(read, utterances, indices, skipped))
    if not items:
        n, following = len(utterances), indices[-1] + 1
        others = (index % n for index in range(following, following + n))
        items = list(islice(_readable(read, utterances, others, skipped), 1))
    if not items:
        raise ValueError(f"none of {len(utterances)} recordings can be read; see {skipped.path}.")
    return items


def _readable(
    read: Callable[[int], T], utterances: Sequence[Utterance], indices: Iterable[int], skipped: SkippedAudio
) -> Iterator[T]:
    for index in indices:
        try:
            yield read(index)
        except (OSError, ValueError) as error:
            skipped.add(utterances[index].audio, error)
