"""The encoder on the audio and its margin: the states of one utterance alone, and those of the full window."""

import pytest
import torch

from seam.data.dataset import SpeechDataset, encode
from seam.data.manifest import Utterance
from seam.modeling_seam.encoder_window import frames_with_margin
from seam.tests.helpers import sounds
from seam.train.state_cache import _count_states

pytestmark = pytest.mark.oldest

WINDOW = 200  # frames of the tiny encoder


def speech_of(frames: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random features and their mask; what follows the audio is not silence but large."""
    torch.manual_seed(seed)
    features = torch.randn(len(frames), 16, WINDOW)
    mask = (torch.arange(WINDOW) < torch.tensor(frames)[:, None]).long()
    return torch.where(mask[:, None].bool(), features, 7 * features), mask


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def exact(request, build_model):
    """Make a model in float64 whose encoder hears the audio alone."""
    model = build_model(encoder_window="audio").double()
    model.set_attn_implementation(request.param)
    return model


@pytest.mark.parametrize(
    ("frames", "margin", "expected"),
    [(1, 0, 2), (2, 0, 2), (7, 0, 8), (199, 0, 200), (200, 0, 200), (7, 0.5, 58), (8, 0.01, 10), (8, 0.005, 8)]
    + [(199, 0.5, 200), (1, 30, 200), (0, 0, 0)],
)
def test_frames_are_whole_states_within_the_window(frames, margin, expected):
    assert int(frames_with_margin(torch.tensor(frames), margin, WINDOW)) == expected


@torch.no_grad()
def test_a_batch_gives_what_each_utterance_gives_alone(exact):
    frames = [2, 3, 9, 64, 101, 150, 199, 200]
    features, mask = speech_of(frames)
    states, state_mask = exact.encode(features, mask)
    assert states.shape == (8, 100, 32) and state_mask.sum(-1).tolist() == [1, 2, 5, 32, 51, 75, 100, 100]
    for i, count in enumerate(state_mask.sum(-1).tolist()):
        alone, own = exact.encode(features[i : i + 1], mask[i : i + 1])
        assert alone.shape == (1, count, 32) and own.all()
        torch.testing.assert_close(alone[0], states[i, :count], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_what_follows_the_audio_is_not_heard(exact):
    features, mask = speech_of([9, 64])
    states, state_mask = exact.encode(features, mask)
    changed = torch.where(frames_of(state_mask), features, -3.0)
    again, _ = exact.encode(changed, mask)
    assert torch.equal(again[state_mask.bool()], states[state_mask.bool()])
    assert not torch.allclose(exact.encoder(features.double()).last_hidden_state[0, :5], states[0, :5])


def frames_of(state_mask: torch.Tensor) -> torch.Tensor:
    """Return which frames the states of a mask belong to, `(batch, 1, WINDOW)`."""
    own = state_mask.repeat_interleave(2, dim=-1)
    return torch.nn.functional.pad(own, (0, WINDOW - own.shape[1])).bool()[:, None]


@torch.no_grad()
@pytest.mark.parametrize("frames", [200, 199])
def test_audio_that_fills_the_window_has_the_encoders_own_states(exact, frames):
    features, mask = speech_of([frames])
    states, state_mask = exact.encode(features, mask)
    torch.testing.assert_close(states, exact.encoder(features.double()).last_hidden_state, rtol=1e-11, atol=1e-11)
    assert state_mask.all()


@torch.no_grad()
def test_the_margin_is_heard_and_visible(build_model):
    features, mask = speech_of([9, 64, 190])
    audio, full, none = (
        build_model(encoder_window=window, speech_margin=margin)
        for window, margin in (("audio", 0.3), ("full", 0.3), ("audio", 0.0))
    )
    states, state_mask = audio.encode(features, mask)
    assert state_mask.sum(-1).tolist() == [20, 47, 100]
    of_window, window_mask = full.encode(features, mask)
    assert torch.equal(window_mask, state_mask) and of_window.shape == states.shape
    torch.testing.assert_close(of_window, full.encoder(features).last_hidden_state)
    torch.testing.assert_close(states[2], of_window[2], rtol=1e-4, atol=1e-4)  # its margin ends with the window
    longer = (torch.arange(WINDOW) < torch.tensor([39, 94, 200])[:, None]).long()
    torch.testing.assert_close(states[state_mask.bool()], none.encode(features, longer)[0][state_mask.bool()])


@torch.no_grad()
def test_without_a_mask_it_is_the_window(build_model):
    model = build_model(encoder_window="audio", speech_margin=0.5)
    features, _ = speech_of([9, 64])
    states, mask = model.encode(features)
    torch.testing.assert_close(states, model.encoder(features).last_hidden_state)
    assert mask.shape == (2, 100) and mask.all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(build_model, dtype):
    features, mask = speech_of([9, 64, 200])
    features = torch.where(mask[:, None].bool(), features, 0)
    model = build_model(encoder_window="audio")
    expected, _ = model.encode(features, mask)
    states, state_mask = model.to(dtype).encode(features, mask)
    assert states.dtype == dtype
    keep = state_mask.bool()
    torch.testing.assert_close(states[keep].float(), expected[keep], rtol=0.1, atol=0.15)


@pytest.mark.parametrize("window", ["audio", "full"])
@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_the_cache_counts_the_states_that_encode_returns(build_model, processor, tmp_path, window, margin):
    model = build_model(encoder_window=window, speech_margin=margin)
    utterances = []
    for i, samples in enumerate([1600, 1601, 1759, 1760, 1761, 1919, 1920, 2000, 9999, 30000, 31840, 31999, 32000]):
        path = sounds.write(tmp_path / f"{i}.wav", sounds.tone(samples / 16000))
        utterances.append(Utterance(path, "one", samples / 16000, "none", "sounds", "train"))
    dataset = SpeechDataset(utterances, processor)
    items = [item for batch in encode(model, dataset, [list(range(len(dataset)))], workers=0) for item in batch]
    counts = [len(item["speech_states"]) for item in items]
    assert counts == [_count_states(one.duration, model, processor) for one in utterances]
    assert len(set(counts)) > 3


@pytest.mark.parametrize("use_llm", [True, False])
def test_transcripts_of_a_batch_are_those_of_each_utterance(build_table_model, processor, waveforms, use_llm):
    model = build_table_model(encoder_window="audio", speech_margin=0.2, llm_inputs="continuous")
    together = model.generate(**processor(audio=waveforms), use_llm=use_llm, max_new_tokens=8)
    for waveform, row in zip(waveforms, together, strict=True):
        alone = model.generate(**processor(audio=waveform), use_llm=use_llm, max_new_tokens=8)
        assert alone[0].tolist() == row[: alone.shape[1]].tolist()
