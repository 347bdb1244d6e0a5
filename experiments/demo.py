"""
Make a working checkpoint from nothing, offline: synthetic speech, both backbones, the three stages, and a table.

    seam train demo RECIPE.yaml [key=value ...]

Each step is completed before the next begins, and is not repeated when the same command is given again.
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
from seam.data.files import copy_file, write_text
from seam.data.manifest import Utterance, read_manifest
from seam.evaluation.hypotheses import SYSTEMS, TABLE_1
from seam.evaluation.scoring import interval, total, utterance_errors
from seam.evaluation.table import notes, write_table
from seam.evaluation.transcription import load_whisper, transcribe
from seam.experiments import tiny_backbones
from seam.experiments.grammar import VOCABULARY, sample
from seam.experiments.speech import (
    TARGET_DOMAIN,
    SpeechSettings,
    make_test_speech,
    make_training_speech,
    source_domains,
)
from seam.experiments.steps import Steps
from seam.modeling_seam import SeamProcessor, load_checkpoint
from seam.processing_seam import DEFAULT_INSTRUCTION
from seam.publishing.card import write_card
from seam.train import alignment, instruction, refinement
from seam.train.recipe import StageRecipe, build, check_keys

SUMMARY = """\
A tiny checkpoint, small enough to live in a repository and trained offline, its encoder and its LLM included.
It understands spoken digits, single and in strings, and a grammar of home-assistant commands, in English."""
LIMITS = """\
Anything but digits and the commands of its grammar comes out as the nearest thing within them. Within them, the LLM
mostly copies the output of Stage 1."""
CORPUS_LICENCES = {"fsdd": "Free Spoken Digit Dataset: CC BY-SA 4.0"}


@strict
@dataclass
class BackboneSettings:
    """
    Settings of a tiny backbone; all but the first two are the language model's.

    Args:
        training: fields of `TrainingArguments`.
        sizes: fields of `WhisperConfig` or `Qwen3Config`.
        vocab_size: of the tokenizer.
        sentences: number of sentences that the language model reads of each domain.
        target_sentences: of the domain that is read but never spoken in training, if it is another number.
        tasks: see `seam.experiments.tiny_backbones.TaskShares`.
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
    More speech, on which the tiny Whisper continues to train, and on which alone the three stages train.

    Speech that an encoder has been trained on often gives it cleaner states than unseen speech.

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
    Speech and backbones, made from nothing.

    Args:
        whisper, llm: the tiny backbones.
        speech: see `SpeechSettings`.
        seed: of everything random.
    """

    whisper: BackboneSettings
    llm: BackboneSettings
    speech: SpeechSettings = field(default_factory=SpeechSettings)
    seed: int = 0


@strict
@dataclass
class DemoRecipe(WorldRecipe):
    """
    Settings of the demo.

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
    """Run every step and return the table (see `compare_systems`)."""
    folder = Path(recipe.output_dir)
    stages = stage_recipes(recipe, folder)  # checks all settings before anything is started
    for speech in (recipe.speech, *([recipe.second_round.speech] if recipe.second_round else [])):
        if speech.people is not None:
            read_manifest(speech.people, "train", speech.people_corpus)
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder)
    make_world(recipe, folder, steps)
    if second := recipe.second_round:
        seed = recipe.seed + 1
        settings = [seed, asdict(second.speech)]
        steps.run("more speech", settings, lambda: make_training_speech(second.speech, folder / "more-speech", seed))
        settings = [seed, second.config, without_folders(second.training)]
        steps.run("whisper, second round", settings, lambda: train_second_round(second, folder))
    for name, stage in (("alignment", alignment), ("instruction", instruction), ("refinement", refinement)):
        steps.run(name, getattr(recipe, name), lambda stage=stage, name=name: stage.main(stages[name]))
    steps.run("checkpoint", None, lambda: save_checkpoint(folder))
    steps.run("evaluation", recipe.model_id, lambda: evaluate(recipe, folder, steps))
    print((folder / "table.md").read_text())
    minutes = sum(step["seconds"] for step in steps.done.values()) / 60
    print(f"{minutes:.1f} minutes in all; checkpoint in {folder / 'model'}, table in {folder / 'table.md'} and .png")
    return json.loads((folder / "table.json").read_text())


