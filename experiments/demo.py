"""
From nothing to a working checkpoint: synthetic speech, both foundations, the three stages, and the paper's Table 1 in
small. Offline.

    seam train demo RECIPE.yaml [key=value ...]

Each part is finished before the next begins and is not repeated when the same command is given again.
"""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from tqdm.auto import tqdm
from transformers import (
    AutoFeatureExtractor,
    AutoTokenizer,
    Qwen3Config,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from seam.data.dataset import SpeechDataset, keep_in_memory
from seam.data.manifest import Utterance, read_manifest
from seam.evaluation.hypotheses import SYSTEMS, TABLE_1
from seam.evaluation.scoring import interval, total, utterance_errors
from seam.evaluation.table import notes, write_table
from seam.evaluation.transcription import load_checkpoint, load_whisper, transcribe
from seam.experiments import tiny_backbones
from seam.experiments.grammar import VOCABULARY, sample
from seam.experiments.speech import (
    TARGET_DOMAIN,
    SpeechSettings,
    make_test_speech,
    make_training_speech,
    source_domains,
)
from seam.experiments.steps import Parts
from seam.modeling_seam import SeamProcessor
from seam.processing_seam import DEFAULT_INSTRUCTION
from seam.publishing.card import write_card
from seam.train import alignment, instruction, refinement
from seam.train.recipe import StageRecipe, build, check_keys


@strict
@dataclass
class FoundationSettings:
    """
    Args:
        sizes: fields of `WhisperConfig` or `Qwen3Config`.
        training: fields of `TrainingArguments`.
        vocab_size: of the tokenizer (language model only).
        sentences: sentences of each domain that the language model reads (language model only).
        target_sentences: of the domain that is read and never heard, where it is another number.
        tasks: see `seam.experiments.tiny_backbones.TaskShares` (language model only).
    """

    training: TrainingArguments
    sizes: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 700
    sentences: int = 15000
    target_sentences: int | None = None
    tasks: tiny_backbones.TaskShares = field(default_factory=tiny_backbones.TaskShares)


@strict
@dataclass
class SecondRound:
    """
    More speech, on which the tiny Whisper learns on, and from which alone the three stages learn: what an encoder makes
    of speech that it has read often is cleaner than what it makes of anybody else's.

    Args:
        speech: see `SpeechSettings`; the test sets are those of the first round.
        config: fields of `WhisperConfig` that differ from the first round: dropouts, SpecAugment.
        training: fields of `TrainingArguments`.
    """

    speech: SpeechSettings
    training: TrainingArguments
    config: dict[str, Any] = field(default_factory=dict)


@strict
@dataclass
class WorldRecipe:
    """
    Speech and foundations, made from nothing.

    Args:
        whisper, llm: the tiny foundations.
        speech: what is said.
        seed: of everything random.
    """

    whisper: FoundationSettings
    llm: FoundationSettings
    speech: SpeechSettings = field(default_factory=SpeechSettings)
    seed: int = 0


@strict
@dataclass
class DemoRecipe(WorldRecipe):
    """
    Args:
        output_dir: everything is written here; the checkpoint is in `model/`.
        model_id: the name under which the model card loads the checkpoint; by default its folder.
        second_round: see `SecondRound`.
        alignment, instruction, refinement: fields of `StageRecipe`; paths are filled in.
    """

    output_dir: str = "runs/demo"
    model_id: str | None = None
    second_round: SecondRound | None = None
    alignment: dict[str, Any] = field(default_factory=dict)
    instruction: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)


