"""Half an hour of recordings streams through Stage 1, four times: memory stays constant, damaged ones are skipped."""

import json
import math
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import TrainerCallback, trainer

from seam.data.manifest import Utterance, read_manifest, write_manifest
from seam.experiments import tiny_backbones
from seam.tests.conftest import QWEN_SIZES, WHISPER_SIZES
from seam.tests.helpers.training_sounds import recipe
from seam.train import alignment

BATCH, BUFFER, PASSES = 16, 500, 4


@pytest.fixture(scope="module")
def long_backbones(tmp_path_factory, shared):
    """With a window of 30 s, and a tokenizer that knows the words."""
    folder = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    texts = [one.text.lower() for one in read_manifest(shared / "speech")]
    tokenizer = tiny_backbones.make_tokenizer(texts, 2000)
    sizes = {"max_target_positions": 192, "encoder_layers": 1, "encoder_attention_heads": 1, "decoder_layers": 1}
    whisper, extractor = tiny_backbones.make_whisper(tokenizer, 30, **{**WHISPER_SIZES, **sizes})
    return (
        tiny_backbones.save_backbone(folder / "whisper", whisper, tokenizer, extractor),
        tiny_backbones.save_backbone(folder / "llm", tiny_backbones.make_qwen3(tokenizer, **QWEN_SIZES), tokenizer),
    )


class Memory(TrainerCallback):
    """Bytes of this process and its workers together, after every step."""

    used: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        self.used.append(sum(one.memory_full_info().pss for one in processes))


@pytest.mark.slow
def test_memory_stays_flat(long_backbones, shared, tmp_path, monkeypatch):
    recordings = read_manifest(shared / "speech")[::2]
    assert sum(one.duration for one in recordings) > 1700
    too_long = [one for one in recordings if one.duration > 30]
    (tmp_path / "broken.flac").write_bytes(recordings[0].audio.read_bytes()[:100])
    broken = Utterance(tmp_path / "broken.flac", "broken", 1.0)
    middle = len(recordings) // 2
    manifest = write_manifest(tmp_path / "m.jsonl", [*recordings[:middle], broken, *recordings[middle:]])
    count = len(recordings) + 1
    steps = sum(math.ceil(min(BUFFER, count - start) / BATCH) for start in range(0, count, BUFFER))  # of one pass

    seen = []
    loss = alignment.AlignmentTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.append(len(inputs["labels"]))
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(alignment.AlignmentTrainer, "compute_loss", compute_loss)
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Memory])
    metrics = alignment.main(
        recipe(
            tmp_path / "out",
            str(manifest),
            steps * PASSES,
            training={"per_device_train_batch_size": BATCH, "dataloader_num_workers": min(2, os.cpu_count())},
            data={
                "keep_encoder_states": False,
                "streaming": True,
                "shuffle_buffer": BUFFER,
                "on_bad_audio": "skip",
                "validation": [str(write_manifest(tmp_path / "validation.jsonl", recordings[:4]))],
            },
            encoder=long_backbones[0],
            llm=long_backbones[1],
        )
    )
    assert sum(seen) == PASSES * (len(recordings) - len(too_long))
    assert metrics["skipped_audio"] == 1 + len(too_long)
    lines = (tmp_path / "out" / "skipped_audio.jsonl").read_text().splitlines()
    named = {Path(json.loads(line)["audio"]).resolve() for line in lines}
    assert named == {one.audio.resolve() for one in (broken, *too_long)}
    # Until then, allocators fill and workers copy the pages of the process that they were forked from.
    third, fourth = np.median(Memory.used[2 * steps : 3 * steps]), np.median(Memory.used[3 * steps :])
    assert fourth < 1.05 * third
