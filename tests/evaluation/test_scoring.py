"""Word errors by hand."""

import pytest

from seam.evaluation.scoring import ErrorCount, interval, total, utterance_errors, word_errors


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("one two three", "one two three", 0),
        ("one two three", "one too three", 1),
        ("one two three", "one three", 1),
        ("one two three", "one two two three", 1),
        ("One, two three!", "one two three.", 0),
        ("one two", "", 2),
        ("five", "six seven", 2),
    ],
)
def test_counts(reference, hypothesis, errors):
    count = word_errors([reference], [hypothesis])
    assert (count.errors, count.words) == (errors, len(reference.split()))


def test_digits_stay_words():
    """A normaliser that makes numbers of them would turn one wrong digit into a wrong string."""
    assert word_errors(["three one four"], ["three one five"]).rate == pytest.approx(100 / 3)


def test_a_corpus_is_counted_as_a_whole():
    count = word_errors(["one two three", "four"], ["one two", "five"])
    assert count.rate == 50.0


def test_no_errors_leave_no_doubt_that_resampling_could_find():
    assert interval(utterance_errors(["one two", "three"], ["one two", "three"])) == (0, 0)


def test_interval_is_around_the_rate_and_the_same_every_time():
    counts = [ErrorCount(index % 7 == 0, 4) for index in range(200)]
    low, high = interval(counts)
    assert low < total(counts).rate < high
    assert interval(counts) == (low, high)
    # The errors are independent, so the normal approximation of the mean of 200 is near.
    share = 29 / 200
    half = 1.96 * 100 / 4 * (share * (1 - share) / 200) ** 0.5
    assert (low, high) == pytest.approx((100 / 4 * share - half, 100 / 4 * share + half), abs=0.3)


def test_fewer_utterances_are_less_certain():
    counts = [ErrorCount(index % 2, 4) for index in range(100)]
    (low, high), (lower, higher) = interval(counts), interval(counts[:10])
    assert higher - lower > 2 * (high - low)


def test_no_utterances_have_no_interval():
    with pytest.raises(ValueError, match="no utterances"):
        interval([])
