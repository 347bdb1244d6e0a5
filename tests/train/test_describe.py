"""The parameter counts of the paper's architecture, against figures worked out by hand, and of any other."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seam.__main__ import app
from seam.modeling_seam import SeamForSpeechRecognition
from seam.tests.helpers.shipped import TINY
from seam.train.describe import describe
from seam.train.recipe import RecipeError, StageRecipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# Millions, by hand: encoder 32 x (4 d^2 + 3 d + 8 d^2 + 5 d + 4 d) + 2 d of norm + 1500 d of positions + convolutions
# (80 + d) x 3 d + 2 d with d = 1280, and so on; the same as in the audit of the paper.
FIGURES = {
    "speech encoder": 636.785,
    "alignment decoder": 840.133,
    "projections": 6.5536,
    "language model": 4022.468,
    "  of it the embedding table": 388.956,
    "LoRA adapters": 66.060,
}
TABLE_2 = {"speech encoder": 629, "alignment decoder": 839, "projections": 72, "language model": 4058}


@pytest.fixture(scope="module")
def papers():
    return describe(str(RECIPES / "paper" / "alignment.yaml"))


def test_the_papers_architecture(papers):
    counts = {one.name: one.parameters / 1e6 for one in papers.components}
    assert counts == pytest.approx(FIGURES, rel=1e-5)
    assert TABLE_2.items() <= {one.name: one.paper for one in papers.components}.items()
    trained = {one.name: one.trained_in for one in papers.components if one.trained_in}
    assert trained == {"alignment decoder": (1,), "projections": (1,), "LoRA adapters": (2, 3)}


def test_how_the_papers_figures_come_about(papers):
    notes = {one.name: one.note for one in papers.components}
    assert "629.15M" in notes["speech encoder"] and "838.86M" in notes["alignment decoder"]
    assert "66.39M" in notes["projections"] and "72.94M" in notes["projections"]
    assert "heads of 80 instead of 128 it would be 61.64M" in notes["LoRA adapters"]


def test_a_learned_mask_is_trained_in_stage_3(build_model, tmp_path):
    build_model(learned_mask=True).save_pretrained(tmp_path)
    described = describe(str(tmp_path))
    mask = described.components[-1]
    assert (mask.name, mask.parameters, mask.trained_in) == ("learned mask", 48, (3,))
    assert described.stages[2].trained == described.stages[1].trained + 48


def test_a_draft_head_is_trained_beside_the_stages(build_model, tmp_path):
    build_model(draft_vocabulary=list(range(10, 300))).save_pretrained(tmp_path)
    described = describe(str(tmp_path))
    assert [stage.number for stage in described.stages] == [1, 2, 3, "draft"]
    head = next(one for one in described.components if one.name == "draft head")
    assert (head.parameters, head.trained_in) == ((32 + 1) * 291, ("draft",))
    first, _, _, draft = described.stages
    assert draft.trained == head.parameters and draft.loaded == first.loaded
    assert draft.training_fp32 == 4 * (first.loaded + 3 * head.parameters)


def test_the_paper_has_no_draft_head(tmp_path):
    paper = RECIPES / "paper" / "alignment.yaml"
    (tmp_path / "draft.yaml").write_text(f"base: {paper}\nconfig: {{draft_vocabulary: {list(range(19029))}}}\n")
    result = CliRunner().invoke(app, ["describe", str(tmp_path / "draft.yaml")])
    assert result.exit_code == 0 and "24.38M" in result.output  # (1280 + 1) x 19,030


@pytest.mark.parametrize("trained", [False, True])
def test_the_table_in_the_place_of_the_projections(papers, tmp_path, trained):
    paper = RECIPES / "paper" / "alignment.yaml"
    recipe = tmp_path / "table.yaml"
    recipe.write_text(
        f"base: {paper}\nconfig: {{token_projection: table}}\ntrain_token_table: {str(trained).lower()}\n"
    )
    described = describe(str(recipe))
    components = {one.name: one for one in described.components}
    table, rest = (
        components.pop("token table"),
        {one.name: one for one in papers.components if one.name != "projections"},
    )
    assert table.parameters == 151936 * 1280 and table.trained_in == (1,) * trained
    assert "66.39M" in table.note and components == rest
    decoder = rest["alignment decoder"].parameters
    assert described.stages[0].trained == decoder + trained * table.parameters
    result = CliRunner().invoke(app, ["describe", str(recipe)])
    assert result.exit_code == 0 and "token table" in result.output and "194.48M" in result.output


def test_what_each_stage_loads_and_trains(papers):
    decoder = FIGURES["alignment decoder"] + FIGURES["projections"]
    loaded = FIGURES["speech encoder"] + decoder + FIGURES["  of it the embedding table"]
    first, second, third = papers.stages
    assert first.loaded / 1e6 == pytest.approx(loaded, rel=1e-5)
    assert first.trained / 1e6 == pytest.approx(decoder, rel=1e-5)
    assert first.weights_fp32 == 4 * first.loaded and first.weights_bf16 == 2 * first.loaded
    # Frozen weights once, trained ones with a gradient and two moments.
    assert first.training_fp32 / 1e6 == pytest.approx(4 * (loaded + 3 * decoder), rel=1e-5)
    everything = FIGURES["speech encoder"] + decoder + FIGURES["language model"] + FIGURES["LoRA adapters"]
    assert second.loaded / 1e6 == pytest.approx(everything, rel=1e-5) and second.loaded == third.loaded
    assert second.trained == third.trained == papers.components[-1].parameters
    assert [stage.paper_trained for stage in papers.stages] == [911, 62, None]


def test_another_architecture_stands_beside_nothing():
    description = describe(str(RECIPES / "small" / "alignment.yaml"))
    assert not any(one.paper or one.note for one in description.components)
    assert {one.name: one.parameters for one in description.components}["speech encoder"] == 307_216_384


def test_a_checkpoint():
    description = describe(str(TINY))
    model = SeamForSpeechRecognition.from_pretrained(TINY)
    counts = {one.name: one.parameters for one in description.components}
    parts = ("speech encoder", "alignment decoder", "projections", "language model", "LoRA adapters")
    assert sum(counts[part] for part in parts) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["  of it the embedding table"] == model.get_input_embeddings().weight.numel()


def test_what_cannot_be_described(tmp_path):
    with pytest.raises(RecipeError, match="continues with runs/paper/alignment, .* the recipe of Stage 1"):
        describe(str(RECIPES / "paper" / "instruction.yaml"))
    (tmp_path / "empty.yaml").write_text("training: {output_dir: x}\n")
    with pytest.raises(RecipeError, match="names neither a model nor both backbones"):
        describe(str(tmp_path / "empty.yaml"))


def test_the_command():
    result = CliRunner().invoke(app, ["describe", str(TINY)])
    assert result.exit_code == 0 and "alignment decoder" in result.output and "paper" not in result.output
    result = CliRunner().invoke(app, ["describe", str(RECIPES / "paper" / "alignment.yaml"), "--json"])
    assert json.loads(result.stdout)["components"][0]["paper"] == 629
    result = CliRunner().invoke(app, ["describe", "nowhere.yaml"])
    assert result.exit_code == 1 and "nowhere.yaml: no such recipe" in result.output


@pytest.mark.parametrize("folder", ["paper", "small", "own"])
def test_the_recipes_say_what_the_paper_says(folder):
    stages = [
        load_recipe(StageRecipe, RECIPES / folder / f"{stage}.yaml", ["training.use_cpu=true"])
        for stage in ("alignment", "instruction", "refinement", "draft")
    ]
    for recipe in stages[:3]:
        training = recipe.training
        assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (5e-4, 0.01, 1.0)
        assert training.bf16 and training.optim.startswith("adamw") and recipe.data.casing == "lower"
    assert (stages[2].masking_probability, stages[2].deletion_probability) == (0.05, 0.1)
    assert [stages[1].model, stages[2].model] == [stages[0].training.output_dir, stages[1].training.output_dir]
    assert (stages[3].model, stages[3].data.train) == (stages[0].training.output_dir, stages[0].data.train)
    if folder == "paper":
        config = stages[0].config
        assert (config["lora_rank"], config["lora_alpha"], config["lora_dropout"]) == (32, 64, 0.1)
        assert len(config["lora_target_modules"]) == 7 and config["alignment_lambda"] == 0.5
        assert stages[0].processor.instruction == "Transcribe the following audio:"
