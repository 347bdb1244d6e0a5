"""Count a model's parameters without allocating them, and set them beside the paper's Table 2."""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from seam.configuration_seam import QWEN3_4B, WHISPER_LARGE, WHISPER_LARGE_DECODER, SeamConfig
from seam.modeling_seam import SeamForSpeechRecognition
from seam.train.alignment import AlignmentTrainer
from seam.train.draft import DraftTrainer
from seam.train.instruction import InstructionTrainer
from seam.train.recipe import RecipeError, StageRecipe, load_recipe
from seam.train.refinement import RefinementTrainer

# config.json of the backbones that the recipes name, so that counting needs no access to the Hub.
BACKBONES = Path(__file__).parents[1] / "recipes" / "backbones"
DRAFT = "draft"  # stands in the place of a stage's number, as the draft head can be trained after any stage
TRAINERS = {1: AlignmentTrainer, 2: InstructionTrainer, 3: RefinementTrainer, DRAFT: DraftTrainer}
ENCODER, DECODER, PROJECTIONS, BRIDGE = "speech encoder", "alignment decoder", "projections", "bridge"
DRAFT_HEAD, TOKEN_TABLE = "draft head", "token table"
LLM, TABLE, LORA, MASK = "language model", "  of it the embedding table", "LoRA adapters", "learned mask"
# Table 2, in millions.
PAPER = {ENCODER: 629, DECODER: 839, PROJECTIONS: 72, LLM: 4058, TABLE: 389, LORA: 62}
PAPER_TRAINED = {1: 911, 2: 62}
# Bytes of a trained parameter: itself, its gradient and the two moments of AdamW, in fp32.
TRAINED_BYTES = 16


@dataclass(frozen=True)
class Component:
    """
    One row of the table of components.

    Args:
        name: of the component; one that begins with a space is a part of the component before.
        parameters: their number.
        trained_in: the stages, 1 to 3, in which it is trained; `DRAFT` for the draft head.
        paper: millions of parameters in the paper's Table 2, for the paper's architecture.
        note: how the paper's figure can be explained.
    """

    name: str
    parameters: int
    trained_in: tuple[int | str, ...]
    paper: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """
    One row of the table of stages.

    Args:
        number: 1 to 3, or `DRAFT`.
        loaded: number of parameters in memory; of the LLM, in Stage 1 and for a draft head trained on its checkpoint,
            only the embedding table.
        trained: number of parameters that are trained.
        weights_fp32, weights_bf16: bytes of the weights alone.
        training_fp32: bytes of weights, gradients and AdamW's moments in fp32, without activations.
        paper_trained: millions of trained parameters in the paper's Table 2.
    """

    number: int | str
    loaded: int
    trained: int
    weights_fp32: int
    weights_bf16: int
    training_fp32: int
    paper_trained: int | None = None


@dataclass(frozen=True)
class Description:
    """The components of a model, and what each stage loads and trains."""

    components: list[Component]
    stages: list[Stage]

    def to_dict(self) -> dict:
        """Return nested dictionaries, for JSON."""
        return asdict(self)


def describe(name: str) -> Description:
    """
    Count the parameters of a model that need not exist yet.

    Args:
        name: a recipe (`*.yaml`), or a checkpoint: folder or Hub id.

    Raises:
        RecipeError: for a recipe that names neither a checkpoint nor both backbones.
        OSError: when a configuration cannot be read.
    """
    config = _load_config(name)
    config.alignment_only = False  # a checkpoint of Stage 1 is described with the LLM of the later stages
    with torch.device("meta"):
        model = SeamForSpeechRecognition(config)
    groups = _group_parameters(model)
    trained = {number: list(TRAINERS[number].trained_parameters(model)) for number in _stages_of(model, groups)}
    notes = _notes(model, groups) if _has_paper_sizes(config) else {}
    components = [
        Component(
            name,
            _count(parameters),
            tuple(number for number, those in trained.items() if parameters and not _without(parameters, those)),
            PAPER.get(name) if notes else None,
            notes.get(name, ""),
        )
        for name, parameters in groups.items()
    ]
    stages = []
    for number, those in trained.items():
        absent = (LLM, LORA) if number in (1, DRAFT) else (TABLE,)  # which the language model includes
        loaded, count = sum(_count(groups[name]) for name in groups if name not in absent), _count(those)
        training = 4 * (loaded - count) + TRAINED_BYTES * count
        paper = PAPER_TRAINED.get(number) if notes else None
        stages.append(Stage(number, loaded, count, 4 * loaded, 2 * loaded, training, paper))
    return Description(components, stages)