def main(recipe: DemoRecipe) -> dict[str, Any]:
    """Run every part. Returns the table as a dictionary (see `seam.evaluation.table`)."""
    folder = Path(recipe.output_dir)
    stages = stage_recipes(recipe, folder)  # all settings are checked before anything is started
    for speech in (recipe.speech, *([recipe.second_round.speech] if recipe.second_round else [])):
        if speech.people is not None:
            read_manifest(speech.people, "train", speech.people_corpus)
    folder.mkdir(parents=True, exist_ok=True)
    parts = Parts(folder)
    make_world(recipe, folder, parts)
    if again := recipe.second_round:
        seed = recipe.seed + 1
        spoken = [seed, asdict(again.speech)]
        parts.run("more speech", spoken, lambda: make_training_speech(again.speech, folder / "more-speech", seed))
        key = [seed, again.config, without_folders(again.training)]
        parts.run("whisper, second round", key, lambda: train_encoder_on(again, folder))
    for name, stage in (("alignment", alignment), ("instruction", instruction), ("refinement", refinement)):
        parts.run(name, getattr(recipe, name), lambda stage=stage, name=name: stage.main(stages[name]))
    parts.run("checkpoint", None, lambda: save_checkpoint(folder))
    parts.run("evaluation", recipe.model_id, lambda: evaluate(recipe, folder, parts))
    print((folder / "table.md").read_text())
    minutes = sum(part["seconds"] for part in parts.done.values()) / 60
    print(f"{minutes:.1f} minutes in all; checkpoint in {folder / 'model'}, table in {folder / 'table.md'} and .png")
    return json.loads((folder / "table.json").read_text())


def make_world(recipe: WorldRecipe, folder: Path, parts: Parts) -> None:
    """`speech/`, `tests/`, `llm/` and `whisper/`."""
    spoken = [recipe.seed, asdict(recipe.speech)]
    parts.run("speech", spoken, lambda: make_training_speech(recipe.speech, folder / "speech", recipe.seed))
    parts.run("test speech", spoken, lambda: make_test_speech(recipe.speech, folder / "tests", recipe.seed))
    parts.run("language model", foundation_key(recipe, recipe.llm), lambda: make_language_model(recipe, folder))
    parts.run("whisper", foundation_key(recipe, recipe.whisper), lambda: make_speech_encoder(recipe, folder))


def foundation_key(recipe: WorldRecipe, settings: FoundationSettings) -> list:
    """What the weights of a foundation depend on."""
    reads = [settings.vocab_size, settings.sentences, settings.target_sentences, asdict(settings.tasks)]
    return [recipe.seed, settings.sizes, *reads, without_folders(settings.training)]


def without_folders(training: TrainingArguments) -> dict[str, Any]:
    return {key: value for key, value in training.to_dict().items() if "dir" not in key}


def training_in(training: TrainingArguments, folder: Path) -> TrainingArguments:
    """The settings of a foundation's training, which writes into `folder`."""
    return dataclasses.replace(training, output_dir=str(folder), remove_unused_columns=False)


def last_encoder(recipe: DemoRecipe, folder: Path) -> Path:
    """The tiny Whisper that the stages build on."""
    return folder / ("whisper-2" if recipe.second_round else "whisper")


def stage_recipes(recipe: DemoRecipe, folder: Path) -> dict[str, StageRecipe]:
    """The recipes of the three stages with their paths and the seed filled in."""
    check_keys(recipe.whisper.sizes, WhisperConfig, "whisper.sizes.")
    check_keys(recipe.llm.sizes, Qwen3Config, "llm.sizes.")
    if recipe.second_round:
        check_keys(recipe.second_round.config, WhisperConfig, "second_round.config.")
    speech = "more-speech" if recipe.second_round else "speech"
    recipes, before = {}, {"encoder": str(last_encoder(recipe, folder)), "llm": str(folder / "llm")}
    for name in ("alignment", "instruction", "refinement"):
        values = dict(getattr(recipe, name))
        values["training"] = {"output_dir": str(folder / name), "seed": recipe.seed, **values.get("training", {})}
        values["data"] = {
            "train": [str(folder / speech / "train.jsonl")],
            "validation": [str(folder / "tests" / "validation" / "manifest.jsonl")],
            "keep_encoder_states": True,
            **values.get("data", {}),
        }
        recipes[name] = build(StageRecipe, {**before, **values}, f"{name}.")
        before = {"model": str(folder / name)}
        if name == "alignment":
            before["llm"] = str(folder / "llm")  # Stage 1's checkpoint has the embedding table only
    return recipes


# ---- foundations ----


def make_language_model(recipe: WorldRecipe, folder: Path) -> str:
    """The tokenizer and the tiny Qwen3, which reads the text of every domain, tests excluded."""
    domains = [*source_domains(recipe.speech), *((TARGET_DOMAIN, "words") if recipe.speech.words else ())]
    sentences = sentences_of(recipe, domains)
    requests = [DEFAULT_INSTRUCTION, "Repeat the following:", "Correct the following:", "user", "assistant"]
    every_form = [f"{word} {word}" for word in VOCABULARY]  # at the start of a sentence and within it
    tokenizer = tiny_backbones.make_tokenizer(sentences + (requests + every_form) * 200, recipe.llm.vocab_size)
    return train_language_model(recipe, tokenizer, sentences, folder / "llm")


