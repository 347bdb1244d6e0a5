"""A comparison in seconds: every system is trained and evaluated once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from huggingface_hub.errors import StrictDataclassError

from seam.data.manifest import Utterance, write_manifest
from seam.evaluation.hypotheses import SYSTEMS
from seam.experiments import compare
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.recipe import RecipeError, build, load_recipe

WHISPER = SYSTEMS["whisper"].row
TEXTS = ["one two three", "stop the music", "the old goat", "hay"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(5)
    utterances = []
    for index, text in enumerate(TEXTS):
        time = np.arange(rng.integers(9000, 30000)) / 16000
        path = folder / f"{index}.wav"
        soundfile.write(path, np.sin(2 * np.pi * rng.uniform(100, 3000) * time) / 3, 16000)
        utterances.append(Utterance(path, text, len(time) / 16000, corpus="tones"))
    return str(write_manifest(folder / "manifest.jsonl", utterances))


def stage(steps: int, **values) -> dict:
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return {"training": training, **values}


def values(folder, backbones, manifest) -> dict:
    return {
        "output_dir": str(folder),
        "encoder": backbones[0],
        "llm": backbones[1],
        "data": {"train": [manifest], "validation": [manifest], "keep_encoder_states": True},
        "tests": {"tones": manifest, "again": manifest},
        "seeds": [0, 1],
        "systems": {
            "seam": {
                "label": "SEAM",
                "config": {"lora_rank": 4},
                "alignment": stage(3),
                "instruction": stage(2),
                "refinement": stage(2),
            },
            "untuned": {
                "start": "seam",
                "processor": {"instruction": "Correct the following:"},
                "rows": ["full"],
                "config": {"lora_rank": 2},
            },
            "linear": {
                "config": {"bridge": "linear", "bridge_config": {"hidden_size": 16}, "lora_rank": 0},
                "instruction": stage(2),
            },
        },
        "claims": [["SEAM, with FTG", "SEAM, Stage 1"], ["SEAM, with FTG", "linear"]],
    }


@pytest.mark.medium
def test_every_system_is_compared_once(backbones, manifest, tmp_path, capsys):
    results = compare.main(build(compare.CompareRecipe, values(tmp_path, backbones, manifest)))
    rows = ["SEAM, Stage 1", "SEAM, without FTG", "SEAM, with FTG", "untuned, with FTG", "linear"]
    assert list(results["systems"]) == [WHISPER, *rows]
    for sets in results["systems"].values():
        assert sets["tones"] == sets["again"] and len(sets["tones"]["seeds"]) in (1, 2)
    assert results["words"] == {"tones": 10, "again": 10}
    # 10 embeddings a second, and the untuned model reads the output of the tuned one's Stage 1.
    assert results["systems"]["linear"]["tones"]["embeddings_per_second"] == pytest.approx(10, rel=0.1)
    same = [results["systems"][row]["tones"]["embeddings_per_second"] for row in rows[:4]]
    assert len(set(same)) == 1
    for seed in (0, 1):
        untuned = SeamForSpeechRecognition.from_pretrained(tmp_path / f"seed-{seed}" / "untuned" / "start")
        processor = SeamProcessor.from_pretrained(tmp_path / f"seed-{seed}" / "untuned" / "start")
        assert processor.instruction == "Correct the following:" and untuned.config.lora_rank == 2
        assert untuned.config.prompt_token_ids == processor.prompt_ids()
    assert "| SEAM, with FTG than linear |" in (tmp_path / "comparison.md").read_text()

    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    capsys.readouterr()
    assert compare.main(build(compare.CompareRecipe, values(tmp_path, backbones, manifest))) == results
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == before
    assert " ..." not in capsys.readouterr().out  # nothing was done again


@pytest.mark.medium
def test_a_changed_system_alone_is_trained_again(backbones, manifest, tmp_path):
    recipe = values(tmp_path, backbones, manifest)
    del recipe["systems"]["untuned"], recipe["claims"]
    recipe["seeds"], recipe["whisper"] = [3], False
    compare.main(build(compare.CompareRecipe, recipe))
    seam = (tmp_path / "seed-3" / "seam" / "parts.json").read_bytes()
    recipe["systems"]["linear"]["instruction"] = stage(3)
    compare.main(build(compare.CompareRecipe, recipe))
    assert (tmp_path / "seed-3" / "seam" / "parts.json").read_bytes() == seam
    parts = json.loads((tmp_path / "seed-3" / "linear" / "parts.json").read_text())
    assert parts["instruction"]["settings"][1]["training"]["max_steps"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"systems": {"a": {}}}, "systems.a has neither a stage nor a start"),
        ({"systems": {"a": {"start": "b"}}}, "systems.a.start is 'b'; accepted: a system before it"),
        ({"systems": {"a": {"alignment": {"trainin": {}}}}}, "systems.a.alignment.trainin; did you mean"),
        ({"systems": {"a": {"like": "b"}}}, "systems.a.like is 'b'; accepted: a system before it"),
        (
            {"systems": {"a": {"alignment": stage(1)}, "b": {"start": "a", "processor": {"boa_token": "<|im_end|>"}}}},
            "systems.b.processor may differ from systems.a in the instruction only",
        ),
        (
            {"systems": {"a": {"alignment": stage(1)}, "b": {"start": "a", "config": {"bridge": "ctc"}}}},
            "systems.b.config.bridge may not differ from systems.a",
        ),
        ({"claims": [["SEAM", "linear"]]}, "is not a pair of rows of the table; these are: SEAM, Stage 1"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_trained(change, message, backbones, manifest, tmp_path):
    with pytest.raises(RecipeError, match=message):
        compare.main(build(compare.CompareRecipe, {**values(tmp_path / "out", backbones, manifest), **change}))
    assert not (tmp_path / "out").exists()


@pytest.mark.medium
def test_a_world_is_made_first(backbones, manifest, tmp_path, monkeypatch):
    """Speech, tests and backbones come from the world; their making is tested with the demo."""

    def make_world(recipe, folder, steps):
        for name, backbone in zip(("whisper", "llm"), backbones, strict=True):
            shutil.copytree(backbone, folder / name)
        shutil.copytree(Path(manifest).parent, folder / "speech")

    control = []
    monkeypatch.setattr(compare, "make_world", make_world)
    monkeypatch.setattr(
        compare,
        "make_control",
        lambda recipe, folder: control.append(shutil.copytree(backbones[1], folder / "control")),
    )
    recipe = values(tmp_path, backbones, manifest)
    del recipe["encoder"], recipe["llm"]
    backbone = {"training": {"max_steps": 1, "use_cpu": True}}
    recipe["world"] = {"whisper": backbone, "llm": backbone}
    recipe["data"] = {"train": ["speech/manifest.jsonl"], "validation": ["speech/manifest.jsonl"]}
    recipe["tests"] = {"tones": "speech/manifest.jsonl"}
    recipe["seeds"], recipe["claims"] = [0], []
    recipe["systems"] = {
        "seam": {"config": {"lora_rank": 2}, "alignment": stage(1, data={"train": ["speech/manifest.jsonl"]})},
        "control": {"llm": "control", "config": {"lora_rank": 2}, "alignment": stage(1)},
    }
    results = compare.main(build(compare.CompareRecipe, recipe))
    assert list(results["systems"]) == [WHISPER, "seam, Stage 1", "control, Stage 1"]
    assert control == [tmp_path / "control"]
    with pytest.raises(RecipeError, match="encoder and llm are made in the world"):
        compare.main(build(compare.CompareRecipe, {**recipe, "encoder": backbones[0]}))
    del recipe["world"]
    with pytest.raises(RecipeError, match="neither both backbones"):
        compare.main(build(compare.CompareRecipe, recipe))


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted([*RECIPES.glob("compare/*.yaml"), *RECIPES.glob("ablations/*.yaml")]))
def test_the_recipes_are_valid(path, tmp_path, monkeypatch):
    """Up to where the making of the world would begin: every stage and every claim has been checked."""

    def make_world(recipe, folder, steps):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "make_world", make_world)
    with pytest.raises(KeyboardInterrupt):
        compare.main(load_recipe(compare.CompareRecipe, path, [f"output_dir={tmp_path}"]))


@pytest.mark.medium
def test_recipes_share_a_folder_and_the_systems_in_it(backbones, manifest, tmp_path, capsys):
    recipe = values(tmp_path, backbones, manifest)
    recipe["seeds"], recipe["whisper"], recipe["claims"] = [0], False, []
    seam = recipe["systems"]["seam"]
    seam["alignment"]["training"].update(eval_strategy="steps", eval_steps=1)
    recipe["systems"] = {"seam": seam}
    compare.main(build(compare.CompareRecipe, recipe))
    first = (tmp_path / "comparison.json").read_bytes()
    capsys.readouterr()

    recipe["report"] = "other"
    recipe["systems"] = {
        "seam": seam,
        "mean": {"like": "seam", "start": "seam", "alignment": None, "config": {"llm_inputs": "continuous"}},
    }
    results = compare.main(build(compare.CompareRecipe, recipe))
    printed = capsys.readouterr().out
    assert "alignment: done before" in printed and "alignment ..." not in printed and "refinement ..." in printed
    # What it is like in everything else, but for the name.
    assert [row for row in results["systems"] if row.startswith("mean")] == [
        f"mean, {SYSTEMS[row].suffix}" for row in compare.ROWS
    ]
    config = SeamForSpeechRecognition.from_pretrained(tmp_path / "seed-0" / "mean" / "refinement").config
    assert (config.llm_inputs, config.lora_rank) == ("continuous", 4)
    assert results["systems"]["mean, Stage 1"] == results["systems"]["SEAM, Stage 1"]
    assert (tmp_path / "comparison.json").read_bytes() == first
    # Three evaluations in three steps and the last one again; the other stages have the last one alone.
    assert list(results["curves"]) == ["SEAM, alignment"]
    assert [step for step, _ in results["curves"]["SEAM, alignment"][0]] == [1, 2, 3, 3]
    assert (tmp_path / "other-curves.png").is_file() and not (tmp_path / "other-curves.png.tmp").exists()


@pytest.mark.parametrize(
    ("speech", "message"),
    [
        ({"word_domain": "wrds"}, "unknown domain 'wrds'; accepted: commands, digits"),
        ({"refinement": [{"domain": "poems", "count": 3}]}, "unknown domain 'poems'"),
        ({"refinement": [{"domain": "words", "count": 3, "noise": "loud"}]}, "noise"),
    ],
)
def test_a_wrong_world_is_found_before_it_is_made(speech, message, backbones, manifest, tmp_path):
    recipe = values(tmp_path / "out", backbones, manifest)
    backbone = {"training": {"max_steps": 1, "use_cpu": True}}
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        build(compare.CompareRecipe, {**recipe, "world": {"whisper": backbone, "llm": backbone, "speech": speech}})
