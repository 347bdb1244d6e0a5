"""Recipes: typed, overridable, and clear about what is wrong."""

from pathlib import Path

import pytest

from seam.experiments.demo import DemoRecipe, stage_recipes
from seam.train.recipe import RecipeError, StageRecipe, check_stage, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "encoder: whisper\nllm: qwen\nconfig: {lora_rank: 8}\n"
        f"training: {{output_dir: {tmp_path / 'out'}, learning_rate: 5e-4, max_steps: 10}}\n"
        "data: {train: [a.jsonl], validation: [b.jsonl]}\n"
    )
    return path


def test_values_and_defaults(recipe):
    read = load_recipe(StageRecipe, recipe, [])
    assert (read.encoder, read.llm, read.config) == ("whisper", "qwen", {"lora_rank": 8})
    assert (read.training.learning_rate, read.training.max_steps) == (5e-4, 10)
    assert (read.data.train, read.data.casing) == (["a.jsonl"], "lower")
    assert (read.masking_probability, read.deletion_probability) == (0.05, 0.1)


def test_overrides(recipe):
    read = load_recipe(
        StageRecipe,
        recipe,
        [
            "training.learning_rate=1e-3",
            "data.casing=upper",
            "config.lora_rank=4",
            "model=somewhere",
            "data.train=[c.jsonl]",
        ],
    )
    assert read.training.learning_rate == 1e-3
    assert (read.data.casing, read.config, read.model, read.data.train) == (
        "upper",
        {"lora_rank": 4},
        "somewhere",
        ["c.jsonl"],
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainning.max_steps=3", "unknown recipe key trainning; did you mean training?"),
        ("training.max_step=3", "unknown recipe key training.max_step; did you mean training.max_steps?"),
        ("data.xyz=3", "unknown recipe key data.xyz; accepted: train, validation"),
        (
            "config.alignment_lamda=0.3",
            "unknown recipe key config.alignment_lamda; did you mean config.alignment_lambda?",
        ),
        ("processor.boa_tok=x", "unknown recipe key processor.boa_tok; did you mean processor.boa_token?"),
        ("data.eval_batch_size=many", "data: .*eval_batch_size"),
        ("data.casing=title", "data.casing is 'title'; accepted: lower, upper, keep."),
        ("mask=noise", "mask is 'noise'; accepted: zero, learned."),
        ("deletion_probability=1.5", "deletion_probability is 1.5"),
        ("data=3", "data must be a mapping"),
        ("training.max_steps=many", "training: .*max_steps|training: .*many"),
        ("novalue", "'novalue' is not of the form key=value"),
    ],
)
def test_mistakes_are_named(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(StageRecipe, recipe, [override])


WORDS = ["no", "off", "yes", "on", "y", "N", "0x", "010", "1:30", "2024-01-01", "1_000"]


@pytest.mark.parametrize("word", WORDS)
def test_words_stay_words(recipe, word):
    """YAML 1.1 reads booleans, octal and sexagesimal numbers and dates out of them."""
    overrides = [f"training.run_name={word}", f"data.train=[{word}]", f"data.train_split={word}"]
    read = load_recipe(StageRecipe, recipe, overrides)
    assert (read.training.run_name, read.data.train, read.data.train_split) == (word, [word], word)


def test_a_setting_of_words_takes_no_and_off(recipe, tmp_path):
    assert load_recipe(StageRecipe, recipe, ["training.eval_strategy=no"]).training.eval_strategy == "no"
    (tmp_path / "other.yaml").write_text(f"base: {recipe}\ntraining:\n  save_strategy: no\n")
    assert load_recipe(StageRecipe, tmp_path / "other.yaml", []).training.save_strategy == "no"
    with pytest.raises(RecipeError, match="training: .*eval_strategy.*: invalid choice: 'off'"):
        load_recipe(StageRecipe, recipe, ["training.eval_strategy=off"])


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("on", True), ("Yes", True), ("off", False), ("no", False)]
)
def test_settings_that_are_true_or_false_take_the_old_words(recipe, word, value):
    names = ("training.eval_on_start", "data.streaming", "config.learned_mask", "first_token_guidance")
    read = load_recipe(StageRecipe, recipe, [*(f"{name}={word}" for name in names), "training.eval_strategy=steps"])
    assert (read.training.eval_on_start, read.data.streaming, read.first_token_guidance) == (value,) * 3
    assert read.config["learned_mask"] is value


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("1E3", 1e3), ("2.5e-3", 2.5e-3), (".5", 0.5), ("3.", 3.0), ("0", 0.0), ("7", 7.0)],
)
def test_numbers(recipe, text, number):
    read = load_recipe(StageRecipe, recipe, [f"cross_entropy_weight={text}", f"training.learning_rate={text}"])
    assert (read.cross_entropy_weight, read.training.learning_rate) == (number, number)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=[a"], r"'data.train=\[a': the value is not YAML"),
        (["model=x", "model.name=y"], "'model.name=y': model is 'x', which has no keys"),
        (["data.train=[a]", "data.train.first.name=y"], "data.train.first is .'a'., which has no keys"),
        (["config={lora_rank: 4, lora_rank: 8}"], "the key 'lora_rank' comes twice"),
    ],
)
def test_overrides_that_say_nothing_are_named(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(StageRecipe, recipe, overrides)


@pytest.mark.parametrize("content", ["seed: caf\u00e9".encode("latin-1"), b"a: 1\na: 2\n", b"a: \x00"])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match="bad.yaml is not YAML"):
        load_recipe(StageRecipe, tmp_path / "bad.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["aligner_from_decoder=true", "config.bridge=ctc"], "the bridge 'ctc' is no Whisper decoder; accepted: align"),
        (["aligner_from_decoder=true", "model=x"], "aligner_from_decoder is for a new model, but model=x has its"),
        (["aligner_from_decoder=2"], "aligner_from_decoder"),
        (["mask=learned", "masking_probability=0"], "mask is 'learned', but with a masking_probability of 0"),
    ],
)
def test_settings_that_do_not_go_together_are_named(recipe, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(StageRecipe, recipe, overrides)


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("aligner_from_decoder=true", ["alignment"]),
        ("first_token_guidance=true", ["instruction", "refinement"]),
        ("mask=learned", ["refinement"]),
    ],
)
def test_a_setting_of_other_stages_is_refused(recipe, override, stages):
    read = load_recipe(StageRecipe, recipe, [override])
    default = load_recipe(StageRecipe, recipe, [])
    name = override.partition("=")[0]
    for stage in ("alignment", "instruction", "refinement", "draft"):
        check_stage(default, stage)
        if stage in stages:
            check_stage(read, stage)
            continue
        with pytest.raises(
            RecipeError, match=f"^{name} is no setting of seam train {stage}, but of: {', '.join(stages)}"
        ):
            check_stage(read, stage)