def make_control(recipe: WorldRecipe, folder: Path) -> str:
    """`control/`: a language model of the same size and tokenizer, trained as long, that has not read the stories."""
    sentences = sentences_of(recipe, [*source_domains(recipe.speech), "words"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    return train_language_model(recipe, tokenizer, sentences, folder / "control")


def sentences_of(recipe: WorldRecipe, domains: list[str]) -> list[str]:
    """What a language model reads of these domains, tests excluded."""
    rng = random.Random(recipe.seed + 1)
    counts = {TARGET_DOMAIN: recipe.llm.target_sentences or recipe.llm.sentences}
    return [
        text
        for domain in domains
        for text in sample(domain, counts.get(domain, recipe.llm.sentences), rng, held_out=False, unique=False)
    ]


def train_language_model(recipe: WorldRecipe, tokenizer, sentences: list[str], folder: Path) -> str:
    """A tiny Qwen3 that reads `sentences`, saved in `folder`."""
    set_seed(recipe.seed)
    model = tiny_backbones.make_qwen3(tokenizer, **recipe.llm.sizes)
    training = training_in(recipe.llm.training, folder)
    tasks = tiny_backbones.TextTasks(
        tokenizer,
        sentences,
        training.max_steps * training.per_device_train_batch_size,
        recipe.seed,
        recipe.llm.tasks,
    )
    loss = tiny_backbones.train_qwen3(model, tasks, training)
    tiny_backbones.save_foundation(folder, model, tokenizer)
    return f"{model.num_parameters() / 1e6:.2f}M parameters, mean loss {loss:.3f}"


def make_speech_encoder(recipe: WorldRecipe, folder: Path) -> str:
    """The tiny Whisper, trained on the speech of the source domain, random words and people."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    set_seed(recipe.seed)
    whisper, feature_extractor = tiny_backbones.make_whisper(
        tokenizer, recipe.speech.window_seconds, **recipe.whisper.sizes
    )
    loss = train_and_save(whisper, feature_extractor, folder / "speech", recipe.whisper.training, folder / "whisper")
    return f"{whisper.num_parameters() / 1e6:.2f}M parameters, mean loss {loss:.3f}"


def train_encoder_on(again: SecondRound, folder: Path) -> str:
    """The second round of the tiny Whisper."""
    set_seed(again.training.seed)
    whisper = WhisperForConditionalGeneration.from_pretrained(folder / "whisper", **again.config)
    feature_extractor = AutoFeatureExtractor.from_pretrained(folder / "whisper")
    loss = train_and_save(whisper, feature_extractor, folder / "more-speech", again.training, folder / "whisper-2")
    return f"mean loss {loss:.3f}"


def train_and_save(whisper, feature_extractor, speech: Path, training: TrainingArguments, folder: Path) -> float:
    """Train a Whisper on the `train.jsonl` of `speech`; returns the mean loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "llm")
    # With a tokenizer of its own: a processor adds the audio token, which Whisper's must not have.
    processor = SeamProcessor(feature_extractor, AutoTokenizer.from_pretrained(folder.parent / "llm"))
    items = keep_in_memory(SpeechDataset(read_manifest(speech / "train.jsonl"), processor))
    loss = tiny_backbones.train_whisper(whisper, items, tokenizer, training_in(training, folder))
    tiny_backbones.save_foundation(folder, whisper, tokenizer, feature_extractor)
    return loss


# ---- checkpoint and evaluation ----


def save_checkpoint(folder: Path) -> None:
    """`model/`: the result of Stage 3, without what the training left beside it."""
    temporary = folder / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for part in load_checkpoint(str(folder / "refinement")):
        part.save_pretrained(temporary)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.replace(temporary, folder / "model")


def evaluate(recipe: DemoRecipe, folder: Path, parts: Parts) -> None:
    """Word error rates of every system on every test set: `table.json`, `table.md`, `table.png` and the model card."""
    model, processor = load_checkpoint(str(folder / "model"))
    whisper, whisper_processor = load_whisper(str(last_encoder(recipe, folder)))
    tests = {
        path.parent.name.removeprefix("test-"): read_manifest(path)
        for path in (folder / "tests").glob("test-*/manifest.jsonl")
    }
    write_table(compare_systems(model, processor, whisper, whisper_processor, tests), folder)
    for name in ("table.json", "table.png"):
        shutil.copyfile(folder / name, folder / "model" / name)
    spoken = [part["result"] for name, part in parts.done.items() if name in ("speech", "more speech")]
    texts = json.dumps(card_texts(recipe.speech, spoken), indent=1, ensure_ascii=False)
    (folder / "model" / "card.json").write_text(texts + "\n", encoding="utf-8")
    write_card(model, processor, folder / "model", recipe.model_id or str(folder / "model"))


SUMMARY = """\
A tiny checkpoint, small enough to live in a repository and trained offline, its encoder and its LLM included.
It understands spoken digits, single and in strings, and a grammar of home-assistant commands, in English."""
LIMITS = """\
Anything but digits and the commands of its grammar comes out as the nearest thing within them. Within them, the LLM
mostly copies what Stage 1 heard."""
CORPUS_LICENCES = {"fsdd": "Free Spoken Digit Dataset: CC BY-SA 4.0"}


def card_texts(speech: SpeechSettings, spoken: list[str]) -> dict[str, Any]:
    """
    Args:
        speech: settings of the training speech.
        spoken: how much was made, by round: "31000 utterances, 12.98 h".

    Returns:
        What `card.json` holds; see `seam.publishing.card.CardTexts`.
    """
    data = f"{' and '.join(spoken)}: synthetic speech (espeak-ng)"
    licence = "synthetic speech: made with espeak-ng (GPL-3.0), of which nothing is in the checkpoint"
    if speech.people is not None:
        words = read_manifest(speech.people, "train", speech.people_corpus)
        speakers = ", ".join(sorted({word.speaker for word in words}))
        data += f", and utterances made from recordings of people saying single words ({speakers})"
        corpus = f"recordings of people ({speech.people_corpus}): not stated"
        licence += f"; {CORPUS_LICENCES.get(speech.people_corpus, corpus)}"
    own = "Apache-2.0 (trained from nothing)"
    return {
        "title": "SEAM, a tiny checkpoint",
        "summary": SUMMARY,
        "language": "en",
        "training_data": data + ".",
        "limits": LIMITS,
        "licences": {"encoder": own, "aligner": own, "language model": own, "training data": licence},
        "license": "apache-2.0",
    }


def compare_systems(
    model, processor, whisper, whisper_processor, tests: dict[str, Sequence[Utterance]]
) -> dict[str, Any]:
    """
    Args:
        model, processor: a trained SEAM.
        whisper: `WhisperForConditionalGeneration` whose encoder SEAM uses.
        whisper_processor: see `seam.evaluation.transcription.load_whisper`.
        tests: test sets by name.

    Returns:
        `{"wer": {system: {test: percent}}, "interval": {system: {test: [low, high]}}, "words": {test: count},
        "notes": [sentence]}`; the intervals are those of `seam.evaluation.scoring.interval`.
    """
    wer: dict[str, dict[str, float]] = {SYSTEMS[name].row: {} for name in TABLE_1}
    intervals: dict[str, dict[str, list[float]]] = {name: {} for name in wer}
    words = {}
    for name, utterances in tqdm(sorted(tests.items()), desc="test sets"):
        references = [utterance.text.lower() for utterance in utterances]
        sources = [utterance.audio for utterance in utterances]
        guided = transcribe(model, processor, sources, batch_size=32)
        unguided = transcribe(model, processor, sources, batch_size=32, first_token_guidance=False)
        hypotheses = {
            "whisper": [one.text for one in transcribe(whisper, whisper_processor, sources, batch_size=32)],
            "stage1": [one.stage1 for one in guided],
            "full-noftg": [one.text for one in unguided],
            "full": [one.text for one in guided],
        }
        for system, texts in hypotheses.items():
            counts = utterance_errors(references, texts)
            wer[SYSTEMS[system].row][name] = total(counts).error_rate
            intervals[SYSTEMS[system].row][name] = list(interval(counts))
            words[name] = total(counts).length
    return {"wer": wer, "interval": intervals, "words": words, "notes": notes(wer)}
