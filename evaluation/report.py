"""
Score the hypotheses of a run, without a model.

The report consists of `results.json`, `results.md`, `results.yaml` (the Hub's evaluation metadata), `results.png`,
`rates.png` and `errors.md`, which shows the worst utterances word by word.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from tqdm.auto import tqdm

from seam.data.files import locked, write_text
from seam.evaluation import plots, scoring
from seam.evaluation.hypotheses import SYSTEMS, TABLE_1, read_hypotheses
from seam.evaluation.scoring import has_loop
from seam.evaluation.table import INTERVALS, error_rate_table

ALL = "all test sets"
NORMALIZERS = {"english": "Whisper's English normaliser", "basic": "Whisper's basic normaliser"}
WORST = 20
TASK = "automatic-speech-recognition"
ENDS = 2  # <BOA> and <EOA>, which Stage 1 adds to the tokens of every utterance


def write_report(folder: str | Path, progress: bool = False) -> dict[str, Any]:
    """
    Score a finished run and write the report beside its hypotheses. Equal hypotheses give equal files.

    Args:
        folder: of the run.
        progress: whether to show a progress bar.

    Returns:
        The content of `results.json`:
        - `run`: `run.json`, which names data, model and hardware;
        - `test_sets`: the `utterances` of each, and the `seconds` of those that could be read; if there are several
          test sets, also `ALL` of them together;
        - `systems`: by system and test set, what `score_system` returns;
        - `rates`: by test set, what `unit_rates` returns;
        - `not_english`: the test sets, if any, whose words the English normaliser does not keep apart.

    Raises:
        FileNotFoundError: when there is no run; ValueError: when it is unfinished or damaged.
    """
    folder = Path(folder)
    run, systems = read_hypotheses(folder)
    sets = {system: _test_sets(rows) for system, rows in systems.items()}
    first = next(iter(sets.values()))
    readable = {name: [row for row in rows if "error" not in row] for name, rows in first.items()}
    readable = {name: rows for name, rows in readable.items() if rows}
    scored = {system: {} for system in sets}
    jobs = [(system, name, rows) for system, named in sets.items() for name, rows in named.items()]
    for system, name, rows in tqdm(jobs, desc="scoring", leave=False, disable=not progress):
        scored[system][name] = score_system(rows)
    results = {
        "run": run,
        "test_sets": {
            name: {
                "utterances": len(rows),
                "seconds": sum(row["seconds"] for row in rows if "error" not in row),
            }
            for name, rows in first.items()
        },
        "systems": scored,
        "rates": {name: unit_rates(rows) for name, rows in readable.items()},
    }
    unfit = [
        name for name, rows in first.items() if name != ALL and not scoring.fits_english(r["reference"] for r in rows)
    ]
    if unfit:
        results["not_english"] = unfit
    results = _rounded(results)
    card_data = ModelCardData(model_name=run["model"]["name"], eval_results=eval_results(results))
    files = (
        ("results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        ("results.md", f"# Results of {run['model']['name']}\n\n{markdown(results)}"),
        ("results.yaml", card_data.to_yaml() + "\n"),
        ("errors.md", worst_utterances(systems)),
    )
    wer, intervals = _error_rates(results, "english")
    with locked(folder / ".lock", str(folder), "wait for it"):
        for name, text in files:
            write_text(folder / name, text)
        plots.plot_error_rates(wer, intervals, list(results["test_sets"]), folder / "results.png")
        if readable:
            _plot_rates(readable, results["rates"], folder / "rates.png")
    return results


def score_system(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Score one system on one test set. Audio that could not be read counts with an empty hypothesis.

    Returns:
        - `wer`, by normaliser: `rate` (the error rate) in percent, `interval` `[low, high]`, `insertions`, `deletions`,
          `substitutions`, `words`; `cer` likewise, of `characters`, without interval;
        - `first_token`, `stage1_first_token`: percentage of utterances whose first token, in the transcript and in
          Stage 1, is the reference's, among those with a reference; `None` if there are none;
        - `loops`, `empty`: percentage of utterances with a loop (see `seam.evaluation.scoring.has_loop`), and with an
          empty transcript of a reference that is not;
        - `failed`: number of utterances whose audio could not be read;
        - `rtfx`: seconds of audio per second of work; `None` if there is no audio.
    """
    references, hypotheses = [row["reference"] for row in rows], [row["text"] for row in rows]
    result: dict[str, Any] = {"wer": {}, "cer": {}}
    for normalizer in scoring.NORMALIZERS:
        counts = scoring.utterance_errors(references, hypotheses, normalizer)
        count, characters = scoring.total(counts), scoring.character_errors(references, hypotheses, normalizer)
        result["wer"][normalizer] = {**_kinds(count), "words": count.length, "interval": list(scoring.interval(counts))}
        result["cer"][normalizer] = {**_kinds(characters), "characters": characters.length}
    referenced = [row for row in rows if row["reference_tokens"]]
    loops = [has_loop(*map(scoring.words, pair)) for pair in zip(references, hypotheses, strict=True)]
    empty = [bool(row["reference"].strip()) and not row["text"].strip() for row in rows]
    wall = sum(row["wall_seconds"] for row in rows)
    return {
        **result,
        "first_token": _percent([row["tokens"][:1] == row["reference_tokens"][:1] for row in referenced]),
        "stage1_first_token": _percent([row["stage1_tokens"][:1] == row["reference_tokens"][:1] for row in referenced]),
        "loops": _percent(loops),
        "empty": _percent(empty),
        "failed": sum("error" in row for row in rows),
        "rtfx": sum(row["seconds"] for row in rows if "error" not in row) / wall if wall else None,
    }


