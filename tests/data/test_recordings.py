"""Utterances made from a manifest of single words."""

import numpy as np
import soundfile

from seam.data.manifest import Utterance, read_manifest
from seam.data.recordings import write_strings, write_training


def words(folder):
    rng = np.random.default_rng(0)
    made = []
    for speaker in ("anna", "bert"):
        for word in ("one", "two", "three"):
            path = folder / f"{speaker}-{word}.wav"
            soundfile.write(path, 0.2 * rng.standard_normal(4000), 8000)
            made.append(Utterance(path, word, 0.5, speaker, "digits", "train"))
    return made


def test_training_utterances(tmp_path):
    made = write_training(words(tmp_path), tmp_path / "train", 10, 6, 2.0, clean_share=0.5, seed=1)
    assert len(made) == 16
    assert made == read_manifest(tmp_path / "train" / "manifest.jsonl")
    for one in made:
        info = soundfile.info(one.audio)
        assert info.samplerate == 16000 and info.duration <= 2.0
    assert {one.speaker for one in made[:10]} == {"anna", "bert"}
    assert all(len(one.text.split()) == 1 for one in made[:10])
    assert any(len(one.text.split()) > 1 for one in made[10:])


def test_strings_are_the_same_for_the_same_seed(tmp_path):
    one, other = (write_strings(words(tmp_path), tmp_path / name, 5, 2.0, seed=3) for name in "ab")
    assert [u.text for u in one] == [u.text for u in other]
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(soundfile.read(first.audio)[0], soundfile.read(second.audio)[0])
