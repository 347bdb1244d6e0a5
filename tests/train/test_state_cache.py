"""Encoder states on disk: equal to computed ones, computed once, refused when stale or too large."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from seam.data.dataset import SpeechDataset, keep_encoder_states
from seam.data.manifest import read_manifest
from seam.modeling_seam import SeamForSpeechRecognition
from seam.tests.helpers.training_sounds import TEXTS, changed, recipe, weights
from seam.train import alignment, draft, instruction, refinement, state_cache
from seam.train.recipe import RecipeError
from seam.train.state_cache import cached_encoder_states
from seam.train.trainer import StageTrainer

pytestmark = pytest.mark.medium


@pytest.fixture
def ready(manifest, tmp_path):
    """Make recipes with a folder of states."""

    def ready(steps: int = 4, **values):
        data = {"keep_encoder_states": False, "encoder_states": str(tmp_path / "states"), **values.pop("data", {})}
        training = {"per_device_train_batch_size": 4, "logging_steps": 1, "lr_scheduler_type": "constant"}
        training |= values.pop("training", {})
        return recipe(values.pop("out", tmp_path / "out"), manifest, steps, data=data, training=training, **values)

    return ready


@pytest.fixture
def read(ready, model, processor, manifest):
    """Return the training set of a recipe with its states on disk."""

    def read(model=model, **values):
        datasets = [SpeechDataset(read_manifest(manifest), processor) for _ in range(2)]
        return cached_encoder_states(ready(**values), model, processor, datasets)[0]

    return read


@pytest.fixture
def in_pieces(monkeypatch):
    """Three shards: of three, three and two sounds."""
    monkeypatch.setattr(state_cache, "ENCODER_BATCH_SIZE", 3)
    monkeypatch.setattr(state_cache, "SHARD_BYTES", 1)


@pytest.fixture
def quick(monkeypatch):
    """Leaves the word error rates out."""
    monkeypatch.setattr(StageTrainer, "word_error_rates", lambda self: {})


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def shards(tmp_path, name: str = "train") -> list[Path]:
    return sorted((tmp_path / "states").glob(f"{name}-*"))


def needed(manifest) -> int:
    """Bytes of the states of one set: a state is 32 numbers for 320 samples or what remains of them."""
    return sum(-(-soundfile.info(one.audio).frames // 320) * 32 * 4 for one in read_manifest(manifest))


AUDIO = {"encoder_window": "audio", "speech_margin": 0.2}


@pytest.mark.parametrize(("workers", "config"), [(0, {}), (2, {}), (2, AUDIO), (2, {"speech_margin": 0.2})])
def test_states_are_those_kept_in_memory(workers, config, read, build_model, processor, manifest):
    model = build_model(**config)
    kept = keep_encoder_states(model, SpeechDataset(read_manifest(manifest), processor), workers=0)
    for _ in range(2):  # computed, and found
        items = list(DataLoader(read(model), batch_size=None, num_workers=workers, multiprocessing_context=None))
        for one, other in zip(items, kept, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other)


def test_workers_that_are_started_anew_open_the_files_themselves(read):
    dataset = read()
    first = dataset[0]["speech_states"]
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))["speech_states"], first)


def test_shards_hold_what_they_say(read, in_pieces, model, processor, manifest, tmp_path):
    dataset = read()
    assert [path.name for path in shards(tmp_path)] == [f"train-0000{number}.safetensors" for number in range(3)]
    assert [len(load_file(path)["lengths"]) for path in shards(tmp_path)] == [3, 3, 2]
    size = sum(load_file(path)["states"].nbytes for path in shards(tmp_path))
    assert size == needed(manifest)
    utterances = read_manifest(manifest)
    for index in (7, 0, 4):
        alone = model.encode(**processor(audio=utterances[index].audio))[0][0]
        torch.testing.assert_close(dataset[index]["speech_states"], alone, rtol=1e-4, atol=1e-5)
        assert processor.decode(dataset[index]["token_ids"]) == TEXTS[index]


@pytest.mark.parametrize("config", [{}, AUDIO])
def test_training_is_the_same_as_with_states_in_memory(config, ready, quick, backbones, tmp_path, monkeypatch):
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": config}
    memory = {"keep_encoder_states": True, "encoder_states": None}
    afresh = {"encoder_states": None}
    for name, data in (("disk", {}), ("memory", memory), ("afresh", afresh)):
        alignment.main(ready(out=tmp_path / name, data=data, **settings))
    monkeypatch.setattr(state_cache, "encode", lambda *args: pytest.fail("encoded again") if args[2] else iter(()))
    workers = {"dataloader_num_workers": 2}
    alignment.main(ready(out=tmp_path / "found", training=workers, **settings))
    for name in ("memory", "found"):
        assert losses(tmp_path / name) == losses(tmp_path / "disk") and len(losses(tmp_path / "disk")) == 4
        assert not changed(weights(tmp_path / name), weights(tmp_path / "disk"))
    np.testing.assert_allclose(losses(tmp_path / "afresh"), losses(tmp_path / "disk"), rtol=1e-4)


def test_every_stage_reads_them(ready, quick, backbones, tmp_path, monkeypatch):
    config = {"lora_rank": 4, "llm_inputs": "continuous"}
    alignment.main(ready(1, out=tmp_path / "1", encoder=backbones[0], llm=backbones[1], config=config))
    monkeypatch.setattr(SeamForSpeechRecognition, "encode", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(draft.DraftTrainer, "word_error_rates", lambda self: {})
    draft.main(ready(1, out=tmp_path / "draft", model=str(tmp_path / "1")))
    instruction.main(ready(1, out=tmp_path / "2", model=str(tmp_path / "1"), llm=backbones[1]))
    metrics = refinement.main(ready(1, out=tmp_path / "3", model=str(tmp_path / "2")))
    assert np.isfinite(metrics["eval_loss"])


def test_half_as_large_for_the_same_losses_in_bf16(ready, quick, backbones, manifest, tmp_path):
    settings = {"encoder": backbones[0], "llm": backbones[1]}
    for name, dtype in (("whole", "float32"), ("half", "bfloat16")):
        data = {"encoder_states": str(tmp_path / name / "states"), "encoder_states_dtype": dtype}
        alignment.main(ready(out=tmp_path / name, data=data, training={"bf16": True}, **settings))
        with safe_open(tmp_path / name / "states" / "train-00000.safetensors", framework="pt") as opened:
            assert opened.get_tensor("states").nbytes == needed(manifest) // (1 if name == "whole" else 2)
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    assert not changed(weights(tmp_path / "half"), weights(tmp_path / "whole"))
    with pytest.raises(RecipeError, match="'bfloat16', which only training in bf16 reads without loss"):
        ready(data={"encoder_states_dtype": "bfloat16"})
    with pytest.raises(RecipeError, match="encoder_states_dtype is 'float16'; accepted: float32, bfloat16"):
        ready(data={"encoder_states_dtype": "float16"})


def test_a_disk_that_is_too_small_is_seen_before_any_work(read, in_pieces, manifest, tmp_path, monkeypatch):
    def left(free: int):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))

    both = 2 * needed(manifest)
    left(both - 1)
    message = f"the states of 16 utterances need {both / 1e9:.3g} GB more in .*states, whose disk has .* GB left"
    with pytest.raises(RecipeError, match=message):
        read()
    assert not shards(tmp_path)
    left(both)
    read()
    left(0)
    read()  # all are there
    gone = shards(tmp_path)[1]
    size = load_file(gone)["states"].nbytes
    gone.unlink()
    left(size - 1)
    with pytest.raises(RecipeError, match=f"need {size / 1e9:.3g} GB more"):
        read()


def test_an_interrupted_run_continues(read, in_pieces, tmp_path, monkeypatch):
    whole = [read()[index]["speech_states"] for index in range(8)]
    shards(tmp_path)[1].unlink()
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    encoded, encode = [], state_cache.encode
    monkeypatch.setattr(state_cache, "encode", lambda *args: encoded.extend(args[2]) or encode(*args))
    again = read()
    assert encoded == [[3, 4, 5]] and kept == {path: path.stat().st_mtime_ns for path in kept}
    assert all(torch.equal(again[index]["speech_states"], whole[index]) for index in range(8))


def test_a_disk_that_fills_up_leaves_complete_shards(read, in_pieces, tmp_path, monkeypatch):
    save, written = state_cache.save_file, []

    def fails_at_last(tensors, path, metadata):
        if len(written) == 2:
            Path(path).write_bytes(b"half of")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        written.append(path)
        save(tensors, path, metadata)

    monkeypatch.setattr(state_cache, "save_file", fails_at_last)
    with pytest.raises(OSError, match="train-00002.safetensors cannot be written: .*No space left on device"):
        read()
    assert len(shards(tmp_path)) == 2 and len(list((tmp_path / "states").glob("[!.]*"))) == 2


def test_processes_share_the_work(read, in_pieces, tmp_path):
    whole = read()
    about = ("train", {"encoder": "a"}, [1] * len(whole), 1, "speech_states")
    sets = state_cache.Shards(whole.dataset, tmp_path / "shared", *about)

    def compute(batches):
        return ([whole[index]["speech_states"] for index in batch] for batch in batches)

    (tmp_path / "shared").mkdir()
    sets.write(compute, torch.float32, 1, 2)
    assert [path.name for path in (tmp_path / "shared").glob("[!.]*")] == ["train-00001.safetensors"]
    with pytest.raises(FileNotFoundError, match="train-00000.safetensors is missing; all processes must see the same"):
        sets.read()
    sets.write(compute, torch.float32, 0, 2)
    shared = sets.read()
    assert all(torch.equal(shared[index]["speech_states"], whole[index]["speech_states"]) for index in range(8))


def test_states_of_anything_else_are_stale(read, ready, build_model, processor, manifest, tmp_path):
    read()
    before = {path: path.read_bytes() for path in shards(tmp_path)}
    utterances = read_manifest(manifest)

    def refused(what: str, model=None, utterances=utterances, **values):
        datasets = [SpeechDataset(utterances, processor) for _ in range(2)]
        message = f"train-00000.safetensors is stale: it was made from {what}. Delete it or give another folder"
        with pytest.raises(ValueError, match=message):
            cached_encoder_states(ready(**values), model or build_model(), processor, datasets)

    other = build_model()
    with torch.no_grad():
        other.encoder.layer_norm.bias.add_(0.001)
    refused("another speech encoder", other)
    for config in ({"mask_speech_padding": False}, {"speech_margin": 0.2}, {"encoder_window": "audio"}):
        refused("another speech encoder", build_model(**config))
    half = {"encoder_states_dtype": "bfloat16"}
    refused(r"another precision \(float32, now bfloat16\)", data=half, training={"bf16": True})
    refused(r"another number of utterances \(8, now 7\)", utterances=utterances[:7])
    refused("other recordings", utterances=[utterances[1], utterances[0], *utterances[2:]])
    refused("other recordings", utterances=[dataclasses.replace(utterances[0], duration=1.0), *utterances[1:]])
    processor.feature_extractor.dither = 0.5
    try:
        refused("other features")
    finally:
        processor.feature_extractor.dither = 0.0
    assert before == {path: path.read_bytes() for path in shards(tmp_path)}


def test_transcripts_are_those_of_now(ready, model, processor, manifest, tmp_path):
    """States do not depend on them: a correction takes effect and costs nothing."""
    utterances = read_manifest(manifest)
    for text, casing, ids in (("STOP", str.lower, "stop"), ("Stop", str, "Stop"), ("hay", str.lower, "hay")):
        datasets = [
            SpeechDataset([dataclasses.replace(one, text=text) for one in utterances], processor, casing)
            for _ in range(2)
        ]
        train, _ = cached_encoder_states(ready(), model, processor, datasets)
        assert train[3]["token_ids"].tolist() == processor.transcript_ids(ids)


def test_what_has_no_part_in_the_states_makes_nothing_stale(read, build_model, tmp_path):
    read()
    before = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    read(build_model(llm_inputs="continuous", lora_rank=2, bridge="linear", bridge_config={"hidden_size": 16}))
    assert before == {path: path.stat().st_mtime_ns for path in shards(tmp_path)}


def test_a_damaged_shard_is_named(read, in_pieces, tmp_path):
    read()
    shard = shards(tmp_path)[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="train-00002.safetensors is damaged: .* Delete it: it is made again"):
        read()
    shard.unlink()
    read()


def test_memory_and_disk_at_once_are_refused(ready):
    with pytest.raises(RecipeError, match="give one of them"):
        ready(data={"keep_encoder_states": True})


def test_stage_3_encodes_nothing_for_cached_tokens(ready, quick, build_model, processor, tmp_path):
    from seam.train import stage1_decoding

    build_model().save_pretrained(tmp_path / "2")
    processor.save_pretrained(tmp_path / "2")
    settings = {"model": str(tmp_path / "2"), "alignment_cache": str(tmp_path / "heard")}
    stage1_decoding.main(ready(**settings))
    refinement.main(ready(1, **settings))
    assert not (tmp_path / "states").exists()
