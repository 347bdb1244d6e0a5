"""Every field of `TrainingArguments` holds in the trainers of the stages, or is refused before the training."""

import json

import pytest
from transformers import TrainingArguments

from seam.data.dataset import SpeechCollator
from seam.data.manifest import read_manifest
from seam.tests.helpers.training_sounds import recipe
from seam.train import alignment
from seam.train.recipe import DataSettings, RecipeError
from seam.train.training_arguments import KEPT, refusal

OTHERS = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "group_by_length": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "seconds",
    "auto_find_batch_size": True,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "include_num_input_tokens_seen": True,
    "include_tokens_per_second": True,
    "save_only_model": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "prediction_loss_only": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "hub_strategy": "checkpoint",
    "hub_always_push": True,
    "hub_revision": "draft",
    "label_names": ["text"],
}
FIELDS = set(TrainingArguments.__dataclass_fields__)


@pytest.mark.oldest
@pytest.mark.parametrize("name", OTHERS)
def test_what_the_trainers_do_not_keep_is_refused_in_the_recipe(tmp_path, name):
    assert OTHERS.keys() == KEPT.keys()
    if name not in FIELDS:
        pytest.skip("this version of transformers has no such field")
    with pytest.raises(RecipeError, match=rf"^training\.{name} is .*; accepted: "):
        recipe(tmp_path, "no.jsonl", 1, training={name: OTHERS[name]})


@pytest.mark.oldest
def test_the_defaults_are_kept(tmp_path):
    assert refusal(TrainingArguments(str(tmp_path), use_cpu=True)) is None
    assert refusal(TrainingArguments(str(tmp_path), use_cpu=True), own_batches=True) is None


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_ranks_make_their_own_batches(tmp_path, name):
    with pytest.raises(RecipeError, match=rf"^training\.accelerator_config\.{name} is true; accepted: false"):
        recipe(tmp_path, "no.jsonl", 1, training={"accelerator_config": json.dumps({name: True})})


@pytest.mark.oldest
@pytest.mark.parametrize("data", [{"batch_seconds": 4}, {"batch_tokens": 20}, {"streaming": True}])
def test_what_makes_its_own_batches_takes_no_order_of_others(tmp_path, data):
    data = {"keep_encoder_states": False, **data}
    for name, value in {"dataloader_drop_last": True, "data_seed": 3, "train_sampling_strategy": "sequential"}.items():
        if name not in FIELDS:
            continue
        with pytest.raises(RecipeError, match=rf"^training\.{name} is .* make batches of their own"):
            recipe(tmp_path, "no.jsonl", 1, training={name: value}, data=data)
        recipe(tmp_path, "no.jsonl", 1, training={name: value})
    recipe(tmp_path, "no.jsonl", 1, training={"data_seed": 42, "seed": 42}, data=data)


@pytest.mark.oldest
def test_half_precision_that_a_cpu_has_not_is_refused_first(tmp_path):
    with pytest.raises(RecipeError, match=r"^training\.fp16 is True, which needs an accelerator; accepted on a CPU"):
        recipe(tmp_path, "no.jsonl", 1, training={"fp16": True})


def test_a_trainer_of_ones_own_script_refuses_them_too(tmp_path):
    for field, message in {
        "label_smoothing_factor": r"training\.label_smoothing_factor is True",
        "push_to_hub": r"training\.push_to_hub: .* call seam\.publishing\.push\.push",
    }.items():
        args = TrainingArguments(str(tmp_path), use_cpu=True, **{field: True})
        with pytest.raises(RecipeError, match=message):
            alignment.AlignmentTrainer(processor=None, validation=[], data=DataSettings(), args=args)


def test_a_stage_of_ones_own_script_does_not_push_by_halves(backbones, tmp_path):
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": {"lora_rank": 4}}
    with pytest.raises(RecipeError, match=r"training\.push_to_hub: .* call seam\.publishing\.push\.push"):
        alignment.main(recipe(tmp_path, "no.jsonl", 1, training={"push_to_hub": True}, **settings))


@pytest.mark.medium
def test_the_order_of_the_data_is_as_asked_for(backbones, processor, manifest, tmp_path, monkeypatch):
    seen: list[tuple[int, ...]] = []
    collate = SpeechCollator.__call__

    def spied(self, items):
        seen.extend(tuple(item["token_ids"].tolist()) for item in items)
        return collate(self, items)

    orders = {}
    settings = {"encoder": backbones[0], "llm": backbones[1], "config": {"lora_rank": 4}}
    monkeypatch.setattr(SpeechCollator, "__call__", spied)
    for name, training in {
        "one": {"data_seed": 1},
        "again": {"data_seed": 1},
        "two": {"data_seed": 2},
        "sequential": {"train_sampling_strategy": "sequential"},
    }.items():
        if not training.keys() <= FIELDS:
            continue
        seen.clear()
        training = {"per_device_train_batch_size": 2, **training}
        alignment.main(recipe(tmp_path / name, manifest, 4, training=training, **settings))
        orders[name] = seen[:8]
    assert orders["one"] == orders["again"] != orders["two"]
    assert sorted(orders["one"]) == sorted(orders["two"]) and len(set(orders["one"])) == 8
    if "sequential" in orders:
        texts = [one.text.lower() for one in read_manifest(manifest)]
        assert orders["sequential"] == [tuple(processor.transcript_ids(text)) for text in texts]
