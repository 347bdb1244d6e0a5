"""The training of the English checkpoint, step by step, with tiny backbones and tones in the place of people."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from seam.data.manifest import Utterance, write_manifest
from seam.evaluation.hypotheses import SYSTEMS, TABLE_1
from seam.experiments import english, english_speech
from seam.experiments.english import EnglishRecipe
from seam.modeling_seam import load_checkpoint
from seam.modeling_seam.weights import BACKBONE_RECORD, packaged_folder, weight_files, weights_record
from seam.train.recipe import RecipeError, StageRecipe, build, load_recipe

ROOT = Path(english.__file__).parents[1]
ORDER = ["alignment", "instruction", "refinement", "draft"]


# ---- the recipes that are shipped ----


@pytest.fixture
def shipped(monkeypatch) -> EnglishRecipe:
    monkeypatch.chdir(ROOT)
    return load_recipe(EnglishRecipe, "recipes/english/english.yaml", [])


def test_each_stage_begins_with_the_one_before_and_reads_what_the_steps_write(shipped):
    folder = shipped.output_dir
    assert list(shipped.stages) == ORDER == list(english.STAGES)
    before = f"{folder}/untrained"
    for name, path in shipped.stages.items():
        stage = load_recipe(StageRecipe, path, ["training.use_cpu=true"])
        assert (stage.model, stage.training.output_dir) == (before, f"{folder}/{name}")
        assert stage.data.validation == [f"{folder}/tests/validation.jsonl"] and stage.data.casing == "keep"
        if name == "instruction":
            assert stage.data.text == [f"{folder}/text.txt"] and shipped.config["llm_inputs"] == "nearest"
        else:
            part = "later" if name == "refinement" else "alignment"
            assert stage.data.train == [f"{folder}/speech/{part}.jsonl"]
            assert stage.data.encoder_states == f"{folder}/states/{part}"
        before = stage.training.output_dir


def test_every_corpus_is_credited(shipped, shared):
    """In the card, which names the licences, by the names that people know."""
    known = {
        "fsdd": "Free Spoken Digit",
        "common_voice": "Common Voice",
        "robotutor_stories": "RoboTutor",
        "african_storybook": "African Storybook",
        "an4": "AN4",
        "ljspeech": "LJ Speech",
        "speech_commands": "Speech Commands",
    }
    settings = english_speech.EnglishSpeech(corpora=[str(shared / Path(name).name) for name in shipped.speech.corpora])
    corpora = {one.corpus for one in english_speech.choose(settings, np.random.default_rng(0))}
    assert not corpora & {*english_speech.EVALUATION_ONLY}
    card = json.loads((ROOT / "recipes" / "english" / "card.json").read_text(encoding="utf-8"))
    for corpus in corpora:
        name = "LibriSpeech" if corpus.startswith("librispeech") else known.get(corpus, corpus)
        assert any(name in licensed for licensed in card["licences"]), corpus


# ---- all steps ----


@pytest.fixture
def backbones_from_packages(multilingual, tmp_path, monkeypatch) -> dict[str, Path]:
    """Lay the tiny backbones down as `seam backbones` would."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = {}
    for role, source in zip(("encoder", "llm"), multilingual, strict=True):
        hub_id = f"nobody/tiny-{role}"
        folders[role] = packaged_folder(hub_id)
        shutil.copytree(source, folders[role])
        record = {"id": hub_id, **weights_record(weight_files(folders[role]))}
        (folders[role] / BACKBONE_RECORD).write_text(json.dumps(record))
    monkeypatch.setattr(english, "packaged_backbones", lambda say: folders)
    return folders


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a function that makes a recipe of all stages, of two steps each, on tones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(english_speech, "LABEL_TOKENS", 8)
    rng = np.random.default_rng(0)
    for name, corpus in (("first", "librispeech train-clean-100"), ("second", "common_voice")):
        (tmp_path / name).mkdir()
        utterances = []
        for index in range(16):
            samples = int(rng.integers(6000, 20000))
            sound = np.sin(2 * np.pi * (200 + 40 * index) * np.arange(samples) / 16000)
            path, split = tmp_path / name / f"{name}{index}.wav", "dev" if index % 4 == 0 else "train"
            soundfile.write(path, 0.3 * sound, 16000)
            text = f"Go on, {index}."
            utterances.append(Utterance(path, text, samples / 16000, f"{name} {split} {index % 6}", corpus, split))
        write_manifest(tmp_path / name / "metadata.jsonl", utterances)

    def recipe(**stage) -> EnglishRecipe:
        before, paths = "out/untrained", {}
        for name in ORDER:
            part = "later" if name == "refinement" else "alignment"
            data = {"train": [f"out/speech/{part}.jsonl"], "encoder_states": f"out/states/{part}"}
            data = {"text": ["out/text.txt"]} if name == "instruction" else data
            training = {"max_steps": 2, "save_strategy": "no", "bf16": True, "report_to": "none"}
            validation = {"validation": ["out/tests/validation.jsonl"], "casing": "keep"}
            values = {"model": before, "data": {**data, **validation}}
            if name == "refinement":
                values["alignment_cache"] = "out/stage1"
            values["training"] = {**training, "output_dir": f"out/{name}", "disable_tqdm": True}
            paths[name] = f"{name}.yaml"
            Path(paths[name]).write_text(yaml.safe_dump({**values, **stage.get(name, {})}))
            before = f"out/{name}"
        # Nothing longer than the tiny encoder's window of 2 s.
        speech = {"corpora": ["first", "second"], "varied_share": 0.0, "joined_share": 0.0, "silent": 0}
        speech |= {"validation": 4, "test": 2}
        Path("book.txt").write_text("The old goat eats hay.\n\nTurn the light on!\n")
        config = {"lora_rank": 2, "speech_margin": 0.2, "llm_inputs": "nearest"}
        values = {"output_dir": "out", "speech": speech, "text": {"files": ["book.txt"]}, "config": config}
        return build(EnglishRecipe, {**values, "stages": paths})

    return recipe


