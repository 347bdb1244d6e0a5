"""Stage 1's tokens on disk, ahead of Stage 3: right, decoded once, by several processes, refused when stale."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from seam.__main__ import app
from seam.data import files
from seam.data.dataset import batches_by_length
from seam.data.manifest import read_manifest, write_manifest
from seam.modeling_seam import SeamForSpeechRecognition
from seam.tests.helpers import forked
from seam.tests.helpers.training_sounds import TEXTS, changed, recipe, weights
from seam.train import alignment, instruction, refinement, stage1_decoding
from seam.train.cache_keys import ALL_BYTES, check_key, stage1_key
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def checkpoint(build_model, processor, tmp_path_factory) -> str:
    """Save a model whose Stage 1 decodes some tokens, though wrong ones, for every sound."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stage3(checkpoint, manifest, tmp_path):
    """Make recipes of Stage 3 with a cache, in batches of three: two full ones and a last one of the eight sounds."""

    def stage3(**values):
        data = {"keep_encoder_states": False, "eval_batch_size": 3, **values.pop("data", {})}
        values = {"model": checkpoint, "alignment_cache": str(tmp_path / "cache"), "data": data, **values}
        return recipe(tmp_path / "out", manifest, values.pop("steps", 2), **values)

    return stage3


def rows(tmp_path, name: str = "train-0") -> list[dict]:
    lines = (tmp_path / "cache" / f"{name}.jsonl").read_text().splitlines()
    assert "made_from" in json.loads(lines[0])
    return [json.loads(line) for line in lines[1:]]


def test_batches_are_the_longest_first(manifest):
    utterances = [dataclasses.replace(read_manifest(manifest)[0], duration=seconds) for seconds in (2, 9, 2, 5, 1)]
    assert batches_by_length([one.duration for one in utterances], 2) == [[1, 3], [0, 2], [4]]


def test_rows_hold_the_stage_1_tokens_of_each_sound_alone(stage3, model, processor, manifest, tmp_path):
    counts = stage1_decoding.main(stage3())
    assert counts["train"] == counts["validation"] == {"utterances": 8, "decoded": 8, "left": 0}
    utterances = read_manifest(manifest)
    durations = [utterances[row["id"]].duration for row in rows(tmp_path)]
    assert durations == sorted(durations, reverse=True) and sorted(r["id"] for r in rows(tmp_path)) == list(range(8))
    for row in rows(tmp_path):
        assert row["audio"] == f"{row['id']}.wav"
        assert row["reference_tokens"] == processor.transcript_ids(TEXTS[row["id"]])
        heard = model.align(*model.speech(**processor(audio=utterances[row["id"]].audio)))
        assert row["stage1_tokens"] == heard.sequences[0].tolist() and len(row["stage1_tokens"]) > 0
    assert rows(tmp_path, "validation-0") == rows(tmp_path)


@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
def test_stage_3_trains_the_same_from_the_cache(llm_inputs, stage3, build_model, processor, tmp_path, monkeypatch):
    build_model(llm_inputs=llm_inputs).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    refinement.main(stage3(model=model, alignment_cache=None, training={"output_dir": str(tmp_path / "by itself")}))
    stage1_decoding.main(stage3(model=model))
    align, calls = SeamForSpeechRecognition.align, []
    monkeypatch.setattr(
        SeamForSpeechRecognition, "align", lambda *args, **kwargs: calls.append(1) or align(*args, **kwargs)
    )
    monkeypatch.setattr(refinement.RefinementTrainer, "word_error_rates", lambda self: {})
    refinement.main(stage3(model=model, training={"output_dir": str(tmp_path / "cached")}))
    assert not calls
    assert not changed(weights(tmp_path / "by itself"), weights(tmp_path / "cached"))


def test_from_the_cache_of_tokens_no_audio_is_read(stage3, monkeypatch):
    stage1_decoding.main(stage3())
    monkeypatch.setattr(refinement.RefinementTrainer, "word_error_rates", lambda self: {})
    monkeypatch.setattr("seam.processing_seam.SeamProcessor.load_audio", lambda *_: pytest.fail("audio was read"))
    refinement.main(stage3(data={"keep_encoder_states": True}))


def test_an_interrupted_run_continues(stage3, tmp_path, monkeypatch):
    stage1_decoding.main(stage3())
    whole = {row["id"]: row for row in rows(tmp_path)}
    path = tmp_path / "cache" / "train-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # four rows, and a half
    with pytest.raises(ValueError, match="cache holds 4 of the 8 utterances of the train set; the same `seam train"):
        refinement.main(stage3())
    assert stage1_decoding.main(stage3())["train"] == {"utterances": 8, "decoded": 4, "left": 0}
    assert {row["id"]: row for row in rows(tmp_path)} == whole and len(rows(tmp_path)) == 8
    monkeypatch.setattr(stage1_decoding, "decode_stage1", lambda *args: pytest.fail("decoded") if args[3] else iter(()))
    assert stage1_decoding.main(stage3())["train"]["decoded"] == 0


