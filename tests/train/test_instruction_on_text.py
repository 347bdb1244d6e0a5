"""Stage 2 on plain text, which stands for speech that Stage 1 hears without a mistake."""

import json

import pytest
import torch

from seam.data.text import read_passages
from seam.modeling_seam import SeamForSpeechRecognition, load_checkpoint
from seam.tests.helpers.training_sounds import TEXTS, changed, recipe, weights
from seam.train import instruction
from seam.train.recipe import RecipeError, StageRecipe, build, check_stage

pytestmark = pytest.mark.medium  # all stages are trained first


@pytest.fixture
def alignment(stages) -> str:
    return str(stages / "alignment")


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{one}\n" for one in TEXTS))
    return str(path)


def on_text(output_dir, manifest, steps, text, **values):
    data = {"train": [], "text": [text], **values.pop("data", {})}
    return recipe(output_dir, manifest, steps, data=data, **values)


def test_the_llm_learns_to_write_what_it_reads(alignment, backbones, manifest, text, tmp_path):
    values = {"model": alignment, "llm": backbones[1], "training": {"logging_steps": 1}}
    instruction.main(on_text(tmp_path / "out", manifest, 30, text, **values))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0] / 2
    after = weights(tmp_path / "out")
    before = {name: value for name, value in weights(alignment).items() if name in after}
    assert not changed(before, after)  # LoRA alone is new


def test_the_loss_is_that_of_speech_that_is_heard_without_a_mistake(alignment, backbones, manifest, text, tmp_path):
    values = {"model": alignment, "llm": backbones[1], "first_token_guidance": True, "training": {"logging_steps": 1}}
    instruction.main(on_text(tmp_path / "out", manifest, 1, text, **values))
    (first, *_) = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]

    model, processor = load_checkpoint(alignment)
    model.add_llm(backbones[1])  # LoRA changes nothing yet
    ids = [processor.transcript_ids(one.text) for one in read_passages(text)]
    labels = processor.labels(ids)
    heard = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], True, padding_value=-100)
    embeds = model.get_input_embeddings()(heard.clamp_min(0))
    mask = (heard >= 0).long()
    loss = model.eval()(labels=labels, aligned_embeds=embeds, aligned_mask=mask, first_token_ids=labels[:, 0]).loss
    assert first["loss"] == pytest.approx(float(loss), rel=1e-3)


def test_random_tokens_are_read_and_written_alike(alignment, backbones, manifest, text, tmp_path, monkeypatch):
    seen = []
    forward = SeamForSpeechRecognition.forward

    def spy(self, *args, **inputs):
        if "alignment_ids" in inputs:
            seen.append((self.training, inputs["alignment_ids"], inputs["labels"], inputs["first_token_ids"]))
        return forward(self, *args, **inputs)

    monkeypatch.setattr(SeamForSpeechRecognition, "forward", spy)
    values = {"model": alignment, "llm": backbones[1], "first_token_guidance": True, "token_noise": 0.5}
    instruction.main(on_text(tmp_path / "out", manifest, 3, text, **values))
    processor = load_checkpoint(alignment)[1]
    own = {tuple(processor.transcript_ids(one.text)) for one in read_passages(text)}
    rows = 0
    for is_training, read, labels, first in seen:
        assert is_training
        for ids, written, given in zip(read, labels, first, strict=True):
            count = int((ids >= 0).sum())
            assert ids[:count].tolist() == written[:count].tolist() and given == ids[0]
            assert (written[count], int((written >= 0).sum())) == (processor.labels([[]])[0, 0], count + 1)
            rows += tuple(ids[:count].tolist()) not in own
    assert rows > 10


def test_text_is_refused_where_it_cannot_stand_for_speech(alignment, backbones, manifest, text, tmp_path):
    model, processor = load_checkpoint(alignment)
    model.config.llm_inputs = "continuous"
    for part in (model, processor):
        part.save_pretrained(tmp_path / "continuous")
    with pytest.raises(RecipeError, match="continuous predictions, which text does not have; accepted: .*nearest"):
        instruction.main(on_text(tmp_path, manifest, 1, text, model=str(tmp_path / "continuous"), llm=backbones[1]))
    with pytest.raises(FileNotFoundError, match="no such text file"):
        instruction.main(on_text(tmp_path, manifest, 1, "none.txt", model=alignment, llm=backbones[1]))
    for stage in ("alignment", "refinement", "draft"):
        with pytest.raises(RecipeError, match=f"data.text is no setting of seam train {stage}, but of: instruction"):
            check_stage(on_text(tmp_path, manifest, 1, text), stage)
    for name, value in {
        "train": [manifest],
        "streaming": True,
        "encoder_states": "states",
        "batch_seconds": 100,
        "on_bad_audio": "skip",
    }.items():
        with pytest.raises(RecipeError, match=f"data.{name}.* is about training audio, but with data.text there is no"):
            build(StageRecipe, {"training": {"output_dir": "x", "max_steps": 1}, "data": {"text": [text], name: value}})
    with pytest.raises(RecipeError, match="token_noise: Stage 2 replaces tokens of data.text only"):
        check_stage(recipe(tmp_path, manifest, 1, token_noise=0.1), "instruction")
    with pytest.raises(RecipeError, match="aligned_embeds keeps what the aligner hears"):
        on_text(tmp_path, manifest, 1, text, aligned_embeds="embeds")
