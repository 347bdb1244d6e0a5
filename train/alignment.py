"""
Train Stage 1, speech-conditioning alignment (Section 3.5, Eq. 3).

Only the aligner is trained; encoder and embeddings are frozen.

    seam train alignment RECIPE.yaml [key=value ...]
"""

import torch

from seam.modeling_seam import SeamForSpeechRecognition, load_checkpoint
from seam.modeling_seam.bridges import require_stage_1
from seam.train.inputs import new_model
from seam.train.recipe import StageRecipe, check_stage
from seam.train.run import run
from seam.train.trainer import StageTrainer


class AlignmentTrainer(StageTrainer):
    """Train the aligner with Eq. 3 on teacher-forced transcripts, and report Stage 1's word error rate."""

    use_llm = False

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """Return the aligner's parameters."""
        return list(model.bridge.parameters())


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
    return run(recipe, AlignmentTrainer, model, processor)
