"""
Synthesize speech with espeak-ng: voices, a speaker, and corpora with a manifest.

The library comes with the package `espeakng-loader` (extra `demo`); Linux and macOS.
"""

import _ctypes
import ctypes
import logging
import multiprocessing
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

from seam.data.augmentation import SAMPLE_RATE, add_noise
from seam.data.checks import write_audio
from seam.data.manifest import Utterance, write_manifest
from seam.experiments.grammar import DIGITS
from seam.experiments.waveform_augmentation import augment

_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan", "en-us-nyc")
_HELD_OUT_ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland")
# Only intelligible variants: no robots, whispers, strong echoes or overdriven ones. A variant and its near copies
# (steph and steph2, Michael and Mario, robert and rob, m7 and Nguyen ...) are all in one list, or in none.
_TRAINING_VARIANTS = (
    "f2", "f4", "f5", "m1", "m2", "m3", "m4", "m6", "m7", "m8", "klatt", "klatt2", "klatt3", "klatt4", "adam",
    "benjamin", "david", "Reed", "Alex", "Andrea", "Denis", "Diogo", "antonio", "aunty", "grandma", "linda", "max",
    "miguel", "pablo", "paul", "shelby", "victor",
)  # fmt: skip
_HELD_OUT_VARIANTS = ("f1", "steph", "Annie", "m5", "edward", "Gene", "Michael", "robert")
_ACCENTED_VARIANTS = ("f2", "f4", "f5", "m1", "m3", "m4", "m7", "klatt3", "linda", "max")

_SPELLINGS = {
    "cs": "zírou uan tú srí fór fajv siks sevn ejt najn",
    "de": "siero ouann tuh sri foor faiw ßicks säwwen äjt nain",
    "el": "ζίροου ουαν του θρι φορ φάιβ σιξ σέβεν έιτ νάιν",
    "es": "síro uán tu tri for fáif siks séven éit náin",
    "fi": "siirou uan tuu srii foor faiv siks seven eit nain",
    "fr": "zirau ouanne tou sri forre faillve sixe sèvenne eillte naillne",
    "hu": "ziró uan tú szrí fór fájv sziksz szeven éjt nájn",
    "id": "ziro wan tu tri for faif siks seven eit nain",
    "it": "siro uàn tu tri for fàiv sics sèven èit nàin",
    "nl": "ziero wan toe srie foor faaiv siks sevven eejt naain",
    "pl": "zirou łan tu sri for fajw syks sewen ejt najn",
    "pt": "zirou uane tu tri fór fáiv siques séven éit náina",
    "ru": "зироу уан ту сри фор файв сикс сэвн эйт найн",
    "sv": "sirå oann to tri får fajv sicks seven ejt najn",
    "tr": "ziro uan tu tri for fayv siks sevn eyt nayn",
}

RESPELLED_DIGITS: dict[str, dict[str, str]] = {
    language: dict(zip(DIGITS, spelling.split(), strict=True)) for language, spelling in _SPELLINGS.items()
}

_FASTEST = 260  # words per minute; beyond it espeak-ng slurs
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_OUTPUT_SYNCHRONOUS, _CHARACTERS_UTF8 = 2, 1

logger = logging.getLogger(__name__)

_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_library_lock = threading.Lock()


def training_voices() -> list[str]:
    """Return English voices to train on, every accent with every training variant."""
    return [f"{accent}+{variant}" for variant in _TRAINING_VARIANTS for accent in _ACCENTS]


def held_out_voices() -> list[str]:
    """Return English voices for tests, whose variants and near copies occur in no training voice."""
    return [f"{accent}+{variant}" for variant in _HELD_OUT_VARIANTS for accent in _HELD_OUT_ACCENTS]


def accented_voices() -> list[str]:
    """Return training voices of other languages, which can only speak English digits, with their accent."""
    return [f"{language}+{variant}" for variant in _ACCENTED_VARIANTS for language in RESPELLED_DIGITS]


