"""Plain English for Stage 2 of the English checkpoint: passages as long as what people say in one window."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub.dataclasses import strict

from seam.data.files import write_text
from seam.data.manifest import read_manifest
from seam.evaluation.scoring import words

SENTENCE_END = re.compile(r"(?<=[.?!])\s+")
LONGEST_SENTENCE = 60  # words; longer ones are lists, or lines without punctuation
HELD_OUT_WORDS = 6  # in a row: a passage that shares them with a held-out transcript is left out


@strict
@dataclass
class EnglishText:
    """
    What the LLM of the English checkpoint learns to write as it reads it.

    Args:
        files: of plain text, with empty lines between paragraphs; or tables (`.tsv`), whose last column is taken.
        words: of all passages together, at most.
        passage_words: of a passage, at most, drawn anew for each: several sentences in a row.
        seed: of the order and of the lengths.
    """

    files: list[str] = field(default_factory=list)
    words: int = 300_000
    passage_words: int = 70
    seed: int = 0


def sentences(path: Path) -> Iterator[str]:
    """Yield the sentences of a file, in order."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".tsv":
        paragraphs = [line.split("\t")[-1] for line in text.split("\n")]
    else:
        paragraphs = re.split(r"\n\s*\n", text)
    for paragraph in paragraphs:
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            if sentence and len(sentence.split()) <= LONGEST_SENTENCE:
                yield sentence


def passages(all_sentences: Iterable[str], longest: int, rng: np.random.Generator) -> Iterator[str]:
    """Yield sentences in a row, joined up to a number of words that is drawn anew each time; one is never divided."""
    joined: list[str] = []
    limit = rng.integers(1, longest + 1)
    for sentence in all_sentences:
        if joined and sum(len(one.split()) for one in [*joined, sentence]) > limit:
            yield " ".join(joined)
            joined, limit = [], rng.integers(1, longest + 1)
        joined.append(sentence)
    if joined:
        yield " ".join(joined)


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Return every `HELD_OUT_WORDS` normalized words in a row of a text."""
    written = words(text, "english")
    return {tuple(written[start : start + HELD_OUT_WORDS]) for start in range(len(written) - HELD_OUT_WORDS + 1)}


def make_training_text(text: EnglishText, target: Path, held_out: Iterable[Path]) -> str:
    """
    Write passages, one a line, of which none has words in a row that a held-out transcript has.

    Args:
        text: what to take.
        target: the file.
        held_out: manifests of the test and validation sets.

    Returns:
        What was made.
    """
    rng = np.random.default_rng(text.seed)
    kept_out = set().union(*(word_runs(one.text) for path in held_out for one in read_manifest(path)))
    found = [one for path in text.files for one in passages(sentences(Path(path)), text.passage_words, rng)]
    chosen: list[str] = []
    count = 0
    for index in rng.permutation(len(found)):
        passage = found[index]
        if count >= text.words:
            break
        if word_runs(passage).isdisjoint(kept_out):
            chosen.append(passage)
            count += len(passage.split())
    write_text(target, "".join(f"{passage}\n" for passage in chosen))
    return f"{len(chosen)} passages, {count} words"
