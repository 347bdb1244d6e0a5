"""
Stage 2, instruction tuning (Section 3.5, Eq. 4): LoRA on the language model, which reads the aligner's teacher-forced
embeddings in its chat template; the loss is on the assistant's reply only.

    seam train instruction RECIPE.yaml [key=value ...]
"""

import torch

from seam.modeling_seam import SeamForSpeechRecognition
from seam.train.recipe import StageRecipe
from seam.train.stage import StageTrainer, llm_adapters, run, stage_before


class InstructionTrainer(StageTrainer):
    """Trains the LoRA adapters with Eq. 4; reports the word error rates of Stage 1 and of the full model."""

    use_llm = True

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        return llm_adapters(model)


def main(recipe: StageRecipe) -> dict[str, float]:
    """Run Stage 2 on the checkpoint of Stage 1."""
    return run(recipe, InstructionTrainer, *stage_before(recipe))
