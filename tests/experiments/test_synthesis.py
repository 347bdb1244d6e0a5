import hashlib
import json
import sys

import numpy as np
import pytest
import soundfile

from seam.experiments import synthesis
from seam.experiments.grammar import DIGITS
from seam.experiments.synthesis import (
    RESPELLED_DIGITS,
    SAMPLE_RATE,
    Job,
    Speaker,
    accented_voices,
    held_out_voices,
    respell,
    synthesize,
    training_voices,
)


def variants(voices: list[str]) -> set[str]:
    return {voice.partition("+")[2] for voice in voices}


def test_voice_lists_share_no_variant():
    assert len(set(training_voices())) == len(training_voices()) >= 90
    assert len(set(held_out_voices())) == len(held_out_voices()) >= 18
    # Also not a numbered sibling such as edward2 of edward; f1 or m5 are numbered but different people.
    stems = {v.rstrip("0123456789").lower() for v in variants(training_voices())} - {"f", "m"}
    assert not stems & {v.rstrip("0123456789").lower() for v in variants(held_out_voices())}
    assert not variants(training_voices()) & variants(held_out_voices())
    assert variants(accented_voices()) <= variants(training_voices())
    assert not set(accented_voices()) & set(training_voices())


def test_respellings_cover_every_digit_and_nothing_else():
    for language in RESPELLED_DIGITS:
        assert len(respell(" ".join(DIGITS), language).split()) == 10
        for text in ("turn on the light", "ten", ""):
            with pytest.raises(ValueError, match="digit words"):
                respell(text, language)


def test_the_missing_library_is_named(monkeypatch):
    synthesis._loader.cache_clear()
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install 'seam\[demo\]'"):
        Speaker()


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    pytest.importorskip("espeakng_loader", reason="synthetic speech needs espeakng-loader (extra demo)")
    return Speaker()


@pytest.mark.medium
def test_every_voice_speaks_and_sounds_different(speaker):
    digests = set()
    voices = training_voices() + held_out_voices() + accented_voices()
    for voice in voices:
        # New York differs from the rest of the country in few words: "four" is one of them.
        audio = speaker.speak("four zero", voice)
        assert audio.dtype == np.float32 and audio.ndim == 1
        assert 0.4 < audio.size / SAMPLE_RATE < 1.6, voice
        assert 0.1 < np.abs(audio).max() <= 1, voice
        digests.add(hashlib.sha256(audio.tobytes()).digest())
    assert len(digests) == len(voices)


@pytest.mark.parametrize("voice", ["en-us+f2", "en+klatt3", "en-029+m1", "fr+m3"])
def test_speech_does_not_depend_on_what_was_spoken_before(speaker, voice):
    first = speaker.speak("seven three zero", voice, 150, 40)
    speaker.speak("turn on the light", "en+f4", 200, 70)
    assert np.array_equal(first, speaker.speak("seven three zero", voice, 150, 40))
    assert np.array_equal(first, Speaker().speak("seven three zero", voice, 150, 40))


def test_rate_and_pitch_have_their_effect(speaker):
    slow, fast = (speaker.speak("turn on the kitchen light", "en-us+m3", rate) for rate in (120, 240))
    assert 1.5 < slow.size / fast.size < 2.5
    low, high = (speaker.speak("nine", "en-us+m3", 175, pitch) for pitch in (10, 90))
    assert not np.array_equal(low, high)


def test_silence_at_the_ends_is_trimmed(speaker):
    audio = np.abs(speaker.speak("nine", "en-us"))
    assert audio[: SAMPLE_RATE // 20].max() > 0.003 and audio[-SAMPLE_RATE // 20 :].max() > 0.003


def test_unknown_voices_and_texts_are_refused(speaker):
    for voice in ("xx", "en-xx", "en-us+nobody", "ja", ""):
        with pytest.raises(ValueError, match="voice"):
            speaker.speak("one", voice)
    with pytest.raises(ValueError, match="digit words"):
        speaker.speak("turn on the light", "fr+m3")


def jobs() -> list[Job]:
    texts = ("seven three zero", "turn on the light", "what time is it", "nine")
    voices = ("en-us+f2", "en+klatt3", "en-029+m1")
    return [
        Job(text, voice, "commands", "train", seed, augment=seed % 2 == 1)
        for seed, (text, voice) in enumerate((text, voice) for text in texts for voice in voices)
    ]


def test_a_corpus_does_not_depend_on_the_number_of_workers(speaker, tmp_path):
    for workers in (1, 2):
        corpus = synthesize(jobs(), tmp_path / str(workers), workers=workers, max_seconds=4)
        assert corpus.utterances == len(jobs()) and corpus.left_out == 0
    names = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*"))
    assert len(names) == len(jobs()) + 1
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_manifest_describes_the_audio(speaker, tmp_path):
    corpus = synthesize(jobs(), tmp_path, workers=1, max_seconds=4)
    entries = [json.loads(line) for line in corpus.manifest.read_text(encoding="utf-8").splitlines()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audio", "manifest.jsonl"]
    for job, entry in zip(jobs(), entries, strict=True):
        info = soundfile.info(tmp_path / entry["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE, 1, "PCM_16")
        assert entry["duration"] == pytest.approx(info.duration, abs=1e-3)
        described = [entry[key] for key in ("text", "speaker", "corpus", "split")]
        assert described == [job.text, job.voice, job.corpus, job.split]
    assert corpus.seconds == pytest.approx(sum(entry["duration"] for entry in entries))


def test_long_speech_is_hurried_and_then_left_out_and_counted(speaker, tmp_path, caplog):
    long = " ".join(["seven"] * 6)
    hurried = speaker.speak(long, "en-us+m3", 260).size / SAMPLE_RATE + 0.1
    short = Job("nine", "en-us+m3", "digits", "train", 0, augment=False)
    work = [Job(long, "en-us+m3", "digits", "train", seed, augment=False) for seed in range(4)] + [short]
    kept = synthesize(work, tmp_path / "hurried", workers=1, max_seconds=hurried)
    assert kept.utterances == 5 and kept.left_out == 0
    rest = synthesize(work, tmp_path / "dropped", workers=1, max_seconds=1.0)
    assert rest.utterances == 1 and rest.left_out == 4
    assert "4 of 5 utterances" in caplog.text
    assert json.loads(rest.manifest.read_text())["text"] == "nine"
