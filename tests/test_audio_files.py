"""What audio may be: every container, rate, type and shape that is beyond doubt; the rest is refused in a sentence."""

import io
import logging
import os
import struct
import threading

import numpy as np
import pytest
import soundfile
import torch

from seam.audio_files import decode, waveform_of

RATE = 16000
SOUND = (0.3 * np.sin(np.arange(3 * RATE) * 0.05) * np.linspace(0.2, 1, 3 * RATE)).astype(np.float32)
FORMATS = {
    "WAV": "PCM_16",
    "WAVEX": "PCM_24",
    "RF64": "PCM_16",
    "W64": "PCM_16",
    "AIFF": "PCM_16",
    "AU": "PCM_16",
    "NIST": "PCM_16",
    "FLAC": "PCM_16",
    "OGG": "VORBIS",
    "MP3": "MPEG_LAYER_III",
}


def encoded(waveform=SOUND, rate=RATE, file_format="WAV", subtype=None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=file_format, subtype=subtype or FORMATS.get(file_format))
    return buffer.getvalue()


# ---- files ----


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.4, 0.7, 0.98])
def test_a_cut_file_is_decoded_as_far_as_it_goes_and_said_to_be_cut(file_format, share, tmp_path):
    noise = (0.1 * np.random.default_rng(0).standard_normal(10 * RATE)).astype(np.float32)
    whole = encoded(noise, file_format=file_format)
    path = tmp_path / "cut"
    for content in (whole, whole[: int(len(whole) * share)]):
        path.write_bytes(content)
        for source in (path, content):
            decoded = decode(source, "cut")
            assert decoded.rate == RATE and bool(decoded.cut) == (content is not whole)
    assert 0.3 * share < len(decoded.waveform) / len(noise) <= share + 0.02


