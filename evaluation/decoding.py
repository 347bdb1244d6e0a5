"""
Decode test sets with every system and keep the raw output.

It goes to `run.json` and one JSON Lines file for each system, which an interrupted run continues. Scoring is separate
(`seam.evaluation.report`).
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from seam.data.dataset import batches_by_length
from seam.data.files import locked, mend_json_lines, sha256_of, write_text, writing
from seam.data.manifest import CASINGS, Utterance, check_duration, read_manifest
from seam.evaluation.hypotheses import SYSTEMS, read_run, rows_path
from seam.evaluation.transcription import Transcription, load_whisper, transcribe
from seam.modeling_seam import SeamConfig, load_checkpoint
from seam.modeling_seam.bridges import BRIDGES
from seam.modeling_seam.saving import complete_save
from seam.modeling_seam.weights import read_fingerprint, weight_files
from seam.processing_seam import PROCESSOR_FILES

# What runs in one folder must have in common. The batch size is among it because speed depends on it.
IDENTITY = ("model", "data", "casing", "batch_size")
# What a row of hypotheses must have beside the fields of its `Transcription`.
ROW = ("id", "audio", "test_set", "reference", "wall_seconds", "reference_tokens")


@dataclass(frozen=True)
class Item:
    """
    An utterance of a run.

    Args:
        id: its index among all utterances of the run.
        audio: path of the recording relative to its manifest.
        test_set: corpus and split, or the manifest's name where it states neither.
        utterance: as read from the manifest.
    """

    id: int
    audio: str
    test_set: str
    utterance: Utterance


def decode_test_sets(
    model: str,
    manifests: Sequence[str | Path],
    folder: str | Path,
    systems: Sequence[str] | None = None,
    batch_size: int = 16,
    casing: str = "lower",
    split: str | None = None,
    progress: bool = False,
) -> None:
    """
    Write `folder/run.json` and `folder/hypotheses/SYSTEM.jsonl`, or complete them.

    Each row holds

    - `id`, `audio`, `test_set`, `corpus`, `split`, `speaker`, `reference`: see [`Item`]; the text is unchanged;
    - `seconds`: of audio; `wall_seconds`: of work, the row's share, by length, of its batch's time for reading,
      features, generation and decoding; neither other systems nor the first batch's warm-up are counted;
    - `text`, `tokens`: the raw hypothesis and its ids; `stage1`, `stage1_tokens`: the same of Stage 1's output;
    - `embeddings`: how many the language model was given, or Stage 1 predicted;
    - `reference_tokens`: ids of the reference in the given casing, as the model is trained on them;
    - `error`: why the audio could not be read, if so; the hypothesis is then empty and its time 0.

    Every system decodes by itself. A batch holds utterances of one test set, and the longest utterances come first:
    they need little padding, and what does not fit into memory fails at once. Rows are written after each batch, and
    what has been written is not decoded again. One process writes to a folder at a time; rows that are damaged, twice
    or of no utterance of this run are taken out and decoded again.

    Args:
        model: folder or Hub id of the checkpoint.
        manifests: what `seam.data.manifest.read_manifest` reads.
        folder: where the run is written.
        systems: names of `SYSTEMS`; by default all that the checkpoint supports.
        batch_size: pieces of audio decoded at once.
        casing: of the references' ids, one of `seam.data.manifest.CASINGS`.
        split: decode only this split.
        progress: whether to show a progress bar for each system.

    Raises:
        ValueError: for unknown systems or casings, and for a folder that holds another run; FileNotFoundError: for a
            missing manifest. Both are raised before the model is loaded. ValueError: for systems that the checkpoint
            does not support. OSError: while another process writes to the folder.
    """
    for system in systems or ():
        if system not in SYSTEMS:
            raise ValueError(f"unknown system {system!r}; known: {', '.join(SYSTEMS)}.")
    if casing not in CASINGS:
        raise ValueError(f"casing is {casing!r}; accepted: {', '.join(CASINGS)}.")
    folder = Path(folder)
    items, data = _read_items(manifests, split)
    complete_save(Path(model))
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise OSError(f"cannot load the checkpoint {model!r}: {error}") from error
    systems = _choose_systems(model, config, systems)
    run = {"data": data, "casing": casing, "batch_size": batch_size, "model": _identify(model)}
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", str(folder), "wait for it, or give another folder"):
        _complete(folder, run, model, config.model_type, items, systems, progress)


def _complete(
    folder: Path, run: dict[str, Any], model: str, kind: str, items: list[Item], systems: Sequence[str], progress: bool
) -> None:
    """Decode what a folder lacks of a run, of which `run` holds what `IDENTITY` names."""
    batch_size, casing = run["batch_size"], run["casing"]
    earlier = {"systems": [], "hardware": []}
    if any((folder / "hypotheses").glob("*.jsonl")):
        earlier = read_run(folder)
        _check_same_run(folder, earlier, run)
    pending = {system: _pending_batches(folder, system, items, batch_size) for system in systems}
    if not any(pending.values()):
        return

    load = load_whisper if kind == "whisper" else load_checkpoint
    seam, processor = load(model, device_map="auto")
    run |= {
        "dtype": str(seam.dtype).removeprefix("torch."),
        "systems": [name for name in SYSTEMS if name in {*earlier["systems"], *systems}],
        "hardware": list(dict.fromkeys([*earlier["hardware"], _hardware(seam)])),
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    (folder / "hypotheses").mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.json", json.dumps(run, indent=1) + "\n")
    for system, batches in pending.items():
        done = len(items) - sum(map(len, batches))
        rows = _decode(seam, processor, batches, SYSTEMS[system].generate, batch_size, CASINGS[casing])
        with tqdm(desc=system, unit="utterance", total=len(items), initial=done, disable=not progress) as bar:
            _append_rows(rows_path(folder, system), rows, bar)


def _pending_batches(folder: Path, system: str, items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Return the batches of a system without the utterances that an earlier run decoded; mend what it has left."""
    done: set[int] = set()

    def is_right(row: Any) -> bool:
        """Return whether a row is of an utterance of this run, and the first of it."""
        if not isinstance(row, dict) or not {*ROW, *(field.name for field in fields(Transcription))} <= row.keys():
            return False
        position = row["id"]
        if type(position) is not int or not 0 <= position < len(items) or position in done:
            return False
        if (row["audio"], row["reference"]) != (items[position].audio, items[position].utterance.text):
            return False
        done.add(position)
        return True

    mend_json_lines(rows_path(folder, system), is_right)
    remaining = [[item for item in batch if item.id not in done] for batch in _batches(items, batch_size)]
    return [batch for batch in remaining if batch]


