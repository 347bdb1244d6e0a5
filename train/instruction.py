"""
Train Stage 2, instruction tuning (Section 3.5, Eq. 4).

LoRA is trained on the language model, which reads the aligner's teacher-forced embeddings in its chat template; the
loss is on the assistant's reply only. For a bridge without a Stage 1 this is the first and only stage, which trains the
bridge as well.

    seam train instruction RECIPE.yaml [key=value ...]
"""

import torch
from torch.utils.data import Dataset

from seam.data.manifest import Utterance
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.bridges import require_stage_1
from seam.train.inputs import load_previous_stage, lora_parameters, new_model
from seam.train.recipe import RecipeError, StageRecipe, check_stage
from seam.train.run import run
from seam.train.state_cache import cached_aligned_embeds
from seam.train.trainer import StageTrainer, replace_at_random


class InstructionTrainer(StageTrainer):
    """
    Train the LoRA adapters with Eq. 4, and report the word error rates of Stage 1 and of the full model.

    Args:
        first_token_guidance: the transcript's first token is given, not learned.
        token_noise: see `StageRecipe`.
    """

    use_llm = True

    def __init__(self, *, first_token_guidance: bool = False, token_noise: float = 0.0, **kwargs):
        self.first_token_guidance = first_token_guidance
        self.token_noise = token_noise
        super().__init__(**kwargs)

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """Return LoRA's parameters, and those of a bridge that has no Stage 1."""
        if model.bridge.has_stage_1:
            return lora_parameters(model)
        adapters = lora_parameters(model) if model.config.lora_rank else []  # SLAM-ASR trains its projector alone
        return [*model.bridge.parameters(), *adapters]

    @staticmethod
    def settings(recipe: StageRecipe) -> dict[str, bool | float]:
        """Return whether the first token is given, and the share of random tokens."""
        return {"first_token_guidance": recipe.first_token_guidance, "token_noise": recipe.token_noise}

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return the loss of a batch; in training on text, some of the tokens are random, read and written alike."""
        if model.training and self.token_noise:
            returnable = self.accelerator.unwrap_model(self.model).lookup.returnable
            read = replace_at_random(inputs["alignment_ids"], returnable, self.token_noise)
            labels = inputs["labels"].clone()
            labels[:, :-1] = torch.where(read >= 0, read, labels[:, :-1])
            inputs = {**inputs, "alignment_ids": read, "labels": labels}
        if self.first_token_guidance:
            inputs = {**inputs, "first_token_ids": inputs["labels"][:, 0]}
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(recipe: StageRecipe) -> dict[str, float]:
    """Run Stage 2 on the checkpoint of Stage 1, or on a new model whose bridge has no Stage 1."""
    check_stage(recipe, "instruction")
    if recipe.model is None and recipe.encoder is not None and recipe.llm is not None:
        model, processor = new_model(recipe)
        if model.bridge.has_stage_1:
            raise RecipeError(
                f"the bridge {model.config.bridge!r} has a Stage 1: train it first (seam train alignment)."
            )
    else:
        model, processor = load_previous_stage(recipe)
    if recipe.first_token_guidance:
        require_stage_1(model.config, "first_token_guidance")
    if recipe.data.text:
        require_stage_1(model.config, "data.text")
        if model.config.llm_inputs != "nearest":
            raise RecipeError(
                f"data.text: this model's LLM reads {model.config.llm_inputs} predictions, which text does not have; "
                "accepted: config.llm_inputs nearest."
            )
    if recipe.aligned_embeds is None:
        return run(recipe, InstructionTrainer, model, processor)
    require_stage_1(model.config, "aligned_embeds")

    def prepare(dataset: Dataset, name: str, utterances: list[Utterance]) -> Dataset:
        return cached_aligned_embeds(recipe, model, processor, dataset, name, utterances)

    return run(recipe, InstructionTrainer, model, processor, prepare)
