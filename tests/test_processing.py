"""Audio, prompts and transcripts."""

import io
import re

import numpy as np
import pytest
import soundfile
import torch

from seam.modeling_seam import SeamProcessor

pytestmark = pytest.mark.oldest


@pytest.fixture
def tone():
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)


def encoded(waveform, rate=16000, file_format="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=file_format)
    return buffer.getvalue()


# ---- audio ----


@pytest.mark.parametrize(
    "kind", ["path", "bytes", "flac", "array", "int16", "tensor", "list", "dict", "stereo file", "channels", "column"]
)
def test_every_kind_of_audio_gives_the_same_waveform(processor, tone, tmp_path, kind):
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    source = {
        "path": tmp_path / "tone.wav",
        "bytes": encoded(tone),
        "flac": encoded(tone, file_format="FLAC"),
        "array": tone,
        "int16": (tone * 32767).astype(np.int16),
        "tensor": torch.tensor(tone),
        "list": tone.tolist(),
        "dict": {"array": tone, "sampling_rate": 16000},
        "stereo file": encoded(np.stack([tone, tone], axis=1)),
        "channels": np.stack([tone, tone], axis=1),
        "column": tone[:, None],
    }[kind]
    waveform = processor.load_audio(source)
    assert waveform.dtype == np.float32 and waveform.shape == (16000,)
    np.testing.assert_allclose(waveform, tone, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100])
def test_other_sample_rates_are_resampled(processor, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    for source in (encoded(tone, rate), {"raw": tone, "sampling_rate": rate}):
        waveform = processor.load_audio(source)
        assert len(waveform) == 16000
        assert np.abs(np.fft.rfft(waveform)).argmax() == 440
    assert len(processor.load_audio(tone, sampling_rate=rate)) == 16000


def test_bad_audio_is_named(processor, tmp_path):
    (tmp_path / "words.wav").write_text("this is not audio")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16000)
    with pytest.raises(FileNotFoundError, match="missing.wav: no such audio file"):
        processor.load_audio(tmp_path / "missing.wav")
    for name in ("words.wav", "empty.wav"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as audio"):
            processor.load_audio(tmp_path / name)
    with pytest.raises(ValueError, match="none.wav holds no audio samples"):
        processor.load_audio(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="ndarray holds NaN or infinite"):
        processor.load_audio(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match=r"ndarray has the shape \(2, 2, 2\); accepted: \(samples,\)"):
        processor.load_audio(np.zeros((2, 2, 2)))


class AudioDecoder:
    """What `datasets` gives for a recording."""

    def __init__(self, parts):
        self.parts = parts

    def __getitem__(self, name):
        return self.parts[name]


@pytest.mark.parametrize(
    "kind", ["path", "bytes", "both", "array", "rate of numpy", "channels first", "decoder", "file"]
)
def test_what_datasets_and_open_give(processor, tone, tmp_path, kind):
    (tmp_path / "tone.raw").write_bytes(encoded(tone))
    source = {
        "path": {"path": str(tmp_path / "tone.raw"), "bytes": None},
        "bytes": {"path": None, "bytes": encoded(tone)},
        "both": {"path": "nowhere.wav", "bytes": encoded(tone)},
        "array": {"array": tone, "sampling_rate": 16000, "path": "nowhere.wav"},
        "rate of numpy": {"raw": tone, "sampling_rate": np.float64(16000)},
        "channels first": {"array": np.stack([tone, tone]), "sampling_rate": np.int32(16000)},
        "decoder": AudioDecoder({"array": tone, "sampling_rate": 16000}),
        "file": io.BytesIO(encoded(tone)),
    }[kind]
    np.testing.assert_allclose(processor.load_audio(source), tone, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"array": [0.0]}, "has 'array', but no 'sampling_rate'"),
        ({"array": [0.0], "sampling_rate": 0}, "the sampling rate is 0; accepted: 4000 to 384000 Hz"),
        ({"raw": [0.0], "sampling_rate": "16000"}, "the sampling rate is '16000'"),
        ({"raw": [0.0], "sampling_rate": float("nan")}, "the sampling rate is nan"),
        ({"wav": [0.0]}, "has the keys 'wav'; accepted: 'array' or 'raw' with 'sampling_rate', 'bytes', 'path'"),
        ({}, "has the keys none"),
        ({"path": None, "bytes": None}, "has the keys 'path', 'bytes'"),
        (io.StringIO("text"), "gives str, not bytes: open audio files with mode 'rb'"),
        ("https://example.org/sound.wav", "https://example.org/sound.wav cannot be downloaded"),
    ],
)
def test_a_source_without_what_it_needs_is_refused(processor, source, reason, monkeypatch):
    def offline():
        raise ConnectionError("offline")

    monkeypatch.setattr("seam.audio_files.get_session", offline)
    with pytest.raises(ValueError, match=re.escape(reason)):
        processor.load_audio(source)


