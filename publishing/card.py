"""The model card: `model_card.md` filled in by huggingface_hub from the files of a checkpoint, never by hand."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from seam.data.files import replacing
from seam.evaluation import report
from seam.evaluation.hypotheses import SYSTEMS
from seam.evaluation.report import TASK, eval_result
from seam.evaluation.table import markdown

TEMPLATE = Path(__file__).parents[1] / "model_card.md"
# What each file of results holds at least.
RESULTS = {
    "table.json": ("wer", "interval", "words", "notes"),
    "results.json": ("run", "test_sets", "systems", "rates"),
}
PLOTS = ("table.png", "results.png")


@strict
@dataclass
class CardTexts:
    """
    What `card.json` can say; every key may be absent.

    Args:
        title: by default the last part of the model's id.
        summary, training_data, limits: Markdown.
        language: code of the language heard.
        licences: of each part, for people.
        license: of the whole, the Hub's identifier.
        system: the row of `table.json` that is the model's own result.
        datasets: Hub ids of the training data.
    """

    title: str | None = None
    summary: str = ""
    language: str | None = None
    training_data: str = "Not stated."
    limits: str = "Not stated."
    licences: dict[str, str] = field(default_factory=dict)
    license: str | None = None
    system: str = SYSTEMS["full"].row
    datasets: list[str] = field(default_factory=list)


def write_card(model, processor, folder: Path, model_id: str) -> None:
    """
    Write the card of a checkpoint as `README.md`, the name under which the Hub shows it, from `card.json` (see
    `CardTexts`), `table.json` (of `seam.evaluation.table.write_table`) and `results.json` (of `seam score`) in the same
    folder, where they are.

    Args:
        model, processor: the checkpoint.
        folder: where it is saved.
        model_id: the name under which the snippets of the card load it, a Hub id or a folder.

    Raises:
        ValueError: naming file and key, when one of these files is not what it should be.
    """
    folder = Path(folder)
    texts = read_texts(folder / "card.json")
    table, results = (_read_whole(folder / name, keys) for name, keys in RESULTS.items())
    title = texts.title or Path(model_id).name
    if table is not None and texts.system not in table["wer"]:
        raise ValueError(f"{folder / 'card.json'}: system: no row {texts.system!r} in table.json: {list(table['wer'])}")
    evaluated = report.eval_results(results) if results else []
    if table:
        evaluated += [
            eval_result(name, "wer", "WER", rate) for name, rate in sorted(table["wer"][texts.system].items())
        ]
    shown = [markdown(table)] if table else []
    shown += [report.markdown(results)] if results else []
    parts = {name: getattr(model, name) for name in ("encoder", "bridge", "language_model")}
    card = ModelCard.from_template(
        ModelCardData(
            language=texts.language,
            license=texts.license,
            library_name="transformers",
            pipeline_tag=TASK,
            tags=["seam", "speech-llm"],
            datasets=texts.datasets or None,
            model_name=title if evaluated else None,
            eval_results=evaluated or None,
        ),
        template_path=str(TEMPLATE),
        title=title,
        model_id=model_id,
        parameters={name: f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f}" for name, part in parts.items()},
        window_seconds=f"{processor.max_seconds:g}",
        results="\n".join(shown).strip() or "Not stated.",
        system=texts.system if table else None,
        plots=[name for name in PLOTS if (folder / name).is_file()],
        **{name: getattr(texts, name) for name in ("summary", "training_data", "limits", "licences")},
    )
    with replacing(folder / "README.md") as temporary:
        card.save(temporary)


def read_texts(path: Path) -> CardTexts:
    """`card.json`, or the defaults where there is none."""
    values = _read(path) or {}
    known = [one.name for one in fields(CardTexts)]
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
    try:
        return CardTexts(**values)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _read_whole(path: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """Results with all of `keys`, None where there is no file."""
    results = _read(path)
    for key in keys:
        if results is not None and key not in results:
            raise ValueError(f"{path}: no {key!r}")
    return results


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: no JSON object")
    return values
