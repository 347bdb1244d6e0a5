"""What the machine allows: the bytes that a loop must read and its products, at the speed of the machine."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from seam.bench.loops.systems import Utterances
from seam.bench.loops.timing import synchronize
from seam.modeling_seam.speculative import Row

BYTES = 2**29  # of the matrix that is read to measure the bandwidth: more than caches hold
SIDE = 2048  # of the square matrices that are multiplied
TRIES = 20  # of which the best counts: other work on the machine only ever slows it down


@dataclass
class Machine:
    """
    Args:
        bandwidth: bytes a second that a product of a large matrix with one vector reads.
        arithmetic: floating-point operations a second of a product of two matrices.
    """

    bandwidth: float
    arithmetic: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The speeds of a machine, in the type in which the models compute."""
    columns = 4096
    matrix = torch.full((BYTES // dtype.itemsize // columns, columns), 0.5, device=device, dtype=dtype)
    vector = torch.full((columns,), 0.5, device=device, dtype=dtype)
    square = torch.full((SIDE, SIDE), 0.5, device=device, dtype=dtype)
    reading = _best(lambda: torch.mv(matrix, vector), device)
    return Machine(BYTES / reading, 2 * SIDE**3 / _best(lambda: square @ square, device))


def _best(function, device: torch.device) -> float:
    seconds = []
    for _ in range(TRIES + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


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
