"""The paper's Table 1 in small: every system on every test set, as JSON, Markdown and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from seam.data.files import write_text
from seam.data.manifest import Utterance
from seam.evaluation.layout import INTERVALS, plot_error_rates, rate_table
from seam.evaluation.scoring import interval, total, utterance_errors
from seam.evaluation.transcription import transcribe

WHISPER = "Whisper, its own decoder"
STAGE1 = "SEAM w/o LLM (Stage 1)"
FULL = "SEAM full, w/o FTG"
GUIDED = "SEAM full, w/ FTG"


def compare_systems(
    model, processor, whisper, whisper_processor, tests: dict[str, Sequence[Utterance]]
) -> dict[str, Any]:
    """
    Args:
        model, processor: a trained SEAM.
        whisper: `WhisperForConditionalGeneration` whose encoder SEAM uses.
        whisper_processor: see `seam.evaluation.transcription.load_whisper`.
        tests: test sets by name.

    Returns:
        `{"wer": {system: {test: percent}}, "interval": {system: {test: [low, high]}}, "words": {test: count},
        "notes": [sentence]}`; the intervals are those of `seam.evaluation.scoring.interval`.
    """
    wer: dict[str, dict[str, float]] = {name: {} for name in (WHISPER, STAGE1, FULL, GUIDED)}
    intervals: dict[str, dict[str, list[float]]] = {name: {} for name in wer}
    words = {}
    for name, utterances in tqdm(sorted(tests.items()), desc="test sets"):
        references = [utterance.text.lower() for utterance in utterances]
        sources = [utterance.audio for utterance in utterances]
        guided = transcribe(model, processor, sources, batch_size=32)
        unguided = transcribe(model, processor, sources, batch_size=32, first_token_guidance=False)
        hypotheses = {
            WHISPER: [one.text for one in transcribe(whisper, whisper_processor, sources, batch_size=32)],
            STAGE1: [one.stage1 for one in guided],
            FULL: [one.text for one in unguided],
            GUIDED: [one.text for one in guided],
        }
        for system, texts in hypotheses.items():
            counts = utterance_errors(references, texts)
            wer[system][name] = total(counts).rate
            intervals[system][name] = list(interval(counts))
            words[name] = total(counts).length
    return {"wer": wer, "interval": intervals, "words": words, "notes": notes(wer)}


def notes(wer: dict[str, dict[str, float]]) -> list[str]:
    """One honest sentence per comparison that the paper makes: whether the LLM and FTG help here, and where."""

    def verdict(what: str, before: str, after: str) -> str:
        sides: dict[str, list[str]] = {"lower": [], "higher": [], "equal": []}
        for test in wer[before]:
            change = wer[after][test] - wer[before][test]
            side = "equal" if abs(change) < 0.05 else ("lower" if change < 0 else "higher")
            sides[side].append(f"{test} ({change:+.1f})" if side != "equal" else test)
        said = [f"{side} on {', '.join(names)}" for side, names in sides.items() if names]
        return f"{what}: word error rate " + "; ".join(said) + "."

    return [
        verdict("The LLM after Stage 3, against Stage 1", STAGE1, FULL),
        verdict("First Token Guidance", FULL, GUIDED),
    ]


def markdown(table: dict[str, Any]) -> str:
    """The table of `compare_systems` and its notes."""
    words = {test: table["words"][test] for test in sorted(table["words"])}
    lines = rate_table("WER %", table["wer"], table["interval"], words)
    return "\n".join([*lines, "", INTERVALS, "", *(f"- {note}" for note in table["notes"]), ""])


def write_table(table: dict[str, Any], folder: Path) -> None:
    """Write `table.json`, `table.md` and `table.png` into `folder`."""
    for name, text in (("table.json", json.dumps(table, indent=1)), ("table.md", markdown(table))):
        write_text(folder / name, text)
    plot_error_rates(table["wer"], table["interval"], sorted(table["words"]), folder / "table.png")