def _append_rows(path: Path, batches: Iterable[list[dict[str, Any]]], bar: tqdm) -> None:
    """Append rows to a file batch by batch; name unreadable audio, and show the speed."""
    seconds = wall = 0.0
    with writing(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for rows in batches:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            for row in rows:
                if "error" in row:
                    bar.write(f"not decoded: {row['error']}", file=sys.stderr)
                else:
                    seconds, wall = seconds + row["seconds"], wall + row["wall_seconds"]
            bar.update(len(rows))
            bar.set_postfix_str(f"RTFx {seconds / wall:.1f}" if wall else "")


def _choose_systems(name: str, config: PreTrainedConfig, systems: Sequence[str] | None) -> Sequence[str]:
    """Return the requested systems, by default all that the checkpoint supports. Raises `ValueError` for any other."""
    if config.model_type == "whisper":
        has, what = ("whisper",), "is a Whisper"
    elif config.model_type != "seam":
        raise ValueError(f"{name} is a checkpoint of architecture {config.model_type!r}; accepted: seam, whisper.")
    elif config.alignment_only:
        has, what = ("stage1",), "holds Stage 1 without the LLM"
    elif not BRIDGES[config.bridge].has_stage_1:
        has, what = ("full",), f"has no Stage 1 (bridge {config.bridge!r})"
    else:
        has, what = ("stage1", "full", "full-noftg"), "has no decoder of a Whisper"
    if not set(systems or has) <= set(has):
        raise ValueError(f"{name} {what}; accepted: --systems {','.join(has)}.")
    return systems or has


def _decode(
    model, processor, batches: Iterable[Sequence[Item]], arguments: dict[str, bool], batch_size: int, casing
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each batch."""
    warm = False
    for batch in batches:
        if not warm:  # what only the first call does, such as compiling kernels, does not count as speed
            _transcribe_readable(model, processor, batch, batch_size, max_new_tokens=2, **arguments)
            warm = True
        start = time.perf_counter()
        results, errors = _transcribe_readable(model, processor, batch, batch_size, **arguments)
        wall = time.perf_counter() - start
        seconds = sum(result.seconds for result in results.values())
        rows = []
        for item in batch:
            utterance = item.utterance
            result = results.get(item.id, Transcription(utterance.duration, "", "", (), (), 0))
            row = {
                "id": item.id,
                "audio": item.audio,
                "test_set": item.test_set,
                "corpus": utterance.corpus,
                "split": utterance.split,
                "speaker": utterance.speaker,
                "reference": utterance.text,
                **asdict(result),
                "wall_seconds": wall * result.seconds / seconds if item.id in results else 0.0,
                "reference_tokens": processor.transcript_ids(casing(utterance.text)),
            }
            rows.append({**row, "error": errors[item.id]} if item.id in errors else row)
        yield rows


def _transcribe_readable(model, processor, batch: Sequence[Item], batch_size: int, **arguments):
    """Return the transcriptions and, for audio that cannot be read, the reasons, both by id."""
    waveforms, errors = {}, {}
    for item in batch:
        try:
            waveform = processor.load_audio(item.utterance.audio)
            check_duration(item.utterance, len(waveform) / processor.sampling_rate)
            waveforms[item.id] = waveform
        except (ValueError, OSError) as error:
            errors[item.id] = str(error) if item.audio in str(error) else f"{item.audio}: {error}"
    results = transcribe(model, processor, list(waveforms.values()), batch_size, **arguments)
    return dict(zip(waveforms, results, strict=True)), errors


def _read_items(manifests: Sequence[str | Path], split: str | None) -> tuple[list[Item], list[dict[str, Any]]]:
    """Return all utterances, and what `run.json` says of each manifest."""
    items, data, unlabelled = [], [], {}
    for manifest in map(Path, manifests):
        utterances = read_manifest(manifest, split=split)
        folder = manifest if manifest.is_dir() else manifest.parent
        rows = []
        for utterance in utterances:
            test_set = " ".join(dict.fromkeys(filter(None, (utterance.corpus, utterance.split))))
            if not test_set:
                test_set = folder.resolve().name if folder == manifest else manifest.stem
                if unlabelled.setdefault(test_set, manifest) != manifest:
                    both = f"{unlabelled[test_set]} and {manifest}"
                    raise ValueError(f"{both} state no corpus and have the same name: rename one of them.")
            audio = os.path.relpath(utterance.audio, folder)
            items.append(Item(len(items), audio, test_set, utterance))
            rows.append([audio, test_set, utterance.text, utterance.duration])
        name = folder.resolve().name if folder == manifest else f"{folder.resolve().name}/{manifest.name}"
        data.append({"manifest": name, "utterances": len(utterances), "sha256": sha256_of(rows)})
    return items, data


def _batches(items: Sequence[Item], batch_size: int) -> Iterator[list[Item]]:
    for test_set in dict.fromkeys(item.test_set for item in items):
        members = [item for item in items if item.test_set == test_set]
        for batch in batches_by_length([item.utterance.duration for item in members], batch_size):
            yield [members[index] for index in batch]


def _identify(name: str) -> dict[str, str]:
    """
    Return a checkpoint's name (a Hub id, or a folder's last part) and a digest of all that decides its output.

    That is its settings, prompt, tokenizer, and weights, whose fingerprint config.json states and loading verifies.
    """
    digests = []
    for file in ("config.json", "generation_config.json", *PROCESSOR_FILES):
        path = cached_file(
            name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        digests.append(b"absent" if path is None else bytes.fromhex(sha256_of([Path(path)])))
    if SeamConfig.get_config_dict(name)[0].get("model_type") != "seam":  # config.json says nothing of the weights
        digests.append(read_fingerprint(weight_files(name)).encode())
    folder = Path(name)
    return {"name": folder.resolve().name if folder.is_dir() else name, "sha256": sha256_of(digests)}


def _check_same_run(folder: Path, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise `ValueError` unless both runs have one checkpoint and the same texts; their names and paths may differ."""

    def identity(of: dict[str, Any], key: str):
        if key == "model":
            return of[key]["sha256"]
        return [manifest["sha256"] for manifest in of[key]] if key == "data" else of[key]

    def name(of: dict[str, Any], key: str) -> str:
        if key == "model":
            return of[key]["name"]
        return ", ".join(manifest["manifest"] for manifest in of[key]) if key == "data" else str(of[key])

    for key in IDENTITY:
        if identity(earlier, key) != identity(run, key):
            before, now = name(earlier, key), name(run, key)
            change = f"{before}, now {now}" if before != now else f"{before}, with other content than now"
            raise ValueError(f"{folder} holds hypotheses of another run ({key}: {change}); give another folder.")


def _hardware(model) -> str:
    devices = {parameter.device for parameter in model.parameters()}
    names = sorted(torch.cuda.get_device_name(device) for device in devices if device.type == "cuda")
    return " + ".join(names) if names else f"CPU (threads: {torch.get_num_threads()})"
