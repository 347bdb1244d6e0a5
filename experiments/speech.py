"""Make the speech of the demo: synthetic utterances, some joined from recordings of people, and test sets."""

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from seam.data.manifest import read_manifest, write_manifest
from seam.experiments.grammar import DOMAINS, sample
from seam.experiments.people import make_strings, make_training_utterances
from seam.experiments.synthesis import Job, accented_voices, held_out_voices, synthesize, training_voices

TARGET_DOMAIN = "stories"
RECORDINGS = 10


@strict
@dataclass
class RefinementSet:
    """
    Utterances for Stage 3, which Stage 1 is not trained on, so that it makes the errors that it makes on unseen speech.

    Args:
        domain: a key of `seam.experiments.grammar.DOMAINS`.
        count: number of utterances.
        noise: least and greatest signal-to-noise ratio in dB; None for no noise.
    """

    domain: str
    count: int
    noise: list[float] | None = None


@strict
@dataclass
class SpeechSettings:
    """
    The demo's speech, in numbers of utterances.

    Args:
        window_seconds: the window of the tiny Whisper.
        commands, digits: synthetic training speech of the source domain.
        words: synthetic training speech of words of both domains in any order.
        word_domain: how these are drawn, `words` or `frequent words` of `seam.experiments.grammar.DOMAINS`.
        refinement: a list of fields of `RefinementSet`, the content of `refinement.jsonl`; empty by default.
        accents: digit strings in foreign accents.
        clean_share: share of the synthetic speech that is not augmented.
        people: folder or manifest of recordings of people who say single words, of which `people_corpus` is used:
            its `train` split to train on and its `dev` split to test on.
        people_singles, people_strings: augmented single words, and strings joined from them, to train on.
        people_clean_share: share of these that is not augmented.
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
        refinement = [RefinementSet(**values) for values in self.refinement]
        for domain in (self.word_domain, *(one.domain for one in refinement)):
            if domain not in DOMAINS:
                raise ValueError(f"unknown domain {domain!r}; accepted: {', '.join(DOMAINS)}.")

    @property
    def max_seconds(self) -> float:
        """Return the greatest length of an utterance, a little less than the window."""
        return self.window_seconds - 0.05


def source_domains(settings: SpeechSettings) -> dict[str, int]:
    """Return the domains that are spoken as sentences in training, and the number of utterances of each."""
    return {name: count for name, count in (("commands", settings.commands), ("digits", settings.digits)) if count}


def make_training_speech(settings: SpeechSettings, folder: Path, seed: int) -> str:
    """Synthesize the training speech, add utterances made from recordings of people, and write `train.jsonl`."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    voices = training_voices()
    train_jobs = [
        job
        for domain, count in (*source_domains(settings).items(), (settings.word_domain, settings.words))
        for job in speech_jobs(rng, domain, count, voices, "train", settings.clean_share, held_out=False)
    ]
    train_jobs += speech_jobs(rng, "digits", settings.accents, accented_voices(), "train", 0.0, held_out=False)
    synthesize(train_jobs, folder / "train", max_seconds=settings.max_seconds)
    train = read_manifest(folder / "train" / "manifest.jsonl")
    if settings.people is not None:
        train += make_training_utterances(
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
        replace(job, noise=one.noise and tuple(one.noise))
        for one in (RefinementSet(**values) for values in settings.refinement)
        for job in speech_jobs(rng, one.domain, one.count, voices, "refinement", 1.0, held_out=False)
    ]
    if jobs:
        synthesize(jobs, folder / "refinement", max_seconds=settings.max_seconds)
        write_manifest(folder / "refinement.jsonl", read_manifest(folder / "refinement" / "manifest.jsonl"))
    return f"{len(train)} utterances, {sum(one.duration for one in train) / 3600:.2f} h"


def make_test_speech(settings: SpeechSettings, folder: Path, seed: int) -> None:
    """
    Make the test sets, whose sentences are in no training speech, without augmentation.

    These are `validation/`, a `test-NAME/` for each test set, and `recordings/`, a few utterances of unseen voices to
    show. For every held-out person there are single words and strings joined from them.
    """
    rng = random.Random(f"tests {seed}")
    source = tuple(source_domains(settings))
    tests = [
        ("validation", training_voices(), source, settings.test),
        ("test-seen voices", training_voices(), source, settings.test),
        ("test-unseen voices", held_out_voices(), source, settings.test),
        ("recordings", held_out_voices(), source, RECORDINGS),
    ]
    if settings.words:  # without them no training speech has the words of the other domain
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
            make_strings(own, folder / f"test-{speaker} strings", settings.test, settings.max_seconds, seed=seed)


def speech_jobs(
    rng: random.Random, domain: str, count: int, voices: list[str], corpus: str, clean_share: float, held_out: bool
) -> list[Job]:
    """Draw sentences of a domain and a voice for each; all but `clean_share` are to be augmented."""
    texts = sample(domain, count, rng, held_out=held_out, unique=held_out)
    return [
        Job(text, rng.choice(voices), corpus, corpus, rng.getrandbits(32), augment=rng.random() >= clean_share)
        for text in texts
    ]
