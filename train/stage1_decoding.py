"""
Decode Stage 1's tokens (Algorithm 1), from which Stage 3 learns.

That happens when Stage 3 begins, or ahead of it by this command, in any number of processes, into the recipe's
`alignment_cache`.

    seam train decode RECIPE.yaml [key=value ...]
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature

from seam.data.dataset import SpeechCollator, SpeechDataset, batches_by_length
from seam.data.files import locked, read_json_lines, repair_json_lines, writing
from seam.data.manifest import CASINGS, Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor, load_checkpoint
from seam.modeling_seam.backbones import EmbeddingTable
from seam.modeling_seam.bridges import require_stage_1
from seam.train.cache_keys import check_key, recordings_key, stage1_key, transcripts_key
from seam.train.distributed import map_over_ranks
from seam.train.inputs import check_lengths, read_utterances
from seam.train.recipe import RecipeError, StageRecipe, check_stage


class DecodedUtterance(NamedTuple):
    """An utterance's position in its data set, the ids of its transcript `(tokens,)`, and Stage 1's `(tokens,)`."""

    position: int
    token_ids: torch.LongTensor
    alignment_ids: torch.LongTensor


@torch.no_grad()
def decode_stage1(
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    batches: list[list[int]],
    workers: int = 2,
) -> Iterator[list[DecodedUtterance]]:
    """
    Decode utterances with Stage 1, and yield them batch by batch.

    Args:
        model, processor: with a Stage 1.
        dataset: of features or of encoder states.
        batches: positions in the data set.
        workers: processes that read it.
    """
    model.eval()
    collate = SpeechCollator(processor)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)
    for positions, items in zip(batches, loader, strict=True):
        tensors = collate(items)
        del tensors["labels"]
        alignment = model.align(*model.speech(**BatchFeature(tensors).to(model.device)))
        rows = zip(positions, items, alignment.sequences.cpu(), alignment.mask.bool().cpu(), strict=True)
        yield [DecodedUtterance(position, item["token_ids"].clone(), ids[keep]) for position, item, ids, keep in rows]


def decode_all(
    model, processor, dataset: Dataset, utterances: Sequence[Utterance], batch_size: int
) -> list[DecodedUtterance]:
    """Decode every utterance of a data set with Stage 1, each rank its share, and return all in order."""

    def decode(batches: list[list[int]]) -> list[list[DecodedUtterance]]:
        decoded = decode_stage1(model, processor, dataset, batches)
        return list(tqdm(decoded, desc="Stage 1 decoding", total=len(batches), leave=False))

    decoded = map_over_ranks(decode, batches_by_length([utterance.duration for utterance in utterances], batch_size))
    return sorted(chain.from_iterable(decoded), key=lambda one: one.position)


def read_cache(
    recipe: StageRecipe, model: SeamForSpeechRecognition, processor: SeamProcessor
) -> dict[str, list[DecodedUtterance]]:
    """
    Return what `seam train decode` wrote for a recipe: the data sets `train` and `validation`.

    Raises:
        ValueError: when the cache is stale, incomplete or damaged.
        FileNotFoundError: when there is none.
    """
    folder = Path(recipe.alignment_cache)
    read = {}
    for name, (utterances, key) in _data_sets(recipe, model, processor).items():
        files = _files(folder, name)
        if not files:
            raise FileNotFoundError(f"{folder} holds no {name} set; `seam train decode` with the same recipe makes it.")
        rows = {row["id"]: row for file in files for row in _read_rows(file, key)}
        if len(rows) < len(utterances):
            raise ValueError(
                f"{folder} holds {len(rows)} of the {len(utterances)} utterances of the {name} set; the same "
                "`seam train decode` finishes it."
            )
        read[name] = [
            DecodedUtterance(
                position, torch.LongTensor(row["reference_tokens"]), torch.LongTensor(row["stage1_tokens"])
            )
            for position, row in sorted(rows.items())
        ]
    return read


def main(recipe: StageRecipe) -> dict[str, Any]:
    """
    Decode the training and validation utterances of a Stage-3 recipe with the Stage 1 of its `model`.

    That may also be the checkpoint of Stage 1 itself. Rows are written batch by batch to
    `alignment_cache/SET-RANK.jsonl`:

    - `id`, `audio`: the utterance's position in the data set, and its recording;
    - `reference_tokens`, `stage1_tokens`: ids of its transcript, and Stage 1's.

    The first line of every file is its cache key. Utterances that any process has decoded before are not decoded again.
    Of N processes (`RANK` and `WORLD_SIZE`, as torchrun and `accelerate launch` set them) each takes every N-th batch;
    none waits for another.

    Returns:
        For each data set the number of utterances, of those decoded now, and of those left to other processes.
    """
    check_stage(recipe, "refinement")
    if recipe.alignment_cache is None:
        raise RecipeError("the recipe names no alignment_cache, the folder to write Stage 1's tokens to.")
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of Stage 1 or 2 as model=FOLDER.")
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    require_stage_1(model.config, "seam train decode")
    folder = Path(recipe.alignment_cache)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < processes:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {processes}; accepted: 0 up to but not WORLD_SIZE.")
    data_sets = _data_sets(recipe, model, processor)
    missing, results = {}, {}
    for name, (utterances, key) in data_sets.items():
        check_lengths(utterances, recipe, model, processor)
        decoded = {row["id"] for file in _files(folder, name) for row in _read_rows(file, key)}
        batches = batches_by_length([utterance.duration for utterance in utterances], recipe.data.eval_batch_size)
        own = [[position for position in batch if position not in decoded] for batch in batches[rank::processes]]
        missing[name] = [batch for batch in own if batch]
        count = sum(map(len, missing[name]))
        left = len(utterances) - len(decoded) - count
        results[name] = {"utterances": len(utterances), "decoded": count, "left": left}
    _drop_llm(model).to(recipe.training.device)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (utterances, key) in data_sets.items():
        dataset = SpeechDataset(utterances, processor, CASINGS[recipe.data.casing])
        workers = recipe.cache_workers
        with (
            _open_to_append(folder / f"{name}-{rank}.jsonl", key) as file,
            tqdm(desc=name, unit="utterance", total=results[name]["decoded"], disable=None) as bar,
        ):
            for batch in decode_stage1(model, processor, dataset, missing[name], workers):
                _write_rows(file, batch, utterances)
                bar.update(len(batch))
    return {**results, "alignment_cache": str(folder)}


def _data_sets(recipe, model, processor) -> dict[str, tuple[list[Utterance], dict[str, Any]]]:
    """Return by name the utterances of the data sets and their cache keys."""
    casing = CASINGS[recipe.data.casing]
    stage1 = stage1_key(model, processor)
    sets = {}
    for name, utterances in zip(("train", "validation"), read_utterances(recipe.data), strict=True):
        transcripts = [processor.transcript_ids(casing(utterance.text)) for utterance in utterances]
        key = stage1 | recordings_key(utterances) | transcripts_key(transcripts, recipe.data.casing)
        sets[name] = (utterances, key)
    return sets


def _drop_llm(model: SeamForSpeechRecognition) -> SeamForSpeechRecognition:
    """Leave of the model's LLM, much the largest part, no more than the embedding table that Stage 1 needs."""
    with torch.device("meta"):
        table = EmbeddingTable(model.config.get_text_config())
    table.set_input_embeddings(model.get_input_embeddings())
    model.language_model = table
    return model


