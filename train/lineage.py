"""Carry what the card of a checkpoint says of its training data and licences over to what is trained from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from seam.data.manifest import Utterance
from seam.train.recipe import RecipeError, StageRecipe

CARD = "card.json"
# Of the parent's card, what holds for its child. Title, summary and results are the parent's own.
CARRIED = ("language", "training_data", "limits", "licences", "license", "datasets")


def inherited_card(recipe: StageRecipe, utterances: Sequence[Utterance]) -> dict[str, Any] | None:
    """
    Return the content of the new checkpoint's `card.json`, or `None` where the recipe's `model` has none.

    It says that the parent was trained further, and on what: corpora, or the names of the files where no corpus is
    stated. Their licence is not known here, and the card says so.

    Args:
        recipe: of the training.
        utterances: that it trains on.

    Raises:
        RecipeError: when the parent's file is damaged; before the training, not after it.
    """
    if recipe.model is None:
        return None
    found = cached_file(
        recipe.model, CARD, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if found is None:
        return None
    try:
        parent = json.loads(Path(found).read_text(encoding="utf-8"))
        card = {key: parent[key] for key in CARRIED if key in parent}
        title, before = parent.get("title"), str(card.get("training_data", ""))
        licences = dict(card.get("licences", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"{found} is damaged: it is no card of a checkpoint.") from error
    corpora = set() if recipe.data.streaming else {utterance.corpus for utterance in utterances}
    files = [Path(name).name for name in (*recipe.data.text, *recipe.data.train)]
    names = ", ".join(sorted(corpora) if corpora and all(corpora) else dict.fromkeys(files))
    card["summary"] = f"Trained further from {title}." if title else parent.get("summary", "")
    further = f"Then trained further on: {names}."
    card["training_data"] = before if further in before else f"{before}\n\n{further}".strip()
    card["licences"] = {names: "not stated", **licences}
    return card
