"""Read the typed settings of a training run from YAML and `key=value`."""

import argparse
import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from seam.configuration_seam import SeamConfig
from seam.data.augmentation import Augmentation
from seam.data.files import recipe_file
from seam.data.manifest import CASINGS
from seam.modeling_seam.backbones import LLM_DTYPES
from seam.train import yaml_settings
from seam.train.training_arguments import refusal
from seam.train.yaml_settings import as_booleans

T = TypeVar("T")

# The stages (`seam train …`) that have the settings of `StageRecipe` which not all stages have.
STAGES_WITH = {
    "aligner_from_decoder": ("alignment",),
    "cross_entropy_weight": ("alignment",),
    "token_noise": ("alignment", "instruction"),
    "train_token_table": ("alignment",),
    "first_token_guidance": ("instruction", "refinement"),
    "llm_dtype": ("instruction", "refinement"),
    "mask": ("refinement",),
    "max_error_rate": ("refinement",),
    "aligned_embeds": ("instruction",),
    "alignment_cache": ("refinement",),
}
MASKS = ("zero", "learned")
FULL = "float32"
STATES_DTYPES = ("float32", "bfloat16")
ON_BAD_AUDIO = ("stop", "skip")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message says why in one sentence."""


@strict
@dataclass
class DataSettings:
    """
    The data of a training run, and how it is read.

    Args:
        train, validation: manifests (see `seam.data.manifest.read_manifest`). Of a stream `train` may be WebDataset
            shards, by name or pattern (`shards/*.tar`), or data sets of `datasets` (`datasets:PATH[:CONFIGURATION]`).
        text: files of plain text, one passage a line, in the place of `train` (Stage 2 with `llm_inputs: nearest`,
            where tokens that Stage 1 hears without a mistake are text to the LLM). No audio takes part.
        train_split, validation_split: keep only the utterances of this split.
        casing: of the transcripts: `lower`, `upper`, or `keep`, as they are. LibriSpeech's upper case takes 46 % more
            tokens than lower case.
        keep_encoder_states: run the frozen encoder once and keep its states in memory.
        encoder_states: folder to keep them in instead, for later trainings too: 50 states for each second, with
            Whisper-large-v2 256 kB (0.9 TB for LibriSpeech's 960 hours).
        encoder_states_dtype: `float32`, or `bfloat16`, half as large, for training in bf16. The aligner reads them in
            bf16 anyway, so that the losses are the same to the bit; a Q-Former normalizes them first, and reads rounded
            ones.
        train_limit, validation_limit: the most utterances to use, taken at even distances.
        eval_batch_size: utterances decoded at once, for the word error rate and for Stage 3.
        augmentation: random changes to the training audio (see `Augmentation`).
        on_bad_audio: what to do about a recording that cannot be read: `stop`, or `skip` it and name it in the log and
            in `skipped_audio.jsonl` in the output folder.
        batch_seconds, batch_tokens: budgets of seconds of audio and of transcript tokens in one batch of one process,
            padding included. With either, batches hold utterances of similar length, as many as fit, and at most
            `training.per_device_train_batch_size`; Whisper's encoder reads each as a whole window, however short.
        streaming: read the training data during the training, instead of its manifests before (see `SpeechStream`).
            Needs `training.max_steps`.
        shuffle_buffer: number of a stream's utterances that are shuffled and batched together. Those of `datasets` are
            buffered with their audio, in the compression of its files.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    train_split: str | None = None
    validation_split: str | None = None
    casing: str = "lower"
    keep_encoder_states: bool = False
    encoder_states: str | None = None
    encoder_states_dtype: str = "float32"
    train_limit: int | None = None
    validation_limit: int | None = None
    eval_batch_size: int = 16
    augmentation: Augmentation = field(default_factory=Augmentation)
    on_bad_audio: str = "stop"
    batch_seconds: float | int | None = None
    batch_tokens: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 10000

    def __post_init__(self):
        if self.casing not in CASINGS:
            raise RecipeError(f"data.casing is {self.casing!r}; accepted: {', '.join(CASINGS)}.")
        if self.encoder_states_dtype not in STATES_DTYPES:
            raise RecipeError(
                f"data.encoder_states_dtype is {self.encoder_states_dtype!r}; accepted: {', '.join(STATES_DTYPES)}."
            )
        if self.keep_encoder_states and self.encoder_states is not None:
            raise RecipeError("data.keep_encoder_states is memory, data.encoder_states is a folder: give one of them.")
        if self.on_bad_audio not in ON_BAD_AUDIO:
            raise RecipeError(f"data.on_bad_audio is {self.on_bad_audio!r}; accepted: {', '.join(ON_BAD_AUDIO)}.")
        cache = "keep_encoder_states" if self.keep_encoder_states else "encoder_states" if self.encoder_states else None
        if self.augmentation and cache:
            raise RecipeError(
                f"data.augmentation changes the audio anew in every epoch, but data.{cache} keeps what the encoder "
                "computed once: leave one of them out."
            )
        if self.on_bad_audio == "skip" and cache:
            raise RecipeError(
                f"data.on_bad_audio=skip: data.{cache} reads all audio before the training; remove the recordings that "
                "cannot be read from the manifests."
            )
        if self.has_budget and self.augmentation.concatenation_probability:
            raise RecipeError(
                "data.augmentation.concatenation_probability makes utterances of other lengths than those that "
                "data.batch_seconds and data.batch_tokens count: leave one of them out."
            )
        if self.streaming and cache:
            raise RecipeError(f"data.streaming reads the audio during the training, but data.{cache} before it.")
        if self.streaming and self.train_limit is not None:
            raise RecipeError("data.train_limit chooses among all utterances, which data.streaming does not know.")
        if self.text:
            self._check_text()
        if self.shuffle_buffer < 1:
            raise RecipeError(f"data.shuffle_buffer is {self.shuffle_buffer}; accepted: 1 and above.")

    def _check_text(self) -> None:
        audio = {
            "train": self.train,
            "streaming": self.streaming,
            "augmentation": self.augmentation,
            "encoder_states": self.encoder_states,
            "batch_seconds": self.batch_seconds,
            "on_bad_audio=skip": self.on_bad_audio == "skip",
        }
        for name, given in audio.items():
            if given:
                raise RecipeError(f"data.{name} is about training audio, but with data.text there is none.")

    @property
    def has_budget(self) -> bool:
        """Return whether batches have a budget of seconds or of tokens."""
        return self.batch_seconds is not None or self.batch_tokens is not None


@strict
@dataclass
class ProcessorSettings:
    """The fields of `SeamProcessor` for a new model, where they differ from its defaults."""

    instruction: str | None = None
    boa_token: str | None = None
    eoa_token: str | None = None
    audio_token: str | None = None
    leading_space: bool | None = None


@strict
@dataclass
class StageRecipe:
    """
    One stage of training.

    Args:
        training: fields of `transformers.TrainingArguments`. A run resumes from the last checkpoint in its `output_dir`
            without being asked; `resume_from_checkpoint` names one in another folder to begin from.
        data: see `DataSettings`.
        model: checkpoint of the stage before (Stages 2 and 3), one whose aligner to train further (Stage 1), or any to
            train a draft head for.
        encoder, llm: Hub ids or folders of the backbones of a new model (Stage 1). For a checkpoint of Stage 1, which
            holds the LLM's embedding table only, an LLM from a folder is named again.
        config: fields of `SeamConfig` for a new model.
        processor: see `ProcessorSettings`, for a new model.
        aligner_from_decoder: whether a new aligner begins with the weights of the encoder checkpoint's own Whisper
            decoder instead of random ones (Stage 1); its two projections begin at random in any case.
        cross_entropy_weight: weight of a cross-entropy on the scores of the aligner's table, beside Eq. 3 (Stage 1 with
            `token_projection: table`).
        token_noise: share of tokens that are replaced by random ones: of those that the aligner is given, so that it
            learns to go on after a mistake (Stage 1); of those of `data.text`, read and written alike, so that the LLM
            learns to copy what it does not expect (Stage 2).
        train_token_table: whether the aligner's table is trained too; a light checkpoint then holds it, and later
            trainings of Stage 1 go on with it (Stage 1 with `token_projection: table`).
        llm_dtype: precision of the frozen LLM while LoRA is trained on it: `float32`, `bfloat16`, or `4bit` (QLoRA's
            NF4). An LLM that was published in bf16 loses nothing by `bfloat16`. Everything else stays in fp32, and
            checkpoints hold the LLM in the precision that it was loaded from (Stages 2 and 3).
        first_token_guidance: whether the reply's first token is given in training too, as it is at inference (Eq. 6),
            rather than learned: the transcript's (Stage 2), or Stage 1's, right or wrong (Stage 3). The loss begins
            with y_2, in evaluation as well.
        masking_probability, deletion_probability: p_m and p_d of Section 3.5 (Stage 3).
        mask: what replaces a masked embedding, which Section 3.5 does not say: `zero`, or a `learned` vector that
            begins at zero, is trained with LoRA and saved with the checkpoint (Stage 3).
        max_error_rate: leave out training utterances in which Stage 1 has a higher token error rate (%): from what it
            did not hear at all, the LLM would learn to invent (Stage 3).
        early_stopping_patience: end the training after this number of evaluations in a row without a better model, by
            `training.metric_for_best_model` (`loss` by default; of the word error rates `stage1_wer` or `wer`). Needs
            `training.load_best_model_at_end`, which keeps the best.
        aligned_embeds: folder to keep the frozen aligner's output in, for later trainings too: one embedding of the LLM
            for each token (Stage 2).
        alignment_cache: folder of Stage 1's tokens, which `seam train decode` writes. Without it, Stage 3 begins by
            decoding them.
    """

    training: TrainingArguments
    data: DataSettings
    model: str | None = None
    encoder: str | None = None
    llm: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    processor: ProcessorSettings = field(default_factory=ProcessorSettings)
    aligner_from_decoder: bool = False
    cross_entropy_weight: float = 0.0
    token_noise: float = 0.0
    train_token_table: bool = False
    llm_dtype: str = FULL
    first_token_guidance: bool = False
    masking_probability: float = 0.05
    deletion_probability: float = 0.1
    mask: str = "zero"
    max_error_rate: float | int | None = None
    early_stopping_patience: int | None = None
    aligned_embeds: str | None = None
    alignment_cache: str | None = None

    def __post_init__(self):
        if refused := refusal(self.training, self.data.has_budget or self.data.streaming):
            raise RecipeError(refused)
        self._check_values()
        self._check_early_stopping()
        self._check_data()
        self._check_new_model()

    def _check_values(self) -> None:
        for name in ("masking_probability", "deletion_probability", "token_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; accepted: 0 up to but not 1.")
        if self.max_error_rate is not None and self.max_error_rate < 0:
            raise RecipeError(f"max_error_rate is {self.max_error_rate}; accepted: 0 and above, in percent.")
        if self.cross_entropy_weight < 0:
            raise RecipeError(f"cross_entropy_weight is {self.cross_entropy_weight}; accepted: 0 and above.")
        if self.llm_dtype not in (FULL, *LLM_DTYPES):
            raise RecipeError(f"llm_dtype is {self.llm_dtype!r}; accepted: {', '.join((FULL, *LLM_DTYPES))}.")
        if (self.training.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise RecipeError(
                "training.gradient_checkpointing_kwargs: use_reentrant=true finds no gradients behind a frozen LLM's "
                "embeddings; accepted: false, the default."
            )
        if self.mask not in MASKS:
            raise RecipeError(f"mask is {self.mask!r}; accepted: {', '.join(MASKS)}.")
        if self.mask == "learned" and not self.masking_probability:
            raise RecipeError(
                "mask is 'learned', but with a masking_probability of 0 there is nothing to learn it from."
            )

    def _check_early_stopping(self) -> None:
        if self.early_stopping_patience is None:
            return
        if self.early_stopping_patience < 1:
            raise RecipeError(
                f"early_stopping_patience is {self.early_stopping_patience}; accepted: 1 and above, in evaluations."
            )
        if not self.training.load_best_model_at_end or self.training.eval_strategy == "no":
            raise RecipeError(
                "early_stopping_patience waits for a better model: set training.load_best_model_at_end=true, "
                "training.eval_strategy and training.metric_for_best_model."
            )

    def _check_data(self) -> None:
        if self.data.encoder_states_dtype == "bfloat16" and not self.training.bf16:
            raise RecipeError(
                "data.encoder_states_dtype is 'bfloat16', which only training in bf16 reads without loss: set "
                "training.bf16=true."
            )
        if self.data.streaming and self.training.max_steps <= 0:
            raise RecipeError("data.streaming has no last utterance: say how long to train by training.max_steps.")
        if self.aligned_embeds is not None and (self.data.augmentation or self.data.on_bad_audio == "skip"):
            raise RecipeError(
                "aligned_embeds are computed once from all audio, before the training: leave out data.augmentation and "
                "data.on_bad_audio=skip."
            )
        if self.aligned_embeds is not None and self.data.text:
            raise RecipeError("aligned_embeds keeps what the aligner hears, but data.text is not heard: leave one out.")
        if self.aligned_embeds is not None and self.data.streaming:
            raise RecipeError(
                "aligned_embeds are computed for a whole data set, which data.streaming does not read at once."
            )

    def _check_new_model(self) -> None:
        check_keys(self.config, SeamConfig, "config.")
        if self.aligner_from_decoder and self.model is not None:
            raise RecipeError(
                f"aligner_from_decoder is for a new model, but model={self.model} has its aligner already."
            )
        bridge = self.config.get("bridge", "aligner")
        if self.aligner_from_decoder and bridge != "aligner":
            raise RecipeError(f"aligner_from_decoder: the bridge {bridge!r} is no Whisper decoder; accepted: aligner.")

    @property
    def cache_workers(self) -> int:
        """Return the number of processes that read speech for what is computed once: two, if the training has fewer."""
        return max(2, self.training.dataloader_num_workers)


def check_stage(recipe: StageRecipe, stage: str) -> None:
    """Raise `RecipeError` for a setting that the stage (the command after `seam train`) does not have."""
    check_trackers(recipe.training.report_to)
    defaults = {field.name: field.default for field in dataclasses.fields(StageRecipe)}
    for name, stages in STAGES_WITH.items():
        if stage not in stages and getattr(recipe, name) != defaults[name]:
            raise RecipeError(f"{name} is no setting of seam train {stage}, but of: {', '.join(stages)}.")
    if stage == "instruction" and recipe.token_noise and not recipe.data.text:
        raise RecipeError("token_noise: Stage 2 replaces tokens of data.text only, which is not given.")
    if stage != "instruction" and recipe.data.text:
        raise RecipeError(f"data.text is no setting of seam train {stage}, but of: instruction.")
    if stage in ("refinement", "draft") and recipe.data.streaming:
        raise RecipeError(f"data.streaming: seam train {stage} reads all training data before it trains.")
    if stage == "refinement" and recipe.data.augmentation:
        raise RecipeError(
            "data.augmentation: Stage 1 decodes the audio of Stage 3 once, so the audio must stay the same."
        )
    if stage == "refinement" and recipe.data.on_bad_audio == "skip":
        raise RecipeError(
            "data.on_bad_audio=skip: Stage 3 reads all audio before it trains; remove the recordings that cannot be "
            "read from its manifests."
        )


def check_trackers(names: list[str]) -> None:
    """Raise `RecipeError` for a tracker (`training.report_to`) that is not installed, or unknown to transformers."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"training.report_to: {name!r}; accepted: none, {', '.join(INTEGRATION_TO_CALLBACK)}.")
        is_available = getattr(integration_utils, f"is_{name}_available", lambda: True)
        if not is_available():
            raise RecipeError(f"training.report_to: {name} is not installed: pip install {name}")


def check_keys(values: dict[str, Any], cls: type, where: str) -> list[str]:
    """Return the names of a dataclass's fields; raise `RecipeError` for a key that is none, naming the closest one."""
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in values:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {where}{close[0]}?" if close else f"accepted: {', '.join(names[:12])}."
            raise RecipeError(f"unknown recipe key {where}{key}; {hint}")
    return names


def build(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """
    Build a dataclass from nested dictionaries.

    Args:
        cls: the dataclass.
        values: of its fields.
        where: what precedes the keys in an error, for instance `data.`.

    Raises:
        RecipeError: for a key that does not exist, naming the closest one that does, or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{where.rstrip('.') or 'the recipe'} must be a mapping of keys to values, got {values!r}.")
    names = check_keys(values, cls, where)
    # Of `X | None` the dataclass X is the kind, so that a value given for an optional field is built too.
    hints = get_type_hints(cls)
    kinds = {name: next(filter(dataclasses.is_dataclass, get_args(hint)), hint) for name, hint in hints.items()}
    values = as_booleans(values, hints)
    if isinstance(values.get("config"), dict) and cls is StageRecipe:
        values["config"] = as_booleans(values["config"], SeamConfig.__annotations__)
    if cls is TrainingArguments:
        return _parse_training_arguments(values, where)
    nested = {
        key: build(kinds[key], value, f"{where}{key}.") if dataclasses.is_dataclass(kinds[key]) else value
        for key, value in values.items()
    }
    for name in names:
        if name not in nested and dataclasses.is_dataclass(hints[name]):
            nested[name] = build(hints[name], {}, f"{where}{name}.")
    nested = {
        key: float(value) if hints[key] is float and type(value) is int else value for key, value in nested.items()
    }
    try:
        return cls(**nested)
    except (TypeError, StrictDataclassError) as error:
        raise RecipeError(f"{where.rstrip('.') or 'the recipe'}: {' '.join(str(error).split())}") from error


def _parse_training_arguments(values: dict[str, Any], where: str) -> TrainingArguments:
    """Parse values as a command line of transformers would, which converts and checks them."""
    values = {"report_to": "none", **values}
    best = values.get("metric_for_best_model")
    if isinstance(best, str):  # transformers takes every metric but a loss to be better when it is greater
        values = {"greater_is_better": not best.endswith(("loss", "wer")), **values}
    arguments = []
    for key, value in values.items():
        if value is not None:
            typed = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            arguments += [f"--{key}", *map(str, typed)]
    try:
        return HfArgumentParser(TrainingArguments, exit_on_error=False).parse_args_into_dataclasses(arguments)[0]
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        if values.get("bf16") and "bf16/gpu" in str(error):
            raise RecipeError(
                f"{where}bf16 needs a GPU, and there is none: give {where}bf16=false, or {where}use_cpu=true to "
                "compute in bf16 on this CPU."
            ) from error
        raise RecipeError(f"{where.rstrip('.')}: {error}") from error


def load_recipe(cls: type[T], path: str | Path, overrides: list[str]) -> T:
    """
    Read a recipe.

    Args:
        cls: the dataclass that it fills.
        path: YAML file. With `base: FILE`, a path relative to it, its values are merged into those of that recipe.
        overrides: `key=value`, with dots between nested keys; values are YAML.

    Raises:
        RecipeError: for a missing file, one that is not YAML, an unknown key, or an override that is not `key=value`.
    """
    values = _read_recipe(recipe_file(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is not of the form key=value.")
        *parents, last = key.split(".")
        parent = values
        for name in parents:
            parent = parent.setdefault(name, {}) if isinstance(parent, dict) else parent
        if not isinstance(parent, dict):
            raise RecipeError(f"{override!r}: {'.'.join(parents) or path} is {parent!r}, which has no keys.")
        try:
            parent[last] = yaml_settings.parse(value)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{override!r}: the value is not YAML: {' '.join(str(error).split())}.") from error
    return build(cls, values)


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a recipe merged into those of its base; `above` are the recipes that are based on it."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe.")
    try:
        values = yaml_settings.parse(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict) or "base" not in values:
        return values
    base = path.parent / str(values.pop("base"))
    above = (*above, path.resolve())
    if base.resolve() in above:
        raise RecipeError(f"{path}: base: {base} builds on this recipe itself.")
    return merged(_read_recipe(base, above), values)


def merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merge `values` into a copy of `base`: mappings key by key, everything else replaced."""
    both = dict(base)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        both[key] = merged(base[key], value) if nested else value
    return both
