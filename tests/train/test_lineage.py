"""A checkpoint that was trained from another says on what that one was trained, and under which licences."""

import json
from pathlib import Path

import pytest

from seam.publishing.card import read_texts
from seam.tests.helpers import training_sounds
from seam.tests.helpers.shipped import RECORDINGS, TINY
from seam.train import refinement
from seam.train.inputs import read_utterances
from seam.train.lineage import inherited_card
from seam.train.recipe import RecipeError

MANIFEST = str(RECORDINGS / "manifest.jsonl")


def card_of(model, manifest=MANIFEST):
    recipe = training_sounds.recipe("unused", manifest, 1, model=str(model))
    return inherited_card(recipe, read_utterances(recipe.data)[0])


@pytest.mark.medium
def test_fine_tuned_the_shipped_checkpoint_keeps_training_data_and_licence(tmp_path):
    refinement.main(training_sounds.recipe(tmp_path, MANIFEST, 1, model=str(TINY)))
    parent, child = (read_texts(folder / "card.json") for folder in (TINY, tmp_path))
    assert child.license == parent.license == "apache-2.0" and child.language == "en" and child.limits == parent.limits
    assert child.training_data == f"{parent.training_data}\n\nThen trained further on: recordings."
    assert child.licences == {"recordings": "not stated", **parent.licences}
    assert child.title is None and child.summary == f"Trained further from {parent.title}."
    (tmp_path / "card.json").write_text('{"title": "Mine"}')
    refinement.main(training_sounds.recipe(tmp_path, MANIFEST, 1, model=str(TINY)))
    assert read_texts(tmp_path / "card.json").title == "Mine"  # a card that is there is the user's


def test_the_next_stage_on_the_same_data_says_it_once(tmp_path):
    first = card_of(TINY)
    (tmp_path / "card.json").write_text(json.dumps(first))
    assert card_of(tmp_path) == first


def test_without_a_corpus_the_manifest_is_named(tmp_path):
    row = {"audio": str(next(Path(RECORDINGS).glob("*.*"))), "text": "one", "duration": 1.0}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    assert card_of(TINY, str(tmp_path / "mine.jsonl"))["training_data"].endswith("on: mine.jsonl.")


def test_a_checkpoint_without_a_card_has_none_to_pass_on(tmp_path):
    assert card_of(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"licences": 3}'])
def test_a_damaged_card_is_named_before_the_training(tmp_path, content):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(RecipeError, match="card.json is damaged: it is no card"):
        card_of(tmp_path)