def test_a_file_that_was_not_even_begun(stage3, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "train-0.jsonl").write_bytes(b'{"made_from": {"enco')
    (tmp_path / "cache" / "train-1.jsonl").write_bytes(b"")  # of a process that begins now
    assert stage1_decoding.main(stage3())["train"]["decoded"] == 8 and len(rows(tmp_path)) == 8


def test_processes_share_the_work_and_take_over_what_one_left(stage3, tmp_path, monkeypatch):
    """Batches of 3, 3 and 2 of the eight sounds, for two processes: the first has the first and the last."""
    ready = stage3()  # its TrainingArguments would look for the other process
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert stage1_decoding.main(ready)["train"] == {"utterances": 8, "decoded": 3, "left": 5}
    monkeypatch.setenv("RANK", "0")
    assert stage1_decoding.main(ready)["train"] == {"utterances": 8, "decoded": 5, "left": 0}
    ids = [{row["id"] for row in rows(tmp_path, f"train-{rank}")} for rank in (0, 1)]
    assert [len(one) for one in ids] == [5, 3] and ids[0] | ids[1] == set(range(8))
    (tmp_path / "cache" / "train-1.jsonl").unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert stage1_decoding.main(ready)["train"] == {"utterances": 8, "decoded": 3, "left": 0}
    refinement.main(ready)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK is 1, but WORLD_SIZE is 1"):
        stage1_decoding.main(ready)