def unit_rate(counts: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """
    Compute the units per second of a test set, and their distribution over its utterances.

    Args:
        counts: number of units of each utterance.
        seconds: length of each utterance.

    Returns:
        `corpus`: all units over all seconds, as the paper's 2.71 and 2.99; `mean`, `deviation`, `p5`, `median`, `p95`:
        of the utterances' own rates.

    Raises:
        ValueError: when there are no utterances.
    """
    if not len(counts):
        raise ValueError("a rate needs at least one utterance")
    each = per_utterance(counts, seconds)
    low, median, high = np.percentile(each, [5, 50, 95])
    return {
        "corpus": float(np.sum(counts) / np.sum(seconds)),
        "mean": float(each.mean()),
        "deviation": float(each.std()),
        "p5": float(low),
        "median": float(median),
        "p95": float(high),
    }


def per_utterance(counts: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """Return each utterance's own rate, of shape `(utterances,)`."""
    return np.asarray(counts) / np.asarray(seconds)


def unit_rates(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """
    Compute how many words, tokens and embeddings a test set has per second of audio.

    Returns:
        What `unit_rate` returns, of `words` (separated by spaces) and `tokens` of the references, of `embeddings` of
        the audio (one for each token of Stage 1), and of the latter two with `<BOA>` and `<EOA>` (`tokens_with_ends`,
        `embeddings_with_ends`).
    """
    seconds = [row["seconds"] for row in rows]
    counts = {
        "words": [len(row["reference"].split()) for row in rows],
        "tokens": [len(row["reference_tokens"]) for row in rows],
        "embeddings": [row["embeddings"] for row in rows],
    }
    for name in ("tokens", "embeddings"):
        counts[f"{name}_with_ends"] = [count + ENDS for count in counts[name]]
    return {name: unit_rate(each, seconds) for name, each in counts.items()}


def eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """
    Return the Hub's metadata of `results.json`: WER and CER of the model's own system, by test set.

    Figures of the English normaliser are left out where it does not fit.
    """
    system = _own_system(results)
    return [
        eval_result(name, metric, f"{metric.upper()}, {description}", scores[metric][normalizer]["rate"])
        for name, scores in results["systems"][system].items()
        if name != ALL
        for metric in ("wer", "cer")
        for normalizer, description in NORMALIZERS.items()
        if normalizer != "english" or name not in results.get("not_english", ())
    ]


def eval_result(test_set: str, metric: str, name: str, value: float) -> EvalResult:
    """
    Return the Hub's metadata of one figure.

    Args:
        test_set: its display name, from which its identifier is made.
        metric: the Hub's identifier, "wer" or "cer".
        name: display name of the metric.
        value: in percent.
    """
    return EvalResult(
        task_type=TASK,
        dataset_type=test_set.lower().replace(" ", "-"),
        dataset_name=test_set,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 2),
    )


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of `results.json` as Markdown."""
    lines = [*_error_rate_lines(results), *_error_kind_lines(results), *_unit_rate_lines(results)]
    for system, named in results["systems"].items():
        failed = ", ".join(f"{scores['failed']} of {name}" for name, scores in named.items() if scores["failed"])
        if failed:
            lines += ["", f"Audio that {system} could not read: {failed}; scored as empty, and named in `errors.md`."]
    return "\n".join([*lines, ""])


def _error_rate_lines(results: dict[str, Any]) -> list[str]:
    lines, systems = [], results["systems"]
    for normalizer, description in NORMALIZERS.items():
        wer, intervals = _error_rates(results, normalizer)
        words = {name: scores["wer"][normalizer]["words"] for name, scores in systems[_own_system(results)].items()}
        lines += [*error_rate_table(f"WER %, {description}", wer, intervals, words), ""]
    if unfit := results.get("not_english"):
        lines += [
            f"{NORMALIZERS['english']} does not fit {', '.join(unfit)}: it drops vowels and other marks of their "
            "script, so that different words count as equal. Read these under the basic one.",
            "",
        ]
    return [*lines, INTERVALS, "; ".join(f"{system}: {SYSTEMS[system].description}" for system in systems) + ".", ""]


def _error_kind_lines(results: dict[str, Any]) -> list[str]:
    run = results["run"]
    lines = [
        "| test set | system | words | insertions | deletions | substitutions | CER % | first token right % "
        "| of Stage 1 % | loops % | empty % | RTFx |",
        "|---" * 12 + "|",
    ]
    for name in results["test_sets"]:
        for system, named in results["systems"].items():
            scores, count = named[name], named[name]["wer"]["english"]
            kinds = " | ".join(str(count[kind]) for kind in ("words", "insertions", "deletions", "substitutions"))
            shares = (scores[key] for key in ("first_token", "stage1_first_token", "loops", "empty", "rtfx"))
            cells = " | ".join("–" if value is None else f"{value:.1f}" for value in shares)
            lines.append(f"| {name} | {system} | {kinds} | {scores['cer']['english']['rate']:.1f} | {cells} |")
    return [
        *lines,
        "",
        f"Counts and CER under {NORMALIZERS['english']}. First token: of the reference, casing {run['casing']!r}. "
        "RTFx: seconds of audio in a second of work, from file to text, in batches of "
        f"{run['batch_size']}, {run['dtype']}, on {'; then '.join(run['hardware'])}; {run['software']}.",
        "",
    ]


def _unit_rate_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        "| per second of audio | utterances | minutes | words | tokens | embeddings | tokens with ends "
        "| embeddings with ends |",
        "|---" * 8 + "|",
    ]
    for name, rate in results["rates"].items():
        size, failed = results["test_sets"][name], next(iter(results["systems"].values()))[name]["failed"]
        units = ("words", "tokens", "embeddings", "tokens_with_ends", "embeddings_with_ends")
        cells = " | ".join(f"{rate[unit]['corpus']:.2f}" for unit in units)
        lines.append(f"| {name} | {size['utterances'] - failed} | {size['seconds'] / 60:.1f} | {cells} |")
    return [
        *lines,
        "",
        f"Tokens of the references (casing {results['run']['casing']!r}), and embeddings that the LLM is given, one "
        "for each token of Stage 1: all of a test set over all of its seconds. With ends: `<BOA>` and `<EOA>` counted "
        "as well.",
    ]


def worst_utterances(systems: dict[str, list[dict[str, Any]]]) -> str:
    """
    Return Markdown that names unreadable audio and shows the `WORST` utterances of each system.

    These are the ones with the most word errors under the English normaliser; an error is shown as
    `[reference → hypothesis]`.
    """
    lines = ["# Utterances with most errors", ""]
    for system, rows in systems.items():
        counts = scoring.utterance_errors([r["reference"] for r in rows], [r["text"] for r in rows], "english")
        ranked = sorted(zip(counts, rows, strict=True), key=lambda pair: (-pair[0].errors, pair[1]["id"]))
        lines += [f"## {system}", ""]
        lines += [
            f"- {row['audio']} ({row['test_set']}) was not read: {row['error']}" for row in rows if "error" in row
        ]
        for count, row in [pair for pair in ranked if pair[0].errors and "error" not in pair[1]][:WORST]:
            aligned = " ".join(
                word if word == output else f"[{word} → {output}]"
                for word, output in scoring.alignment(row["reference"], row["text"], "english")
            )
            lines.append(f"- {row['audio']} ({row['test_set']}), {count.errors} of {count.length}: {aligned}")
        lines.append("")
    return "\n".join(lines)


def _test_sets(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    names = list(dict.fromkeys(row["test_set"] for row in rows))
    sets = {name: [row for row in rows if row["test_set"] == name] for name in names}
    return {**sets, ALL: rows} if len(names) > 1 else sets


def _kinds(count: scoring.ErrorCount) -> dict[str, float]:
    kinds = {kind: getattr(count, kind) for kind in ("insertions", "deletions", "substitutions")}
    return {"rate": count.error_rate, **kinds}


def _percent(flags: Sequence[bool]) -> float | None:
    return 100 * sum(flags) / len(flags) if flags else None


def _own_system(results: dict[str, Any]) -> str:
    return next(system for system in reversed(TABLE_1) if system in results["systems"])


def _error_rates(results: dict[str, Any], normalizer: str) -> tuple[plots.ErrorRates, plots.Intervals]:
    def pick(key: str):
        return {
            system: {name: scores["wer"][normalizer][key] for name, scores in named.items()}
            for system, named in results["systems"].items()
        }

    return pick("rate"), pick("interval")


def _plot_rates(sets: dict[str, list[dict[str, Any]]], means: dict[str, Any], path: Path) -> None:
    units = {"tokens": "tokens of the reference", "embeddings": "embeddings of the audio"}
    counts = {
        name: {
            "tokens": [len(row["reference_tokens"]) for row in rows],
            "embeddings": [row["embeddings"] for row in rows],
        }
        for name, rows in sets.items()
    }
    panels = {
        name: {
            label: per_utterance(counts[name][unit], [row["seconds"] for row in rows]) for unit, label in units.items()
        }
        for name, rows in sets.items()
    }
    marks = {name: {label: means[name][unit]["corpus"] for unit, label in units.items()} for name in panels}
    plots.plot_histograms(panels, marks, "per second of audio", path)


def _rounded(value):
    """Round figures to four decimals: more mean nothing."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
