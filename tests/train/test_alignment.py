"""Stage 1 of an aligner with a table: what is trained, the cross-entropy on its scores, random tokens."""

import json

import pytest
import torch

from seam.modeling_seam import SeamForSpeechRecognition
from seam.tests.helpers.training_sounds import TEXTS, Killed, changed, recipe, weights
from seam.train import alignment, draft, instruction
from seam.train.alignment import AlignmentTrainer
from seam.train.recipe import RecipeError
from seam.train.trainer import replace_at_random

pytestmark = pytest.mark.medium

TABLE = "bridge.token_table.weight"


@pytest.fixture
def table_recipe(multilingual, manifest, tmp_path):
    """Make recipes of Stage 1 on the multilingual Whisper's decoder, which evaluate one utterance."""

    def table_recipe(name: str, steps: int, **values):
        settings = {"token_projection": "table", "alignment_reduction": "mean", "speech_margin": 0.2}
        config = {**settings, "encoder_window": "audio", **values.pop("config", {})}
        training = {"learning_rate": 1e-3, "logging_steps": 1, **values.pop("training", {})}
        data = {"validation_limit": 1, **values.pop("data", {})}
        if "model" not in values:
            values |= {"encoder": multilingual[0], "llm": multilingual[1], "config": config}
            values["processor"] = {"leading_space": True}
        return recipe(tmp_path / name, manifest, steps, training=training, data=data, **values)

    return table_recipe


def losses(folder) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.oldest
@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_falls_and_the_table_is_trained_on_request(table_recipe, multilingual, processor, tmp_path, trained):
    settings = {"cross_entropy_weight": 0.5, "train_token_table": trained, "training": {"learning_rate": 3e-3}}
    metrics = alignment.main(table_recipe("one", 25, **settings))
    assert metrics.keys() >= {"eval_loss", "eval_stage1_wer"}
    found = losses(tmp_path / "one")
    assert found[-1] < 0.7 * found[0]
    begun = SeamForSpeechRecognition.from_backbones(
        *multilingual, processor, token_projection="table", alignment_only=True
    )
    names = changed(begun.state_dict(), weights(tmp_path / "one"))
    assert names == {
        name for name in weights(tmp_path / "one") if name.startswith("bridge.") and (trained or name != TABLE)
    }
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["token_table_trained"] == trained
    assert json.loads((tmp_path / "one" / "processor_config.json").read_text())["leading_space"] is True


def test_a_table_that_was_trained_once_is_trained_on(table_recipe, tmp_path):
    alignment.main(table_recipe("one", 2, train_token_table=True))
    alignment.main(table_recipe("two", 2, model=str(tmp_path / "one")))
    assert TABLE in changed(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "config.json").read_text())["token_table_trained"]


@pytest.mark.oldest
def test_later_stages_go_on_with_it(table_recipe, multilingual, tmp_path):
    alignment.main(table_recipe("one", 2))
    settings = {"model": str(tmp_path / "one")}
    draft.main(table_recipe("draft", 2, **settings))
    instruction.main(table_recipe("two", 2, llm=multilingual[1], **settings))
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert not changed({k: v for k, v in before.items() if k.startswith(("bridge.", "encoder."))}, after)
    assert any("draft_head" in name for name in weights(tmp_path / "draft"))


@pytest.mark.parametrize(
    "values",
    [{"cross_entropy_weight": 0.5}, {"train_token_table": True}],
)
def test_what_needs_a_table_is_refused_without(backbones, manifest, tmp_path, values):
    name = next(iter(values))
    with pytest.raises(RecipeError, match=f"^{name} is for an aligner with a table .token_projection: table."):
        alignment.main(recipe(tmp_path, manifest, 1, encoder=backbones[0], llm=backbones[1], **values))
    with pytest.raises(RecipeError, match=f"^{name} is no setting of seam train instruction"):
        instruction.main(recipe(tmp_path, manifest, 1, model="nowhere", **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"token_noise": 1.0}, "token_noise is 1.0; accepted: 0 up to but not 1"),
        ({"token_noise": -0.1}, "token_noise is -0.1"),
        ({"cross_entropy_weight": -1.0}, "cross_entropy_weight is -1.0; accepted: 0 and above"),
    ],
)
def test_values_are_checked(manifest, tmp_path, values, message):
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, manifest, 1, **values)


@pytest.mark.oldest
def test_a_killed_training_draws_the_same_noise_again(table_recipe, tmp_path, dies_after):
    training = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    settings = {"token_noise": 0.3, "cross_entropy_weight": 0.5, "train_token_table": True, "training": training}
    dies_after(None)
    alignment.main(table_recipe("whole", 6, **settings))
    dies_after(3)
    with pytest.raises(Killed):
        alignment.main(table_recipe("killed", 6, **settings))
    dies_after(None)
    alignment.main(table_recipe("killed", 6, **settings))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def trainer_of(model, processor, tmp_path, manifest, **settings) -> AlignmentTrainer:
    made = recipe(tmp_path, manifest, 1)
    return AlignmentTrainer(
        model=model, processor=processor, validation=[], data=made.data, args=made.training, **settings
    )


@pytest.mark.parametrize("which", ["linear", "table"])
def test_noise_replaces_a_share_of_what_the_aligner_is_given(
    which, build_model, build_table_model, processor, waveforms, manifest, tmp_path, monkeypatch
):
    model = {"linear": build_model, "table": build_table_model}[which]()
    trainer = trainer_of(model, processor, tmp_path, manifest, token_noise=0.25)
    labels = torch.full((40, 51), 7)
    labels[5:, 30:] = -100
    torch.manual_seed(0)
    noisy = replace_at_random(labels[:, :-1], model.lookup.returnable, trainer.token_noise)
    is_token = labels[:, :-1] >= 0
    assert (noisy[~is_token] == -100).all()
    is_replaced = (noisy != 7)[is_token]
    assert 0.2 < is_replaced.float().mean() < 0.3
    drawn = noisy[is_token][is_replaced].unique()
    assert len(drawn) > 100 and set(drawn.tolist()) <= set(model.lookup.returnable.tolist())
    # In training only, and labels stay what they are.
    inputs, seen = dict(processor(audio=waveforms, text=TEXTS[:4])), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: seen.append(inputs) or forward(**inputs))
    trainer.compute_loss(model.train(), inputs)
    trainer.compute_loss(model.eval(), inputs)
    assert [("alignment_inputs" in one, torch.equal(one["labels"], inputs["labels"])) for one in seen] == [
        (True, True),
        (False, True),
    ]


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_in_bf16(table_recipe, tmp_path, weight):
    settings = {"cross_entropy_weight": weight, "train_token_table": True}
    for name, precision in (("full", {}), ("half", {"bf16": True})):
        alignment.main(table_recipe(name, 3, training=precision, **settings))
    torch.testing.assert_close(losses(tmp_path / "half"), losses(tmp_path / "full"), rtol=0.05, atol=0.02)
