"""Common Voice: SPLIT.tsv with the columns `client_id`, `path` and `sentence`, and the recordings in clips/."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from seam.data.corpora.found import BAD_LINE, Found, LeftOut, chosen, lines, require_folder

SPLITS = ("train", "dev", "test")
# Not read unless asked for: `validated` holds the three splits again, and the others were not agreed upon.
FURTHER_SPLITS = ("validated", "other", "invalidated")
COLUMNS = ("client_id", "path", "sentence")


def read(source: str | Path, splits: Sequence[str] = ()) -> Iterator[Found | LeftOut]:
    """
    Args:
        source: the folder of one language, which holds the `.tsv` files and `clips`.
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
    for split in chosen(available, wanted, source):
        yield from _split(folder, split)


def _split(folder: Path, split: str) -> Iterator[Found | LeftOut]:
    path = folder / f"{split}.tsv"
    # Not `csv`: quotation marks are part of the sentences, and a tab or a line break never is.
    rows = ((number, line.split("\t")) for number, line in lines(path))
    _, header = next(rows, (0, []))
    if missing := [name for name in COLUMNS if name not in header]:
        raise ValueError(f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    for number, fields in rows:
        if len(fields) != len(header):
            detail = f"{len(fields)} columns instead of {len(header)}"
            yield LeftOut(f"{path.name}, line {number}", BAD_LINE, detail)
            continue
        row = dict(zip(header, fields, strict=True))
        yield Found(
            id=row["path"],
            audio=folder / "clips" / row["path"],
            text=row["sentence"],
            speaker=row["client_id"],
            corpus="common_voice",
            split=split,
        )