def test_no_recipe_and_no_yaml(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(StageRecipe, tmp_path / "none.yaml", [])
    (tmp_path / "bad.yaml").write_text("a: [1,")
    with pytest.raises(RecipeError, match="bad.yaml is not YAML"):
        load_recipe(StageRecipe, tmp_path / "bad.yaml", [])


@pytest.mark.parametrize("path", sorted((RECIPES / "demo").glob("*.yaml")), ids=lambda path: path.name)
def test_demo_recipes_are_valid(path, tmp_path):
    recipe = load_recipe(DemoRecipe, path, [f"output_dir={tmp_path}"])
    stages = stage_recipes(recipe, tmp_path)
    assert stages["alignment"].encoder == str(tmp_path / ("whisper-2" if recipe.second_round else "whisper"))
    assert stages["instruction"].model == str(tmp_path / "alignment")
    assert stages["refinement"].model == str(tmp_path / "instruction")


@pytest.mark.parametrize("path", sorted((RECIPES / "own").glob("*.yaml")), ids=lambda path: path.name)
def test_own_recipes_are_valid(path):
    read = load_recipe(StageRecipe, path, ["training.bf16=false", "training.use_cpu=true"])
    assert read.training.learning_rate == {"draft": 2e-3, "rewritten_decoder": 2e-5}.get(path.stem, 5e-4)
    assert (read.model is None) == (path.stem in ("alignment", "rewritten_decoder"))


def test_a_recipe_can_build_on_another(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text(
        "model: there\nconfig: {lora_rank: 4, lora_alpha: 8}\ndata: {train: [a, b]}\ntraining: {output_dir: x}\n"
    )
    (tmp_path / "sub" / "b.yaml").write_text("base: ../a.yaml\nconfig: {lora_rank: 2}\ndata: {train: [c]}\n")
    (tmp_path / "c.yaml").write_text("base: sub/b.yaml\nmodel: null\n")
    read = load_recipe(StageRecipe, tmp_path / "c.yaml", ["config.lora_dropout=0.5"])
    assert read.config == {"lora_rank": 2, "lora_alpha": 8, "lora_dropout": 0.5}
    assert read.data.train == ["c"] and read.model is None and read.training.output_dir == "x"

    (tmp_path / "a.yaml").write_text("base: c.yaml\n")
    with pytest.raises(RecipeError, match="builds on this recipe itself"):
        load_recipe(StageRecipe, tmp_path / "c.yaml", [])
    (tmp_path / "a.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(RecipeError, match="nowhere.yaml: no such recipe"):
        load_recipe(StageRecipe, tmp_path / "c.yaml", [])


def test_augmentation_is_refused_where_the_audio_is_read_once(recipe):
    one = "data.augmentation.time_masks=2"
    assert load_recipe(StageRecipe, recipe, [one, "data.augmentation.speeds=[0.9, 1, 1.1]"]).data.augmentation
    assert not load_recipe(StageRecipe, recipe, ["data.keep_encoder_states=true"]).data.augmentation
    with pytest.raises(RecipeError, match="anew in every epoch, but data.keep_encoder_states keeps"):
        load_recipe(StageRecipe, recipe, [one, "data.keep_encoder_states=true"])
    read = load_recipe(StageRecipe, recipe, [one])
    check_stage(read, "alignment")
    with pytest.raises(RecipeError, match="data.augmentation: Stage 1 decodes the audio of Stage 3 once"):
        check_stage(read, "refinement")
    for override, message in (
        ("data.augmentation.time_mask=2", "did you mean data.augmentation.time_masks"),
        ("data.augmentation.speeds=[fast]", "data.augmentation: .*speeds"),
        ("data.augmentation.min_snr=70", "min_snr is 70.0, above max_snr"),
    ):
        with pytest.raises(ValueError, match=message):
            load_recipe(StageRecipe, recipe, [override])


def test_bad_audio_stops_or_is_skipped(recipe):
    assert load_recipe(StageRecipe, recipe, []).data.on_bad_audio == "stop"
    with pytest.raises(RecipeError, match="data.on_bad_audio is 'ignore'; accepted: stop, skip."):
        load_recipe(StageRecipe, recipe, ["data.on_bad_audio=ignore"])
    read = load_recipe(StageRecipe, recipe, ["data.on_bad_audio=skip"])
    check_stage(read, "instruction")
    with pytest.raises(RecipeError, match="Stage 3 reads all audio before it trains"):
        check_stage(read, "refinement")
    with pytest.raises(RecipeError, match="data.keep_encoder_states reads all audio before the training"):
        load_recipe(StageRecipe, recipe, ["data.on_bad_audio=skip", "data.keep_encoder_states=true"])


def test_budgets_of_a_batch(recipe):
    assert not load_recipe(StageRecipe, recipe, []).data.has_budget
    assert load_recipe(StageRecipe, recipe, ["data.batch_seconds=100"]).data.has_budget
    assert load_recipe(StageRecipe, recipe, ["data.batch_tokens=300"]).data.has_budget
    with pytest.raises(RecipeError, match="makes utterances of other lengths"):
        joined = "data.augmentation.concatenation_probability=0.3"
        load_recipe(StageRecipe, recipe, ["data.batch_tokens=300", joined])


def test_bf16_without_a_gpu_says_what_to_give(recipe, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(
        RecipeError, match="training.bf16 needs a GPU, .* give training.bf16=false, or training.use_cpu="
    ):
        load_recipe(StageRecipe, recipe, ["training.bf16=true"])
    assert load_recipe(StageRecipe, recipe, ["training.bf16=true", "training.use_cpu=true"]).training.bf16


def test_a_limit_of_errors_is_a_share_of_stage_3(recipe):
    assert load_recipe(StageRecipe, recipe, ["max_error_rate=15"]).max_error_rate == 15
    with pytest.raises(RecipeError, match="max_error_rate is -1; accepted: 0 and above, in percent"):
        load_recipe(StageRecipe, recipe, ["max_error_rate=-1"])
    with pytest.raises(RecipeError, match="max_error_rate is no setting of seam train instruction"):
        check_stage(load_recipe(StageRecipe, recipe, ["max_error_rate=15"]), "instruction")