def _group_parameters(model: SeamForSpeechRecognition) -> dict[str, list[nn.Parameter]]:
    """Return the parameters by the components' names; the LLM's embedding table belongs to two of them."""
    lora = [parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name]
    if model.config.bridge == "aligner":
        name, prefixes = (
            (TOKEN_TABLE, ("token_table.",))
            if model.config.token_projection == "table"
            else (PROJECTIONS, ("input_projection.", "output_projection."))
        )
        own = [parameter for key, parameter in model.bridge.named_parameters() if key.startswith(prefixes)]
        bridge = {DECODER: _without(model.bridge.parameters(), own), name: own}
    else:
        bridge = {f"{BRIDGE} ({model.config.bridge})": list(model.bridge.parameters())}
    return {
        ENCODER: list(model.encoder.parameters()),
        **bridge,
        **({} if model.draft_head is None else {DRAFT_HEAD: list(model.draft_head.parameters())}),
        LLM: _without(model.language_model.parameters(), lora),
        TABLE: [model.get_input_embeddings().weight],
        LORA: lora,
        **({} if model.mask_embedding is None else {MASK: [model.mask_embedding]}),
    }


def _stages_of(model: SeamForSpeechRecognition, groups: dict[str, list[nn.Parameter]]) -> tuple[int | str, ...]:
    """Return the stages in which the model can be trained."""
    if not model.bridge.has_stage_1:
        stages = (2,)
    else:
        stages = (1, 2, 3) if groups[LORA] else (1,)
    return stages if model.draft_head is None else (*stages, DRAFT)


def _load_config(name: str) -> SeamConfig:
    """Return the config of a checkpoint, or of the model that a recipe builds or continues with."""
    if Path(name).suffix not in (".yaml", ".yml"):
        return SeamConfig.from_pretrained(name)
    recipe = load_recipe(StageRecipe, name, ["training.use_cpu=true"])  # or bf16 would need a GPU, just to count
    if recipe.model is not None:
        try:
            return SeamConfig.from_pretrained(recipe.model)
        except OSError as error:
            raise RecipeError(
                f"{name} continues with {recipe.model}, which cannot be read; describe the recipe of Stage 1."
            ) from error
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError(f"{name} names neither a model nor both backbones (encoder and llm).")
    ids = {"boa_token_id": 0, "eoa_token_id": 1}  # any two do for counting, which loads no tokenizer
    fields = {**ids, "token_table_trained": recipe.train_token_table, **recipe.config}
    return SeamConfig.from_backbones(backbone_config(recipe.encoder), backbone_config(recipe.llm), **fields)


def backbone_config(name: str) -> PreTrainedConfig:
    """Return the config of a Hub id or folder, without the Hub for the backbones that our recipes name."""
    known = BACKBONES / name
    return AutoConfig.from_pretrained(known if not Path(name).exists() and known.is_dir() else name)


def _has_paper_sizes(config: SeamConfig) -> bool:
    """Return whether the sizes are those of Section 3.4 and Table 2."""
    expected = (
        (config.audio_config, WHISPER_LARGE),
        (config.aligner_config, WHISPER_LARGE_DECODER),
        (config.text_config, QWEN3_4B),
        (config, {"bridge": "aligner", "lora_rank": 32}),
    )
    return all(getattr(part, key, None) == value for part, sizes in expected for key, value in sizes.items())


def _notes(model: SeamForSpeechRecognition, groups: dict[str, list[nn.Parameter]]) -> dict[str, str]:
    """Return explanations of the paper's figures, as far as a count of ours gives the same number."""
    config = model.config
    vocabulary = config.audio_config.vocab_size * config.audio_config.d_model
    narrow = copy.deepcopy(config)
    narrow.text_config.head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    with torch.device("meta"):
        adapters = SeamForSpeechRecognition(narrow).language_model.named_parameters()
        narrow_lora = _count(parameter for key, parameter in adapters if "lora_" in key)

    def matrices(module: nn.Module) -> int:
        return _count(one.weight for one in module.modules() if isinstance(one, nn.Linear))

    return {
        ENCODER: f"the paper's is its matrices alone, {millions(matrices(model.encoder))}: without convolutions, "
        "positions, norms and biases",
        DECODER: f"the paper's is its matrices alone, {millions(matrices(model.bridge.layers))}",
        TOKEN_TABLE: f"Whisper's of {millions(vocabulary)}, re-written for the LLM's tokens; in the place of Eq. 2's "
        "projections; trained with train_token_table",
        PROJECTIONS: f"with Whisper's vocabulary table of {millions(vocabulary)}, which nothing here uses, it would be "
        f"{millions(2 * config.audio_config.d_model * config.get_text_config().hidden_size + vocabulary)}",
        LLM: "no count of ours gives the paper's",
        LORA: f"with heads of {narrow.text_config.head_dim} instead of {config.text_config.head_dim} it would be "
        f"{millions(narrow_lora)}",
    }


def millions(count: int) -> str:
    """Return a count in millions, with two decimals."""
    return f"{count / 1e6:,.2f}M"


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _without(parameters: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that are not among the others."""
    left_out = {id(other) for other in others}
    return [parameter for parameter in parameters if id(parameter) not in left_out]
