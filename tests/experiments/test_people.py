import numpy as np
import pytest
import soundfile

from seam.data.manifest import Utterance, read_manifest
from seam.experiments.people import SAMPLE_RATE, join_recordings, make_strings, make_training_utterances


def recording(seconds: float, amplitude: float, frequency: float) -> np.ndarray:
    """Return a word: a tone burst in the middle third, with the noise of a room throughout."""
    rng = np.random.default_rng(int(frequency))
    audio = 0.002 * rng.standard_normal(int(seconds * SAMPLE_RATE))
    third = audio.size // 3
    audio[third : 2 * third] += amplitude * np.sin(2 * np.pi * frequency * np.arange(third) / SAMPLE_RATE)
    return audio.astype(np.float32)


RECORDINGS = [
    (recording(0.4, 0.5, 200), "one", "anna"),
    (recording(0.5, 0.05, 300), "two", "anna"),
    (recording(0.3, 0.3, 400), "three", "bob"),
    (recording(0.6, 0.9, 500), "four", "bob"),
]


def test_the_generator_decides_everything():
    first, again = (join_recordings(RECORDINGS, 5, np.random.default_rng(1), max_seconds=3) for _ in range(2))
    for (audio, *labels), (audio_again, *labels_again) in zip(first, again, strict=True):
        assert np.array_equal(audio, audio_again) and labels == labels_again


def test_strings_stay_with_one_speaker_and_within_the_limits():
    joined = join_recordings(RECORDINGS, 100, np.random.default_rng(2), max_words=4, max_seconds=1.5)
    words = {"anna": {"one", "two"}, "bob": {"three", "four"}}
    assert len(joined) == 100
    for audio, text, speaker in joined:
        assert set(text.split()) <= words[speaker]
        assert len(text.split()) <= 4
        assert audio.size <= 1.5 * SAMPLE_RATE
        assert audio.dtype == np.float32 and np.abs(audio).max() <= 1
    assert {len(text.split()) for _, text, _ in joined} >= {2, 3}
    assert {speaker for *_, speaker in joined} == {"anna", "bob"}


def test_gaps_hold_low_noise_instead_of_digital_silence():
    for audio, text, _ in join_recordings(RECORDINGS, 30, np.random.default_rng(3), max_seconds=5):
        frames = audio[: audio.size // 160 * 160].reshape(-1, 160)
        levels = np.sqrt(np.mean(np.square(frames), axis=1))
        assert levels.min() > 5e-4, text
        assert np.quantile(levels, 0.2) < 0.02
        assert np.count_nonzero(audio == 0) < 0.01 * audio.size


def test_gap_noise_has_a_floor_for_gated_recordings():
    gated = np.zeros(SAMPLE_RATE // 2, dtype=np.float32)
    gated[2000:6000] = 0.3
    (audio, text, _), *_ = join_recordings([(gated, "one", "anna")], 1, np.random.default_rng(0), max_seconds=9)
    assert len(text.split()) > 1
    gap = audio[gated.size + 10 : gated.size + 300]
    assert 0 < np.abs(gap).max() < 0.01


def test_loudness_is_evened_but_not_equalised():
    joined = join_recordings(RECORDINGS[:2], 50, np.random.default_rng(5), max_words=2, max_seconds=5)
    audio = next(audio for audio, text, _ in joined if text == "one two")
    loud, quiet = np.abs(audio[: int(0.4 * SAMPLE_RATE)]).max(), np.abs(audio[-int(0.5 * SAMPLE_RATE) :]).max()
    assert 2 < loud / quiet < 6  # ten before


def test_long_recordings_are_left_out_aloud(caplog):
    joined = join_recordings(RECORDINGS, 20, np.random.default_rng(6), max_seconds=0.45)
    assert {text for _, text, _ in joined} == {"one", "three"}
    assert "2 recordings" in caplog.text
    with pytest.raises(ValueError, match="no recording"):
        join_recordings(RECORDINGS, 1, np.random.default_rng(0), max_seconds=0.1)
    with pytest.raises(ValueError, match="max_words"):
        join_recordings(RECORDINGS, 1, np.random.default_rng(0), max_words=0, max_seconds=1)


def words(folder):
    rng = np.random.default_rng(0)
    made = []
    for speaker in ("anna", "bert"):
        for word in ("one", "two", "three"):
            path = folder / f"{speaker}-{word}.wav"
            soundfile.write(path, 0.2 * rng.standard_normal(4000), 8000)
            made.append(Utterance(path, word, 0.5, speaker, "digits", "train"))
    return made


@pytest.mark.medium
def test_training_utterances(tmp_path):
    made = make_training_utterances(words(tmp_path), tmp_path / "train", 10, 6, 2.0, clean_share=0.5, seed=1)
    assert len(made) == 16
    assert made == read_manifest(tmp_path / "train" / "manifest.jsonl")
    for one in made:
        info = soundfile.info(one.audio)
        assert info.samplerate == 16000 and info.duration <= 2.0
    assert {one.speaker for one in made[:10]} == {"anna", "bert"}
    assert all(len(one.text.split()) == 1 for one in made[:10])
    assert any(len(one.text.split()) > 1 for one in made[10:])


def test_strings_are_the_same_for_the_same_seed(tmp_path):
    one, other = (make_strings(words(tmp_path), tmp_path / name, 5, 2.0, seed=3) for name in "ab")
    assert [u.text for u in one] == [u.text for u in other]
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(soundfile.read(first.audio)[0], soundfile.read(second.audio)[0])