def _files(folder: Path, name: str) -> list[Path]:
    """Return the files of a data set, one from each process."""
    return sorted(folder.glob(f"{name}-*.jsonl"))


def _read_rows(path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a file that another process may be writing to. Raises `ValueError` when it is stale."""
    first, *rows = read_json_lines(path, ignore_unfinished=True) or [{"made_from": key}]
    check_key(path, first.get("made_from", {}), key)
    return rows


def _write_rows(file: TextIO, batch: list[DecodedUtterance], utterances: list[Utterance]) -> None:
    """Write a batch of decoded utterances to a file, complete on return."""
    for position, token_ids, alignment_ids in batch:
        row = {
            "id": position,
            "audio": utterances[position].audio.name,
            "reference_tokens": token_ids.tolist(),
            "stage1_tokens": alignment_ids.tolist(),
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


@contextmanager
def _open_to_append(path: Path, key: dict[str, Any]) -> Iterator[TextIO]:
    """Open a file to write rows after those that it has. Raises `OSError` while another process writes to it."""
    with locked(Path(f"{path}.lock"), str(path), "torchrun and `accelerate launch` give each its own RANK"):
        is_new = not repair_json_lines(path)
        with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            if is_new:
                file.write(json.dumps({"made_from": key}) + "\n")
                file.flush()
            yield file
