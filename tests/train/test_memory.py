"""Memory of training: activations, logits and optimizer states that it does not need are neither kept nor computed."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seam.modeling_seam.nearest import NearestToken
from seam.tests.conftest import SENTENCES, WHISPER_SIZES
from seam.tests.helpers.training_sounds import changed, recipe, weights
from seam.train import alignment, draft, instruction, refinement
from seam.train.inputs import lora_parameters
from seam.train.recipe import RecipeError

pytestmark = pytest.mark.medium

CHECKPOINTING = {"gradient_checkpointing": True}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
STEPS = {"per_device_train_batch_size": 4, "logging_steps": 1}
QFORMER = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "hidden_dropout_prob": 0.1}


def train(stage, folder, manifest, training, **values) -> list[dict[str, float]]:
    """Train two steps of a stage, and return what was logged about them; two utterances are decoded at the end."""
    data = {"validation_limit": 2}
    stage.main(recipe(folder, manifest, 2, training={**STEPS, **training}, data=data, **values))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = ("loss", "grad_norm", "eval_loss", "eval_wer", "eval_stage1_wer")
    return [{key: value for key, value in entry.items() if key in kept} for entry in history]


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory, backbones, manifest) -> str:
    folder = tmp_path_factory.mktemp("alignment")
    config = {"lora_rank": 4, "lora_dropout": 0.1, "llm_inputs": "continuous"}
    alignment.main(recipe(folder, manifest, 100, encoder=backbones[0], llm=backbones[1], config=config))
    return str(folder)


# ---- gradient checkpointing ----


def test_checkpointed_activations_give_the_same_losses_and_gradients(
    stage_1, backbones, multilingual, manifest, tmp_path
):
    """To the bit, dropout included, in every stage."""
    new = {"encoder": backbones[0], "llm": backbones[1]}
    dropout = {"lora_rank": 4, "aligner_config": {**WHISPER_SIZES, **DROPOUT}}
    table = {"encoder": multilingual[0], "llm": multilingual[1], "config": {"token_projection": "table"}}
    qformer = {"bridge": "qformer", "bridge_config": QFORMER, "lora_rank": 4, "lora_dropout": 0.1}
    stages = {
        "alignment": (alignment, {**new, "config": dropout}),
        "table": (alignment, {**table, "cross_entropy_weight": 0.5, "train_token_table": True}),
        "draft": (draft, {"model": stage_1}),
        "instruction": (instruction, {"model": stage_1, "llm": backbones[1]}),
        "in bf16": (instruction, {"model": stage_1, "llm": backbones[1], "llm_dtype": "bfloat16"}),
        "refinement": (refinement, {"model": stage_1, "llm": backbones[1], "mask": "learned"}),
        "qformer": (instruction, {**new, "config": qformer}),
    }
    for name, (stage, values) in stages.items():
        plain = train(stage, tmp_path / name / "plain", manifest, {}, **values)
        saving = train(stage, tmp_path / name / "saving", manifest, CHECKPOINTING, **values)
        assert plain == saving and sum("loss" in entry for entry in plain) == 2, name
        assert not changed(weights(tmp_path / name / "plain"), weights(tmp_path / name / "saving")), name


@pytest.mark.oldest
def test_a_training_may_go_on_with_checkpointed_activations(stage_1, backbones, manifest, tmp_path):
    """As one would that has run out of memory."""
    values = {"model": stage_1, "llm": backbones[1]}
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(instruction, tmp_path, manifest, saving, **values)
    whole = weights(tmp_path)
    for name in ("checkpoint-2", "model.safetensors"):
        (tmp_path / name).rename(tmp_path / f"old {name}")
    train(instruction, tmp_path, manifest, {**saving, **CHECKPOINTING}, **values)
    assert not changed(whole, weights(tmp_path))


def saved_bytes(model, batch, **kwargs) -> int:
    """Return the bytes that the forward pass saves for the backward pass, without weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)  # or another one would come to lie there
        return tensor

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch, **kwargs).loss
    loss.backward()
    return sum(sizes.values())


@pytest.mark.parametrize("use_llm", [False, True])
def test_checkpointed_activations_are_not_kept(use_llm, build_model, processor, waveforms):
    model = build_model(lora_dropout=0.1)
    batch = processor(audio=waveforms, text=SENTENCES)
    for parameter in lora_parameters(model) if use_llm else model.bridge.parameters():
        parameter.requires_grad_(True)
    model.train()
    plain = saved_bytes(model, batch, use_llm=use_llm, return_logits=False)
    model.gradient_checkpointing_enable()
    assert saved_bytes(model, batch, use_llm=use_llm, return_logits=False) < plain / 2