@cache
def _loader() -> ModuleType:
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("synthetic speech needs espeakng-loader: pip install 'seam[demo]'") from error
    return espeakng_loader


class Speaker:
    """Speaks texts with espeak-ng; the waveform depends on the arguments alone, not on what was spoken before."""

    def __init__(self) -> None:
        self._library_path = _loader().get_library_path()
        self._data_path = _loader().get_data_path()
        variants = Path(self._data_path, "voices", "!v")
        self._variants = {path.name for path in variants.iterdir()}

    def speak(self, text: str, voice: str, rate: int = 175, pitch: int = 50) -> np.ndarray:
        """
        Speak one text.

        Args:
            text: lower-case words; for a voice that is not English, only digit words.
            voice: language and variant, such as "en-us+f2".
            rate: words per minute, 80 to 450.
            pitch: 0 to 100.

        Returns:
            float32 mono audio at 16 kHz of shape `(samples,)` in [-1, 1], without silence at its ends.

        Raises:
            ValueError: for an unknown voice, or a text that the voice cannot speak.
            RuntimeError: when espeak-ng fails or produces no sound.
        """
        language, _, variant = voice.partition("+")
        # espeak-ng silently ignores an unknown variant.
        if variant and variant not in self._variants:
            raise ValueError(f"unknown variant {variant!r} in voice {voice!r}")
        if language in RESPELLED_DIGITS:
            text = respell(text, language)
        elif language.split("-")[0] != "en":
            raise ValueError(f"the voice {voice!r} is neither English nor one of {', '.join(RESPELLED_DIGITS)}")
        with _library_lock:
            native, native_rate = self._synthesize(text, voice, rate, pitch)
        audio = soxr.resample(native.astype(np.float32) / 32768, native_rate, SAMPLE_RATE)
        return np.clip(_trim_silence(audio), -1, 1)

    def _synthesize(self, text: str, voice: str, rate: int, pitch: int) -> tuple[np.ndarray, int]:
        """Return int16 audio of shape `(samples,)` and its sample rate in Hz."""
        # The library keeps the state of flutter and noise from one utterance to the next, and no call resets it. Only
        # loading it anew (half a millisecond) makes an utterance independent of those before it.
        library = ctypes.CDLL(self._library_path)
        try:
            return self._synthesize_with(library, text, voice, rate, pitch)
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)

    def _synthesize_with(
        self, library: ctypes.CDLL, text: str, voice: str, rate: int, pitch: int
    ) -> tuple[np.ndarray, int]:
        pieces: list[np.ndarray] = []

        @_SynthCallback
        def collect(samples, count, _events):  # the signature is the library's
            if samples and count > 0:
                # Copied: the library writes the next piece into the same buffer.
                pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        native_rate = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, os.fsencode(self._data_path), 0)
        if native_rate <= 0:
            raise RuntimeError(f"espeak-ng could not be initialised from {self._data_path}")
        library.espeak_SetSynthCallback(collect)
        # Two sources of randomness: its own, seeded by the clock, and the C library's.
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.srand(1)
        if library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng does not know the voice {voice!r}")
        for parameter, value in ((_PARAMETER_RATE, rate), (_PARAMETER_PITCH, pitch)):
            if library.espeak_SetParameter(parameter, int(value), 0):
                raise RuntimeError(f"espeak-ng refused rate {rate} or pitch {pitch}")
        encoded = text.encode() + b"\0"
        failed = library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded)), 0, 1, 0, _CHARACTERS_UTF8, None, None)
        if failed or not pieces:
            raise RuntimeError(f"espeak-ng could not speak {text!r} with the voice {voice!r}")
        return np.concatenate(pieces), native_rate


def _trim_silence(audio: np.ndarray) -> np.ndarray:
    """Cut off the silence at both ends, which is 50 dB below the peak, all but 20 ms of it."""
    magnitude = np.abs(audio)
    loud = np.flatnonzero(magnitude > 0.003 * magnitude.max(initial=0))
    if not loud.size:
        raise RuntimeError("espeak-ng produced silence only")
    margin = SAMPLE_RATE // 50
    return audio[max(loud[0] - margin, 0) : loud[-1] + margin]


