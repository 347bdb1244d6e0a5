"""Read tar shards as WebDataset has them: every utterance is read, or it is named."""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import soundfile

from seam.audio_files import AUDIO_SUFFIXES
from seam.data.bad_audio import SkippedAudio
from seam.data.manifest import Utterance, parse_row, utterance_fields

MAX_LINKS = 8  # that follow each other


@dataclass(frozen=True)
class TarredAudio:
    """A recording in an uncompressed tar file: `size` bytes from `offset` on."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """Read the content of the audio file."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class _File(NamedTuple):
    """A file of a shard, whose content may be that of another one (a link)."""

    name: str
    data: tarfile.TarInfo

    @property
    def suffix(self) -> str:
        return "." + PurePosixPath(self.name).name.partition(".")[2].lower()


def iter_tar(path: Path, split: str | None = None, skipped: SkippedAudio | None = None) -> Iterator[Utterance]:
    """
    Yield the utterances of a WebDataset shard.

    Consecutive files with the same name up to the first dot are one utterance: its audio, and a `.json` with the other
    fields of a manifest's line or a `.txt` with the transcript. Several archives one after the other are read as one
    shard. Links within it are followed. Files that programs leave beside the data (`._a.wav`, `.DS_Store`, and
    WebDataset's own `__name__`) are no utterances.

    Only headers and texts are read. `datasets` also reads such shards, but with all audio, so that processes could not
    share a shard without each reading it completely, and it needs torchcodec.

    Args:
        path: of the shard.
        split: yield only the utterances of this split.
        skipped: receives what cannot be read: an utterance without audio or text, with two of them, or whose name came
            before; a damaged header, behind which reading goes on at the next one; a cut. `None` raises for the first.

    Raises:
        ValueError: no tar file, or a compressed one, or something that cannot be read; the message has its name.
    """

    def report(name: str, problem: object) -> None:
        error = ValueError(f"{name} {problem}")
        if skipped is None:
            raise error
        skipped.add(name, error)

    try:
        with tarfile.open(path, "r:") as tar:
            seen: set[tuple[int, PurePosixPath]] = set()
            for key, members in groupby(_members(tar, path, report), lambda one: (one[0], _key(one[1].name))):
                files = _resolved(path, [member for _, member in members], report)
                if not files:
                    continue
                if key in seen:
                    report(
                        f"{path}/{key[1]}",
                        "comes a second time in its shard; the files of an utterance stand together.",
                    )
                    continue
                seen.add(key)
                try:
                    utterance = _read_utterance(tar, path, key[1], files)
                except ValueError as error:
                    if skipped is None:
                        raise
                    skipped.add(f"{path}/{key[1]}", error)
                    continue
                if split in (None, utterance.split):
                    yield utterance
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as an uncompressed tar file: {error}.") from error


def _members(
    tar: tarfile.TarFile, path: Path, report: Callable[[str, object], None]
) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """
    Yield the number of the archive and the header of each member but folders.

    `tarfile` itself takes a bad header, and the end of a file at a border between members, for the end of the archive.
    """
    file: IO[bytes] = tar.fileobj  # type: ignore[assignment] # of an open archive there is one
    end, offset, archive = os.fstat(file.fileno()).st_size, 0, 0
    is_ended = is_lost = False  # behind the mark of an end; looking for a header behind a bad one
    while offset < end:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not any(block):
            is_ended = True
            offset += tarfile.BLOCKSIZE
            continue
        if is_lost and block[257:262] != b"ustar":  # the content of a file
            offset += tarfile.BLOCKSIZE
            continue
        file.seek(offset)
        tar.offset = offset  # from which it counts, and which it moves to the next header
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
            if member.size < 0:
                raise tarfile.HeaderError("a negative size")
        except tarfile.HeaderError as error:
            if not is_lost:
                report(f"{path} at byte {offset}", f"is no header of a tar file: {error}.")
            is_lost, is_ended = True, False
            offset += tarfile.BLOCKSIZE
            continue
        archive += is_ended and not is_lost
        is_ended = is_lost = False
        offset = tar.offset
        if not member.isfile():
            missing = 0
        elif missing := max(0, member.offset_data + member.size - end):
            report(f"{path}/{member.name}", f"is cut: {missing} of its {member.size} bytes are missing.")
            return
        if not member.isdir():
            yield archive, member
    if not is_ended:
        report(str(path), "has no mark of its end: it is cut, or its writer did not finish.")


