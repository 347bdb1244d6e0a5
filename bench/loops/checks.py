"""Whether a fast loop wrote what the plain one did, and if not, by how narrow a choice."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

# So many bf16 numbers apart, two logits are a tie: a forward over many positions rounds otherwise than one over one.
TIE = 4


@dataclass
class Comparison:
    """
    Args:
        rows: number of rows compared.
        differing: of them that differ.
        ties: of these, whose first difference is a numerical tie.
        gaps: at the first difference of each, how far the plain loop's logits of the two tokens lie apart, in steps
            between bf16 numbers of their size.
    """

    rows: int
    differing: int
    ties: int
    gaps: list[float]

    @property
    def is_lossless(self) -> bool:
        return self.differing == self.ties

    def to_dict(self) -> dict:
        return asdict(self)


def compare(
    fast: list[list[int]], plain: list[list[int]], dtype: torch.dtype, logits_of: Callable[[int], torch.Tensor]
) -> Comparison:
    """
    Args:
        fast, plain: what the two loops wrote, row by row, batch after batch.
        dtype: of the weights. In fp32 nothing counts as a tie.
        logits_of: from a place to the plain loop's logits there, `(batch, vocabulary)`; asked only where rows differ.
    """
    gaps = []
    for row, (one, other) in enumerate(zip(fast, plain, strict=True)):
        if one == other:
            continue
        place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if place is None:  # one of them is longer
            gaps.append(math.inf)
        else:
            logits = logits_of(place)
            logits = logits[row % len(logits)].float()
            gaps.append(in_bf16_steps(float(logits[one[place]]), float(logits[other[place]])))
    ties = sum(gap <= TIE for gap in gaps) if dtype == torch.bfloat16 else 0
    return Comparison(len(plain), len(gaps), ties, gaps)


def in_bf16_steps(a: float, b: float) -> float:
    """The distance of two numbers in steps between bf16 numbers of the size of the larger one."""
    largest = max(abs(a), abs(b))
    if largest == 0:
        return 0.0
    return abs(a - b) / (torch.finfo(torch.bfloat16).eps * 2.0 ** math.floor(math.log2(largest)))