def make_world(recipe: WorldRecipe, folder: Path, steps: Steps) -> None:
    """Make `speech/`, `tests/`, `llm/` and `whisper/`."""
    speech = [recipe.seed, asdict(recipe.speech)]
    steps.run("speech", speech, lambda: make_training_speech(recipe.speech, folder / "speech", recipe.seed))
    steps.run("test speech", speech, lambda: make_test_speech(recipe.speech, folder / "tests", recipe.seed))
    steps.run("language model", backbone_key(recipe, recipe.llm), lambda: make_language_model(recipe, folder))
    steps.run("whisper", backbone_key(recipe, recipe.whisper), lambda: make_speech_encoder(recipe, folder))


def backbone_key(recipe: WorldRecipe, settings: BackboneSettings) -> list:
    """Return all that the weights of a backbone depend on."""
    text = [settings.vocab_size, settings.sentences, settings.target_sentences, asdict(settings.tasks)]
    return [recipe.seed, settings.sizes, *text, without_folders(settings.training)]


def without_folders(training: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a training but for its folders, on which no weight depends."""
    return {key: value for key, value in training.to_dict().items() if "dir" not in key}


def training_in(training: TrainingArguments, folder: Path) -> TrainingArguments:
    """Return the settings of a backbone's training with `folder` as its output."""
    return dataclasses.replace(training, output_dir=str(folder), remove_unused_columns=False)


def last_encoder(recipe: DemoRecipe, folder: Path) -> Path:
    """Return the folder of the tiny Whisper that the stages build on."""
    return folder / ("whisper-2" if recipe.second_round else "whisper")


def stage_recipes(recipe: DemoRecipe, folder: Path) -> dict[str, StageRecipe]:
    """Return the recipes of the three stages with their paths and the seed filled in."""
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


# ---- backbones ----


def make_language_model(recipe: WorldRecipe, folder: Path) -> str:
    """Make the tokenizer and the tiny Qwen3, trained on the text of every domain but the test sentences."""
    domains = [*source_domains(recipe.speech), *((TARGET_DOMAIN, "words") if recipe.speech.words else ())]
    sentences = sentences_of(recipe, domains)
    requests = [DEFAULT_INSTRUCTION, "Repeat the following:", "Correct the following:", "user", "assistant"]
    every_form = [f"{word} {word}" for word in VOCABULARY]  # at the start of a sentence and within it
    tokenizer = tiny_backbones.make_tokenizer(sentences + (requests + every_form) * 200, recipe.llm.vocab_size)
    return train_language_model(recipe, tokenizer, sentences, folder / "llm")


def make_control(recipe: WorldRecipe, folder: Path) -> str:
    """Make `control/`, a language model of the same size, tokenizer and training that has not read the stories."""
    sentences = sentences_of(recipe, [*source_domains(recipe.speech), "words"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    return train_language_model(recipe, tokenizer, sentences, folder / "control")


def sentences_of(recipe: WorldRecipe, domains: list[str]) -> list[str]:
    """Draw the sentences of these domains that a language model reads, none of which is in a test."""
    rng = random.Random(recipe.seed + 1)
    counts = {TARGET_DOMAIN: recipe.llm.target_sentences or recipe.llm.sentences}
    return [
        text
        for domain in domains
        for text in sample(domain, counts.get(domain, recipe.llm.sentences), rng, held_out=False, unique=False)
    ]


def train_language_model(recipe: WorldRecipe, tokenizer, sentences: list[str], folder: Path) -> str:
    """Train a tiny Qwen3 on `sentences`, save it in `folder`, and return its size and loss."""
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
    tiny_backbones.save_backbone(folder, model, tokenizer)
    return f"{model.num_parameters() / 1e6:.2f}M parameters, mean loss {loss:.3f}"


def make_speech_encoder(recipe: WorldRecipe, folder: Path) -> str:
    """Train the tiny Whisper on the training speech, and return its size and loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    set_seed(recipe.seed)
    whisper, feature_extractor = tiny_backbones.make_whisper(
        tokenizer, recipe.speech.window_seconds, **recipe.whisper.sizes
    )
    loss = train_and_save(whisper, feature_extractor, folder / "speech", recipe.whisper.training, folder / "whisper")
    return f"{whisper.num_parameters() / 1e6:.2f}M parameters, mean loss {loss:.3f}"


def train_second_round(second: SecondRound, folder: Path) -> str:
    """Train the tiny Whisper for a second round, and return its loss."""
    set_seed(second.training.seed)
    whisper = WhisperForConditionalGeneration.from_pretrained(folder / "whisper", **second.config)
    feature_extractor = AutoFeatureExtractor.from_pretrained(folder / "whisper")
    loss = train_and_save(whisper, feature_extractor, folder / "more-speech", second.training, folder / "whisper-2")
    return f"mean loss {loss:.3f}"


def train_and_save(whisper, feature_extractor, speech: Path, training: TrainingArguments, folder: Path) -> float:
    """Train a Whisper on the `train.jsonl` of `speech`, save it in `folder`, and return the mean loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "llm")
    # The processor gets a tokenizer of its own, because it adds the audio token, which Whisper's must not have.
    processor = SeamProcessor(feature_extractor, AutoTokenizer.from_pretrained(folder.parent / "llm"))
    items = keep_in_memory(SpeechDataset(read_manifest(speech / "train.jsonl"), processor))
    loss = tiny_backbones.train_whisper(whisper, items, tokenizer, training_in(training, folder))
    tiny_backbones.save_backbone(folder, whisper, tokenizer, feature_extractor)
    return loss


# ---- checkpoint and evaluation ----


def save_checkpoint(folder: Path) -> None:
    """Save the result of Stage 3 as `model/`, without the other files of the training."""
    temporary = folder / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for component in load_checkpoint(str(folder / "refinement")):
        component.save_pretrained(temporary)
    shutil.rmtree(folder / "model", ignore_errors=True)
    os.replace(temporary, folder / "model")


def evaluate(recipe: DemoRecipe, folder: Path, steps: Steps) -> None:
    """Evaluate every system on every test set; write `table.json`, `table.md`, `table.png` and the model card."""
    model, processor = load_checkpoint(str(folder / "model"))
    whisper, whisper_processor = load_whisper(str(last_encoder(recipe, folder)))
    tests = {
        path.parent.name.removeprefix("test-"): read_manifest(path)
        for path in (folder / "tests").glob("test-*/manifest.jsonl")
    }
    write_table(compare_systems(model, processor, whisper, whisper_processor, tests), folder)
    for name in ("table.json", "table.png"):
        copy_file(folder / name, folder / "model" / name)
    sizes = [step["result"] for name, step in steps.done.items() if name in ("speech", "more speech")]
    texts = json.dumps(card_texts(recipe.speech, sizes), indent=1, ensure_ascii=False)
    write_text(folder / "model" / "card.json", texts + "\n")
    write_card(model, processor, folder / "model", recipe.model_id or str(folder / "model"))


def card_texts(speech: SpeechSettings, sizes: list[str]) -> dict[str, Any]:
    """
    Return the content of `card.json` (see `seam.publishing.card.CardTexts`).

    Args:
        speech: settings of the training speech.
        sizes: of the training speech of each round: "31000 utterances, 12.98 h".
    """
    data = f"{' and '.join(sizes)}: synthetic speech (espeak-ng)"
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
    model, processor, whisper, whisper_processor, tests: dict[str, Sequence[Utterance]], normalizer: str = "basic"
) -> dict[str, Any]:
    """
    Transcribe the test sets with every system and score the transcripts.

    Args:
        model, processor: a trained SEAM.
        whisper: `WhisperForConditionalGeneration` whose encoder SEAM uses.
        whisper_processor: see `seam.evaluation.transcription.load_whisper`.
        tests: test sets by name.
        normalizer: one of `seam.evaluation.scoring.NORMALIZERS`.

    Returns:
        `{"wer": {system: {test: percent}}, "interval": {system: {test: [low, high]}}, "words": {test: count},
        "notes": [sentence]}` with the intervals of `seam.evaluation.scoring.interval`.
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
            counts = utterance_errors(references, texts, normalizer)
            wer[SYSTEMS[system].row][name] = total(counts).error_rate
            intervals[SYSTEMS[system].row][name] = list(interval(counts))
            words[name] = total(counts).length
    return {"wer": wer, "interval": intervals, "words": words, "notes": notes(wer)}
