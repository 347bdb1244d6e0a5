"""The check of a checkpoint: it passes on the shipped one, and fails where something is wrong."""

import shutil

import pytest
from typer.testing import CliRunner

from seam.__main__ import app
from seam.publishing.selfcheck import _backbones, selfcheck
from seam.tests.helpers.shipped import RECORDINGS, TINY

RECORDING = RECORDINGS / "audio" / "000000.wav"


@pytest.mark.slow
def test_the_shipped_checkpoint_passes():
    result = CliRunner().invoke(app, ["selfcheck", str(TINY)])
    assert result.exit_code == 0, result.output
    assert "light: equal logits" in result.output and "FAILED" not in result.output


@pytest.mark.slow
def test_a_folder_without_its_code_fails(tmp_path, monkeypatch):
    from seam.publishing import selfcheck as module

    def export_without_code(model, target):
        folder = module_export(model, target)
        shutil.rmtree(folder / "modeling_seam")
        return folder

    module_export = module.export
    monkeypatch.setattr(module, "export", export_without_code)
    first = next(iter(selfcheck(str(TINY), RECORDING)))
    assert not first.passed and "modeling_seam" in first.seen


def test_a_table_of_whispers_is_not_made_of_an_encoder_alone(table_model, processor, tmp_path):
    table_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    found = _backbones(str(tmp_path / "model"), tmp_path / "backbones", tmp_path / "cache")
    assert "re-written from Whisper's decoder" in found and not (tmp_path / "backbones").exists()
