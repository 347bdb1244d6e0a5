"""Decode audio files and check waveforms: the one place where sound becomes samples."""

import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
from huggingface_hub.utils import get_session

logger = logging.getLogger(__name__)

# Outside these rates a header is wrong: a file of 32 kB "at 1 Hz" would become 1.5 GB at 16 kHz.
MIN_RATE, MAX_RATE = 4_000, 384_000
# Lossy codecs and resampling overshoot full scale by less than this; samples beyond are of another scale.
MAX_PEAK = 2.0
# Of the axes of a matrix, the one of at most this many is channels if the other is longer.
MAX_CHANNELS = 16
# Channels whose mean has less than this share of their power cancel each other: one of them was inverted.
CANCELLED_SHARE = 0.01
BLOCK_SAMPLES = 1 << 16
# libsndfile mentions in its log only that audio ends before the header says so. Programs that write to a pipe state
# the largest possible length, and some count the header: neither file is cut.
STATED_LENGTH = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (?P<stated>\d+) \(should be (?P<actual>\d+)\)", re.MULTILINE
)
UNKNOWN_LENGTH = 0x7FFFF000
COUNTED_HEADER = 64  # bytes
DOWNLOAD_SECONDS = 30
OGG_CUT = re.compile(r"end-of-stream|junk after the last page", re.IGNORECASE)
AFTER_DATA = re.compile(r"^data : (\d+)\n\*\*\* Unknown chunk marker", re.MULTILINE)
SPHERE_COUNT = re.compile(rb"^sample_count -i (\d+)", re.MULTILINE)
# By these names, the audio files of a folder or an archive are known.
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} | {".opus", ".m4a", ".mp4", ".webm"}
# Files that begin so are libsndfile's: what it does not read of them is damaged. Cut FLAC it does not read, PyAV does.
MAGICS = {b"RIFF", b"RF64", b"riff", b"FORM", b".snd", b"NIST", b"caff", b"OggS"}
# What libsndfile and its binding raise for what they cannot read.
UNREADABLE = (soundfile.SoundFileError, TypeError, MemoryError, OverflowError)
MP3_FRAME = 576  # samples of the shortest frame
READABLE = "WAV, FLAC, MP3, OGG, Opus, AIFF, AU, CAF, W64 and NIST SPHERE"


@dataclass(frozen=True)
class Decoded:
    """
    The content of an audio file.

    Args:
        waveform: shape `(samples,)`, float32, mixed down.
        rate: in Hz.
        cut: why the file is taken to be cut short; empty where it seems whole.
    """

    waveform: np.ndarray
    rate: int
    cut: str


def decode(source: str | Path | bytes, name: str) -> Decoded:
    """
    Decode an audio file as far as it goes. Time and memory are in proportion to the file, not to what its header says.

    Other containers than libsndfile's, such as m4a, mp4 and webm, are read where PyAV is installed.

    Args:
        source: path of a file, a pipe or a device, or the content of a file.
        name: of the source in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, or a file that is not audio or whose header cannot be true.
    """
    if not isinstance(source, bytes):
        path = Path(source)
        if path.is_dir():
            raise ValueError(f"{name} is a folder, not an audio file.")
        if not path.exists():
            raise FileNotFoundError(f"{name}: no such audio file.")
        source = path if path.is_file() else path.read_bytes()  # a pipe cannot be read twice
    try:
        with opened(source) as file:
            return _read(file, name)
    except UNREADABLE as error:
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        magic = _magic(source)
        if magic in MAGICS:
            raise ValueError(f"{name} cannot be read as audio: {reason}.") from error
        return _decode_with_pyav(source, name, reason, cut=reason if magic == b"fLaC" else "")


@contextmanager
def opened(source: Path | bytes) -> Iterator[soundfile.SoundFile]:
    """Open an audio file, whose format is what its content says, whatever its name ends with."""
    if isinstance(source, bytes):
        with soundfile.SoundFile(io.BytesIO(_with_length(source))) as file:
            yield file
        return
    with source.open("rb") as binary:
        head = binary.read(1 << 16)
        if _with_length(head) != head:
            binary.seek(0)
            with soundfile.SoundFile(io.BytesIO(_with_length(binary.read()))) as file:
                yield file
            return
        os.lseek(binary.fileno(), 0, os.SEEK_SET)
        with soundfile.SoundFile(binary.fileno(), closefd=False) as file:  # by name, .raw would have no header
            yield file


