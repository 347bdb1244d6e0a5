"""
Stage 1, speech-conditioning alignment (Section 3.5, Eq. 3): only the aligner learns; encoder and embeddings are frozen.

    seam train alignment RECIPE.yaml [key=value ...]
"""

from dataclasses import asdict

import torch

from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.recipe import RecipeError, StageRecipe
from seam.train.stage import StageTrainer, run


class AlignmentTrainer(StageTrainer):
    """Trains the aligner with Eq. 3 on teacher-forced transcripts; reports Stage 1's word error rate."""

    use_llm = False

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        return list(model.aligner.parameters())


def main(recipe: StageRecipe) -> dict[str, float]:
    """
    Run Stage 1: on a new model around `encoder` and `llm`, of which only the embedding table is read (Table 2), or on
    an existing `model`.
    """
    if recipe.model is not None:
        model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    elif recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither a model nor both backbones (encoder and llm).")
    else:
        tokens = {key: value for key, value in asdict(recipe.processor).items() if value is not None}
        processor = SeamProcessor.from_backbones(recipe.encoder, recipe.llm, **tokens)
        torch.manual_seed(recipe.training.seed)  # of the fresh aligner
        config = {**recipe.config, "alignment_only": True}
        model = SeamForSpeechRecognition.from_backbones(recipe.encoder, recipe.llm, processor, **config)
    return run(recipe, AlignmentTrainer, model, processor)
