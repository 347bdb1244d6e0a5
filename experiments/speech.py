"""The speech of the demo: what is synthesised, what is joined from recordings of people, and what is held out."""

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from seam.data.manifest import read_manifest, write_manifest
from seam.experiments.grammar import DOMAINS, sample
from seam.experiments.people import write_strings, write_training
from seam.experiments.synthesis import Job, accented_voices, held_out_voices, synthesize, training_voices

TARGET_DOMAIN = "stories"
RECORDINGS = 10


@strict
@dataclass
class SpokenSet:
    """
    Utterances that Stage 3 learns from: others than the training's, so that Stage 1 makes the mistakes that it makes of
    what it has not learned.

    Args:
        domain: a key of `seam.experiments.grammar.DOMAINS`.
        count: number of utterances.
        noise: least and greatest signal-to-noise ratio in dB; none without.
    """

    domain: str
    count: int
    noise: list[float] | None = None


@strict
@dataclass
class SpeechSettings:
    """
    Numbers of utterances.

    Args:
        window_seconds: the window that the tiny Whisper hears.
        commands, digits, words: synthetic training speech: the source domain, and words of both domains in any order.
        word_domain: how the latter are drawn, `words` or `frequent words` of `seam.experiments.grammar.DOMAINS`.
        refinement: fields of `SpokenSet` of what `refinement.jsonl` holds; none by default.
        accents: digit strings in foreign accents.
        clean_share: part of the synthetic speech without augmentation.
        people: folder or manifest of recordings of people saying single words, of which `people_corpus` is used:
            its `train` split to train on and its `dev` split to test on.
        people_singles, people_strings: augmented single words, and strings joined from them, to train on.
        people_clean_share: part of these without augmentation.
        test: size of every test set.
    """

    window_seconds: int = 4
    commands: int = 3000
    digits: int = 1500
    words: int = 4500
    word_domain: str = "words"
    refinement: list[Any] = field(default_factory=list)
    accents: int = 0
    clean_share: float = 0.5
    people: str | None = None
    people_corpus: str = "fsdd"
    people_singles: int = 0
    people_strings: int = 0
    people_clean_share: float = 0.25
    test: int = 150

    def __post_init__(self):
        spoken = [SpokenSet(**values) for values in self.refinement]
        for domain in (self.word_domain, *(one.domain for one in spoken)):
            if domain not in DOMAINS:
                raise ValueError(f"unknown domain {domain!r}; accepted: {', '.join(DOMAINS)}.")

    @property
    def max_seconds(self) -> float:
        """Of an utterance: a little less than the window."""
        return self.window_seconds - 0.05


def heard_domains(settings: SpeechSettings) -> dict[str, int]:
    """The source domain: what is spoken as sentences, and how often."""
    return {name: count for name, count in (("commands", settings.commands), ("digits", settings.digits)) if count}


def make_training_speech(settings: SpeechSettings, folder: Path, seed: int) -> str:
    """Synthesise the training speech, add what is made from recordings of people, if any, and write `train.jsonl`."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    voices = training_voices()
    train_jobs = [
        job
        for domain, count in (*heard_domains(settings).items(), (settings.word_domain, settings.words))
        for job in speech_jobs(rng, domain, count, voices, "train", settings.clean_share, held_out=False)
    ]
    train_jobs += speech_jobs(rng, "digits", settings.accents, accented_voices(), "train", 0.0, held_out=False)
    synthesize(train_jobs, folder / "train", max_seconds=settings.max_seconds)
    train = read_manifest(folder / "train" / "manifest.jsonl")
    if settings.people is not None:
        train += write_training(
            read_manifest(settings.people, "train", settings.people_corpus),
            folder / "people",
            settings.people_singles,
            settings.people_strings,
            settings.max_seconds,
            settings.people_clean_share,
            seed,
        )
    write_manifest(folder / "train.jsonl", train)
    rng = random.Random(f"refinement {seed}")
    jobs = [
        replace(job, noise=spoken.noise and tuple(spoken.noise))
        for spoken in (SpokenSet(**values) for values in settings.refinement)
        for job in speech_jobs(rng, spoken.domain, spoken.count, voices, "refinement", 1.0, held_out=False)
    ]
    if jobs:
        synthesize(jobs, folder / "refinement", max_seconds=settings.max_seconds)
        write_manifest(folder / "refinement.jsonl", read_manifest(folder / "refinement" / "manifest.jsonl"))
    return f"{len(train)} utterances, {sum(one.duration for one in train) / 3600:.2f} h"


def make_test_speech(settings: SpeechSettings, folder: Path, seed: int) -> None:
    """
    Sentences that are in no training speech, not augmented: `validation/`, one `test-NAME/` per test set, and
    `recordings/`, a few utterances of unseen voices to show. Of every held-out person, the single words and strings
    joined from them.
    """
    rng = random.Random(f"tests {seed}")
    heard = tuple(heard_domains(settings))
    tests = [
        ("validation", training_voices(), heard, settings.test),
        ("test-seen voices", training_voices(), heard, settings.test),
        ("test-unseen voices", held_out_voices(), heard, settings.test),
        ("recordings", held_out_voices(), heard, RECORDINGS),
    ]
    if settings.words:  # without them the words of the other domain were never heard
        tests.append(("test-other domain", training_voices(), (TARGET_DOMAIN,), settings.test))
    for name, voices, domains, count in tests:
        jobs = [
            job
            for domain in domains
            for job in speech_jobs(rng, domain, count // len(domains), voices, name, 1.0, held_out=True)
        ]
        synthesize(jobs, folder / name, max_seconds=settings.max_seconds)
    if settings.people is not None:
        held_out = read_manifest(settings.people, "dev", settings.people_corpus)
        for speaker in sorted({one.speaker for one in held_out}):
            own = [one for one in held_out if one.speaker == speaker]
            test = folder / f"test-{speaker} digits"
            test.mkdir(parents=True)
            write_manifest(test / "manifest.jsonl", own)
            write_strings(own, folder / f"test-{speaker} strings", settings.test, settings.max_seconds, seed=seed)


def speech_jobs(
    rng: random.Random, domain: str, count: int, voices: list[str], corpus: str, clean_share: float, held_out: bool
) -> list[Job]:
    """Sentences of a domain with a voice each; all but `clean_share` are to be augmented."""
    texts = sample(domain, count, rng, held_out=held_out, unique=held_out)
    return [
        Job(text, rng.choice(voices), corpus, corpus, rng.getrandbits(32), augment=rng.random() >= clean_share)
        for text in texts
    ]