def _with_length(content: bytes) -> bytes:
    """Return a WAV or AU file with a length of 0 in its header, as streaming writers leave it, with an unknown one."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        start = content.find(b"data", 12) + 4
        if start > 4 and content[start : start + 4] == bytes(4) and len(content) > start + 4:
            return content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :]
    if content[:4] == b".snd" and content[8:12] == bytes(4):
        return content[:8] + b"\xff\xff\xff\xff" + content[12:]
    return content


def _read(file: soundfile.SoundFile, name: str) -> Decoded:
    rate = checked_rate(file.samplerate, name)
    cut = cut_reason(file)
    blocks, read = [], 0
    try:
        while len(block := file.read(max(1, BLOCK_SAMPLES // file.channels), dtype="float32", always_2d=True)):
            blocks.append(block)
            read += len(block)
    except soundfile.LibsndfileError as error:  # FLAC: what comes after the cut, or after damage, cannot be decoded
        if not blocks:
            raise
        cut = f"{error.error_string.rstrip('.')} after {read / rate:.2f} s"
    # FLAC and MP3 may state their length, which libsndfile does not compare.
    if not cut and read < file.frames and file.format in ("FLAC", "MP3", "MPEG"):
        cut = f"{read / rate:.2f} s of the {file.frames / rate:.2f} s that its header states"
    if not blocks:
        blocks = [np.zeros((0, file.channels), np.float32)]
    return Decoded(mixed_down(blocks, name), rate, cut)


def cut_reason(file: soundfile.SoundFile) -> str:
    """Return why an open file seems to be cut short, by its header; an empty string where it seems whole."""
    log = file.extra_info
    for line in STATED_LENGTH.finditer(log):
        stated, actual = int(line["stated"]), int(line["actual"])
        if actual < stated - COUNTED_HEADER and stated < UNKNOWN_LENGTH:
            return f"{actual} bytes of the {stated} that its header states"
    if file.format == "OGG" and OGG_CUT.search(log):
        return "its last page is missing"
    if after := AFTER_DATA.search(log):
        return f"its header states {after[1]} bytes of audio, and what follows is no part of such a file"
    if file.format == "NIST" and (stated := _sphere_count(file)) > file.frames:
        return f"{file.frames} samples of the {stated} that its header states"
    return ""


def _sphere_count(file: soundfile.SoundFile) -> int:
    """Return the number of samples that the header of a NIST SPHERE file states, which libsndfile does not read."""
    source: Any = file.name
    if isinstance(source, int):
        head = os.pread(source, 1024, 0)
    elif isinstance(source, (str, Path)):
        with Path(source).open("rb") as binary:
            head = binary.read(1024)
    else:
        head = source.getvalue()[:1024]
    found = SPHERE_COUNT.search(head)
    return int(found[1]) if found else 0


def _decode_with_pyav(source: Path | bytes, name: str, reason: str, cut: str) -> Decoded:
    """Decode the first audio track of a file that libsndfile does not read, for `reason`; `cut` as in [`Decoded`]."""
    try:
        import av
    except ImportError:
        raise ValueError(
            f"{name} cannot be read as audio: {reason}. Read are {READABLE}; others where PyAV is "
            "installed (pip install av), or after ffmpeg -i FILE audio.wav."
        ) from None
    blocks, rate = [], 0
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), mode="r") as container:
            track = next(iter(container.streams.audio), None)
            if track is None:
                raise ValueError(f"{name} cannot be read as audio: {reason}; PyAV finds no audio track.")
            rate = checked_rate(getattr(track, "rate", None), name)
            packed = av.AudioResampler(format="flt")
            try:
                for frame in container.decode(track):
                    blocks += [one.to_ndarray().reshape(one.samples, -1) for one in packed.resample(frame)]
            except av.FFmpegError as error:
                cut = f"{error.strerror} after {sum(map(len, blocks)) / rate:.2f} s"
    except av.FFmpegError as error:
        raise ValueError(f"{name} cannot be read as audio: {reason}; PyAV: {error.strerror}.") from error
    if not blocks:
        raise ValueError(f"{name} holds no audio samples.")
    if not cut and sum(map(len, blocks)) < MP3_FRAME:  # of MP3 that ends in its first frame
        cut = "less than one frame"
    return Decoded(mixed_down(blocks, name), rate, cut)


def _magic(source: Path | bytes) -> bytes:
    """Return the first four bytes of a file."""
    if isinstance(source, bytes):
        return source[:4]
    with source.open("rb") as binary:
        return binary.read(4)


def download(url: str) -> bytes:
    """Return the content behind a URL; offline mode is kept."""
    try:
        response = get_session().get(url, timeout=DOWNLOAD_SECONDS)
        response.raise_for_status()
    except Exception as error:  # of requests or httpx, by the version of huggingface_hub
        raise ValueError(f"{url} cannot be downloaded: {error}") from error
    return response.content


def is_mapping(source: Any) -> bool:
    """Return whether a source has named parts: a dict, or the decoder that `datasets` gives for a recording."""
    return isinstance(source, Mapping) or type(source).__name__ == "AudioDecoder"


def named_content(source: Any, name: str) -> tuple[Any, Any]:
    """Return the audio of a dict and its sampling rate, which is `None` for an audio file."""
    if not isinstance(source, Mapping):
        return source["array"], source["sampling_rate"]
    for key in ("array", "raw"):
        if source.get(key) is not None:
            if source.get("sampling_rate") is None:
                raise ValueError(f"{name} has {key!r}, but no 'sampling_rate'.")
            return source[key], source["sampling_rate"]
    for key in ("bytes", "path"):
        if source.get(key) is not None:
            return source[key], None
    raise ValueError(
        f"{name} has the keys {', '.join(map(repr, source)) or 'none'}; accepted: 'array' or 'raw' with "
        "'sampling_rate', 'bytes', 'path'."
    )


def content_of(file: BinaryIO, name: str) -> bytes:
    """Read a file object; raise `ValueError` for one that was opened as text."""
    content = file.read()
    if not isinstance(content, bytes):
        raise ValueError(f"{name} gives {type(content).__name__}, not bytes: open audio files with mode 'rb'.")
    return content


def checked_rate(rate: Any, name: str) -> int:
    """Return a sampling rate in Hz; raise `ValueError` for what can be none."""
    try:
        value = int(rate)
        is_rate = not isinstance(rate, (str, bytes, bool)) and value == rate and MIN_RATE <= value <= MAX_RATE
    except (TypeError, ValueError, OverflowError):
        is_rate = False
    if not is_rate:
        raise ValueError(f"{name}: the sampling rate is {rate!r}; accepted: {MIN_RATE} to {MAX_RATE} Hz.")
    return value


def waveform_of(source: Any, name: str, one_recording: bool = False) -> np.ndarray:
    """
    Return samples as a waveform `(samples,)`, float32, mixed down.

    Integers are scaled by the range of their type, unsigned ones from its middle.

    Args:
        source: an array, a tensor or a list of shape `(samples,)`, or a matrix of which it is beyond doubt which axis
            is channels: `(samples, channels)`, or one of the axes is 1.
        name: of the source in errors.
        one_recording: whether `(channels, samples)` is beyond doubt too, because it cannot be several recordings.

    Raises:
        ValueError: no samples, of another shape, or of a scale that is not known.
    """
    if hasattr(source, "detach"):  # a tensor of torch, on any device and in any precision
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
    is_array = hasattr(source, "dtype")
    try:
        samples = np.asarray(source)
    except ValueError as error:
        raise ValueError(f"{name} is no waveform: its rows have different lengths.") from error
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    if kind not in "fiu" or (is_array and kind in "iu" and size > 4):
        raise ValueError(
            f"{name} holds samples of type {samples.dtype}; accepted: floats in [-1, 1], and integers of 8, 16 or 32 "
            "bits over the range of their type."
        )
    if is_array and kind in "iu":
        middle = 2.0 ** (8 * size - 1)
        samples = (samples - middle * (kind == "u")) / middle
    return mixed_down([_channels_last(samples.astype(np.float32), name, one_recording)], name)


def _channels_last(samples: np.ndarray, name: str, one_recording: bool) -> np.ndarray:
    """Return samples as `(samples, channels)`, or raise `ValueError` where it is not clear which axis is which."""
    if samples.ndim == 1:
        return samples[:, None]
    if samples.ndim == 2:
        rows, columns = samples.shape
        if columns == 1 or columns <= MAX_CHANNELS < rows:
            return samples
        if rows == 1 or (one_recording and rows <= MAX_CHANNELS < columns):
            return samples.T
    hint = " Give several recordings as a list of waveforms." if samples.ndim == 2 else ""
    raise ValueError(
        f"{name} has the shape {samples.shape}; accepted: (samples,), and (samples, channels) with at most "
        f"{MAX_CHANNELS} channels.{hint}"
    )


def mixed_down(blocks: list[np.ndarray], name: str) -> np.ndarray:
    """
    Return the mean of the channels of consecutive blocks `(samples, channels)` as one waveform `(samples,)`.

    Of channels that cancel each other, the first is returned, with a warning: their mean would be silence.

    Raises:
        ValueError: samples that are not finite, or far beyond full scale.
    """
    waveform = np.concatenate([block.mean(axis=1) for block in blocks])
    peak = max((float(np.abs(block).max(initial=0)) for block in blocks), default=0.0)
    if not np.isfinite(peak):
        raise ValueError(f"{name} holds NaN or infinite samples.")
    if peak > MAX_PEAK:
        raise ValueError(
            f"{name} holds samples up to {peak:.6g}, beyond full scale; accepted: floats in [-1, 1]. Divide them by "
            "their full scale."
        )
    if blocks[0].shape[1] > 1:
        power = sum(float(np.square(block, dtype=np.float64).mean(axis=1).sum()) for block in blocks)
        if float(np.square(waveform, dtype=np.float64).sum()) < CANCELLED_SHARE * power:
            logger.warning("%s: its channels cancel each other; the first one is taken.", name)
            waveform = np.concatenate([block[:, 0] for block in blocks])
    return waveform
