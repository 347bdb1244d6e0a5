"""Word errors by hand."""

import pytest

from seam.evaluation.scoring import word_errors


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
