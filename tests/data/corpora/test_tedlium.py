"""TED-LIUM's layouts, its STM files and what its transcripts look like."""

import json

import numpy as np
import pytest
import soundfile

from seam.data.corpora import tedlium
from seam.data.corpora.utterances import CorpusUtterance
from seam.data.manifest import read_manifest
from seam.data.prepare import prepare
from seam.tests.helpers.sounds import tone, write_sph

STM = """\
;; LABEL "o" "Overall" "Overall results"
Talk_2010 1 inter_segment_gap 0 1.00 <o,,unknown> ignore_time_segment_in_scoring
Talk_2010 1 Talk_2010 1.00 3.50 <o,f0,male> it 's a test {NOISE} of <unk> segments
Talk_2010 1 Talk_2010 3.50 5.25 <o,f0,male> you don 't have to read(2) it
Talk_2010 1 Talk_2010 5.25 6.00 <o,f0,male> ignore_time_segment_in_scoring
Talk_2010 1 Talk_2010 6.00 8.00 <o,f0,male> the last words of it
"""


@pytest.fixture
def release2(tmp_path):
    """One talk of 8 s whose pitch rises with every second, so that a segment is known by its pitch."""
    root = tmp_path / "TEDLIUM_release2"
    for split in ("train", "test"):
        (root / split / "stm").mkdir(parents=True)
    talk = np.concatenate([tone(1.0, 200 + 100 * second) for second in range(8)])
    write_sph(root / "test" / "sph" / "Talk_2010.sph", talk)
    (root / "test" / "stm" / "Talk_2010.stm").write_text(STM)
    write_sph(root / "train" / "sph" / "Other.sph", tone(4.0, 333))
    (root / "train" / "stm" / "Other.stm").write_text("Other 1 Other 0.5 2.5 <F0_F> hello there everyone\n")
    return root


def test_segments_are_cut_out_sample_by_sample(release2, tmp_path):
    talk = soundfile.read(release2 / "test" / "sph" / "Talk_2010.sph", dtype="int16")[0]
    assert len(talk) == 8 * 16000
    summary = prepare(tedlium.read(release2, ["test"]), tmp_path / "out")
    kept = read_manifest(summary.manifest)
    assert [(one.text, one.duration, one.audio.name) for one in kept] == [
        ("it's a test of segments", 2.5, "Talk_2010-0000100-0000350.flac"),
        ("you don't have to read it", 1.75, "Talk_2010-0000350-0000525.flac"),
        ("the last words of it", 2.0, "Talk_2010-0000600-0000800.flac"),
    ]
    assert {(one.speaker, one.corpus, one.split) for one in kept} == {("Talk_2010", "tedlium", "test")}
    assert summary.not_scored == 2 and not summary.left_out and not summary.left_out_file.read_text()
    for one, (start, end) in zip(kept, [(1.0, 3.5), (3.5, 5.25), (6.0, 8.0)], strict=True):
        samples, rate = soundfile.read(one.audio, dtype="int16")
        assert rate == 16000 and soundfile.info(one.audio).subtype == "PCM_16"
        np.testing.assert_array_equal(samples, talk[round(start * rate) : round(end * rate)])


def test_releases_and_splits(release2, tmp_path):
    everything = list(tedlium.read(release2))
    assert [one.split for one in everything if isinstance(one, CorpusUtterance)] == ["train", "test", "test", "test"]
    assert everything[0].text == "hello there everyone"
    assert list(tedlium.read(release2 / "test")) == everything[1:]
    release3 = tmp_path / "TEDLIUM_release-3"
    release3.mkdir()
    release2.rename(release3 / "legacy")
    assert [one.id if isinstance(one, CorpusUtterance) else one.name for one in tedlium.read(release3)] == [
        one.id if isinstance(one, CorpusUtterance) else one.name for one in everything
    ]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        next(tedlium.read(release3, ["dev"]))
    with pytest.raises(ValueError, match=r"not TED-LIUM as unpacked: looked for {train,dev,test}/stm/\*.stm"):
        next(tedlium.read(tmp_path))


