"""
Train a draft head for Stage 1.

The CTC head on the frozen encoder drafts all of Stage 1's tokens at once, and the aligner verifies them instead of
decoding them one by one. Only the head is trained; SEAM's output stays the same.

    seam train draft RECIPE.yaml [key=value ...]
"""

import logging
from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import BatchFeature

from seam.data.manifest import CASINGS, Utterance
from seam.evaluation.scoring import token_errors, word_errors
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor, load_checkpoint
from seam.train.distributed import map_over_ranks
from seam.train.inputs import read_utterances
from seam.train.recipe import RecipeError, StageRecipe, check_stage
from seam.train.run import run
from seam.train.trainer import StageTrainer

logger = logging.getLogger(__name__)


class DraftTrainer(StageTrainer):
    """
    Train the draft head with the CTC loss of the transcripts.

    Evaluations report its word error rate beside Stage 1's, and its agreement with Stage 1's tokens, on which the time
    that it saves depends.
    """

    use_llm = False

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        """Return the draft head's parameters."""
        return list(model.draft_head.parameters())

    @classmethod
    def metric_names(cls, model: SeamForSpeechRecognition) -> list[str]:
        """Return the names of the metrics that `evaluate` reports beside the loss."""
        return ["stage1_wer", "draft_wer", "draft_agreement"]

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Return the draft head's loss of a batch."""
        return super().compute_loss(model, {**inputs, "use_draft_head": True}, *args, **kwargs)

    def _decode(self, positions: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Return Stage 1's own tokens and the head's for the held-out utterances at these positions."""
        pairs = []
        held_out = Subset(self.eval_dataset, positions)
        loader = DataLoader(held_out, self.data.eval_batch_size, collate_fn=self.data_collator)
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        for batch in tqdm(loader, desc="drafting", leave=False, disable=quiet):
            del batch["labels"]
            speech = self.eval_model.speech(**BatchFeature(batch).to(self.eval_model.device))
            alignment = self.eval_model.align(*speech)
            outputs = [
                [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
                for ids, mask in ((alignment.sequences, alignment.mask), self.eval_model.draft_head.decode(*speech))
            ]
            pairs += zip(*outputs, strict=True)
        return pairs

    def word_error_rates(self) -> dict[str, float]:
        """
        Return error rates on the held-out utterances, in percent.

        These are the word error rates `stage1_wer` and `draft_wer`, and `draft_agreement`, which is 100 minus the token
        error rate of the drafts against Stage 1's own tokens, at least 0.
        """
        casing = CASINGS[self.data.casing]
        references = [casing(utterance.text) for utterance in self.validation]
        stage1, drafts = zip(*map_over_ranks(self._decode, range(len(self.eval_dataset))), strict=True)
        decode = self.processing_class.batch_decode
        return {
            "stage1_wer": word_errors(references, decode(stage1)).error_rate,
            "draft_wer": word_errors(references, decode(drafts)).error_rate,
            "draft_agreement": max(0.0, 100 - token_errors(stage1, drafts).error_rate),
        }


def main(recipe: StageRecipe) -> dict[str, float]:
    """
    Train the draft head of a checkpoint that has a Stage 1.

    A checkpoint without a head gets a new one, for the ids that the training transcripts use.
    """
    check_stage(recipe, "draft")
    if recipe.model is None:
        raise RecipeError("the recipe names no model: train Stage 1 first and give its checkpoint as model=FOLDER.")
    train, _ = read_utterances(recipe.data)
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    if model.config.bridge != "aligner":
        raise RecipeError(f"the bridge {model.config.bridge!r} takes no draft; accepted: aligner.")
    used = _used_ids(train, processor, recipe.data.casing)
    if model.draft_head is None:
        torch.manual_seed(recipe.training.seed)  # the head is initialized at random
        model.add_draft_head(used)
    unknown = used.difference(model.config.draft_vocabulary)
    if unknown:
        logger.warning(
            "The draft head's vocabulary lacks %d of the %d ids that the transcripts use.", len(unknown), len(used)
        )
    return run(recipe, DraftTrainer, model, processor)


def _used_ids(utterances: list[Utterance], processor: SeamProcessor, casing: str) -> set[int]:
    """Return the ids that the transcripts use, in one of `CASINGS`."""
    used = set()
    for utterance in tqdm(utterances, desc="draft vocabulary", leave=False):
        used.update(processor.transcript_ids(CASINGS[casing](utterance.text)))
    return used
