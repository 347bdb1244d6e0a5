"""Training and test utterances made from a manifest of people saying single words."""

import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import soundfile
from tqdm import tqdm

from seam.data.augmentation import augment
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.data.people import SAMPLE_RATE, join_recordings

Part = tuple[np.ndarray, str, str]


def read_words(utterances: Sequence[Utterance]) -> list[Part]:
    """`(waveform at 16 kHz of shape (samples,), text, speaker)` of each utterance."""
    return [(librosa.load(one.audio, sr=SAMPLE_RATE)[0], one.text, one.speaker) for one in utterances]


def write_parts(parts: Sequence[Part], folder: Path, split: str) -> list[Utterance]:
    """Write 16-bit WAV files and a manifest."""
    (folder / "audio").mkdir(parents=True)
    written = []
    for index, (waveform, text, speaker) in enumerate(parts):
        path = folder / "audio" / f"{index:06d}.wav"
        soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
        written.append(Utterance(path, text, len(waveform) / SAMPLE_RATE, speaker, "people", split))
    return read_manifest(write_manifest(folder / "manifest.jsonl", written))


def write_strings(
    utterances: Sequence[Utterance], folder: Path, count: int, max_seconds: float, seed: int
) -> list[Utterance]:
    """Strings of two to six words, each string joined from recordings of one speaker; not augmented."""
    rng = np.random.default_rng(seed)
    return write_parts(join_recordings(read_words(utterances), count, rng, max_seconds=max_seconds), folder, "test")


def write_training(
    utterances: Sequence[Utterance],
    folder: Path,
    singles: int,
    strings: int,
    max_seconds: float,
    clean_share: float,
    seed: int,
) -> list[Utterance]:
    """
    Single words, every speaker equally often, and strings joined from them; all but `clean_share` are augmented.

    Args:
        singles, strings: numbers of utterances.
        max_seconds: longest utterance, before and after augmentation.
    """
    rng = np.random.default_rng(seed)
    words = read_words(utterances)
    speakers = sorted({speaker for _, _, speaker in words})
    own = {
        name: [part for part in words if part[2] == name and len(part[0]) < max_seconds * SAMPLE_RATE]
        for name in speakers
    }
    parts = [own[name][rng.integers(len(own[name]))] for name in rng.choice(speakers, size=singles)]
    # Room for slower speech: augmentation stretches by up to a quarter.
    parts += join_recordings(words, strings, rng, max_seconds=max_seconds / 1.25)
    jobs = [(part, int(rng.integers(2**31)), rng.random() >= clean_share) for part in parts]
    with multiprocessing.get_context("spawn").Pool() as pool:
        work = partial(_augmented, max_samples=int(max_seconds * SAMPLE_RATE))
        parts = list(tqdm(pool.imap(work, jobs, chunksize=32), total=len(jobs), desc="people"))
    return write_parts(parts, folder, "train")


def _augmented(job: tuple[Part, int, bool], max_samples: int) -> Part:
    (waveform, text, speaker), seed, wanted = job
    if wanted:
        changed = augment(waveform, np.random.default_rng(seed))
        waveform = changed if len(changed) <= max_samples else waveform
    return waveform, text, speaker
