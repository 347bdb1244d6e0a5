"""
Decode mangled audio files: is every one decoded, or refused in one sentence, in bounded time and memory?

    python -m seam.bench.fuzz [--inputs 25000] [--seed 0] [--json FILE]

Of each: no error but `ValueError`, no more than `MAX_SECONDS`, no more memory than `MEMORY_FACTOR` times the file plus
`MEMORY_MB`, and no file that was cut short without a word. Those that break a rule are written to `--keep FOLDER`.
"""

import io
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer
from tqdm.auto import tqdm

from seam.audio_files import decode
from seam.data.files import write_text

MAX_SECONDS, MEMORY_FACTOR, MEMORY_MB = 2.0, 20, 200
FORMATS = {
    "WAV": ("PCM_16", "FLOAT", "ULAW", "PCM_U8"),
    "RF64": ("PCM_16",),
    "W64": ("PCM_16",),
    "AIFF": ("PCM_16",),
    "AU": ("PCM_16",),
    "NIST": ("PCM_16",),
    "CAF": ("PCM_16",),
    "FLAC": ("PCM_16",),
    "OGG": ("VORBIS", "OPUS"),
    "MP3": ("MPEG_LAYER_III",),
}
# Where headers are: a changed byte there does more than one in the samples.
HEADER = 64
KEPT_WITHOUT_A_WORD = 0.99  # of the audio: less lost than this is not heard as a cut


@dataclass(frozen=True)
class Input:
    """A mangled file: what was done to it, and whether it was cut short and nothing else."""

    name: str
    content: bytes
    is_cut: bool
    samples: int


@dataclass(frozen=True)
class Outcome:
    """What came of an input: `decoded`, `cut`, `refused`, or the rule that it broke."""

    kind: str
    detail: str = ""

    @property
    def is_broken(self) -> bool:
        """Return whether a rule was broken."""
        return self.kind not in ("decoded", "cut", "refused")


def whole_files(rng: np.random.Generator) -> list[tuple[str, bytes, int]]:
    """Return a short file of each format and coding, mono and stereo, with its number of samples."""
    files = []
    for file_format, codings in FORMATS.items():
        for coding in codings:
            for channels in (1, 2):
                samples = int(rng.integers(8000, 40000))
                noise = 0.1 * rng.standard_normal((samples, channels))
                buffer = io.BytesIO()
                soundfile.write(buffer, noise, 16000, format=file_format, subtype=coding)
                files.append((f"{file_format}/{coding}/{channels}", buffer.getvalue(), samples))
    return files


def mangled(count: int, seed: int) -> Iterator[Input]:
    """Yield files that were cut, overwritten, shifted, repeated or joined, drawn from a seed."""
    rng = np.random.default_rng(seed)
    files = whole_files(rng)
    for number in range(count):
        name, content, samples = files[int(rng.integers(len(files)))]
        data = bytearray(content)
        kind = ("cut", "header", "bytes", "numbers", "insert", "remove", "join", "zeros")[int(rng.integers(8))]
        place = int(rng.integers(len(data)))
        if kind == "cut":
            data = data[:place]
        elif kind == "header":
            for _ in range(int(rng.integers(1, 4))):
                data[int(rng.integers(min(HEADER, len(data))))] = int(rng.integers(256))
        elif kind == "bytes":
            for _ in range(int(rng.integers(1, 30))):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
        elif kind == "numbers":  # lengths and rates: extreme values, in both byte orders
            start = int(rng.integers(min(HEADER, len(data) - 4)))
            value = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 10_000_000)[int(rng.integers(6))]
            data[start : start + 4] = value.to_bytes(4, ("little", "big")[int(rng.integers(2))])
        elif kind == "insert":
            data[place:place] = rng.bytes(int(rng.integers(1, 200)))
        elif kind == "remove":
            del data[place : place + int(rng.integers(1, 2000))]
        elif kind == "join":
            data += files[int(rng.integers(len(files)))][1]
        else:
            data[place : place + int(rng.integers(1, 5000))] = bytes(int(rng.integers(1, 5000)))
        yield Input(f"{number:06d} {name} {kind}", bytes(data), kind == "cut", samples)


def outcome_of(one: Input) -> Outcome:
    """Decode a file and return what came of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    try:
        decoded = decode(one.content, "the file")
        kind, detail = ("cut", decoded.cut) if decoded.cut else ("decoded", "")
        if one.is_cut and not decoded.cut and 0 < len(decoded.waveform) < KEPT_WITHOUT_A_WORD * one.samples:
            kind, detail = "cut without a word", f"{len(decoded.waveform)} of {one.samples} samples"
    except ValueError as error:
        kind, detail = "refused", str(error)
    except Exception as error:  # what this is all about
        return Outcome("another error", f"{type(error).__name__}: {error}")
    seconds = time.monotonic() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if seconds > MAX_SECONDS:
        return Outcome("too slow", f"{seconds:.1f} s")
    if memory > MEMORY_FACTOR * len(one.content) / 2**20 + MEMORY_MB:
        return Outcome("too much memory", f"{memory:.0f} MB for {len(one.content)} bytes")
    return Outcome(kind, detail)


def main(
    inputs: Annotated[int, typer.Option(min=1, help="Number of mangled files.")] = 25_000,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    keep: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write files that break a rule here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the counts here.")] = None,
):
    """Decode mangled files and count what came of them; the exit status is 1 when one broke a rule."""
    counts: Counter[str] = Counter()
    broken = 0
    for one in tqdm(mangled(inputs, seed), total=inputs, desc="decoding"):
        outcome = outcome_of(one)
        counts[outcome.kind] += 1
        if outcome.is_broken:
            broken += 1
            print(f"{one.name}: {outcome.kind}: {outcome.detail}", file=sys.stderr)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / one.name.replace("/", "-").replace(" ", "-")).write_bytes(one.content)
    print(", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    if json_file is not None:
        write_text(json_file, json.dumps({"inputs": inputs, "seed": seed, **counts}, indent=1))
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    typer.run(main)
