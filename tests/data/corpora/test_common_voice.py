"""Common Voice's layout: tab-separated tables and MP3 files."""

import json

import pytest
import soundfile

from seam.data.corpora import common_voice
from seam.data.manifest import read_manifest
from seam.data.prepare import prepare
from seam.tests.helpers.sounds import tone, write

HEADER = (
    "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\t"
)
HEADER += "locale\tsegment\n"


def row(client: str, path: str, sentence: str) -> str:
    return f"{client}\t{path}\t7f\t{sentence}\t\t2\t0\ttwenties\t\t\t\ten\t\n"


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "cv-corpus" / "en"
    for number in range(4):
        write(root / "clips" / f"common_voice_en_{number}.mp3", tone(1.5, 250 + 100 * number, 32000), 32000)
    rows = [
        row("anna", "common_voice_en_0.mp3", 'She said "no", twice.'),
        row("bert", "common_voice_en_1.mp3", '"Unbalanced quotes'),
        row("bert", "common_voice_en_2.mp3", "Third one."),
        row("carl", "common_voice_en_3.mp3", "The fourth."),
    ]
    (root / "train.tsv").write_text(HEADER + rows[0] + rows[1])
    (root / "dev.tsv").write_text(HEADER)
    (root / "test.tsv").write_text(HEADER + rows[2])
    (root / "validated.tsv").write_text(HEADER + "".join(rows))
    return root


def test_quotation_marks_belong_to_the_sentences(corpus, tmp_path):
    summary = prepare(common_voice.read(corpus), tmp_path / "out")
    kept = read_manifest(summary.manifest)
    assert [(one.speaker, one.text, one.split) for one in kept] == [
        ("anna", 'She said "no", twice.', "train"),
        ("bert", '"Unbalanced quotes', "train"),
        ("bert", "Third one.", "test"),
    ]
    assert kept[0].audio.samefile(corpus / "clips" / "common_voice_en_0.mp3")
    assert all(abs(one.duration - 1.5) < 0.1 for one in kept)  # MP3 comes in whole frames
    assert len(list(common_voice.read(corpus, ["validated"]))) == 4


def test_broken_lines_are_named(corpus, tmp_path):
    with (corpus / "train.tsv").open("ab") as file:
        file.write(b"dora\tcommon_voice_en_3.mp3\n")
        file.write(row("emil", "common_voice_en_9.mp3", "Not there.").encode())
        file.write(row("emil", "common_voice_en_3.mp3", "Caf\xe9").encode("latin-1"))
    summary = prepare(common_voice.read(corpus), tmp_path / "out")
    rows = map(json.loads, summary.left_out_file.read_text().splitlines())
    assert [(row["name"], row["reason"]) for row in rows] == [
        ("train.tsv, line 4", "bad line"),
        ("common_voice_en_9.mp3", "no audio file"),
        ("common_voice_en_3.mp3", "not UTF-8"),
    ]
    assert summary.kept == 3


def test_other_folders_are_refused(corpus):
    with pytest.raises(ValueError, match=r"looked for one of {train,dev,.*}.tsv and for clips/"):
        next(common_voice.read(corpus.parent))
    with pytest.raises(ValueError, match="no split 'other'; it has train, dev, test, validated"):
        next(common_voice.read(corpus, ["other"]))
    (corpus / "dev.tsv").write_text("client_id\tpath\n")
    with pytest.raises(ValueError, match="dev.tsv lacks the column sentence"):
        list(common_voice.read(corpus))
    for name in ("train", "dev", "test"):
        (corpus / f"{name}.tsv").unlink()
    with pytest.raises(ValueError, match="has none of train, dev, test; say which of validated to read"):
        next(common_voice.read(corpus))


def test_real_recordings_as_mp3(shared, tmp_path):
    published = [one for one in read_manifest(shared / "speech", corpus="ljspeech") if one.duration < 8][:3]
    assert len(published) == 3
    for one in published:
        samples, rate = soundfile.read(one.audio)
        write(tmp_path / "clips" / f"{one.audio.stem}.mp3", samples, rate)
    rows = [row("linda", f"{one.audio.stem}.mp3", one.text) for one in published]
    (tmp_path / "test.tsv").write_text(HEADER + "".join(rows))
    summary = prepare(common_voice.read(tmp_path), tmp_path / "out")
    assert not summary.left_out
    for one, before in zip(read_manifest(summary.manifest), published, strict=True):
        assert one.text == before.text and abs(one.duration - before.duration) < 0.15