def test_a_file_has_one_writer(stage3, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    (tmp_path / "cache").mkdir()
    with (
        FileLock(tmp_path / "cache" / "train-0.jsonl.lock"),
        pytest.raises(OSError, match="train-0.jsonl is being written by another process; torchrun and"),
    ):
        stage1_decoding.main(stage3())
    assert stage1_decoding.main(stage3())["train"]["decoded"] == 8


def test_torchrun_starts_the_processes(checkpoint, manifest, tmp_path):
    path = Path(__file__).parents[2] / "recipes" / "own" / "refinement.yaml"
    settings = [
        f"model={checkpoint}",
        f"data={{train: [{manifest}], validation: [{manifest}], eval_batch_size: 2}}",
        f"alignment_cache={tmp_path / 'cache'}",
        "training.bf16=false",
        "training.use_cpu=true",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "seam"]
    done = forked.run([*torchrun, "train", "decode", str(path), *settings])
    assert done.returncode == 0, done.stderr
    ids = [[row["id"] for row in rows(tmp_path, f"train-{rank}")] for rank in (0, 1)]
    assert [len(one) for one in ids] == [4, 4] and {*ids[0], *ids[1]} == set(range(8))


def test_a_cache_of_anything_else_is_stale(stage3, build_model, processor, manifest, tmp_path):
    stage1_decoding.main(stage3())
    before = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}

    def refused(what: str, **values):
        for command in (stage1_decoding.main, refinement.main):
            message = f"train-0.jsonl is stale: it was made from {what}. Delete it or give another folder"
            with pytest.raises(ValueError, match=message):
                command(stage3(**values))

    def saved(name: str, model) -> str:
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    def moved(part: str):
        changed = build_model()
        with torch.no_grad():
            for parameter in changed.get_submodule(part).parameters():
                parameter.add_(0.001)
        return changed

    refused("another speech encoder", model=saved("encoder", moved("encoder.layers.1")))
    refused("another Stage 1", model=saved("bridge", moved("bridge.layer_norm")))
    refused("another Stage 1", model=saved("lambda", build_model(alignment_lambda=0.25)))
    refused("another Stage 1", model=saved("vocabulary", build_model(active_vocabulary=list(range(100)))))
    refused(r"another casing \(lower, now upper\)", data={"casing": "upper"})
    refused(r"another number of utterances \(8, now 7\)", data={"train_limit": 7})
    utterances = read_manifest(manifest)
    for what, field, value in (
        ("other transcripts or with another tokenizer", "text", "stop"),
        ("other recordings", "audio", utterances[4].audio),
        ("other recordings", "duration", 0.5),
    ):
        other = [*utterances[:3], dataclasses.replace(utterances[3], **{field: value}), *utterances[4:]]
        path = write_manifest(Path(manifest).parent / f"other {field}.jsonl", other)
        refused(what, data={"train": [str(path)]})
        path.unlink()
    assert before == {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


@pytest.mark.parametrize(
    ("name", "what"), [("encoder.layers.1.fc1.weight", "another speech encoder"), ("bridge.layers.0.fc1", "Stage 1")]
)
def test_one_bit_of_the_weights_makes_a_cache_stale(build_model, processor, name, what):
    model = build_model()
    kept = stage1_key(model, processor)
    before = {key: value for key, value in kept.items() if not key.endswith(ALL_BYTES)}  # as caches were
    weight = next(parameter for key, parameter in model.named_parameters() if key.startswith(name)).data
    weight.view(torch.uint8).flatten()[4] ^= 1
    check_key(Path("a.jsonl"), before, stage1_key(model, processor))
    with pytest.raises(ValueError, match=f"a.jsonl is stale: it was made from .*{what}"):
        check_key(Path("a.jsonl"), kept, stage1_key(model, processor))


def test_the_settings_of_a_table_are_in_the_key(build_table_model, processor):
    fields = ({}, {"mixture_size": 2}, {"language": "de"}, {})
    *keys, again = (stage1_key(build_table_model(**one), processor)["stage1"] for one in fields)
    assert len(set(keys)) == 3 and again == keys[0]


def test_what_has_no_part_in_stage_1_makes_nothing_stale(stage3, build_model, processor, backbones, manifest, tmp_path):
    """Decoded with the checkpoint of Stage 1, trained on that of Stage 2; and the draft head."""
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": {"lora_rank": 4}}
    alignment.main(recipe(tmp_path / "1", manifest, 1, **settings))
    instruction.main(recipe(tmp_path / "2", manifest, 1, model=str(tmp_path / "1"), llm=backbones[1]))
    stage1_decoding.main(stage3(model=str(tmp_path / "1")))
    refinement.main(stage3(model=str(tmp_path / "2")))
    drafted = SeamForSpeechRecognition.from_pretrained(tmp_path / "2")
    drafted.add_draft_head(range(50)).save_pretrained(tmp_path / "drafted")
    processor.save_pretrained(tmp_path / "drafted")
    assert stage1_decoding.main(stage3(model=str(tmp_path / "drafted")))["train"]["decoded"] == 0


def test_a_draft_head_writes_the_same(stage3, build_model, processor, tmp_path):
    stage1_decoding.main(stage3())
    plain = {row["id"]: row for row in rows(tmp_path)}
    build_model().add_draft_head(range(50)).save_pretrained(tmp_path / "drafted")
    processor.save_pretrained(tmp_path / "drafted")
    for path in (tmp_path / "cache").glob("*.jsonl"):
        path.unlink()
    stage1_decoding.main(stage3(model=str(tmp_path / "drafted")))
    assert {row["id"]: row for row in rows(tmp_path)} == plain


def test_recordings_may_lie_elsewhere(stage3, manifest, tmp_path):
    stage1_decoding.main(stage3())
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in Path(manifest).parent.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    elsewhere = str(moved / "manifest.jsonl")
    refinement.main(stage3(data={"train": [elsewhere], "validation": [elsewhere]}))


def test_an_incomplete_recipe_is_refused(stage3, build_model, processor, manifest, tmp_path):
    with pytest.raises(RecipeError, match="the recipe names no alignment_cache"):
        stage1_decoding.main(stage3(alignment_cache=None))
    with pytest.raises(RecipeError, match="the recipe names no model"):
        stage1_decoding.main(stage3(model=None))
    with pytest.raises(FileNotFoundError, match="holds no train set; `seam train decode` with the same recipe"):
        refinement.main(stage3())
    with pytest.raises(RecipeError, match="^alignment_cache is no setting of seam train alignment, but of: refinement"):
        alignment.main(stage3())
    rival = build_model(bridge="linear", bridge_config={"hidden_size": 16})
    rival.save_pretrained(tmp_path / "rival")
    processor.save_pretrained(tmp_path / "rival")
    with pytest.raises(ValueError, match="seam train decode: the bridge 'linear' has no Stage 1; accepted: aligner"):
        stage1_decoding.main(stage3(model=str(tmp_path / "rival")))


def test_a_ctc_head_decodes_as_well(stage3, build_model, processor, tmp_path):
    build_model(bridge="ctc").save_pretrained(tmp_path / "ctc")
    processor.save_pretrained(tmp_path / "ctc")
    stage1_decoding.main(stage3(model=str(tmp_path / "ctc")))
    refinement.main(stage3(model=str(tmp_path / "ctc")))


def test_the_command(checkpoint, manifest, tmp_path):
    path = Path(__file__).parents[2] / "recipes" / "own" / "refinement.yaml"
    settings = [
        f"model={checkpoint}",
        f"data.train=[{manifest}]",
        f"data.validation=[{manifest}]",
        f"alignment_cache={tmp_path / 'cache'}",
        "training.bf16=false",
        "training.use_cpu=true",
    ]
    result = CliRunner().invoke(app, ["train", "decode", str(path), *settings])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["train"]["decoded"] == 8 and len(rows(tmp_path)) == 8
    result = CliRunner().invoke(app, ["train", "decode", str(path), *settings, "data.casing=keep"])
    assert result.exit_code == 1 and "train-0.jsonl is stale" in result.output
