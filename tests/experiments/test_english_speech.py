"""Speech of people: labels that readers like, speakers apart, and the sounds of everyday recordings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.evaluation.scoring import words
from seam.experiments import english_speech
from seam.experiments.english_speech import (
    EnglishSpeech,
    labelled,
    make_test_speech,
    make_training_speech,
    sentence,
    split_by_speaker,
    telephone,
    unquoted,
    vary,
    with_case_of,
)


@pytest.mark.parametrize(
    ("spoken", "written"),
    [
        ("DO YOU WANT A DRINK", "Do you want a drink?"),
        ("i'm here and i'll go", "I'm here and I'll go."),
        ("WHY THEN I STAY", "Why then I stay?"),
        ("C A T", "C A T."),
        ("RUBOUT F X FOUR", "Rubout F X four."),
        ("A cow is my friend!", "A cow is my friend!"),
        ("", ""),
    ],
)
def test_words_become_a_sentence(spoken, written):
    assert sentence(spoken) == written


def test_quotes_of_a_table_are_undone():
    assert unquoted('"He saw ""art"" in motion."') == 'He saw "art" in motion.'
    assert unquoted('He said "no".') == 'He said "no".'


@pytest.mark.parametrize(
    ("reference", "transcript", "written"),
    [
        ("HE CAME AND WENT", "He came, and went.", "He came, and went."),
        ("MISTER DARCY HAD TWENTY", "Mr. Darcy had 20.", "Mr. Darcy had 20."),
        ("I SAW MISTER DARCY LEAVE TODAY", "I saw Mr. Darcy live today.", "I saw Mr. Darcy leave today."),
        ("THEY LEFT HE STAYED AT HOME", "They left. We stayed at home.", "They left. He stayed at home."),
        ("HE SAW LADY YORKE'S SON AND LEFT", "He saw Lady Yorks' son and left.", "He saw Lady Yorke's son and left."),
        ("HE WENT TO THE SEA WITH ALL", "He went to the C with all.", "He went to the sea with all."),
        ("THE OLD MAN CAME IN AND SAT", "The old man came. And sat.", "The old man came in And sat."),
        ("HE LEFT THE HOUSE AT ONCE", "He left the the house at once.", "He left the house at once."),
        ("ALL OF IT IS ANOTHER THING", "Nothing here.", None),
    ],
)
def test_words_of_the_reference_with_the_case_of_a_transcript(reference, transcript, written):
    found = with_case_of(reference, transcript)
    assert found == written
    if written is not None:
        assert words(found, "english") == words(reference, "english")


def test_whose_text_cannot_be_trusted_is_left_out(tmp_path):
    one = Utterance(tmp_path / "a.flac", "ONE TWO THREE FOUR FIVE", 2.0, corpus="librispeech_tc")
    kinds = [one, replace(one, corpus="common_voice", text='"Natural ""text""."'), replace(one, corpus="an4")]
    assert [u.text for u in labelled(kinds, {"a.flac": "Other words."})] == [
        'Natural "text".',
        "One two three four five.",
    ]
    assert [u.text for u in labelled([one], {"a.flac": "One, two, three, four, five."})] == [
        "One, two, three, four, five."
    ]
    assert not list(labelled([one], {}))


def test_no_speaker_is_in_both_parts(tmp_path):
    utterances = [Utterance(tmp_path / f"{i}.flac", "a", 1.0, f"s{i % 12}", f"c{i % 2}") for i in range(240)]
    utterances += [Utterance(tmp_path / f"x{i}.flac", "a", 1.0, "alone", "single") for i in range(200)]
    first, later = split_by_speaker(utterances, 0.25, np.random.default_rng(0))
    assert sorted(map(str, (one.audio for one in first + later))) == sorted(str(one.audio) for one in utterances)
    both = {(one.corpus, one.speaker) for one in first} & {(one.corpus, one.speaker) for one in later}
    assert both == {("single", "alone")}
    assert 0.15 < len(later) / len(utterances) < 0.35


def test_a_speaker_of_two_corpora_is_in_one_part(tmp_path):
    utterances = [
        Utterance(tmp_path / f"{corpus}{i}.flac", "a", 1.0, f"s{i % 9}", corpus) for corpus in "abc" for i in range(27)
    ]
    first, later = split_by_speaker(utterances, 0.25, np.random.default_rng(0))
    assert first and later
    assert not {one.speaker for one in first} & {one.speaker for one in later}


def tone(frequency, seconds=1.0):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(int(16000 * seconds)) / 16000)).astype(np.float32)


def test_a_telephone_passes_its_band_only():
    level = {frequency: np.sqrt(np.mean(telephone(tone(frequency))[2000:-2000] ** 2)) for frequency in (60, 1000, 6000)}
    assert level[1000] > 0.8 * 0.3 / np.sqrt(2)
    assert max(level[60], level[6000]) < 0.1 * level[1000]


def test_changes_are_audible_finite_and_reproducible():
    sounds = [vary(tone(440), lambda: tone(200, 0.4), np.random.default_rng(seed)) for seed in range(12)]
    again = [vary(tone(440), lambda: tone(200, 0.4), np.random.default_rng(seed)) for seed in range(12)]
    for one, other in zip(sounds, again, strict=True):
        assert np.isfinite(one).all() and len(one) > 8000
        np.testing.assert_array_equal(one, other)
        assert len(one) != 16000 or not np.array_equal(one, tone(440))


@pytest.fixture
def corpora(tmp_path):
    """Two small folders of tones: people in both, natural text in one of them."""
    rng = np.random.default_rng(0)
    for name, corpus in (("first", "librispeech train-clean-100"), ("second", "common_voice")):
        folder = tmp_path / name
        folder.mkdir()
        utterances = []
        for i in range(24):
            seconds = float(rng.uniform(0.5, 3))
            soundfile.write(folder / f"{name}{i}.wav", tone(200 + 10 * i, seconds), 16000)
            split = "dev" if i % 4 == 0 else "train"
            utterances.append(
                Utterance(folder / f"{name}{i}.wav", f"WORD NUMBER {i}", seconds, f"{split}{i % 6}", corpus, split)
            )
        write_manifest(folder / "metadata.jsonl", utterances)
    return EnglishSpeech(
        corpora=[str(tmp_path / "first"), str(tmp_path / "second")], silent=4, validation=4, test=3, joined_share=0.5
    )


def test_training_speech(corpora, tmp_path, processor, monkeypatch):
    monkeypatch.setattr(english_speech.SeamProcessor, "from_pretrained", lambda name: processor)
    monkeypatch.setattr(
        english_speech,
        "transcribe_for_labels",
        lambda utterances, checkpoint, path: {one.audio.name: one.text.capitalize() + "!" for one in utterances},
    )
    make_training_speech(corpora, tmp_path / "out", "untrained")
    first, later = (read_manifest(tmp_path / "out" / f"{name}.jsonl") for name in ("alignment", "later"))
    assert {one.text for one in first + later if one.corpus == "silence"} == {""}
    spoken = " ".join(one.text for one in first + later)
    for i in range(24):
        for text in (f"Word number {i}!", f"WORD NUMBER {i}"):  # of the corpora with and without case
            assert (text in spoken) == (i % 4 != 0), text  # `dev` is not trained on
    for one in first + later:
        assert soundfile.info(one.audio).duration == pytest.approx(one.duration, abs=1e-3)
    assert [one.duration for one in first] == sorted(one.duration for one in first)


def test_test_speech(corpora, tmp_path, processor):
    make_test_speech(corpora, tmp_path / "tests", processor)
    kinds = {path.stem: read_manifest(path) for path in (tmp_path / "tests").glob("test-*.jsonl")}
    assert {name: len(those) for name, those in kinds.items()} == {
        "test-people": 6,
        "test-common_voice": 3,
        "test-noisy": 1,
        "test-telephone": 1,
    }
    assert all(one.split == "dev" for those in kinds.values() for one in those)
    assert len(read_manifest(tmp_path / "tests" / "validation.jsonl")) == 4


def test_nobody_is_tested_who_is_trained_on_under_another_corpus(corpora, tmp_path, processor):
    """`dev` of the first folder and `train` of the second share two readers; who is unnamed is shared by nobody."""
    for name, split in (("first", "dev"), ("second", "train")):
        folder = tmp_path / name
        changed = {0: "reader", 4: "other", 8: ""} if split == "dev" else {1: "reader", 2: "other", 3: ""}
        rows = [replace(one, speaker=changed.get(i, one.speaker)) for i, one in enumerate(read_manifest(folder))]
        write_manifest(folder / "metadata.jsonl", rows)
    make_test_speech(replace(corpora, validation=8, test=12), tmp_path / "tests", processor)
    tests = {path.stem: read_manifest(path) for path in (tmp_path / "tests").glob("*.jsonl")}
    trained = {one.speaker for name in corpora.corpora for one in read_manifest(name, "train")} - {""}
    assert {"reader", "other"} <= trained
    assert not trained & {one.speaker for those in tests.values() for one in those}
    assert len(tests["test-people"]) == 4 and "" in {one.speaker for one in tests["test-people"]}


def test_labels_go_on_where_they_stopped(tmp_path, monkeypatch):
    path = tmp_path / "whisper.jsonl"
    path.write_text(json.dumps({"audio": "a.wav", "text": "A."}) + '\n{"audio": "b.w')
    done = english_speech.transcribe_for_labels([Utterance(tmp_path / "a.wav", "", 1.0)], "none", path)
    assert done == {"a.wav": "A."}
    assert path.read_text() == json.dumps({"audio": "a.wav", "text": "A."}) + "\n"
