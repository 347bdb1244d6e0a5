"""Loops by hand."""

import pytest

from seam.evaluation.loops import is_loop, repetitions


@pytest.mark.parametrize(
    ("reference", "hypothesis", "loop"),
    [
        ("go home now", "go go go go home now", True),
        ("go home now", "go go go home now", False),
        ("go go go go home", "go go go go home", False),
        ("go go go go home", "go go go go go home", True),
        ("thank you", "thank you thank you thank you thank you", True),
        ("thank you", "thank you thank you thank you thank", False),
        ("", "a b c d e f g h " * 4, True),
        ("", "a b c d e f g h i " * 4, False),
        ("", "a b c d e f g h " * 3 + "a b c d e f g", False),
        ("on go on go on go on go", "go on go on go on go on", False),  # the same turn of words, begun elsewhere
        ("three one four", "", False),
        ("", "a a b a a b a a b a a b", True),
        ("", "a b a c a b a c a b a b a", False),
    ],
)
def test_loops(reference, hypothesis, loop):
    assert is_loop(reference.split(), hypothesis.split()) is loop


def test_repetitions_are_counted_by_phrase():
    # "b a" overlaps itself; the longest run of each phrase counts
    assert repetitions("a b a b a b c c a b a b".split()) == {("a", "b"): 3, ("c",): 2}
    assert repetitions("a a a a".split()) == {("a",): 4, ("a", "a"): 2}
    assert repetitions("a b c".split()) == {}
