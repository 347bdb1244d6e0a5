"""
From nothing to a working checkpoint: synthetic speech, both foundations, the three stages, and the paper's Table 1 in
small. Offline.

    seam train demo RECIPE.yaml [key=value ...]

Each part is finished before the next begins and is not repeated when the same command is given again.
"""

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    TrainingArguments,
    WhisperForConditionalGeneration,
    set_seed,
)

from seam.data.batching import SpeechDataset, keep_in_memory
from seam.data.grammar import VOCABULARY, sample
from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.data.recordings import write_strings, write_training
from seam.data.synthesis import Job, accented_voices, held_out_voices, synthesize, training_voices
from seam.evaluation.table import compare_systems, write_table
from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam import SeamProcessor
from seam.processing_seam import DEFAULT_INSTRUCTION
from seam.train import alignment, foundations, instruction, refinement
from seam.train.recipe import StageRecipe, build

logger = logging.getLogger(__name__)

TARGET_DOMAIN = "stories"


@strict
@dataclass
class SpeechSettings:
    """
    Numbers of utterances.

    Args:
        window_seconds: the window that the tiny Whisper hears.
        commands, digits, words: synthetic training speech: the source domain, and words of both domains in any order.
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
    accents: int = 0
    clean_share: float = 0.5
    people: str | None = None
    people_corpus: str = "fsdd"
    people_singles: int = 0
    people_strings: int = 0
    people_clean_share: float = 0.25
    test: int = 150


@strict
@dataclass
class FoundationSettings:
    """
    Args:
        sizes: fields of `WhisperConfig` or `Qwen3Config`.
        training: fields of `TrainingArguments`.
        vocab_size: of the tokenizer (language model only).
        sentences: sentences of each domain that the language model reads (language model only).
    """

    training: TrainingArguments
    sizes: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 700
    sentences: int = 15000


@strict
@dataclass
class DemoRecipe:
    """
    Args:
        output_dir: everything is written here; the checkpoint is in `model/`.
        seed: of everything random.
        alignment, instruction, refinement: fields of `StageRecipe`; paths are filled in.
    """

    whisper: FoundationSettings
    llm: FoundationSettings
    output_dir: str = "runs/demo"
    seed: int = 0
    speech: SpeechSettings = field(default_factory=SpeechSettings)
    alignment: dict[str, Any] = field(default_factory=dict)
    instruction: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)


class Parts:
    """
    Runs the parts of a recipe in order and remembers, in `parts.json`, which are done, how long they took and with
    which settings; a part is repeated when its settings or an earlier part changed.
    """

    def __init__(self, folder: Path):
        self.path = folder / "parts.json"
        self.done = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.changed = False

    def run(self, name: str, settings: Any, work: Callable[[], Any]):
        settings = json.loads(json.dumps(settings, default=str, sort_keys=True))
        if not self.changed and name in self.done and self.done[name]["settings"] == settings:
            print(f"{name}: done before, in {self.done[name]['seconds']:.0f} s")
            return
        self.changed = True
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        result = work()
        self.done[name] = {"settings": settings, "seconds": time.monotonic() - start, "result": result}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=1, default=str))
        os.replace(temporary, self.path)
        print(f"{name}: {self.done[name]['seconds']:.0f} s" + (f", {result}" if result else ""), flush=True)


def main(recipe: DemoRecipe) -> dict[str, Any]:
    """Run every part. Returns the table as a dictionary (see `seam.evaluation.table`)."""
    folder = Path(recipe.output_dir)
    stages = stage_recipes(recipe, folder)  # all settings are checked before anything is started
    if recipe.speech.people is not None:
        read_manifest(recipe.speech.people, "train", recipe.speech.people_corpus)
    recipe.llm.training.output_dir, recipe.whisper.training.output_dir = str(folder / "llm"), str(folder / "whisper")
    folder.mkdir(parents=True, exist_ok=True)
    parts, speech = Parts(folder), folder / "speech"
    parts.run("speech", [recipe.seed, asdict(recipe.speech)], lambda: make_speech(recipe, speech))
    parts.run("language model", foundation_key(recipe, recipe.llm), lambda: make_language_model(recipe, folder))
    parts.run("whisper", foundation_key(recipe, recipe.whisper), lambda: make_speech_encoder(recipe, folder))
    for name, stage in (("alignment", alignment), ("instruction", instruction), ("refinement", refinement)):
        parts.run(name, getattr(recipe, name), lambda stage=stage, name=name: stage.main(stages[name]))

    def finish():
        model_folder = folder / "model"
        temporary = folder / "model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        for part in load_checkpoint(str(folder / "refinement")):
            part.save_pretrained(temporary)
        shutil.rmtree(model_folder, ignore_errors=True)
        os.replace(temporary, model_folder)

    parts.run("checkpoint", None, finish)
    tests = {
        path.parent.name.removeprefix("test-"): read_manifest(path) for path in speech.glob("test-*/manifest.jsonl")
    }
    table = {}
    parts.run("evaluation", None, lambda: table.update(evaluate(folder, tests)))
    table = table or json.loads((folder / "table.json").read_text())
    total = sum(part["seconds"] for part in parts.done.values())
    print((folder / "table.md").read_text())
    print(f"{total / 60:.1f} minutes in all; checkpoint in {folder / 'model'}, table in {folder / 'table.md'} and .png")
    return table


def foundation_key(recipe: DemoRecipe, settings: FoundationSettings) -> list:
    """What the weights of a foundation depend on."""
    training = {key: value for key, value in settings.training.to_dict().items() if "dir" not in key}
    return [recipe.seed, settings.sizes, settings.vocab_size, settings.sentences, training]


def stage_recipes(recipe: DemoRecipe, folder: Path) -> dict[str, StageRecipe]:
    """The recipes of the three stages with their paths and the seed filled in."""
    recipes, before = {}, {"encoder": str(folder / "whisper"), "llm": str(folder / "llm")}
    for name in ("alignment", "instruction", "refinement"):
        values = dict(getattr(recipe, name))
        values["training"] = {"output_dir": str(folder / name), "seed": recipe.seed, **values.get("training", {})}
        values["data"] = {
            "train": [str(folder / "speech" / "train.jsonl")],
            "validation": [str(folder / "speech" / "validation" / "manifest.jsonl")],
            "keep_encoder_states": True,
            **values.get("data", {}),
        }
        recipes[name] = build(StageRecipe, {**before, **values}, f"{name}.")
        before = {"model": str(folder / name)}
    return recipes


# ---- speech ----


def heard_domains(settings: SpeechSettings) -> dict[str, int]:
    """The source domain: what is spoken as sentences, and how often."""
    return {name: count for name, count in (("commands", settings.commands), ("digits", settings.digits)) if count}


def make_speech(recipe: DemoRecipe, folder: Path) -> str:
    """Synthesise training, validation and test speech, and prepare the recordings of people, if any."""
    settings, rng = recipe.speech, random.Random(recipe.seed)
    shutil.rmtree(folder, ignore_errors=True)
    seconds = settings.window_seconds - 0.05

    def jobs(domain: str, count: int, voices: list[str], corpus: str, clean_share: float, held_out: bool) -> list[Job]:
        texts = sample(domain, count, rng, held_out=held_out, unique=held_out)
        return [
            Job(text, rng.choice(voices), corpus, corpus, rng.getrandbits(32), augment=rng.random() >= clean_share)
            for text in texts
        ]

    voices = training_voices()
    train_jobs = [
        job
        for domain, count in (*heard_domains(settings).items(), ("words", settings.words))
        for job in jobs(domain, count, voices, "train", settings.clean_share, held_out=False)
    ]
    train_jobs += jobs("digits", settings.accents, accented_voices(), "train", 0.0, held_out=False)
    synthesize(train_jobs, folder / "train", max_seconds=seconds)
    train = read_manifest(folder / "train" / "manifest.jsonl")

    heard = tuple(heard_domains(settings))
    tests = [
        ("validation", voices, heard),
        ("test-seen voices", voices, heard),
        ("test-unseen voices", held_out_voices(), heard),
    ]
    if settings.words:  # without them the words of the other domain were never heard
        tests.append(("test-other domain", voices, (TARGET_DOMAIN,)))
    for name, speakers, domains in tests:
        count = settings.test // len(domains)
        test_jobs = [job for domain in domains for job in jobs(domain, count, speakers, name, 1.0, held_out=True)]
        synthesize(test_jobs, folder / name, max_seconds=seconds)

    if settings.people is not None:
        train += make_people(settings, folder, seconds, recipe.seed)
    write_manifest(folder / "train.jsonl", train)
    return f"{len(train)} utterances, {sum(one.duration for one in train) / 3600:.2f} h to train on"


def make_people(settings: SpeechSettings, folder: Path, seconds: float, seed: int) -> list[Utterance]:
    """Training utterances from recordings of people; per held-out speaker a test set of words and one of strings."""
    recordings = read_manifest(settings.people, "train", settings.people_corpus)
    train = write_training(
        recordings,
        folder / "people",
        settings.people_singles,
        settings.people_strings,
        seconds,
        settings.people_clean_share,
        seed,
    )
    held_out = read_manifest(settings.people, "dev", settings.people_corpus)
    for speaker in sorted({one.speaker for one in held_out}):
        own = [one for one in held_out if one.speaker == speaker]
        test = folder / f"test-{speaker} digits"
        test.mkdir(parents=True)
        write_manifest(test / "manifest.jsonl", own)
        write_strings(own, folder / f"test-{speaker} strings", settings.test, seconds, seed=seed)
    return train


# ---- foundations ----


def make_language_model(recipe: DemoRecipe, folder: Path) -> str:
    """The tokenizer and the tiny Qwen3, which reads the text of every domain, tests excluded."""
    rng = random.Random(recipe.seed + 1)
    domains = [*heard_domains(recipe.speech), *((TARGET_DOMAIN, "words") if recipe.speech.words else ())]
    sentences = [
        text for domain in domains for text in sample(domain, recipe.llm.sentences, rng, held_out=False, unique=False)
    ]
    requests = [DEFAULT_INSTRUCTION, "Repeat the following:", "Correct the following:", "user", "assistant"]
    every_form = [f"{word} {word}" for word in VOCABULARY]  # at the start of a sentence and within it
    tokenizer = foundations.make_tokenizer(sentences + (requests + every_form) * 200, recipe.llm.vocab_size)
    set_seed(recipe.seed)
    model = foundations.make_qwen3(tokenizer, **recipe.llm.sizes)
    training = recipe.llm.training
    tasks = foundations.TextTasks(
        tokenizer, sentences, training.max_steps * training.per_device_train_batch_size, recipe.seed
    )
    loss = foundations.train_qwen3(model, tasks, training)
    foundations.save_foundation(folder / "llm", model, tokenizer)
    return f"{model.num_parameters() / 1e6:.2f}M parameters, mean loss {loss:.3f}"


def make_speech_encoder(recipe: DemoRecipe, folder: Path) -> str:
    """The tiny Whisper, trained on the speech of the source domain, random words and people."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    set_seed(recipe.seed)
    whisper, feature_extractor = foundations.make_whisper(
        tokenizer, recipe.speech.window_seconds, **recipe.whisper.sizes
    )
    processor = SeamProcessor(feature_extractor, tokenizer)
    speech = keep_in_memory(SpeechDataset(read_manifest(folder / "speech" / "train.jsonl"), processor))
    loss = foundations.train_whisper(whisper, speech, tokenizer, recipe.whisper.training)
    foundations.save_foundation(
        folder / "whisper", whisper, AutoTokenizer.from_pretrained(folder / "llm"), feature_extractor
    )
    return f"{whisper.num_parameters() / 1e6:.2f}M parameters, mean loss {loss:.3f}"


# ---- evaluation ----


def evaluate(folder: Path, tests: dict[str, list[Utterance]]) -> dict[str, Any]:
    """Word error rates of every system on every test set, written as `table.json`, `table.md` and `table.png`."""
    model, processor = load_checkpoint(str(folder / "model"))
    whisper = WhisperForConditionalGeneration.from_pretrained(folder / "whisper")
    whisper_processor = (
        AutoFeatureExtractor.from_pretrained(folder / "whisper"),
        AutoTokenizer.from_pretrained(folder / "whisper"),
    )
    with torch.no_grad():
        table = compare_systems(model, processor, whisper, whisper_processor, tests)
    write_table(table, folder)
    return table
