"""Augmentation of training data: what it does, that it stays within bounds, and what decides it."""

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from seam.data.augmentation import Augmentation
from seam.data.dataset import SpeechDataset
from seam.data.manifest import Utterance

RATE = 16000
EVERYTHING = {
    "concatenation_probability": 0.5,
    "speeds": [0.9, 1, 1.1],
    "noise_probability": 0.7,
    "time_masks": 2,
    "time_mask_frames": 10,
    "frequency_masks": 1,
    "frequency_mask_bins": 4,
}


@pytest.fixture
def utterances(tmp_path, waveforms):
    made = []
    for index, (waveform, text) in enumerate(zip(waveforms, ["ONE two", "stop", "the light", "one"], strict=True)):
        soundfile.write(tmp_path / f"{index}.wav", waveform, RATE)
        made.append(Utterance(tmp_path / f"{index}.wav", text, len(waveform) / RATE))
    return made


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_nothing_is_on_by_default(utterances, processor):
    assert not Augmentation() and not Augmentation(speeds=[1.0])
    assert all(Augmentation(**{name: value}) for name, value in EVERYTHING.items() if "mask_" not in name)
    plain, given = SpeechDataset(utterances, processor), SpeechDataset(utterances, processor, augmentation=None)
    assert torch.equal(plain[0]["input_features"], given[0]["input_features"])


def test_speed_changes_length_and_pitch(rng):
    tone = np.sin(2 * np.pi * 400 * np.arange(RATE) / RATE).astype(np.float32)
    faster = Augmentation(speeds=[1.25]).change_waveform(tone, rng, RATE, max_samples=2 * RATE)
    assert len(faster) == 12800 and faster.dtype == np.float32
    assert np.abs(np.fft.rfft(faster)).argmax() * RATE / len(faster) == pytest.approx(500, abs=2)


def test_a_speed_at_which_the_audio_does_not_fit_is_not_drawn(rng):
    audio = np.ones(RATE, dtype=np.float32)
    lengths = {
        len(Augmentation(speeds=[0.5, 0.8, 2]).change_waveform(audio, rng, RATE, max_samples=RATE)) for _ in range(20)
    }
    assert lengths == {8000}
    assert len(Augmentation(speeds=[0.5]).change_waveform(audio, rng, RATE, max_samples=RATE)) == RATE


def test_noise_has_the_ratio_asked_for(rng, tmp_path):
    tone = np.sin(2 * np.pi * 400 * np.arange(RATE) / RATE).astype(np.float32)
    clicks = np.tile([0.5, 0.0, 0.0, 0.0], 3000)  # shorter than the tone, and of a pattern to know it by
    soundfile.write(tmp_path / "clicks.wav", clicks, RATE, subtype="FLOAT")
    (tmp_path / "noise.jsonl").write_text('{"audio": "clicks.wav"}\n')
    for noise in ([], [str(tmp_path / "noise.jsonl")]):
        settings = Augmentation(noise_probability=1.0, noise=noise, min_snr=6.0, max_snr=6.0)
        added = settings.change_waveform(tone, rng, RATE, max_samples=RATE) - tone
        assert 10 * np.log10(np.mean(tone**2) / np.mean(added**2)) == pytest.approx(6, abs=0.05)
    assert np.allclose(added.reshape(-1, 4)[:, 1:], 0, atol=1e-6) and added[::4].min() > 0.5


def test_masks_are_rectangles_within_the_audio(rng):
    features = torch.rand(16, 200) + 1
    settings = Augmentation(time_masks=1, time_mask_frames=20, frequency_masks=1, frequency_mask_bins=5)
    widths = []
    for _ in range(50):
        before = features.clone()
        masked = settings.mask_features(features, 60, rng)
        assert torch.equal(features, before)
        bins, frames = (masked == 0).all(1), (masked == 0).all(0)
        assert torch.equal(masked == 0, bins[:, None] | frames[None])
        assert torch.equal(masked[masked != 0], features[masked != 0])
        assert not frames[60:].any()
        for line in (bins, frames):
            indices = line.nonzero().flatten()
            assert len(indices) == 0 or indices[-1] - indices[0] == len(indices) - 1
        widths.append((int(bins.sum()), int(frames.sum())))
    assert [max(column) for column in zip(*widths, strict=True)] == [5, 20]
    assert [min(column) for column in zip(*widths, strict=True)] == [0, 0]


def test_joined_utterances_have_both_texts_and_both_sounds(utterances, processor):
    dataset = SpeechDataset(utterances, processor, augmentation=Augmentation(concatenation_probability=1.0))
    sounds = {utterance.text.lower(): processor.load_audio(utterance.audio) for utterance in utterances}
    seen = set()
    for epoch in range(20):
        dataset.set_epoch(epoch)
        text = processor.decode(dataset[1]["token_ids"])
        parts = [sounds["one two" if word == "one" else word] for word in text.split() if word != "two"]
        expected = processor(audio=np.concatenate(parts))
        assert torch.equal(dataset[1]["input_features"], expected["input_features"][0])
        seen.add(text)
    # 0.77 s and more, up to 2 s: "one two" has 0.4 s, "the light" 1.25 s, "one" 1.94 s.
    assert {"stop", "stop stop", "stop one two stop"} <= seen
    assert all(text in {"stop", "one", "two"} for words in seen for text in words.split())


def test_joined_transcripts_stay_within_the_aligners_positions(utterances, processor):
    settings = Augmentation(concatenation_probability=1.0)
    limit = len(processor.transcript_ids("stop"))
    dataset = SpeechDataset(utterances, processor, augmentation=settings, max_tokens=limit)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        assert processor.decode(dataset[1]["token_ids"]) == "stop"


def items(dataset, workers, epochs=(0, 1)):
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    made = []
    for epoch in epochs:
        dataset.set_epoch(epoch)
        made += [{key: value.clone() for key, value in item.items()} for item in loader]
    return made


def test_seed_epoch_and_place_decide_everything(utterances, processor):
    """Not the number of workers, the items before, or what else draws at random."""

    def dataset(seed=3):
        return SpeechDataset(utterances, processor, augmentation=Augmentation(**EVERYTHING), seed=seed)

    once = items(dataset(), workers=0)
    np.random.seed(1), torch.manual_seed(1)
    for workers in (0, 1, 2):
        for one, other in zip(once, items(dataset(), workers), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)
    late = dataset()
    late.set_epoch(1)
    assert torch.equal(late[2]["input_features"], once[4 + 2]["input_features"])

    def differ(one, other):
        return sum(not torch.equal(a["input_features"], b["input_features"]) for a, b in zip(one, other, strict=True))

    assert differ(once[:4], once[4:]) == 4 and differ(once, items(dataset(seed=4), workers=0)) == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise_probability": 1.5}, "noise_probability is 1.5; accepted: 0 to 1"),
        ({"concatenation_probability": -0.1}, "concatenation_probability is -0.1; accepted: 0 to 1"),
        ({"speeds": [1, 9]}, "speeds contains 9; accepted: 0.5 to 2"),
        ({"min_snr": 50.0}, "min_snr is 50.0, above max_snr, 40.0"),
        ({"time_masks": -1}, "time_masks is -1; accepted: 0 and above"),
        ({"noise": ["noise.jsonl"]}, "noise is given, but noise_probability is 0"),
    ],
)
def test_settings_out_of_bounds_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**values)
