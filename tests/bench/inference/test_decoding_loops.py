"""Drafts with a known number of errors."""

import kaldialign
import pytest

from seam.bench.inference.decoding_loops import corrupt


@pytest.mark.parametrize(("agreement", "errors"), [(1.0, 0), (0.98, 2), (0.96, 4), (0.9, 9)])
def test_so_many_tokens_are_wrong(agreement, errors):
    text = list(range(100, 190))
    draft = corrupt(text, agreement, 10**6, "0 0")
    counts = kaldialign.edit_distance([str(one) for one in text], [str(one) for one in draft])
    assert counts["total"] == errors
    assert (corrupt(text, agreement, 10**6, "0 0") == draft) and (errors == 0) == (draft == text)


def test_errors_are_of_all_kinds_and_others_with_another_seed():
    text = list(range(100, 1000))
    draft, other = (corrupt(text, 0.9, 10**6, seed) for seed in ("0 0", "0 1"))
    counts = kaldialign.edit_distance([str(one) for one in text], [str(one) for one in draft])
    assert all(counts[kind] > 5 for kind in ("ins", "del")) and counts["sub"] > 40
    assert draft != other