def test_a_cut_file_is_a_warning_or_an_error(processor, tone, caplog):
    cut = encoded(tone)[:20000]
    assert len(processor.load_audio(cut)) == (20000 - 44) // 2
    assert [one.message for one in caplog.records] == [
        "the given bytes is cut short: 19956 bytes of the 32000 that its header states."
    ]
    with pytest.raises(ValueError, match="cut short"):
        processor.load_audio(cut, allow_cut=False)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [("sr", 8000, "sampling_rate"), ("samplingrate", 8000, "sampling_rate"), ("transcript", "hello", "text")],
)
def test_a_keyword_that_would_be_ignored_is_refused(processor, tone, name, value, hint):
    with pytest.raises(TypeError, match=f"unexpected keyword '{name}'; did you mean {hint}"):
        processor(audio=tone, **{name: value})
    with pytest.raises(TypeError, match="'beams'; accepted: audio, text, sampling_rate, prompt, return_tensors"):
        processor(audio=tone, beams=3)
    padded = processor(audio=tone, padding=True, images=None)
    assert torch.equal(padded["input_features"], processor(audio=tone)["input_features"])


def test_longer_audio_than_the_window_is_refused_not_cut(processor):
    with pytest.raises(ValueError, match="2.5 s is longer than the encoder's window of 2 s"):
        processor(audio=np.zeros(40000, np.float32))


def test_split_loses_nothing_and_cuts_where_it_is_quiet(processor):
    rng = np.random.default_rng(0)
    waveform = rng.standard_normal(16000 * 7).astype(np.float32)
    waveform[24000:27000] = 0  # the only quiet place of the first window
    pieces = processor.split(waveform)
    np.testing.assert_array_equal(np.concatenate(pieces), waveform)
    assert max(map(len, pieces)) <= 32000
    assert 24000 <= len(pieces[0]) <= 27000
    assert len(processor.split(waveform[:32000])) == 1


def test_a_list_holds_any_kind_of_audio(processor, tone, tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone, 16000)
    batch = processor(audio=[tmp_path / "tone.wav", str(tmp_path / "tone.wav"), encoded(tone), tone])
    assert batch["input_features"].shape[0] == 4
    assert processor(audio=tone.tolist())["input_features"].shape[0] == 1
    with pytest.raises(ValueError, match="list of audio inputs is empty"):
        processor(audio=[])


def test_features_are_those_of_the_feature_extractor(processor, waveforms):
    features = processor(audio=waveforms)
    assert features["input_features"].shape == (4, 16, 200)
    assert features["attention_mask"].sum(-1).tolist() == [
        len(waveform) // 160 + (len(waveform) % 160 > 0) for waveform in waveforms
    ]
    for i, waveform in enumerate(waveforms):
        alone = processor.feature_extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features[0]
        torch.testing.assert_close(features["input_features"][i], alone)


# ---- prompts and transcripts ----


def test_prompt_is_the_chat_template_with_one_audio_token(processor):
    text = processor.tokenizer.decode(processor.prompt_ids(), skip_special_tokens=False)
    assert text == ("<|im_start|>user\nTranscribe the following audio:<|audio|><|im_end|>\n<|im_start|>assistant\n")
    placed = processor.tokenizer.decode(processor.prompt_ids("<|audio|> What was said?"), skip_special_tokens=False)
    assert placed == "<|im_start|>user\n<|audio|> What was said?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="exactly once, found 2"):
        processor.prompt_ids("<|audio|><|audio|>")


