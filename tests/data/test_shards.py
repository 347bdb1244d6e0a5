"""Damaged and unusual shards: every utterance is read, or it is named and counted."""

import json
import tarfile

import pytest

from seam.data.bad_audio import SkippedAudio
from seam.data.shards import iter_tar
from seam.tests.helpers.tar_shards import add, flac, tone, write_shard

AUDIO = flac(tone(0))
BLOCK = tarfile.BLOCKSIZE


def shard(path, *names, content=None):
    """Write a shard of files in the given order; texts are the names of their files."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            add(tar, name, (content or {}).get(name, AUDIO if name.endswith(("flac", "wav")) else name.encode()))
    return path


def read(path):
    """Return the texts that are read, and the messages about the rest, where it is skipped."""
    skipped = SkippedAudio(path.with_suffix(".skipped"))
    texts = [one.text for one in iter_tar(path, skipped=skipped)]
    lines = skipped.path.read_text().splitlines() if skipped.path.exists() else []
    return texts, [json.loads(line)["reason"] for line in lines]


def check(path, texts, *problems):
    """Check what is read and named where it is skipped, and that the first problem stops where it is not."""
    found, reasons = read(path)
    assert found == texts
    assert len(reasons) == len(problems), reasons
    for reason, problem in zip(reasons, problems, strict=True):
        assert reason.startswith(str(path)) and problem in reason
    if problems:
        with pytest.raises(ValueError, match=problems[0]):
            list(iter_tar(path))
    else:
        assert [one.text for one in iter_tar(path)] == texts


PAIRS = ("a.flac", "a.txt", "b.flac", "b.txt", "c.flac", "c.txt")


@pytest.mark.parametrize(
    ("file", "texts", "problems"),
    [
        ("b.flac", ["a.txt", "c.txt"], ["is no header of a tar file: bad checksum", "b has no audio: b.txt"]),
        ("b.txt", ["a.txt", "c.txt"], ["is no header of a tar file: bad checksum", "b has neither"]),
    ],
)
def test_a_bad_header_in_the_middle(tmp_path, file, texts, problems):
    path = shard(tmp_path / "a.tar", *PAIRS)
    with tarfile.open(path) as tar:
        offset = tar.getmember(file).offset
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    check(path, texts, *problems)


def test_zeros_in_the_place_of_a_header(tmp_path):
    """`tarfile` takes them for the end."""
    path = shard(tmp_path / "a.tar", *PAIRS)
    with tarfile.open(path) as tar:
        offset = tar.getmember("b.flac").offset
    content = path.read_bytes()
    path.write_bytes(content[:offset] + bytes(BLOCK) + content[offset + BLOCK :])
    check(path, ["a.txt", "c.txt"], "is no header", "b has no audio")


def test_archives_one_after_the_other(tmp_path):
    """Keys may come again in the next one, and the same key at the border is not the same utterance."""
    first, second = (shard(tmp_path / f"{name}.tar", "a.flac", "a.txt").read_bytes() for name in "12")
    (tmp_path / "both.tar").write_bytes(first + second + shard(tmp_path / "3.tar", *PAIRS).read_bytes())
    check(tmp_path / "both.tar", ["a.txt", "a.txt", "a.txt", "b.txt", "c.txt"])


def test_a_cut_anywhere_is_named(tmp_path):
    whole = shard(tmp_path / "whole.tar", *PAIRS).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    data_ends = members[-1].offset_data + BLOCK
    cuts = {member.offset for member in members[1:]} | {data_ends}  # at borders, where tarfile sees nothing
    cuts |= {cut + step for cut in cuts for step in (-BLOCK, -1, 1, BLOCK, BLOCK + 1)}
    cuts = {cut for cut in cuts if BLOCK < cut <= data_ends}
    assert len(cuts) > 20
    for cut in sorted(cuts):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        texts, reasons = read(path)
        assert texts == ["a.txt", "b.txt", "c.txt"][: len(texts)] and reasons, cut
        with pytest.raises(ValueError, match=rf"{cut}.tar.* (is cut|it is cut|is no header)"):
            list(iter_tar(path))
    padding = tmp_path / "padding.tar"
    padding.write_bytes(whole[: data_ends + 2 * BLOCK])  # only what pads the archive is missing
    check(padding, ["a.txt", "b.txt", "c.txt"])


def link(tar, name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_followed_within_the_shard(tmp_path, kind):
    """`tar` writes a file that has two names once, and a hard link for its second name."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/a.flac", AUDIO)
        add(tar, "x/a.txt", b"one")
        link(tar, "x/b.flac", "x/a.flac" if kind == tarfile.LNKTYPE else "a.flac", kind)
        add(tar, "x/b.txt", b"two")
        link(tar, "c.flac", "x/b.flac", kind)  # a link to a link
        link(tar, "c.txt", "x/b.txt", kind)
        link(tar, "d.flac", "/etc/passwd", kind)
        add(tar, "d.txt", b"four")
        link(tar, "e.flac", "e.flac", kind)  # to itself
        add(tar, "e.txt", b"five")
    outside = "d.flac is a link to /etc/passwd, which is not in the shard"
    problems = [outside, "d has no audio", "e.flac is a link to e.flac", "e has no audio"]
    check(tmp_path / "a.tar", ["one", "two", "two"], *problems)
    one, two, three = iter_tar(tmp_path / "a.tar", skipped=SkippedAudio(tmp_path / "list"))
    assert one.audio.read() == two.audio.read() == three.audio.read() == AUDIO
    assert str(three.audio) == f"{tmp_path}/a.tar/c.flac" and three.duration == one.duration > 0