def test_segments_that_cannot_be_are_named(release2, tmp_path):
    (release2 / "test" / "stm" / "Talk_2010.stm").write_bytes(
        b"Talk_2010 1 Talk_2010 0.00 2.00 <o,f0,male> the first one\n"
        b"Talk_2010 1 Talk_2010 1.50 3.00 <o,f0,male> begins too early\n"
        b"Talk_2010 1 Talk_2010 3.00 4.00 <o,f0,male> caf\xe9 at noon\n"
        b"Talk_2010 1 Talk_2010 5.00 4.50 <o,f0,male> backwards\n"
        b"Talk_2010 1 Talk_2010 now 4.50 <o,f0,male> no time\n"
        b"Talk_2010 1 Talk_2010\n"
        b"Talk_2010 1 Talk_2010 4.95 6.00 <o,f0,male> the second one\n"
        b"Talk_2010 1 Talk_2010 6.00 7.00 <o,f0,male> {NOISE} <unk>\n"
        b"Talk_2010 1 Talk_2010 7.00 9.00 <o,f0,male> after the end\n"
    )
    (release2 / "test" / "stm" / "Lost.stm").write_text("Lost 1 Lost 0.00 2.00 <o,f0,male> nowhere to be heard\n")
    write_sph(release2 / "test" / "sph" / "Untold.sph", tone(1.0))
    summary = prepare(tedlium.read(release2, ["test"]), tmp_path / "out")
    assert [one.text for one in read_manifest(summary.manifest)] == ["the first one", "the second one"]
    rows = map(json.loads, summary.left_out_file.read_text().splitlines())
    assert sorted((row["name"], row["reason"]) for row in rows) == [
        ("Lost-0000000-0000200", "no audio file"),
        ("Talk_2010-0000150-0000300", "overlapping segment"),
        ("Talk_2010-0000300-0000400", "not UTF-8"),
        ("Talk_2010-0000600-0000700", "empty text"),
        ("Talk_2010-0000700-0000900", "segment after the end"),
        ("Talk_2010.stm, line 4", "bad line"),
        ("Talk_2010.stm, line 5", "bad line"),
        ("Talk_2010.stm, line 6", "bad line"),
        ("Untold", "no transcript"),
    ]
    assert len(list((tmp_path / "out" / "audio").rglob("*.*"))) == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("it 's what they 're doing", "it's what they're doing"),
        ("i 'd 've gone at five o 'clock", "i'd've gone at five o'clock"),
        ("the students ' books", "the students' books"),
        ("get 'em 'cause it 's time", "get 'em 'cause it's time"),
        ("'s the first word", "'s the first word"),
        ("a <unk> b <sil> c {UH} d [NOISE] e", "a b c d e"),
        ("the(2) object(3) (aside)", "the object"),
        ("and so on (Talk_2010-10.33-16.41-F0_M-S1)", "and so on"),
        ("{COUGH}", ""),
    ],
)
def test_transcripts(words, text):
    assert tedlium.transcript(words.split()) == text


def test_lines_with_and_without_a_label():
    segment = tedlium.Segment("T", "S", 1.5, 2.0, ["<unk>", "word"])
    assert tedlium.parse("T 1 S 1.5 2.0 <o,f0,female> <unk> word") == segment
    assert tedlium.parse("T A S 1.5 2 <unk> word") == segment
    with pytest.raises(ValueError, match="not an interval of time"):
        tedlium.parse("T 1 S -1 2 <o,f0,male> word")
    with pytest.raises(ValueError, match="not an interval of time"):
        tedlium.parse("T 1 S 1 nan <o,f0,male> word")


def test_real_recordings(shared, tmp_path):
    """Four utterances of one speaker, joined to a talk with a second between them, come out as they went in."""
    published = [one for one in read_manifest(shared / "speech") if one.audio.stem.startswith("1688-142285-000")][:4]
    talk, stm, start = [], [], 0
    for one in published:
        samples = soundfile.read(one.audio)[0]
        samples = samples[: len(samples) // 160 * 160]  # the times of an STM file are rounded to 10 ms
        talk += [samples, np.zeros(16000)]
        end = start + len(samples)
        stm.append(f"T 1 S {start / 16000:.2f} {end / 16000:.2f} <o,f0,male> {one.text.lower()}\n")
        stm.append(f"T 1 inter_segment_gap {end / 16000:.2f} {end / 16000 + 1:.2f} <o,,unknown>\n")
        start = end + 16000
    write_sph(tmp_path / "dev" / "sph" / "T.sph", np.concatenate(talk))
    (tmp_path / "dev" / "stm").mkdir()
    (tmp_path / "dev" / "stm" / "T.stm").write_text("".join(stm))
    summary = prepare(tedlium.read(tmp_path), tmp_path / "out")
    assert summary.kept == summary.not_scored == 4 and not summary.left_out
    for one, before in zip(read_manifest(summary.manifest), published, strict=True):
        samples = soundfile.read(one.audio, dtype="int16")[0]
        assert one.text == before.text.lower() and one.split == "dev" and one.speaker == "S"
        np.testing.assert_array_equal(samples, soundfile.read(before.audio, dtype="int16")[0][: len(samples)])
