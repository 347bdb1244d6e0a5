"""What the LLM is given in Stage 2, on disk: encoder and aligner are frozen there, so that they run once."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import BatchFeature

from seam.data.dataset import SpeechCollator, SpeechDataset
from seam.data.manifest import CASINGS, Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train import made_from
from seam.train.recipe import StageRecipe
from seam.train.shards import Shards, States, written


def aligned_on_disk(
    recipe: StageRecipe,
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    name: str,
    utterances: list[Utterance],
) -> States:
    """
    Items with `aligned_embeds` `(tokens, d_llm)`, the aligner's teacher-forced predictions as the LLM is given them,
    from the recipe's `aligned_embeds`. Those that are not there are computed first. Computed and kept in bf16 where
    the training is in bf16, as it would compute them in every step.

    Args:
        dataset: of features or of encoder states.
        name: of the data set.
        utterances: of the data set, whose transcripts are read as they are now.

    Raises:
        RecipeError: when the disk is too small for them, before any of them is computed.
        ValueError: for those of another Stage 1, other recordings or transcripts or in another precision.
    """
    folder = Path(recipe.aligned_embeds)
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    speech = SpeechDataset(utterances, processor, CASINGS[recipe.data.casing])
    transcripts = [speech.token_ids(place).tolist() for place in range(len(speech))]
    identity = {
        **made_from.of_stage1(model, processor),
        **made_from.of_recordings(utterances),
        **made_from.of_transcripts(transcripts, recipe.data.casing),
        "llm_inputs": model.config.llm_inputs,
        "dtype": str(dtype).removeprefix("torch."),
    }
    bytes_per_token = model.config.get_text_config().hidden_size * dtype.itemsize
    shards = Shards(speech, folder, name, identity, list(map(len, transcripts)), bytes_per_token, "aligned_embeds")
    compute = partial(_aligned, model, processor, dataset, dtype, max(2, recipe.training.dataloader_num_workers))
    (states,) = written(folder, "aligned_embeds", [(shards, compute)], dtype, recipe.training)
    return states


@torch.no_grad()
def _aligned(
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    dtype: torch.dtype,
    workers: int,
    batches: list[list[int]],
) -> Iterator[list[torch.Tensor]]:
    model.eval()
    collate = SpeechCollator(processor)
    for items in DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list):
        inputs = BatchFeature(collate(items)).to(model.device)
        labels = inputs.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            embeds, mask = model.aligned(*model.speech(**inputs), labels)
        yield [row[keep].cpu() for row, keep in zip(embeds, mask.bool(), strict=True)]