@pytest.mark.medium
def test_an_interrupted_command_goes_on(recipe, backbones_from_packages, monkeypatch, capsys):
    def interrupted(stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(english.STAGES, "instruction", interrupted)
        english.main(recipe())
    done = {"untrained", "test speech", "speech", "text", "alignment"}
    assert set(json.loads(Path("out/parts.json").read_text())) == done
    capsys.readouterr()

    result = english.main(recipe())
    said = capsys.readouterr().out
    assert all(f"{step}: done before" in said for step in done)
    assert "instruction: done before" not in said

    folder = Path("out/model")
    assert result["checkpoint"] == str(folder)
    kinds = {"people", "common_voice", "noisy", "telephone"}
    assert {name: set(row) for name, row in result["wer"].items()} == {SYSTEMS[name].row: kinds for name in TABLE_1}
    config = json.loads((folder / "config.json").read_text())
    assert config["light_checkpoint"] and config["token_projection"] == "table"
    model, processor = load_checkpoint(str(folder))  # its table is made of the backbones again
    assert model.draft_head is not None and processor.leading_space
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Common Voice" in card and all(kind in card for kind in kinds)


def test_what_is_wrong_is_found_before_anything_is_made(recipe):
    with pytest.raises(RecipeError, match="max_stepz"):
        english.main(recipe(refinement={"training": {"max_stepz": 1, "output_dir": "out/refinement"}}))
    without_text = recipe()
    Path("book.txt").unlink()
    with pytest.raises(RecipeError, match=r"text.files: book.txt: no such file"):
        english.main(without_text)
    shutil.rmtree("second")
    with pytest.raises(FileNotFoundError, match="no such manifest"):
        english.main(recipe())
    assert not Path("out").exists()
