"""Where the time of a loop goes, by component, and the least that the machine allows: its bytes and its products."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from unittest.mock import patch

import torch
from torch import nn

from seam.bench.common import Machine, synchronize
from seam.bench.inference.decoding_loops import Utterances
from seam.modeling_seam.aligner_decoding import LayerSteps
from seam.modeling_seam.nearest import NearestToken
from seam.modeling_seam.speculative import Row

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


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes."""
    return sum(one.numel() * one.element_size() for one in parameters)


class Roofline:
    """
    The least seconds of each loop over a batch on a machine.

    Args:
        machine: its speed.
        utterances: the batch.
    """

    def __init__(self, machine: Machine, utterances: Utterances):
        self.machine, self.utterances = machine, utterances
        aligner, config = utterances.model.aligner, utterances.model.config.aligner_config
        # These are read once, for the keys and values of the speech states.
        of_speech = [
            weight
            for layer in aligner.layers
            for part in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)
            for weight in part.parameters()
        ]
        states = utterances.states
        self._decoder = size_of(aligner.layers.parameters()) - size_of(of_speech)
        self._speech = 2 * config.decoder_layers * states.numel() * states.element_size()
        self._speech_seconds = 2 * sum(w.numel() for w in of_speech) * states.shape[:2].numel() / machine.arithmetic

    def whisper_decoder(self) -> float:
        return self._decoding(self.utterances.whisper.proj_out.weight)

    def stage_1(self) -> float:
        aligner, table = self.utterances.model.aligner, self.utterances.lookup.table
        return self._decoding(aligner.input_projection.weight, aligner.output_projection.weight, table)

    def _decoding(self, *others: torch.Tensor) -> float:
        step = self._decoder + self._speech + size_of(others)
        return self._speech_seconds + self.utterances.tokens * step / self.machine.bandwidth

    def llm(self) -> float:
        """One forward over the prompts, and the others over a position of each row."""
        prompts = self.utterances.batch_size * self._prompt_length(with_instruction=True)
        reading = self._llm_bytes() / self.machine.bandwidth
        first = max(reading, prompts * self._llm_position())
        return first + (self.utterances.tokens - 1) * max(reading, self.utterances.batch_size * self._llm_position())

    def llm_checked(self, rows: list[Row]) -> float:
        """Its forwards and positions, as if all were spread evenly over the forwards."""
        positions = len(rows) * self._prompt_length(with_instruction=False)
        positions += sum(row.accepted + row.rejected + row.forwards for row in rows)
        forwards = max(row.forwards for row in rows)
        return max(forwards * self._llm_bytes() / self.machine.bandwidth, positions * self._llm_position())

    def _prompt_length(self, with_instruction: bool) -> int:
        prompt, config = self.utterances.model.config.prompt_token_ids, self.utterances.model.config
        length = len(prompt) - 1 + len(self.utterances.aligned[0]) + 1  # the audio's place, and the guide
        return length if with_instruction else length - prompt.index(config.audio_token_id)

    def _llm_bytes(self) -> int:
        """The whole LLM but its embedding table, of which rows are read."""
        language_model = self.utterances.model.language_model
        return size_of(language_model.parameters()) - size_of([language_model.get_input_embeddings().weight])

    def _llm_position(self) -> float:
        """Seconds of arithmetic for a position."""
        element = self.utterances.model.dtype.itemsize
        return 2 * self._llm_bytes() / element / self.machine.arithmetic
