"""How fast text passes: words, tokens and embeddings per second of audio (the paper's Section 4.4)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

ENDS = 2  # <BOA> and <EOA>: what Stage 1 spends on an utterance besides its tokens


def rate(counts: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """
    Units per second of a test set, and how they are spread over its utterances.

    Args:
        counts: of units, by utterance.
        seconds: of audio, by utterance.

    Returns:
        `corpus`: all units over all seconds, as the paper's 2.71 and 2.99; `mean`, `deviation`, `p5`, `median`, `p95`:
        of the utterances' own rates.

    Raises:
        ValueError: without utterances.
    """
    if not len(counts):
        raise ValueError("no rate of no utterances")
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
    """Each utterance's own rate, of shape `(utterances,)`."""
    return np.asarray(counts) / np.asarray(seconds)


def rates(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """
    The rates of what `seam.evaluation.hypotheses` wrote: `words` (as the transcript is spaced) and `tokens` of the
    references, `embeddings` of the audio (one for each token of Stage 1), and the latter two with `<BOA>` and `<EOA>`
    (`tokens_with_ends`, `embeddings_with_ends`).
    """
    seconds = [row["seconds"] for row in rows]
    counts = {
        "words": [len(row["reference"].split()) for row in rows],
        "tokens": [len(row["reference_tokens"]) for row in rows],
        "embeddings": [row["embeddings"] for row in rows],
    }
    for name in ("tokens", "embeddings"):
        counts[f"{name}_with_ends"] = [count + ENDS for count in counts[name]]
    return {name: rate(each, seconds) for name, each in counts.items()}