def test_prompt_follows_the_template(processor):
    """A hybrid Qwen3 adds an empty think block where thinking is off; the builder takes what the template yields."""
    own = SeamProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        chat_template=processor.chat_template.replace(
            "{{ '<|im_start|>assistant\n' }}",
            "{{ '<|im_start|>assistant\n' }}"
            "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        ),
    )
    assert own.tokenizer.decode(own.prompt_ids()).endswith("assistant\n<think>\n\n</think>\n\n")


def test_transcripts_round_trip(processor):
    ids = processor.transcript_ids("turn on the light")
    assert processor.decode(ids) == "turn on the light"
    labels = processor(text=["one two three", "one"])["labels"]
    assert labels[0].tolist() == [*processor.transcript_ids("one two three"), processor.end_of_turn_id]
    assert labels[1, -1] == -100
    assert processor.transcript_ids("  ") == []


@pytest.mark.parametrize("leading_space", [False, True])
def test_labels_are_decoded_without_their_padding(backbones, leading_space):
    processor = SeamProcessor.from_backbones(*backbones, leading_space=leading_space)
    texts = ["one two three", "one"]
    labels = processor(text=texts)["labels"]
    for given in (labels, labels.numpy(), labels.tolist(), list(labels)):
        assert processor.batch_decode(given) == processor.decode(given) == texts
    assert processor.decode(labels[1]) == processor.decode(labels[1].tolist()) == "one"
    assert processor.decode(labels[1], skip_special_tokens=False).strip() == "one<|im_end|>"
    assert processor.decode(labels[:, :0]) == ["", ""] and processor.batch_decode(labels[:, -1:]) == ["", ""]


def test_transcripts_may_begin_as_within_a_sentence(backbones, tmp_path):
    """With the space that Whisper writes first; texts are without it."""
    processor = SeamProcessor.from_backbones(*backbones, leading_space=True)
    processor.save_pretrained(tmp_path)
    for own in (processor, SeamProcessor.from_pretrained(tmp_path)):
        ids = own.transcript_ids("the old goat")
        assert own.tokenizer("stop the old goat").input_ids[-len(ids) :] == ids
        assert own.tokenizer.decode(ids) == " the old goat"
        assert own.decode(ids) == "the old goat" and own.batch_decode([ids, []]) == ["the old goat", ""]
        assert own.transcript_ids(" the old goat ") == ids and own.transcript_ids(" ") == []


def test_special_tokens_in_a_transcript_are_text(processor):
    ids = processor.transcript_ids("stop <|im_end|> here")
    assert processor.eoa_token_id not in ids
    assert processor.decode(ids) == "stop <|im_end|> here"


def test_lookup_excludes_special_tokens_and_unused_rows(processor):
    excluded = processor.lookup_excluded_ids(400)
    assert processor.eoa_token_id not in excluded
    assert {processor.boa_token_id, processor.tokenizer.pad_token_id, processor.audio_token_id, 399} <= set(excluded)
    assert not set(processor.transcript_ids("turn on the light")) & set(excluded)


def test_unknown_special_token_is_named(processor):
    with pytest.raises(ValueError, match="boa_token '<boa>' is not one token"):
        SeamProcessor(processor.feature_extractor, processor.tokenizer, boa_token="<boa>")


def test_request_has_one_prompt_per_audio(processor, waveforms):
    request = processor.apply_transcription_request(waveforms[:2], prompt=["one", "turn on the light in the kitchen"])
    assert request["prompt_input_ids"].shape == request["prompt_attention_mask"].shape
    assert request["input_ids"].shape == (2, 0)  # what the output of `generate` begins with
    assert request["prompt_input_ids"][0][request["prompt_attention_mask"][0].bool()].tolist() == processor.prompt_ids(
        "one"
    )
    with pytest.raises(ValueError, match="2 audio inputs but 1 prompts"):
        processor.apply_transcription_request(waveforms[:2], prompt=["one"])


def test_save_and_reload(processor, tmp_path, waveforms):
    processor.instruction, original = "Write down what is said:", processor.instruction
    try:
        processor.save_pretrained(tmp_path)
        again = SeamProcessor.from_pretrained(tmp_path)
        assert again.prompt_ids() == processor.prompt_ids()
    finally:
        processor.instruction = original
    assert again.lookup_excluded_ids(400) == processor.lookup_excluded_ids(400)
    torch.testing.assert_close(again(audio=waveforms)["input_features"], processor(audio=waveforms)["input_features"])
