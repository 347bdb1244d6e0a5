"""Common Voice: SPLIT.tsv with the columns `client_id`, `path` and `sentence`, and the recordings in clips/."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from seam.data.corpora.utterances import (
    BAD_LINE,
    CorpusUtterance,
    Exclusion,
    numbered_lines,
    require_folder,
    select_splits,
)

SPLITS = ("train", "dev", "test")
# Read on request only: `validated` contains the three splits, and the transcripts of the others are not confirmed.
FURTHER_SPLITS = ("validated", "other", "invalidated")
COLUMNS = ("client_id", "path", "sentence")


def read(source: str | Path, splits: Sequence[str] = ()) -> Iterator[CorpusUtterance | Exclusion]:
    """
    Yield the utterances of one language.

    Args:
        source: the folder of the language, with the `.tsv` files and `clips`.
        splits: `.tsv` files to read, without the suffix; by default train, dev and test.

    Raises:
        FileNotFoundError: no such folder; ValueError: another layout, a missing column, or no such split.
    """
    folder = require_folder(source)
    available = [name for name in (*SPLITS, *FURTHER_SPLITS) if (folder / f"{name}.tsv").is_file()]
    if not available or not (folder / "clips").is_dir():
        raise ValueError(
            f"{source} is not Common Voice as unpacked: looked for one of {{{','.join(SPLITS + FURTHER_SPLITS)}}}.tsv "
            "and for clips/ in it."
        )
    wanted = splits or [name for name in available if name in SPLITS]
    if not wanted:
        raise ValueError(f"{source} has none of {', '.join(SPLITS)}; say which of {', '.join(available)} to read.")
    for split in select_splits(available, wanted, source):
        yield from _split(folder, split)


def _split(folder: Path, split: str) -> Iterator[CorpusUtterance | Exclusion]:
    path = folder / f"{split}.tsv"
    # Without `csv`: quotation marks belong to the sentences; tabs and line breaks never do.
    rows = ((number, line.split("\t")) for number, line in numbered_lines(path))
    _, header = next(rows, (0, []))
    if missing := [name for name in COLUMNS if name not in header]:
        raise ValueError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    for number, fields in rows:
        if len(fields) != len(header):
            detail = f"{len(fields)} columns instead of {len(header)}"
            yield Exclusion(f"{path.name}, line {number}", BAD_LINE, detail)
            continue
        row = dict(zip(header, fields, strict=True))
        yield CorpusUtterance(
            id=row["path"],
            audio=folder / "clips" / row["path"],
            text=row["sentence"],
            speaker=row["client_id"],
            corpus="common_voice",
            split=split,
        )
