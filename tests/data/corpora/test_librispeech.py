"""LibriSpeech as OpenSLR packs it, on recordings of the real corpus and on synthetic ones."""

import shutil

import pytest

from seam.data.corpora import librispeech
from seam.data.corpora.utterances import CorpusUtterance, Exclusion
from seam.data.manifest import read_manifest
from seam.data.prepare import prepare
from seam.tests.helpers.sounds import tone, write


@pytest.fixture
def corpus(tmp_path):
    """Two subsets, as `LibriSpeech.tar.gz` unpacks them."""
    for split, speaker, chapter, texts in (
        ("dev-clean", "84", "121123", ["GO", "STOP NOW PLEASE"]),
        ("test-other", "1688", "142285", ["TWO TIMES"]),
    ):
        folder = tmp_path / "LibriSpeech" / split / speaker / chapter
        ids = [f"{speaker}-{chapter}-{number:04d}" for number in range(len(texts))]
        for number, id in enumerate(ids):
            write(folder / f"{id}.flac", tone(1.0, 200 + 50 * number + int(speaker)))
        rows = [f"{id} {text}\n" for id, text in zip(ids, texts, strict=True)]
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(rows))
    (tmp_path / "LibriSpeech" / "README.TXT").write_text("about the corpus")
    return tmp_path


def test_archive_root_and_subset_are_the_same_corpus(corpus):
    everything = list(librispeech.read(corpus))
    folder = corpus / "LibriSpeech" / "test-other" / "1688" / "142285"
    last = CorpusUtterance(
        "1688-142285-0000", folder / "1688-142285-0000.flac", "TWO TIMES", "1688", "librispeech", "test-other"
    )
    assert [(one.id, one.text, one.split) for one in everything] == [
        ("84-121123-0000", "GO", "dev-clean"),
        ("84-121123-0001", "STOP NOW PLEASE", "dev-clean"),
        (last.id, last.text, last.split),
    ]
    assert (everything[-1].audio, everything[-1].speaker, everything[-1].sampling_rate) == (last.audio, "1688", 16000)
    assert list(librispeech.read(corpus / "LibriSpeech")) == everything
    assert list(librispeech.read(corpus / "LibriSpeech" / "dev-clean")) == everything[:2]
    assert list(librispeech.read(corpus, ["test-other"])) == everything[2:]


def test_a_recording_without_a_transcript_and_a_transcript_without_a_recording_are_named(corpus, tmp_path):
    folder = corpus / "LibriSpeech" / "dev-clean" / "84" / "121123"
    (folder / "84-121123-0001.flac").rename(folder / "84-121123-0007.flac")
    bare = corpus / "LibriSpeech" / "dev-clean" / "84" / "9"  # a chapter whose transcripts are missing
    write(bare / "84-9-0000.flac", tone(1.0, 900))
    found = [one for one in librispeech.read(corpus, ["dev-clean"]) if isinstance(one, Exclusion)]
    assert [(one.name, one.reason) for one in found] == [
        ("84-121123-0007", "no transcript"),
        ("84-9-0000", "no transcript"),
    ]
    summary = prepare(librispeech.read(corpus), tmp_path / "out")
    assert summary.left_out == {"no transcript": 2, "no audio file": 1} and summary.kept == 2


def test_other_folders_are_refused(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        next(librispeech.read(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no split 'test'; it has dev-clean, test-other"):
        next(librispeech.read(corpus, ["test"]))
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"looked for SUBSET/SPEAKER/CHAPTER/\*.trans.txt"):
        next(librispeech.read(tmp_path / "other"))


def test_real_recordings(shared, tmp_path):
    """All 40 test-other recordings, in the layout that they come from."""
    published = read_manifest(shared / "speech", corpus="librispeech test-other")
    assert len(published) == 40
    for one in published:
        speaker, chapter, _ = one.audio.stem.split("-")
        folder = tmp_path / "LibriSpeech" / "test-other" / speaker / chapter
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(one.audio, folder)
        with (folder / f"{speaker}-{chapter}.trans.txt").open("a") as file:
            file.write(f"{one.audio.stem} {one.text.upper()}\n")
    summary = prepare(librispeech.read(tmp_path), tmp_path / "out")
    assert summary.kept == 40 and not summary.left_out and len(summary.speakers) == 4
    prepared = {one.audio.stem: one for one in read_manifest(summary.manifest)}
    for one in published:
        found = prepared[one.audio.stem]
        assert found.text == one.text.upper() and abs(found.duration - one.duration) < 0.01
        assert (found.speaker, found.corpus, found.split) == (one.audio.parent.name, "librispeech", "test-other")
        assert found.audio.read_bytes() == one.audio.read_bytes()
