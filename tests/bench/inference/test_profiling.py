"""Seconds by component, nested ones apart."""

from types import SimpleNamespace

import torch

from seam.bench.inference import profiling
from seam.bench.inference.profiling import LAYERS, LOOKUP, REST, SPEECH, lookup_share, time_components


def test_a_component_is_counted_without_those_inside_it(monkeypatch):
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def takes(seconds):
        clock.now += seconds

    def outer():
        takes(1)
        parts.inner()

    parts = SimpleNamespace(inner=lambda: takes(10), outer=outer)

    def system():
        takes(100)
        parts.outer()
        parts.inner()

    seconds = time_components(system, [("a", parts, "inner"), ("b", parts, "outer")], torch.device("cpu"))
    assert seconds == {"a": 20, "b": 1, REST: 100}
    assert parts.outer is outer  # as before


def test_the_lookups_share_is_that_of_a_step():
    assert lookup_share({SPEECH: 5.0, LAYERS: 2.0, LOOKUP: 1.0, REST: 1.0}) == 0.25