@dataclass(frozen=True)
class Job:
    """
    One utterance to synthesize.

    Args:
        text, voice: of `Speaker.speak`.
        corpus, split: for the manifest.
        seed: decides rate, pitch, augmentation and noise.
        augment: whether to augment it.
        noise: least and greatest signal-to-noise ratio in dB of additional noise; None for no noise.
    """

    text: str
    voice: str
    corpus: str
    split: str
    seed: int
    augment: bool
    noise: tuple[float, float] | None = None


class Corpus(NamedTuple):
    """The result of `synthesize`: manifest, number of utterances, how many were left out as too long, and seconds."""

    manifest: Path
    utterances: int
    left_out: int
    seconds: float


def synthesize(jobs: Sequence[Job], folder: str | os.PathLike, *, workers: int = 2, max_seconds: float = 3.0) -> Corpus:
    """
    Write `folder/audio/NNNNNN.wav` (16 kHz, 16 bit; N is the number of the job) and `folder/manifest.jsonl`.

    The manifest is written at the end, complete, in the order of the jobs. The files do not depend on `workers`.

    Args:
        jobs: the utterances.
        folder: created if it does not exist; files of the same names are replaced.
        workers: number of processes.
        max_seconds: a longer utterance is spoken faster, and left out (and counted) if it is still too long.
    """
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    run = partial(_run_job, folder=folder, max_seconds=max_seconds)
    progress = partial(tqdm, total=len(jobs), desc="speech", unit="utterance", mininterval=1)
    if workers > 1:
        with multiprocessing.Pool(workers) as pool:
            spoken = list(progress(pool.imap(run, enumerate(jobs), chunksize=16)))
    else:
        spoken = list(progress(map(run, enumerate(jobs))))

    utterances = [utterance for utterance in spoken if utterance is not None]
    manifest = write_manifest(folder / "manifest.jsonl", utterances)
    left_out = len(jobs) - len(utterances)
    if left_out:
        logger.warning("%d of %d utterances are longer than %g s: left out", left_out, len(jobs), max_seconds)
    return Corpus(manifest, len(utterances), left_out, sum(utterance.duration for utterance in utterances))


@cache
def _speaker() -> Speaker:
    """Return the speaker of this process."""
    return Speaker()


def _run_job(numbered: tuple[int, Job], *, folder: Path, max_seconds: float) -> Utterance | None:
    """Write the audio of one job and return its entry in the manifest, or None if it is too long."""
    number, job = numbered
    rng = random.Random(job.seed)
    rate, pitch = rng.randint(120, 210), rng.randint(20, 80)
    for attempt in (rate, *(faster for faster in (230, _FASTEST) if faster > rate)):
        audio = _speaker().speak(job.text, job.voice, attempt, pitch)
        if job.augment:
            # A new generator for every attempt: the same augmentation, whatever the rate.
            audio = augment(audio, np.random.default_rng(job.seed))
        if job.noise is not None:
            audio = add_noise(audio, np.random.default_rng(job.seed), job.noise)
            audio = audio / max(1.0, float(np.abs(audio).max()))
        if len(audio) <= max_seconds * SAMPLE_RATE:
            break
    else:
        return None
    path = folder / "audio" / f"{number:06d}.wav"
    write_audio(path, audio, SAMPLE_RATE)
    return Utterance(path, job.text, round(len(audio) / SAMPLE_RATE, 3), job.voice, job.corpus, job.split)


def respell(text: str, language: str) -> str:
    """Spell a text of digit words for a voice of `language`, a key of `RESPELLED_DIGITS`."""
    words = text.split()
    if not words or any(word not in DIGITS for word in words):
        raise ValueError(f"a {language!r} voice can only speak English digit words, not {text!r}")
    return " ".join(RESPELLED_DIGITS[language][word] for word in words)
