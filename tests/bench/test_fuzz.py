"""Two thousand mangled audio files: every one is decoded, or refused in a sentence, in bounded time and memory."""

import numpy as np
import pytest

from seam.audio_files import Decoded
from seam.bench import fuzz


@pytest.mark.medium
def test_no_mangled_file_breaks_a_rule():
    kinds = {one.name.split()[-1] for one in fuzz.mangled(100, seed=2)}
    assert kinds == {"cut", "header", "bytes", "numbers", "insert", "remove", "join", "zeros"}
    outcomes = [(one.name, fuzz.outcome_of(one)) for one in fuzz.mangled(2000, seed=2)]
    assert not [(name, outcome) for name, outcome in outcomes if outcome.is_broken]
    assert {outcome.kind for _, outcome in outcomes} == {"decoded", "cut", "refused"}


def test_the_rules_can_be_broken(monkeypatch):
    """A file that is taken as whole though half of it is gone; an error of another kind; one that takes too long."""
    (cut,) = [one for one in fuzz.mangled(40, seed=0) if one.is_cut and fuzz.outcome_of(one).kind == "cut"][:1]
    with monkeypatch.context() as patch:
        patch.setattr(fuzz, "decode", lambda content, name: Decoded(np.zeros(10, "f4"), 16000, ""))
        assert fuzz.outcome_of(cut).kind == "cut without a word"
    with monkeypatch.context() as patch:
        patch.setattr(fuzz, "decode", lambda content, name: {}["key"])
        assert fuzz.outcome_of(cut).kind == "another error"
    monkeypatch.setattr(fuzz, "MAX_SECONDS", -1.0)
    assert fuzz.outcome_of(cut).kind == "too slow"
