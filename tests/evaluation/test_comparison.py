"""Error rates over seeds and utterances, and what they say of a claim."""

import json

import numpy as np
import pytest

from seam.evaluation.comparison import SystemOutput, compare, interval, markdown, write_comparison


def output(errors, words=None, embeddings=3) -> SystemOutput:
    errors = np.array(errors)
    words = np.full(errors.shape[1], 10) if words is None else np.array(words)
    return SystemOutput(errors, words, np.full(errors.shape, embeddings), np.full(errors.shape[1], 2.0))


def test_an_error_rate_is_the_mean_of_the_seeds():
    one = output([[1, 0, 3], [1, 2, 1]], words=[10, 5, 5])
    assert one.seed_error_rates == [20.0, 20.0] and one.error_rate == 20.0
    assert output([[0, 0], [4, 0]]).error_rate == 10.0


def test_rows_become_errors():
    def row(reference, text):
        return {"reference": reference, "text": text, "embeddings": 2, "seconds": 1.5}

    seeds = [[row("one two", "one"), row("three", "three")], [row("one two", "two one two"), row("three", "four")]]
    one = SystemOutput.from_rows(seeds)
    assert one.errors.tolist() == [[1, 0], [1, 1]] and one.words.tolist() == [2, 1]
    assert one.embeddings.tolist() == [[2, 2], [2, 2]] and one.seconds.tolist() == [1.5, 1.5]


def test_the_interval_is_of_seeds_and_utterances():
    same = output([[1] * 50] * 3)
    assert interval(same) == (10.0, 10.0)  # nothing varies
    utterances = output([[0, 2] * 25] * 3)
    low, high = interval(utterances)
    assert low == pytest.approx(10 - 1.96 * 10 / 50**0.5, abs=0.6) and high == pytest.approx(
        10 + 1.96 * 10 / 50**0.5, abs=0.6
    )
    seeds = output([[0] * 50, [2] * 50])  # drawing two of two: 0, 10 or 20 %
    assert interval(seeds) == (0.0, 20.0)


def test_a_difference_is_paired():
    """Utterances differ far more than the systems: only pairs show that one is better in each."""
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 9, size=(1, 200))
    worse, better = output(np.repeat(hard + 1, 3, 0)), output(np.repeat(hard, 3, 0))
    assert interval(better, worse) == pytest.approx((-10.0, -10.0))
    low, high = interval(better)
    assert high - low > 5


@pytest.fixture
def results():
    rows = {
        "Stage 1": {"in": output([[1] * 30] * 2), "out": output([[4] * 30] * 2)},
        "full": {"in": output([[2] * 30] * 2), "out": output([[2] * 30] * 2, embeddings=20)},
    }
    return compare(rows, [("full", "Stage 1")])


def test_claims_hold_or_fail(results):
    claim = results["claims"][0]["tests"]
    assert claim["out"]["difference"] == -20.0 and claim["in"]["difference"] == 10.0
    text = markdown(results)
    assert "| full than Stage 1 | no: worse: +10.0 (+10.0 to +10.0) | yes: -20.0 (-20.0 to -20.0) |" in text
    assert "| Stage 1 | 10.0 (10.0–10.0) | 40.0 (40.0–40.0) |" in text
    assert "| full | 1.50 | 10.00 |" in text  # embeddings per second
    assert results["words"] == {"in": 300, "out": 300}


def test_what_is_not_shown_is_not_claimed():
    rng = np.random.default_rng(1)
    rows = {name: {"in": output(rng.integers(0, 5, size=(2, 20)))} for name in ("a", "b")}
    assert "not shown" in markdown(compare(rows, [("a", "b")]))


def test_files(results, tmp_path):
    write_comparison(results, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == results
    assert (tmp_path / "comparison.md").read_text() == markdown(results)
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    assert not list(tmp_path.glob("*.tmp"))
