"""A corpus with every defect that disks and archives bring: each is named, and nothing else is lost."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from seam.data.corpora import librispeech
from seam.data.manifest import read_manifest
from seam.data.prepare import prepare
from seam.tests.data.sounds import write


def left_out(summary) -> list[tuple[str, str]]:
    rows = map(json.loads, summary.left_out_file.read_text().splitlines())
    return [(row["name"], row["reason"]) for row in rows]


def set_header_rate(flac: bytes, rate: int) -> bytes:
    """The 20 bits of STREAMINFO that state the sampling rate, replaced (they begin 18 bytes into the file)."""
    changed = bytearray(flac)
    changed[18], changed[19] = rate >> 12, (rate >> 4) & 255
    changed[20] = (rate & 15) << 4 | changed[20] & 15
    return bytes(changed)


@pytest.fixture(scope="module")
def broken(shared, tmp_path_factory):
    """Of test-other, 30 good recordings and ten damaged ones: the root, what is wrong with which, and the good ids."""
    root = tmp_path_factory.mktemp("broken")
    texts = {one.audio.stem: one for one in read_manifest(shared / "speech", corpus="librispeech test-other")}
    rows = {}
    for id, one in sorted(texts.items()):
        speaker, chapter, _ = id.split("-")
        folder = root / "LibriSpeech" / "test-other" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.audio, folder / f"{id}.flac")
        rows[id] = f"{id} {one.text.upper()}\n".encode()

    def file(id):
        return next(root.rglob(f"{id}.flac"))

    ids = sorted(texts)
    expected = {}

    def damage(reason):
        id = ids.pop(len(ids) // 2)
        expected[id] = reason
        return id

    id = damage("cannot be decoded")  # truncated: the header is whole
    file(id).write_bytes(file(id).read_bytes()[: file(id).stat().st_size // 2])
    assert soundfile.info(file(id)).frames > 0
    id = damage("wrong sampling rate")
    file(id).write_bytes(set_header_rate(file(id).read_bytes(), 8000))
    assert soundfile.info(file(id)).samplerate == 8000
    id = damage("empty text")
    rows[id] = f"{id}\n".encode()
    id = damage("empty file")
    file(id).write_bytes(b"")
    id = damage("too long")
    write(file(id), np.resize(soundfile.read(file(id))[0], 40 * 16000))
    id = damage("not UTF-8")
    rows[id] = f"{id} A CAFÉ\n".encode("latin-1")
    id = damage("silent")
    write(file(id), np.zeros(16000))
    id = damage("characters per second")
    rows[id] = rows[id][:-1] * 20 + b"\n"
    id = damage("duplicate audio")
    shutil.copyfile(file(ids[0]), file(id))
    id = damage("cannot be decoded")  # no audio at all
    file(id).write_bytes(b"<html>404 Not Found</html>")
    twice = ids[3]
    rows[twice] += f"{twice} ANOTHER TEXT FOR IT\n".encode()
    for id, row in rows.items():
        with (file(id).parent / f"{id.rpartition('-')[0]}.trans.txt").open("ab") as transcripts:
            transcripts.write(row)
    return root, sorted([*expected.items(), (twice, "duplicate id")]), ids


def test_each_defect_is_named_and_nothing_else_is_lost(broken, tmp_path):
    root, expected, good = broken
    summary = prepare(librispeech.read(root), tmp_path)
    assert sorted(left_out(summary)) == expected
    kept = read_manifest(summary.manifest)
    assert sorted(one.audio.stem for one in kept) == good and summary.kept == len(good) == 30
    assert sum(summary.left_out.values()) == len(expected) == 11
    by_name = {row["name"]: row for row in map(json.loads, summary.left_out_file.read_text().splitlines())}
    details = {row["reason"]: row["detail"] for row in by_name.values()}
    assert "40.0 s, above 30 s" in details["too long"]
    assert "8000 Hz; the corpus has 16000 Hz" in details["wrong sampling rate"]
    assert "ANOTHER TEXT" in details["duplicate id"]
    assert good[0] in details["duplicate audio"]


def test_the_number_of_workers_changes_nothing(broken, tmp_path):
    root = broken[0]
    one, three = (prepare(librispeech.read(root), tmp_path / str(n), workers=n) for n in (1, 3))
    assert one.manifest.read_bytes() == three.manifest.read_bytes()
    assert one.left_out_file.read_bytes() == three.left_out_file.read_bytes()
