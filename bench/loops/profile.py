"""Where the time of a loop goes: seconds of its components, each without those inside it."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from unittest.mock import patch

import torch
from torch import nn

from seam.bench.loops.systems import Utterances
from seam.bench.loops.timing import synchronize
from seam.modeling_seam.aligner_decoding import LayerSteps
from seam.modeling_seam.nearest import NearestToken

SPEECH, LAYERS, LOOKUP = "keys and values of the speech states", "decoder layers", "lookup"
OUTPUT, LLM, REST = "output layer", "LLM forwards", "rest: projections, cache, Python"

# A component, the object that has it, and the name of its function.
Part = tuple[str, object, str]


def components(system: Callable, parts: list[Part], device: torch.device) -> dict[str, float]:
    """
    Seconds of a system by component; what none of them is stands under `REST`. On a GPU it waits for each component
    to end, which takes time of its own: shares, rather than times, are to be read.
    """
    seconds, inside = {name: 0.0 for name, _, _ in parts} | {REST: 0.0}, []

    def timed(name: str, function: Callable) -> Callable:
        @wraps(function)  # `generate` looks at the arguments of what it calls
        def run(*args, **kwargs):
            synchronize(device)
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(device)
                whole = time.perf_counter() - start
                seconds[name] += whole - inside.pop()
                if inside:
                    inside[-1] += whole

        return run

    with ExitStack() as stack:
        for name, owner, function in parts:
            stack.enter_context(patch.object(owner, function, timed(name, getattr(owner, function))))
        timed(REST, system)()
    return seconds


def speech_parts(layers: nn.ModuleList) -> list[Part]:
    projections = [part for layer in layers for part in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)]
    return [(SPEECH, part, "forward") for part in projections]


def stock_parts(utterances: Utterances) -> list[Part]:
    """Of Whisper's stock loop, and of the stock loop on the aligner, which computes distances to all tokens."""
    layers = utterances.model.aligner.layers
    return [
        *speech_parts(layers),
        *((LAYERS, layer, "forward") for layer in layers),
        (LOOKUP, utterances.lookup, "distances"),
        (OUTPUT, utterances.whisper.proj_out, "forward"),
    ]


def stage_1_parts(utterances: Utterances, lookup: NearestToken) -> list[Part]:
    return [
        *speech_parts(utterances.model.aligner.layers),
        (LAYERS, LayerSteps, "step"),
        (LOOKUP, lookup, "nearest"),
    ]


def llm_parts(utterances: Utterances) -> list[Part]:
    return [(LLM, utterances.model.language_model, "forward")]


def lookup_share(seconds: dict[str, float]) -> float:
    """Of a step; what is done once per utterance is none."""
    return seconds[LOOKUP] / (sum(seconds.values()) - seconds[SPEECH])