def _key(name: str) -> PurePosixPath:
    """Return the name that the files of an utterance share."""
    path = PurePosixPath(name)
    return path.parent / path.name.partition(".")[0]


def _resolved(path: Path, members: list[tarfile.TarInfo], report: Callable[[str, object], None]) -> list[_File]:
    """Return the files of an utterance, with the content that links stand for; without those that are no data."""
    files, index = [], None
    for member in members:
        base = posixpath.basename(member.name)
        if base.startswith("._") or base == ".DS_Store" or (base.startswith("__") and base.endswith("__")):
            continue
        data: tarfile.TarInfo | None = member
        for _ in range(MAX_LINKS):
            if data is None or not (data.islnk() or data.issym()):
                break
            index = _index(path) if index is None else index  # read for each such utterance: shards with links are rare
            folder = posixpath.dirname(data.name) if data.issym() else ""
            data = index.get(posixpath.normpath(posixpath.join(folder, data.linkname)))
        if data is None or not data.isfile():
            target = f"a link to {member.linkname}, which is not in the shard" if member.linkname else "no file"
            report(f"{path}/{member.name}", f"is {target}.")
        elif data.issparse():
            report(f"{path}/{member.name}", "is a sparse file; accepted: plain ones.")
        else:
            files.append(_File(member.name, data))
    return files


def _index(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        members = _members(tar, path, lambda name, problem: None)
        return {posixpath.normpath(member.name): member for _, member in members}


def _read_utterance(tar: tarfile.TarFile, path: Path, key: PurePosixPath, files: list[_File]) -> Utterance:
    audios = [file for file in files if file.suffix in AUDIO_SUFFIXES]
    texts = {file.suffix: file for file in files if file.suffix in (".txt", ".json")}
    names = ", ".join(PurePosixPath(file.name).name for file in files)
    if not audios:
        raise ValueError(f"{path}/{key} has no audio: {names}; what follows a name's first dot says what a file is.")
    if len(audios) > 1 or len({file.suffix for file in files}) < len(files):
        raise ValueError(f"{path}/{key} has a file twice: {names}; accepted: one audio, one .txt, one .json.")
    if not texts:
        raise ValueError(f"{path}/{key} has neither a .txt nor a .json beside its audio.")
    fields = _fields({suffix: _open(tar, file).read() for suffix, file in texts.items()}, f"{path}/{key}")
    (audio,) = audios
    if fields["duration"] is None:
        fields["duration"] = read_duration(_open(tar, audio))
    return Utterance(TarredAudio(path, audio.name, audio.data.offset_data, audio.data.size), **fields)


def _fields(texts: dict[str, bytes], name: str) -> dict[str, Any]:
    """Return what the .txt and the .json beside a recording say of it."""
    try:
        text = texts[".txt"].decode("utf-8-sig") if ".txt" in texts else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}.txt is not UTF-8: {error}.") from error
    try:
        row = parse_row(texts.get(".json", b"{}"))
        if text is not None and row.setdefault("text", text) != text:
            raise ValueError("its text is another than that of the .txt; accepted: one of them")
        return utterance_fields(row)
    except ValueError as error:
        raise ValueError(f"{name}.json: {str(error).rstrip('.')}.") from error


def _open(tar: tarfile.TarFile, file: _File) -> IO[bytes]:
    content = tar.extractfile(file.data)
    assert content is not None  # `None` is for folders and devices
    return content


def read_duration(file: IO[bytes]) -> float:
    """Return the seconds that a header states, or 0 for one that cannot be read: decoding will report it."""
    try:
        return soundfile.info(file).duration
    except soundfile.LibsndfileError:
        return 0.0
