"""Fill in the model card `model_card.md` from the files of a checkpoint."""

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
# The keys that each file of results must have.
RESULTS = {
    "table.json": ("wer", "interval", "words", "notes"),
    "results.json": ("run", "test_sets", "systems", "rates"),
}
PLOTS = ("table.png", "results.png")


@strict
@dataclass
class CardTexts:
    """
    The content of `card.json`; every key may be absent.

    Args:
        title: by default the last part of the model's id.
        summary, training_data, limits: Markdown.
        language: code of the language that is transcribed.
        licences: of each component, in words.
        license: of the checkpoint, the Hub's identifier.
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
    Write the card of a checkpoint as `README.md`, the file that the Hub displays.

    It is filled from those of these files that the checkpoint's folder has: `card.json` (see `CardTexts`), `table.json`
    (of `seam.evaluation.table.write_table`) and `results.json` (of `seam score`).

    Args:
        model, processor: the checkpoint.
        folder: where it is saved.
        model_id: the name under which the card's snippets load it, a Hub id or a folder.

    Raises:
        ValueError: naming file and key, when one of these files is malformed.
    """
    folder = Path(folder)
    texts = read_texts(folder / "card.json")
    table, results = (_read_results(folder / name, keys) for name, keys in RESULTS.items())
    title = texts.title or Path(model_id).name
    if table is not None and texts.system not in table["wer"]:
        raise ValueError(
            f"{folder / 'card.json'}: system is {texts.system!r}; the rows of table.json are: {', '.join(table['wer'])}"
        )
    evaluated = report.eval_results(results) if results else []
    if table:
        evaluated += [
            eval_result(name, "wer", "WER", rate) for name, rate in sorted(table["wer"][texts.system].items())
        ]
    tables = [markdown(table)] if table else []
    tables += [report.markdown(results)] if results else []
    components = {name: getattr(model, name) for name in ("encoder", "bridge", "language_model")}
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
        parameters={name: f"{_parameters(component) / 1e6:.2f}" for name, component in components.items()},
        alignment_only=model.config.alignment_only,
        window_seconds=f"{processor.max_seconds:g}",
        results="\n".join(tables).strip() or "Not stated.",
        system=texts.system if table else None,
        plots=[name for name in PLOTS if (folder / name).is_file()],
        **{name: getattr(texts, name) for name in ("summary", "training_data", "limits", "licences")},
    )
    with replacing(folder / "README.md") as temporary:
        card.save(temporary)


def read_texts(path: Path) -> CardTexts:
    """Read `card.json`, or return the defaults if there is none."""
    values = _read(path) or {}
    known = [one.name for one in fields(CardTexts)]
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
    try:
        return CardTexts(**values)
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _read_results(path: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """Read results, which must have all of `keys`; return None if there is no file."""
    results = _read(path)
    for key in keys:
        if results is not None and key not in results:
            raise ValueError(f"{path} has no key {key!r}; it must have: {', '.join(keys)}")
    return results


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values
