"""The model that a stage begins with, and what of its LLM is trained."""

from dataclasses import asdict

import torch
from accelerate.utils import parse_flag_from_env

from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.recipe import FULL, RecipeError, StageRecipe


def new_model(recipe: StageRecipe, **config) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """A model around the recipe's `encoder` and `llm`, and its processor. `config`: fields that the stage decides."""
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither a model nor both backbones (encoder and llm).")
    tokens = {key: value for key, value in asdict(recipe.processor).items() if value is not None}
    processor = SeamProcessor.from_backbones(recipe.encoder, recipe.llm, **tokens)
    torch.manual_seed(recipe.training.seed)  # of the fresh parts
    fields = {**recipe.config, **config}
    model = SeamForSpeechRecognition.from_backbones(
        recipe.encoder,
        recipe.llm,
        processor,
        llm_dtype=held_in(recipe),
        aligner_from_decoder=recipe.aligner_from_decoder,
        **fields,
    )
    return model, processor


def stage_before(recipe: StageRecipe) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """Model and processor that Stages 2 and 3 go on with; a checkpoint of Stage 1 gets its LLM here."""
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of the stage before as model=FOLDER.")
    # A GPU quantizes faster than its machine.
    place = {"device_map": str(recipe.training.device)} if recipe.llm_dtype == "4bit" else {}
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32, llm_dtype=held_in(recipe), **place)
    if model.config.alignment_only:
        if recipe.llm is None and model.config.backbones is None:
            raise RecipeError(
                f"{recipe.model} holds Stage 1 alone, trained with an LLM from a folder: name it, llm=FOLDER."
            )
        torch.manual_seed(recipe.training.seed)  # of the fresh LoRA
        model.add_llm(recipe.llm, held_in(recipe))
    elif recipe.llm is not None:
        raise RecipeError(f"{recipe.model} holds its LLM already: leave llm out.")
    return model, processor


def held_in(recipe: StageRecipe) -> str | None:
    """The precision of the LLM, as `from_pretrained` takes it. Raises `RecipeError` where it cannot be held so."""
    if recipe.llm_dtype == FULL:
        return None
    given = recipe.training.fsdp or recipe.training.deepspeed
    if given or any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))):
        raise RecipeError(
            f"llm_dtype is {recipe.llm_dtype!r}, but FSDP2 and DeepSpeed take weights of one precision only; accepted "
            "with them: float32. With the whole model on each GPU (recipes/accelerate/eight_gpus.yaml) all are."
        )
    return recipe.llm_dtype


def llm_adapters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
    """The LoRA parameters: what Stages 2 and 3 train."""
    parameters = [parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name]
    if not parameters:
        raise RecipeError("the model has no LoRA adapters to train; build it with config.lora_rank above 0.")
    return parameters
