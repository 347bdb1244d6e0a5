"""Folders for others: full, light, merged, with LoRA for peft."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from seam.modeling_seam import SeamForSpeechRecognition
from seam.publishing import export as exporting
from seam.publishing.export import export

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def checkpoint(build_model, processor, tmp_path_factory):
    """Return a saved checkpoint with results beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def logits(model, processor, waveforms):
    return model(**processor(audio=waveforms[:2], text=["turn on the light", "one two three"])).logits


def test_a_folder_is_complete(checkpoint, processor, waveforms, tmp_path):
    folder = export(checkpoint, tmp_path / "a" / "b")
    names = {path.name for path in folder.iterdir()}
    assert {
        "README.md",
        "audio_files.py",
        "config.json",
        "configuration_seam.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_seam",
        "processing_seam.py",
        "processor_config.json",
        "tokenizer.json",
    } <= names
    assert "automatic-speech-recognition" in (folder / "README.md").read_text()
    before = SeamForSpeechRecognition.from_pretrained(checkpoint)
    after = SeamForSpeechRecognition.from_pretrained(folder)
    assert torch.equal(logits(before, processor, waveforms), logits(after, processor, waveforms))


def test_an_older_checkpoint_is_replaced_completely(checkpoint, tmp_path):
    folder = export(checkpoint, tmp_path / "out")
    (folder / "leftover.txt").write_text("of the older one")
    export(checkpoint, folder)
    assert not (folder / "leftover.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_not_touched(checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a SEAM checkpoint"):
        export(checkpoint, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_interrupted_export_leaves_the_old_folder(checkpoint, tmp_path, monkeypatch):
    folder = export(checkpoint, tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(exporting, "write_card", full_disk)
    with pytest.raises(OSError, match="no space"):
        export(checkpoint, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_killed_between_its_renames_loses_nothing(checkpoint, tmp_path, monkeypatch):
    folder = export(checkpoint, tmp_path / "out")
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folder.rename(tmp_path / ".out.old")  # what such a kill leaves

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(exporting, "write_card", full_disk)
    with pytest.raises(OSError, match="no space"):
        export(checkpoint, folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_merged_has_the_same_logits_without_lora(checkpoint, processor, waveforms, tmp_path):
    folder = export(checkpoint, tmp_path / "out", merge=True)
    assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name]
    assert json.loads((folder / "config.json").read_text())["lora_rank"] == 0
    before = logits(SeamForSpeechRecognition.from_pretrained(checkpoint), processor, waveforms)
    after = logits(SeamForSpeechRecognition.from_pretrained(folder), processor, waveforms)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_draft_head_goes_along(build_model, processor, tmp_path):
    model = build_model(draft_vocabulary=[7, 9])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for merge in (False, True):
        exported = SeamForSpeechRecognition.from_pretrained(
            export(str(tmp_path / "model"), tmp_path / "out", merge=merge)
        )
        assert torch.equal(exported.draft_head.head.weight, model.draft_head.head.weight)
        assert exported.config.draft_vocabulary == [7, 9]


def test_peft_loads_the_adapter(checkpoint, backbones, tmp_path):
    folder = export(checkpoint, tmp_path / "out", adapter=True)
    llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(backbones[1]), folder / "adapter").eval()
    ids = torch.arange(10, 20)[None]
    expected = SeamForSpeechRecognition.from_pretrained(checkpoint).language_model(input_ids=ids).logits
    assert torch.equal(llm(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"light": True}, "name its backbones by --encoder ID and --llm ID"),
        ({"light": True, "merge": True}, "choose one"),
        ({"light": True, "encoder": "a/b"}, "name both"),
    ],
)
def test_what_is_impossible_is_refused(checkpoint, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_backbone_for_others(checkpoint, backbones, tmp_path):
    with pytest.raises(ValueError, match="Hub repository"):
        export(checkpoint, tmp_path / "out", light=True, encoder=backbones[0], llm=backbones[1])