def test_a_key_that_comes_twice_and_files_that_come_twice(tmp_path):
    apart = shard(tmp_path / "apart.tar", "a.flac", "a.txt", "b.flac", "b.txt", "a.flac", "a.txt")
    check(apart, ["a.txt", "b.txt"], "a comes a second time")
    torn = shard(tmp_path / "torn.tar", "a.flac", "b.flac", "a.txt", "b.txt")
    check(torn, [], "a has neither", "b has neither")  # a name is listed once
    together = shard(tmp_path / "together.tar", "a.flac", "a.txt", "a.flac", "a.txt", "b.flac", "b.txt")
    check(together, ["b.txt"], "a has a file twice: a.flac, a.txt, a.flac, a.txt")
    formats = shard(tmp_path / "formats.tar", "a.flac", "a.wav", "a.txt", "b.flac", "b.txt")
    check(formats, ["b.txt"], "a has a file twice: a.flac, a.wav, a.txt; accepted: one audio")


def test_what_is_no_data_is_no_utterance(tmp_path):
    names = ["._a.flac", "._a.txt", "a.flac", "a.txt", ".DS_Store", "__key__", "x/._b.flac", "x/b.flac", "x/b.txt"]
    check(shard(tmp_path / "a.tar", *names), ["a.txt", "x/b.txt"])
    check(shard(tmp_path / "dots.tar", "a.1.flac", "a.1.txt"), [], "a has no audio: a.1.flac, a.1.txt; what follows")


def test_texts_with_a_byte_order_mark(tmp_path):
    content = {"a.txt": "\ufeffcaf\u00e9".encode(), "b.json": '\ufeff{"text": "two"}'.encode()}
    names = ("a.flac", "a.txt", "b.flac", "b.json")
    assert read(shard(tmp_path / "a.tar", *names, content=content)) == (["caf\u00e9", "two"], [])


def test_bad_texts_are_skipped_too(tmp_path):
    content = {"a.txt": b"caf\xe9", "b.txt": b"two"}
    path = shard(tmp_path / "a.tar", "a.flac", "a.txt", "b.flac", "b.txt", content=content)
    check(path, ["two"], "a.txt is not UTF-8")


def test_the_helper_makes_whole_shards(tmp_path):
    check(write_shard(tmp_path / "a.tar", {0: "one", 1: "two"}), ["one", "two"])
