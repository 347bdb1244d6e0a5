"""Training goes on without recordings that cannot be read: which they are stands in a file."""

import json
import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from seam.data.manifest import Utterance

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Skipped:
    """
    Recordings that were left out, one JSON object a line: `audio` and `reason`. All workers and processes write to the
    same file, and a training that is resumed goes on with it.

    Args:
        path: of the file. It is made when the first recording is left out.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def names(self) -> list[str]:
        """The recordings, each once, though every epoch meets them again."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(json.loads(line)["audio"] for line in lines))

    def __len__(self) -> int:
        return len(self.names())

    def add(self, audio: str | Path, error: Exception) -> None:
        """Log what is wrong with a recording, the first time that it is met, and note its name."""
        if str(audio) in self.names():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"audio": str(audio), "reason": str(error)})
        with self.path.open("a", encoding="utf-8") as file:  # one short write at the end: whole beside those of others
            file.write(f"{line}\n")
        logger.warning("%s: skipped; %d so far, see %s", error, len(self), self.path)


def read_batch(
    read: Callable[[int], T], utterances: Sequence[Utterance], places: Sequence[int], skipped: Skipped | None
) -> list[T]:
    """
    What `read` makes of the utterances at `places`, without those that cannot be read. A batch in which nothing is left
    has the next utterance that can be read: every process must have a batch for its step.

    Args:
        skipped: notes those that cannot be read. Without it, they are errors.
    """

    def readable(places):
        for place in places:
            try:
                yield read(place)
            except (OSError, ValueError) as error:
                if skipped is None:
                    raise
                skipped.add(utterances[place].audio, error)

    items = list(readable(places))
    size, following = len(utterances), places[-1] + 1
    items = items or list(islice(readable(place % size for place in range(following, following + size)), 1))
    if not items:
        raise ValueError(f"none of {size} recordings can be read; see {skipped.path}.")
    return items
