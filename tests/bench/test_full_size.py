"""The bench of the full size, at a tiny one: that its parts run, and that its bound is the arithmetic it claims."""

import json

import pytest

from seam.bench import full_size
from seam.modeling_seam import SeamForSpeechRecognition

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full_size")
    return folder, {name: full_size.run_part(name, folder, "tiny") for name in full_size.PARTS}


def test_every_part_runs(results):
    folder, seen = results
    index = json.loads((folder / "llm" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in seen.values())
    model = SeamForSpeechRecognition.from_pretrained(folder / "model")
    assert seen["load"]["weights_gb"] == pytest.approx(sum(p.numel() for p in model.parameters()) * 2e-9)
    assert seen["transcribe"]["batch_1_stage_1_tokens"] <= full_size.NEW_TOKENS


def test_the_bound_of_stage_1(results):
    folder, seen = results
    model = SeamForSpeechRecognition.from_pretrained(folder / "model")
    frozen = sum(p.numel() for p in model.encoder.parameters()) + model.get_input_embeddings().weight.numel()
    trained = sum(p.numel() for p in model.bridge.parameters())
    assert seen["stage_1"]["bound_gb"] == pytest.approx((4 * frozen + 16 * trained) / 1e9)
