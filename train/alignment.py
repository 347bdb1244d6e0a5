"""
Train Stage 1, speech-conditioning alignment (Section 3.5, Eq. 3).

Only the aligner is trained; encoder and embeddings are frozen.

    seam train alignment RECIPE.yaml [key=value ...]
"""

import torch

from seam.modeling_seam import SeamForSpeechRecognition, load_checkpoint
from seam.modeling_seam.bridges import require_stage_1
from seam.train.inputs import new_model
from seam.train.recipe import RecipeError, StageRecipe, check_stage
from seam.train.run import run
from seam.train.trainer import StageTrainer, replace_at_random


class AlignmentTrainer(StageTrainer):
    """
    Train the aligner with Eq. 3 on teacher-forced transcripts, and report Stage 1's word error rate.

    Args:
        cross_entropy_weight, token_noise: see `StageRecipe`.
        kwargs: of `StageTrainer`.
    """

    use_llm = False

    def __init__(self, *, cross_entropy_weight: float = 0.0, token_noise: float = 0.0, **kwargs):
        self.cross_entropy_weight = cross_entropy_weight
        self.token_noise = token_noise
        super().__init__(**kwargs)

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """Return the aligner's parameters, without a table that is not to be trained."""
        is_left_out = model.config.token_projection == "table" and not model.config.token_table_trained
        return [one for name, one in model.bridge.named_parameters() if not (is_left_out and "token_table" in name)]

    @staticmethod
    def settings(recipe: StageRecipe) -> dict[str, float]:
        """Return the weight of the cross-entropy and the share of random tokens."""
        return {"cross_entropy_weight": recipe.cross_entropy_weight, "token_noise": recipe.token_noise}

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return the loss of a batch; in training, some of the tokens that the aligner is given are random."""
        if self.cross_entropy_weight:
            inputs = {**inputs, "cross_entropy_weight": self.cross_entropy_weight}
        if model.training and self.token_noise:
            returnable = self.accelerator.unwrap_model(self.model).lookup.returnable
            given = replace_at_random(inputs["labels"][:, :-1], returnable, self.token_noise)
            inputs = {**inputs, "alignment_inputs": given}
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(recipe: StageRecipe) -> dict[str, float]:
    """
    Run Stage 1 on an existing `model`, or on a new one around `encoder` and `llm`.

    Of the LLM only the embedding table is read (Table 2).
    """
    check_stage(recipe, "alignment")
    if recipe.model is not None:
        model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    else:
        model, processor = new_model(recipe, alignment_only=True)
    require_stage_1(model.config, "seam train alignment")
    has_table = model.config.token_projection == "table"
    for name in ("cross_entropy_weight", "train_token_table"):
        if getattr(recipe, name) and not has_table:
            raise RecipeError(f"{name} is for an aligner with a table (token_projection: table), which this one lacks.")
    if recipe.train_token_table:
        model.config.token_table_trained = True
    return run(recipe, AlignmentTrainer, model, processor)