def test_opus_too():
    whole = encoded(file_format="OGG", subtype="OPUS")
    assert not decode(whole, "x").cut and decode(whole[: len(whole) // 2], "x").cut


@pytest.mark.parametrize("field", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_the_length_of_a_streaming_writer_is_no_length(field, tmp_path):
    wav = bytearray(encoded())
    start = wav.index(b"data") + 4
    wav[start : start + 4] = struct.pack("<I", field)
    au = bytearray(encoded(file_format="AU"))
    au[8:12] = struct.pack(">I", 0 if field == 0 else 0xFFFFFFFF)
    for content in (bytes(wav), bytes(au)):
        (tmp_path / "sound").write_bytes(content)
        for source in (content, tmp_path / "sound"):
            decoded = decode(source, "x")
            assert len(decoded.waveform) == len(SOUND) and not decoded.cut
            np.testing.assert_allclose(decoded.waveform, SOUND, atol=1e-4)


def test_a_header_that_states_less_than_there_is_says_so():
    wav = bytearray(encoded())
    start = wav.index(b"data") + 4
    wav[start : start + 4] = struct.pack("<I", 20000)
    decoded = decode(bytes(wav), "x")
    assert "states 20000 bytes of audio" in decoded.cut and len(decoded.waveform) == 10000


@pytest.mark.parametrize("rate", [0, 1, 100, 10_000_000, 0xFFFFFFFF])
def test_rates_that_cannot_be_are_refused_before_anything_is_resampled(rate):
    wav = bytearray(encoded())
    wav[24:28] = struct.pack("<I", rate)
    with pytest.raises(ValueError, match=r"x: the sampling rate is \d+; accepted: 4000 to 384000 Hz|cannot be read"):
        decode(bytes(wav), "x")


def test_memory_follows_the_file_not_its_header():
    flac = bytearray(encoded(file_format="FLAC"))
    flac[22:26] = struct.pack(">I", 2_000_000_000)  # the lower 32 of STREAMINFO's 36 bits of the number of samples
    pytest.importorskip("av")  # without it, what libsndfile stumbles at is refused
    decoded = decode(bytes(flac), "x")
    assert len(decoded.waveform) == len(SOUND) and decoded.cut


def test_the_name_does_not_decide_the_format(tmp_path):
    for name in ("sound.raw", "sound", "sound.mp3", "ünï中.wav"):
        (tmp_path / name).write_bytes(encoded())
        np.testing.assert_allclose(decode(tmp_path / name, name).waveform, SOUND, atol=1e-4)


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[encoded()])
    writer.start()
    assert len(decode(tmp_path / "pipe", "pipe").waveform) == len(SOUND)
    writer.join()


def test_a_folder_and_what_is_no_audio(tmp_path):
    with pytest.raises(ValueError, match="is a folder, not an audio file"):
        decode(tmp_path, "x")
    for content in (b"", b"RIFF", b"words", encoded()[:30], encoded(file_format="FLAC")[:40]):
        with pytest.raises(ValueError, match="^x (cannot be read as audio|holds no audio)"):
            decode(content, "x")


def test_channels_that_cancel_each_other_are_not_silence(caplog):
    stereo = np.stack([SOUND, -SOUND], axis=1)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(decode(encoded(stereo), "x").waveform, SOUND, atol=1e-4)
        np.testing.assert_allclose(waveform_of(stereo, "y"), SOUND, atol=1e-6)
    assert [record.message for record in caplog.records] == [
        f"{name}: its channels cancel each other; the first one is taken." for name in "xy"
    ]
    caplog.clear()
    one_sided = waveform_of(np.stack([SOUND, 0 * SOUND], axis=1), "z")
    assert not caplog.records and np.allclose(one_sided, SOUND / 2)


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_other_containers_are_read_by_pyav(container, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / f"sound.{container}"
    with av.open(str(path), "w") as file:
        track = file.add_stream("aac" if container == "mp4" else "libopus", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.repeat(SOUND, 3)[None], format="fltp", layout="mono")
        frame.sample_rate = 48000
        for packet in [*track.encode(frame), *track.encode(None)]:
            file.mux(packet)
    decoded = decode(path, "x")
    assert decoded.rate == 48000 and abs(len(decoded.waveform) - 3 * len(SOUND)) < 4000
    loudness = [
        np.square(one[: 140 * 1000]).reshape(140, 1000).mean(1) for one in (decoded.waveform, np.repeat(SOUND, 3))
    ]
    assert np.corrcoef(*loudness)[0, 1] > 0.99 and 0.8 < loudness[0].sum() / loudness[1].sum() < 1.2


# ---- arrays ----


@pytest.mark.parametrize(
    "samples",
    [
        SOUND.astype(np.float64),
        SOUND.astype(np.float16),
        (SOUND * 127).astype(np.int8),
        (SOUND * 32767).astype(np.int16),
        (SOUND * 2147483647.0).astype(np.int32),
        (SOUND * 127 + 128).round().astype(np.uint8),
        (SOUND * 32767 + 32768).astype(np.uint16),
        SOUND.tolist(),
        torch.tensor(SOUND),
        torch.tensor(SOUND).bfloat16(),
        torch.tensor(SOUND, requires_grad=True),
        (torch.tensor(SOUND) * 32767).short(),
        SOUND[:, None],
        SOUND[None],
        np.stack([SOUND, SOUND], axis=1),
    ],
    ids=lambda samples: f"{getattr(samples, 'dtype', 'list')}{getattr(samples, 'ndim', '')}",
)
def test_every_type_and_clear_shape_gives_the_waveform(samples):
    waveform = waveform_of(samples, "x")
    assert waveform.dtype == np.float32 and waveform.shape == SOUND.shape
    np.testing.assert_allclose(waveform, SOUND, atol=0.02)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (SOUND * 32767, "beyond full scale"),
        ((SOUND * 32767).astype(int).tolist(), "beyond full scale"),
        (SOUND * 1e38, "beyond full scale"),
        ((SOUND * 32767).astype(np.int64), "of type int64; accepted: floats in"),
        (SOUND > 0, "of type bool"),
        (SOUND.astype(complex), "of type complex"),
        (["a", "b"], "of type <U1"),
        ([[0.1, 0.2], [0.1]], "rows have different lengths"),
        (np.stack([SOUND, SOUND]), "Give several recordings as a list"),
        (np.zeros((40, 40), np.float32), "shape .40, 40."),
        (np.zeros((2, 2, 9), np.float32), "shape .2, 2, 9."),
        (np.float32(0.5), "shape ..;"),
        (np.array([0.1, np.nan]), "NaN or infinite"),
        (np.array([0.1, np.inf]), "NaN or infinite"),
    ],
)
def test_what_is_not_clear_is_refused(samples, reason):
    with pytest.raises(ValueError, match=f"^x .*{reason}"):
        waveform_of(samples, "x")


def test_the_channels_of_one_recording_may_come_first():
    np.testing.assert_array_equal(waveform_of(np.stack([SOUND, SOUND]), "x", one_recording=True), SOUND)


@pytest.mark.parametrize("scale", [32767, 1e38])
def test_a_float_file_of_another_scale_is_refused(scale):
    with pytest.raises(ValueError, match="^x holds samples up to .*beyond full scale"):
        decode(encoded(SOUND * scale, subtype="FLOAT"), "x")
