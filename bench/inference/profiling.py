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

# The name of a component, the object that has its function, and the name of that function.
Component = tuple[str, object, str]


def time_components(system: Callable, components: list[Component], device: torch.device) -> dict[str, float]:
    """
    Return the seconds of a system by component, each without those inside it; the remainder is `REST`.

    On a GPU every component is waited for, which slows the system down: the shares are meaningful, the seconds are not.
    """
    seconds, inside = {name: 0.0 for name, _, _ in components} | {REST: 0.0}, []

    def timed(name: str, function: Callable) -> Callable:
        @wraps(function)  # `generate` inspects the signatures of what it calls
        def run(*args, **kwargs):
            synchronize(device)
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(device)
                total = time.perf_counter() - start
                seconds[name] += total - inside.pop()
                if inside:
                    inside[-1] += total

        return run

    with ExitStack() as stack:
        for name, owner, function in components:
            stack.enter_context(patch.object(owner, function, timed(name, getattr(owner, function))))
        timed(REST, system)()
    return seconds


def speech_components(layers: nn.ModuleList) -> list[Component]:
    """List the projections of the speech states, which are computed once per utterance."""
    projections = [part for layer in layers for part in (layer.encoder_attn.k_proj, layer.encoder_attn.v_proj)]
    return [(SPEECH, part, "forward") for part in projections]


def stock_components(utterances: Utterances) -> list[Component]:
    """List the components of the stock loops of Whisper and of the aligner, which computes all distances."""
    layers = utterances.model.bridge.layers
    return [
        *speech_components(layers),
        *((LAYERS, layer, "forward") for layer in layers),
        (LOOKUP, utterances.lookup, "distances"),
        (OUTPUT, utterances.whisper.proj_out, "forward"),
    ]


def stage_1_components(utterances: Utterances, lookup: NearestToken) -> list[Component]:
    """List the components of Stage 1's greedy loop."""
    return [
        *speech_components(utterances.model.bridge.layers),
        (LAYERS, LayerSteps, "step"),
        (LOOKUP, lookup, "nearest"),
    ]


def llm_components(utterances: Utterances) -> list[Component]:
    """List the LLM as the single component of its loop."""
    return [(LLM, utterances.model.language_model, "forward")]


def lookup_share(seconds: dict[str, float]) -> float:
    """Return the share of the lookup in a step, without what is computed once per utterance."""
    return seconds[LOOKUP] / (sum(seconds.values()) - seconds[SPEECH])


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of parameters."""
    return sum(one.numel() * one.element_size() for one in parameters)


class Roofline:
    """
    Compute the least seconds that each loop can take for a batch.

    Args:
        machine: its speed.
        utterances: the batch.
    """

    def __init__(self, machine: Machine, utterances: Utterances):
        self.machine, self.utterances = machine, utterances
        aligner, config = utterances.model.bridge, utterances.model.config.aligner_config
        # Used once per utterance, for the keys and values of the speech states.
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
        """Return the least seconds of stock Whisper's loop."""
        return self._decoding(self.utterances.whisper.proj_out.weight)

    def stage_1(self) -> float:
        """Return the least seconds of Stage 1's loop."""
        aligner, table = self.utterances.model.bridge, self.utterances.lookup.table
        return self._decoding(aligner.input_projection.weight, aligner.output_projection.weight, table)

    def _decoding(self, *others: torch.Tensor) -> float:
        step = self._decoder + self._speech + size_of(others)
        return self._speech_seconds + self.utterances.tokens * step / self.machine.bandwidth

    def llm(self) -> float:
        """Return the seconds of one forward over the prompts and of the others over one position of each row."""
        prompts = self.utterances.batch_size * self._prompt_length(with_instruction=True)
        reading = self._llm_bytes() / self.machine.bandwidth
        first = max(reading, prompts * self._llm_position())
        return first + (self.utterances.tokens - 1) * max(reading, self.utterances.batch_size * self._llm_position())

    def llm_checked(self, rows: list[Row]) -> float:
        """Return the seconds of the forwards that were counted, with their positions spread evenly over them."""
        positions = len(rows) * self._prompt_length(with_instruction=False)
        positions += sum(row.accepted + row.rejected + row.forwards for row in rows)
        forwards = max(row.forwards for row in rows)
        return max(forwards * self._llm_bytes() / self.machine.bandwidth, positions * self._llm_position())

    def _prompt_length(self, with_instruction: bool) -> int:
        prompt, config = self.utterances.model.config.prompt_token_ids, self.utterances.model.config
        length = (
            len(prompt) - 1 + len(self.utterances.aligned[0]) + 1
        )  # the audio placeholder is replaced; the guide is appended
        return length if with_instruction else length - prompt.index(config.audio_token_id)

    def _llm_bytes(self) -> int:
        """Return the bytes of the LLM without its embedding table, of which only some rows are read."""
        language_model = self.utterances.model.language_model
        return size_of(language_model.parameters()) - size_of([language_model.get_input_embeddings().weight])

    def _llm_position(self) -> float:
        """Return the seconds of arithmetic per position."""
        element = self.utterances.model.dtype.itemsize
        return 2 * self._llm_bytes() / element / self.machine.arithmetic
