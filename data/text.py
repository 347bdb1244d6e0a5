"""Plain text as training data: passages that the language model reads in the place of speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Dataset

from seam.data.manifest import Utterance

if TYPE_CHECKING:
    from seam.processing_seam import SeamProcessor


def read_passages(path: str | Path) -> list[Utterance]:
    """
    Read a file of plain text, one passage a line; empty lines are no passages.

    Returns:
        Utterances without audio: `audio` names the file and the line, and the duration is 0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8, or holds no passage.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8: {error}.") from error
    passages = [
        Utterance(Path(f"{path}:{number}"), line.strip(), 0.0, split="text")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not passages:
        raise ValueError(f"{path} holds no text.")
    return passages


class TextDataset(Dataset):
    """
    Passages as if Stage 1 had heard every token of them: `alignment_ids` are the transcript's own `token_ids`.

    Args:
        passages: see `read_passages`.
        processor, casing: as of a [`SpeechReader`].
    """

    def __init__(
        self, passages: Sequence[Utterance], processor: SeamProcessor, casing: Callable[[str], str] = str.lower
    ):
        self.passages = passages
        self.processor = processor
        self.casing = casing

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.processor.transcript_ids(self.casing(self.passages[index].text))
        token_ids = torch.tensor(ids, dtype=torch.long)
        return {"token_ids": token_ids, "alignment_ids": token_ids}
