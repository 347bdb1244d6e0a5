"""Recordings in which nobody speaks, with an empty transcript, through every stage and the evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.evaluation.decoding import decode_test_sets
from seam.evaluation.report import write_report
from seam.evaluation.transcription import transcribe
from seam.modeling_seam import load_checkpoint
from seam.tests.helpers.training_sounds import recipe
from seam.train import alignment, draft, instruction, refinement

pytestmark = pytest.mark.medium

SILENT = 3


@pytest.fixture(scope="module")
def with_silence(manifest, tmp_path_factory) -> str:
    """Write a manifest of half of the sounds and of faint noise, which has no words."""
    folder = tmp_path_factory.mktemp("silence")
    rng = np.random.default_rng(0)
    utterances = read_manifest(manifest)[:4]
    for index in range(SILENT):
        samples = int(rng.integers(6000, 24000))
        soundfile.write(folder / f"{index}.wav", 0.01 * rng.standard_normal(samples), 16000)
        utterances.append(Utterance(folder / f"{index}.wav", "", samples / 16000, corpus="silence"))
    return str(write_manifest(folder / "manifest.jsonl", utterances))


def history(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def silenced(with_silence, backbones, tmp_path_factory) -> Path:
    """Train Stage 1 until it knows words from noise."""
    folder = tmp_path_factory.mktemp("alignment")
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": {"lora_rank": 4}}
    alignment.main(recipe(folder, with_silence, 200, **settings))
    return folder


def test_stage_1_learns_to_end_at_once(silenced, with_silence):
    model, processor = load_checkpoint(str(silenced))
    utterances = read_manifest(with_silence)
    heard = [one.text for one in transcribe(model, processor, [one.audio for one in utterances])]
    assert heard == [one.text.lower() for one in utterances]
    assert heard[-SILENT:] == [""] * SILENT


@pytest.mark.parametrize("first_token_guidance", [False, True])
@pytest.mark.parametrize("llm_inputs", ["nearest", "continuous"])
def test_the_llm_stages_read_them(with_silence, backbones, silenced, tmp_path, llm_inputs, first_token_guidance):
    """In batches of one, so that some hold nothing but an empty transcript; and in one batch with words."""
    model, processor = load_checkpoint(str(silenced))
    model.config.llm_inputs = llm_inputs
    for component in (model, processor):
        component.save_pretrained(tmp_path / "one")
    settings = {"first_token_guidance": first_token_guidance, "data": {"eval_batch_size": 2}}
    for size in (1, 7):
        training = {"per_device_train_batch_size": size, "logging_steps": 1}
        two, three = tmp_path / f"two{size}", tmp_path / f"three{size}"
        begun = {"model": str(tmp_path / "one"), "llm": backbones[1]}
        metrics = instruction.main(recipe(two, with_silence, 7, training=training, **settings, **begun))
        metrics |= refinement.main(recipe(three, with_silence, 5, training=training, model=str(two), **settings))
        assert np.isfinite([*history(two), *history(three), metrics["eval_loss"], metrics["eval_wer"]]).all()


def test_caches_keep_them(with_silence, silenced, backbones, tmp_path):
    """Of states, and of embeddings, of which an empty transcript has none; batches by tokens as well."""
    settings = {"model": str(silenced), "llm": backbones[1]}
    found = {}
    for name, cache in (("with", {"aligned_embeds": str(tmp_path / "embeds")}), ("without", {})):
        states = {"encoder_states": str(tmp_path / "states"), "keep_encoder_states": False, "batch_tokens": 20}
        training = {"logging_steps": 1, "learning_rate": 0.0}
        instruction.main(recipe(tmp_path / name, with_silence, 4, data=states, training=training, **settings, **cache))
        found[name] = history(tmp_path / name)
    np.testing.assert_allclose(found["with"], found["without"], rtol=1e-4)


def test_a_stream_and_an_augmentation_read_them(with_silence, backbones, tmp_path):
    data = {"streaming": True, "keep_encoder_states": False, "augmentation": {"concatenation_probability": 0.5}}
    settings = {"encoder": backbones[0], "llm": backbones[1]}
    alignment.main(recipe(tmp_path, with_silence, 6, data=data, training={"logging_steps": 1}, **settings))
    assert np.isfinite(history(tmp_path)).all()


def test_a_draft_head_learns_them(with_silence, silenced, tmp_path):
    training = {"per_device_train_batch_size": 1, "logging_steps": 1}
    metrics = draft.main(recipe(tmp_path, with_silence, 8, model=str(silenced), training=training))
    assert np.isfinite([*history(tmp_path), metrics["eval_draft_agreement"]]).all()


def test_a_table_learns_them_too(with_silence, multilingual, tmp_path):
    config = {"token_projection": "table", "alignment_reduction": "mean", "speech_margin": 0.2}
    settings = {"encoder": multilingual[0], "llm": multilingual[1], "config": {**config, "encoder_window": "audio"}}
    settings |= {"cross_entropy_weight": 0.5, "token_noise": 0.3}
    training = {"per_device_train_batch_size": 1, "logging_steps": 1, "learning_rate": 1e-3}
    alignment.main(recipe(tmp_path, with_silence, 14, training=training, **settings))
    found = history(tmp_path)
    assert np.isfinite(found).all() and np.mean(found[7:]) < np.mean(found[:7])


def test_what_is_heard_in_silence_counts_as_insertions(silenced, with_silence, tmp_path):
    """Words where the reference has none are errors of a corpus, in whose number of words they are not."""
    utterances = read_manifest(with_silence)
    swapped = [replace(one, text="" if one.text else "NO", corpus="sounds", split="") for one in utterances]
    manifest = write_manifest(tmp_path / "manifest.jsonl", swapped)
    decode_test_sets(str(silenced), [manifest], tmp_path / "out", systems=["stage1"], batch_size=4)
    scores = write_report(tmp_path / "out")["systems"]["stage1"]["sounds"]["wer"]["basic"]
    said = sum(len(one.text.split()) for one in utterances)
    assert (scores["insertions"], scores["deletions"], scores["substitutions"]) == (said, SILENT, 0)
    assert scores["words"] == SILENT