def test_reentrant_checkpointing_is_refused(manifest, tmp_path):
    training = {**CHECKPOINTING, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(RecipeError, match="use_reentrant=true finds no gradients behind a frozen LLM"):
        recipe(tmp_path, manifest, 1, training=training)


# ---- logits and distances ----


@pytest.mark.parametrize("guided", [False, True])
def test_logits_are_computed_where_there_is_a_target(guided, build_model, processor, waveforms):
    model = build_model(lora_dropout=0.0)
    batch = processor(audio=waveforms, text=SENTENCES)
    if guided:
        batch["first_token_ids"] = batch["labels"][:, 0]
    adapters = lora_parameters(model)
    for parameter in adapters:
        parameter.requires_grad_(True)
    model.train()
    rows, outputs, gradients = [], [], []
    model.get_output_embeddings().register_forward_hook(lambda _, given, made: rows.append(made.shape[:-1].numel()))
    for return_logits in (True, False):
        outputs.append(model(**batch, return_logits=return_logits))
        outputs[-1].loss.backward()
        gradients.append([parameter.grad.clone() for parameter in adapters])
        model.zero_grad()
    counts = (batch["labels"] != -100).sum(-1)
    assert len(set(counts.tolist())) > 1
    assert rows == [len(counts) * int(counts.max()), int(counts.sum()) - guided * len(counts)]
    assert outputs[0].logits.shape[:2] == (len(counts), int(counts.max())) and outputs[1].logits is None
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_training_and_evaluation_compute_no_other_logits(stage_1, backbones, manifest, tmp_path, monkeypatch):
    rows, labels = [], []

    class Watched(instruction.InstructionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            head = self.model.get_output_embeddings()
            handle = head.register_forward_hook(lambda _, given, made: rows.append(made.shape[:-1].numel()))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            handle.remove()
            labels.append(int((inputs["labels"] != -100).sum()))
            return loss

    monkeypatch.setattr(instruction, "InstructionTrainer", Watched)
    train(instruction, tmp_path, manifest, {}, model=stage_1, llm=backbones[1])
    assert rows == labels and len(rows) == 3  # two steps, one evaluation


def test_padding_is_not_looked_up(model, processor, waveforms, monkeypatch):
    batch = processor(audio=waveforms, text=SENTENCES)
    asked, nearest = [], NearestToken.nearest

    def spy(self, predicted):
        asked.append(predicted.shape[:-1].numel())
        return nearest(self, predicted)

    monkeypatch.setattr(NearestToken, "nearest", spy)
    assert model.config.llm_inputs == "nearest"
    with torch.no_grad():
        embeds, mask = model.aligned(*model.encode(batch["input_features"]), batch["labels"])
        predictions = model.teacher_forced(*model.encode(batch["input_features"]), batch["labels"][:, :-1])
    tokens = (batch["labels"] != -100).sum(-1) - 1
    assert mask.sum(-1).tolist() == tokens.tolist() and asked == [int(tokens.sum())]
    ids = model.lookup.distances(predictions[:, :-1]).argmin(-1)
    assert torch.equal(embeds[mask], model.get_input_embeddings()(ids)[mask])


class Shapes(TorchDispatchMode):
    """Sizes of all that is computed."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, torch.Tensor):
                self.sizes.update(one.shape)
        return made


def test_stage_1_computes_nothing_over_the_vocabulary(build_model, processor, waveforms):
    model = build_model()
    batch = processor(audio=waveforms, text=SENTENCES)
    model.bridge.requires_grad_(True)
    model.train()
    vocabulary = len(model.get_input_embeddings().weight)
    with Shapes() as seen:
        model(**batch, use_llm=False).loss.backward()
    assert model.config.aligner_config.d_model in seen.sizes and vocabulary not in seen.sizes
    with Shapes() as seen:
        model(**batch, use_llm=True)
    assert vocabulary in seen.sizes


# ---- weights, gradients and optimizer states ----


def test_stage_1_holds_the_embedding_table_alone(backbones, manifest, tmp_path, monkeypatch):
    """And optimizer states of what is trained alone."""
    held = {}

    class Watched(alignment.AlignmentTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            held.update({name: (one, one.grad is not None) for name, one in model.named_parameters()})
            held["states"] = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
            return loss

    monkeypatch.setattr(alignment, "AlignmentTrainer", Watched)
    train(alignment, tmp_path, manifest, {}, encoder=backbones[0], llm=backbones[1])
    states = held.pop("states")
    assert {name for name in held if name.startswith("language_model.")} == {"language_model.embed_tokens.weight"}
    assert {name for name, (_, graded) in held.items() if graded} == {n for n in held if n.startswith("bridge.")}
    assert states == {id(one) for name, (one, _) in held.items() if name.startswith("bridge.")}
