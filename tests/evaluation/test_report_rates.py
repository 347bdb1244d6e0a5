"""Rates by hand, and the audit's figures for LibriSpeech with the real vocabulary of Qwen."""

import json

import pytest
from transformers import WhisperFeatureExtractor

from seam.data.manifest import CASINGS
from seam.evaluation.report import per_utterance, unit_rate, unit_rates
from seam.modeling_seam import SeamProcessor
from seam.tests.helpers import qwen

pytestmark = pytest.mark.medium


def test_a_test_sets_rate_is_not_the_mean_of_its_utterances_rates():
    result = unit_rate([2, 30], [1.0, 10.0])
    assert result["corpus"] == pytest.approx(32 / 11)
    assert result["mean"] == result["median"] == 2.5 and result["deviation"] == 0.5
    assert (result["p5"], result["p95"]) == pytest.approx((2.05, 2.95))
    assert per_utterance([2, 30], [1.0, 10.0]).tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="at least one utterance"):
        unit_rate([], [])


def test_what_is_counted_of_a_row():
    rows = [
        {"seconds": 2.0, "reference": "Hello there, you!", "reference_tokens": [7, 8, 9, 10], "embeddings": 2},
        {"seconds": 3.0, "reference": "no", "reference_tokens": [5], "embeddings": 0},
    ]
    corpus = {name: one["corpus"] for name, one in unit_rates(rows).items()}
    expected = {"words": 4, "tokens": 5, "embeddings": 2, "tokens_with_ends": 9, "embeddings_with_ends": 6}
    assert corpus == pytest.approx({name: count / 5 for name, count in expected.items()})


@pytest.fixture(scope="module")
def processor() -> SeamProcessor:
    """Return the paper's vocabulary."""
    if not qwen.RANKS.is_file():
        pytest.skip("no .venv/qwen.tiktoken; `make test` fetches it")
    tokenizer = qwen.load_tokenizer(qwen.load_ranks(qwen.RANKS))
    return SeamProcessor(WhisperFeatureExtractor(), tokenizer)


def test_the_vocabulary_is_qwens(processor):
    ranks = qwen.load_ranks(qwen.RANKS)
    assert len(ranks) == 151643 and processor.tokenizer("Hello, world!").input_ids == [9707, 11, 1879, 0]
    assert (processor.boa_token_id, processor.eoa_token_id) == (151644, 151645)
    spelled = {rank: token for token, rank in ranks.items()}
    text = "nor of the circumstances which led me to leave my native country in 1862; naïve, don't you think?"
    assert b"".join(spelled[i] for i in processor.transcript_ids(text)).decode() == text


@pytest.mark.parametrize(
    ("corpus", "utterances", "lower", "upper", "spoken", "with_ends"),
    [
        # Of the audit, to its two decimals; its 4.2 is of the first, the second's own is lower.
        ("librispeech train-clean-100", 160, 2.91, 4.27, 2.60, 3.07),
        ("librispeech test-other", 40, 2.65, 3.75, 2.41, 2.93),
    ],
)
def test_librispeech(processor, shared, corpus, utterances, lower, upper, spoken, with_ends):
    """The paper's 2.71 tokens per second of the test sets is lower-cased text; upper-cased it is half as much again."""
    lines = (shared / "speech" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    published = [row for row in map(json.loads, lines) if row["corpus"] == corpus]
    assert len(published) == utterances and all(row["text"].isupper() for row in published)
    results = {}
    for name, casing in CASINGS.items():
        rows = []
        for row in published:
            ids = processor.transcript_ids(casing(row["text"]))
            rows.append(
                {"seconds": row["seconds"], "reference": row["text"], "reference_tokens": ids, "embeddings": len(ids)}
            )
        results[name] = {unit: one["corpus"] for unit, one in unit_rates(rows).items()}
    assert results["lower"]["tokens"] == results["lower"]["embeddings"] == pytest.approx(lower, abs=0.005)
    assert results["keep"]["tokens"] == pytest.approx(upper, abs=0.005)
    assert results["lower"]["words"] == results["keep"]["words"] == pytest.approx(spoken, abs=0.005)
    assert results["lower"]["tokens_with_ends"] == pytest.approx(with_ends, abs=0.005)
