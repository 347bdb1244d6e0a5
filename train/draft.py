"""
A draft for Stage 1: a CTC head on the frozen encoder writes all tokens at once, and the aligner checks them instead of
writing them one after the other. Only the head learns; what SEAM writes stays the same.

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
from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.distributed import map_over_ranks
from seam.train.inputs import read_utterances
from seam.train.recipe import RecipeError, StageRecipe, check_stage
from seam.train.run import run
from seam.train.trainer import StageTrainer

logger = logging.getLogger(__name__)


class DraftTrainer(StageTrainer):
    """
    Trains the draft head with the CTC loss of the transcripts; reports its word error rate beside Stage 1's, and how
    much of what Stage 1 writes the head has written too, on which the time that it saves depends.
    """

    use_llm = False

    @staticmethod
    def trained_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
        return list(model.draft_head.parameters())

    @classmethod
    def metric_names(cls, model: SeamForSpeechRecognition) -> list[str]:
        return ["stage1_wer", "draft_wer", "draft_agreement"]

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "use_draft_head": True}, *args, **kwargs)

    def _decode(self, places: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """What Stage 1 and the head write, each by itself, in these of the held-out utterances."""
        pairs = []
        held_out = Subset(self.eval_dataset, places)
        loader = DataLoader(held_out, self.data.eval_batch_size, collate_fn=self.data_collator)
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        for batch in tqdm(loader, desc="drafting", leave=False, disable=quiet):
            del batch["labels"]
            speech = self.eval_model.speech(**BatchFeature(batch).to(self.eval_model.device))
            alignment = self.eval_model.align(*speech)
            written = [
                [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
                for ids, mask in ((alignment.sequences, alignment.mask), self.eval_model.draft_head.decode(*speech))
            ]
            pairs += zip(*written, strict=True)
        return pairs

    def word_error_rates(self) -> dict[str, float]:
        """
        On the held-out utterances, in percent: the word error rates `stage1_wer` and `draft_wer`, and
        `draft_agreement`, which is 100 less the token error rate of the drafts against Stage 1's own tokens.
        """
        casing = CASINGS[self.data.casing]
        references = [casing(utterance.text) for utterance in self.validation]
        heard, drafts = zip(*map_over_ranks(self._decode, range(len(self.eval_dataset))), strict=True)
        decode = self.processing_class.batch_decode
        return {
            "stage1_wer": word_errors(references, decode(heard)).rate,
            "draft_wer": word_errors(references, decode(drafts)).rate,
            "draft_agreement": 100 - token_errors(heard, drafts).rate,
        }


def transcript_vocabulary(utterances: list[Utterance], processor: SeamProcessor, casing: str) -> set[int]:
    """The ids that the transcripts use. `casing`: one of `CASINGS`."""
    used = set()
    for utterance in tqdm(utterances, desc="draft vocabulary", leave=False):
        used.update(processor.transcript_ids(CASINGS[casing](utterance.text)))
    return used


def main(recipe: StageRecipe) -> dict[str, float]:
    """
    Train the draft head of a checkpoint that has a Stage 1. One that has no head yet is given a fresh one, for the ids
    that the training transcripts use.
    """
    check_stage(recipe, "draft")
    if recipe.model is None:
        raise RecipeError("the recipe names no model: train Stage 1 first and give its checkpoint as model=FOLDER.")
    train, _ = read_utterances(recipe.data)
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    if model.config.bridge != "aligner":
        raise RecipeError(f"the bridge {model.config.bridge!r} takes no draft; accepted: aligner.")
    used = transcript_vocabulary(train, processor, recipe.data.casing)
    if model.draft_head is None:
        torch.manual_seed(recipe.training.seed)  # of the fresh head
        model.add_draft_head(used)
    unknown = used.difference(model.config.draft_vocabulary)
    if unknown:
        logger.warning("%d of the %d ids that the transcripts use are not of the draft head.", len(unknown), len(used))
    return run(recipe, DraftTrainer, model, processor)
