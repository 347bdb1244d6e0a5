"""
Train Stage 3, refinement tuning (Section 3.5, Eq. 5).

The LoRA adapters are trained further, now on Stage 1's own output, of which some embeddings are masked or deleted.

    seam train refinement RECIPE.yaml [key=value ...]
"""

import logging
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from seam.data.manifest import Utterance
from seam.evaluation.scoring import token_errors
from seam.modeling_seam import SeamForSpeechRecognition
from seam.modeling_seam.bridges import require_stage_1
from seam.train.inputs import load_previous_stage, lora_parameters
from seam.train.recipe import RecipeError, StageRecipe, check_stage
from seam.train.run import run
from seam.train.stage1_decoding import DecodedUtterance, decode_all, read_cache
from seam.train.trainer import StageTrainer

logger = logging.getLogger(__name__)


def perturb(
    aligned_mask: torch.Tensor, masking_probability: float, deletion_probability: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Choose at random the aligned embeddings to delete, and those to mask.

    A row always keeps at least one embedding: deletions that would leave none are not made.

    Args:
        aligned_mask (`torch.Tensor` of shape `(batch, tokens)`): 1 for Stage 1's tokens, 0 for padding.
        masking_probability, deletion_probability: p_m and p_d.

    Returns:
        Two tensors of the same shape: 1 for the embeddings that are kept, and 1 for those that are masked.
    """
    kept = aligned_mask.bool() & (torch.rand(aligned_mask.shape, device=aligned_mask.device) >= deletion_probability)
    kept = torch.where(kept.any(-1, keepdim=True), kept, aligned_mask.bool())
    masked = torch.rand(aligned_mask.shape, device=aligned_mask.device) < masking_probability
    return kept.to(aligned_mask.dtype), masked.to(aligned_mask.dtype)


class RefinementTrainer(StageTrainer):
    """
    Train the LoRA adapters with Eq. 5 on perturbed Stage-1 outputs, and the model's learned mask, where it has one.

    Args:
        masking_probability, deletion_probability: p_m and p_d.
        first_token_guidance: Stage 1's first token is given, not learned.
    """

    use_llm = True

    def __init__(
        self,
        *,
        masking_probability: float = 0.05,
        deletion_probability: float = 0.1,
        first_token_guidance: bool = False,
        **kwargs,
    ):
        self.first_token_guidance = first_token_guidance
        self.masking_probability = masking_probability
        self.deletion_probability = deletion_probability
        super().__init__(**kwargs)

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """Return LoRA's parameters and the learned mask."""
        mask = [] if model.mask_embedding is None else [model.mask_embedding]
        return [*lora_parameters(model), *mask]

    @staticmethod
    def settings(recipe: StageRecipe) -> dict[str, float | bool]:
        """Return whether the first token is given, and the probabilities of masking and deletion."""
        return {
            "first_token_guidance": recipe.first_token_guidance,
            "masking_probability": recipe.masking_probability,
            "deletion_probability": recipe.deletion_probability,
        }

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return the loss of a batch, perturbed in training but not in evaluation."""
        if model.training:
            mask = (inputs["alignment_ids"] != -100).long()
            kept, masked = perturb(mask, self.masking_probability, self.deletion_probability)
            inputs = {**inputs, "aligned_mask": kept, "masked": masked}
        if self.first_token_guidance:
            inputs = {**inputs, "first_token_ids": inputs["alignment_ids"][:, 0]}
        return super().compute_loss(model, inputs, *args, **kwargs)


class AlignedDataset(Dataset):
    """
    Items with Stage 1's tokens (`alignment_ids`) beside the transcript (`token_ids`).

    Where the language model reads continuous predictions instead of tokens, they hold the speech as well.

    Args:
        speech: the data set that was decoded, or `None` where the speech is not needed again.
        items: the decoded utterances.
    """

    def __init__(self, speech: Dataset | None, items: list[DecodedUtterance]):
        self.speech = speech
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    @property
    def positions(self) -> list[int]:
        """Return the positions of the items among the utterances that were decoded."""
        return [position for position, _, _ in self.items]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        position, token_ids, alignment_ids = self.items[index]
        speech = self.speech[position] if self.speech is not None else {}
        return {**speech, "token_ids": token_ids, "alignment_ids": alignment_ids}


def drop_empty(items: list[DecodedUtterance]) -> list[DecodedUtterance]:
    """
    Leave out utterances without a single Stage-1 token, and log their number.

    At inference the transcript of such audio is empty without the LLM being asked.

    Raises:
        RecipeError: when none is left.
    """
    kept = [item for item in items if len(item.alignment_ids)]
    if not kept:
        raise RecipeError("Stage 1 wrote no token for any utterance: train it longer before Stage 3.")
    if len(kept) < len(items):
        logger.warning("Stage 1 wrote no token for %d of %d utterances; left out.", len(items) - len(kept), len(items))
    return kept


def drop_misheard(items: list[DecodedUtterance], max_error_rate: float) -> list[DecodedUtterance]:
    """
    Leave out utterances whose Stage-1 tokens have a higher token error rate (%), and log their number.

    Raises:
        RecipeError: when none is left.
    """

    def error_rate(item: DecodedUtterance) -> float:
        return token_errors([item.token_ids.tolist()], [item.alignment_ids.tolist()]).error_rate

    kept = [item for item in items if error_rate(item) <= max_error_rate]
    if not kept:
        raise RecipeError(f"max_error_rate is {max_error_rate}: Stage 1 made more errors in every utterance.")
    logger.info("%d of %d utterances have at most %g %% of errors.", len(kept), len(items), max_error_rate)
    return kept


def main(recipe: StageRecipe) -> dict[str, float]:
    """Run Stage 3 on the checkpoint of Stage 2; Stage 1's tokens come from `alignment_cache`, or are decoded first."""
    check_stage(recipe, "refinement")
    model, processor = load_previous_stage(recipe)
    require_stage_1(model.config, "seam train refinement")
    if recipe.mask == "zero" and model.config.learned_mask:
        raise RecipeError(f"{recipe.model} has a learned mask already: continue with it, mask=learned.")
    if recipe.mask == "learned" and not model.config.learned_mask:
        model.add_mask_embedding()
    needs_speech = model.config.llm_inputs == "continuous"
    cached = None
    if recipe.alignment_cache is not None:
        cached = read_cache(recipe, model, processor)
        if not needs_speech:  # then the encoder's states are not needed either
            recipe = replace(recipe, data=replace(recipe.data, keep_encoder_states=False, encoder_states=None))

    def prepare(dataset: Dataset, name: str, utterances: list[Utterance]) -> AlignedDataset:
        if cached is None:
            items = decode_all(model, processor, dataset, utterances, recipe.data.eval_batch_size)
        else:
            items = cached[name]
        items = drop_empty(items)
        if name == "train" and recipe.max_error_rate is not None:
            items = drop_misheard(items, recipe.max_error_rate)
        return AlignedDataset(dataset if needs_speech else None, items)

    return run(recipe, RefinementTrainer, model, processor, prepare)
