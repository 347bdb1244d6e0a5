"""Training the draft head: it alone is trained, its metrics are reported, and the stages leave it as it is."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from seam.__main__ import app
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.tests.helpers.training_sounds import TEXTS, changed, recipe, weights
from seam.train import alignment, draft, instruction
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium

# One layer over 32 numbers: small steps take it nowhere in seconds.
FAST = {"learning_rate": 0.1, "lr_scheduler_type": "cosine"}


@pytest.fixture
def stage_1(stages) -> str:
    """Stage 1 that knows the eight sounds by heart."""
    return str(stages / "alignment")


@pytest.fixture(scope="module")
def drafted(tmp_path_factory, stages, manifest) -> tuple[str, dict[str, float]]:
    """Train a draft head on the checkpoint; return the result and its metrics."""
    folder = str(tmp_path_factory.mktemp("draft"))
    return folder, draft.main(recipe(folder, manifest, 500, model=str(stages / "alignment"), training=FAST))


def test_the_head_learns_and_agrees_with_stage_1(drafted, stage_1, manifest, tmp_path):
    _, metrics = drafted
    begun = draft.main(recipe(tmp_path, manifest, 1, model=stage_1, training={"learning_rate": 0.0}))
    assert begun["eval_draft_wer"] > 50 and begun["eval_draft_agreement"] < 50
    assert metrics["eval_loss"] < begun["eval_loss"] / 10
    assert metrics["eval_draft_wer"] < 10 and metrics["eval_stage1_wer"] < 10
    assert metrics["eval_draft_agreement"] > 90


def test_only_the_head_changes(drafted, stage_1, manifest, tmp_path):
    before, after = weights(stage_1), weights(drafted[0])
    assert set(after) - set(before) == {"draft_head.head.weight", "draft_head.head.bias"}
    assert not changed(before, after)
    # And further, on the head that is there.
    draft.main(recipe(tmp_path, manifest, 2, model=drafted[0]))
    assert changed(after, weights(tmp_path)) == {"draft_head.head.weight", "draft_head.head.bias"}


def test_the_vocabulary_is_that_of_the_transcripts_as_they_are_cased(drafted, stage_1, manifest, tmp_path):
    processor = SeamProcessor.from_pretrained(stage_1)
    model = SeamForSpeechRecognition.from_pretrained(drafted[0])
    assert model.config.draft_vocabulary == sorted({i for text in TEXTS for i in processor.transcript_ids(text)})
    assert model.draft_head.head.out_features == len(model.config.draft_vocabulary) + 1
    draft.main(recipe(tmp_path, manifest, 1, model=stage_1, data={"casing": "upper"}))
    upper = SeamForSpeechRecognition.from_pretrained(tmp_path).config.draft_vocabulary
    assert upper == sorted({i for text in TEXTS for i in processor.transcript_ids(text.upper())})


def test_ids_that_an_older_head_cannot_write_are_counted(drafted, manifest, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = draft.main(recipe(tmp_path, manifest, 1, model=drafted[0], data={"casing": "upper"}))
    assert "The draft head's vocabulary lacks" in caplog.text
    assert np.isfinite(metrics["eval_loss"])


def test_the_agreement_is_counted_in_tokens(drafted, stage_1, manifest, tmp_path, monkeypatch):
    """Drafts that lack the last token of what Stage 1 writes, which knows the sounds by heart."""
    model = SeamForSpeechRecognition.from_pretrained(stage_1).eval()

    def shorter(self, speech_states, speech_mask=None):
        alignment = model.align(speech_states, speech_mask)
        is_last = alignment.mask.bool() & ~torch.nn.functional.pad(alignment.mask[:, 1:], (0, 1)).bool()
        return alignment.sequences, alignment.mask.masked_fill(is_last, 0)

    monkeypatch.setattr("seam.modeling_seam.bridges.CTCHead.decode", shorter)
    metrics = draft.main(recipe(tmp_path, manifest, 1, model=drafted[0], training={"learning_rate": 0.0}))
    processor = SeamProcessor.from_pretrained(drafted[0])
    tokens = sum(len(processor.transcript_ids(text)) for text in TEXTS)
    assert metrics["eval_stage1_wer"] == 0
    assert metrics["eval_draft_agreement"] == pytest.approx(100 * (tokens - len(TEXTS)) / tokens)


def test_kept_states_train_the_same_head(stage_1, manifest, tmp_path):
    for name, keep in (("kept", True), ("computed", False)):
        draft.main(recipe(tmp_path / name, manifest, 5, model=stage_1, data={"keep_encoder_states": keep}))
    one, other = weights(tmp_path / "kept"), weights(tmp_path / "computed")
    torch.testing.assert_close(one["draft_head.head.weight"], other["draft_head.head.weight"], rtol=1e-3, atol=1e-4)


def test_stages_take_the_head_along_and_leave_it_as_it_is(drafted, backbones, manifest, tmp_path):
    alignment.main(recipe(tmp_path / "1", manifest, 2, model=drafted[0]))
    assert {name.split(".")[0] for name in changed(weights(drafted[0]), weights(tmp_path / "1"))} == {"bridge"}
    instruction.main(recipe(tmp_path / "2", manifest, 2, model=drafted[0], llm=backbones[1]))
    before, after = weights(drafted[0]), weights(tmp_path / "2")
    for name in ("draft_head.head.weight", "draft_head.head.bias"):
        assert torch.equal(before[name], after[name])
    metrics = draft.main(recipe(tmp_path / "3", manifest, 2, model=str(tmp_path / "2")))  # of a whole model
    assert metrics["eval_draft_agreement"] > 90 and "eval_wer" not in metrics
    full = weights(tmp_path / "2")
    assert changed(full, weights(tmp_path / "3")) == {"draft_head.head.weight", "draft_head.head.bias"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names no model: train Stage 1 first and give its checkpoint as model=FOLDER"),
        ({"model": "nowhere"}, "cannot load the checkpoint 'nowhere'"),
        ({"model": "nowhere", "mask": "learned"}, "^mask is no setting of seam train draft, but of: refinement"),
    ],
)
def test_an_incomplete_recipe_is_refused(values, message, manifest, tmp_path):
    with pytest.raises((RecipeError, OSError), match=message):
        draft.main(recipe(tmp_path, manifest, 1, **values))


def test_a_rival_takes_no_draft(build_model, processor, manifest, tmp_path):
    build_model(bridge="ctc").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="the bridge 'ctc' takes no draft; accepted: aligner"):
        draft.main(recipe(tmp_path / "out", manifest, 1, model=str(tmp_path)))


def test_the_command_reads_the_recipe_of_your_own():
    path = Path(__file__).parents[2] / "recipes" / "own" / "draft.yaml"
    settings = ["training.bf16=false", "training.use_cpu=true"]
    result = CliRunner().invoke(app, ["train", "draft", str(path), *settings, "model=null"])
    assert result.exit_code == 1 and "train Stage 1 first" in result.output
    result = CliRunner().invoke(app, ["train", "draft", str(path), *settings])
    assert result.exit_code == 1 and "the recipe names no data.train manifest" in result.output
