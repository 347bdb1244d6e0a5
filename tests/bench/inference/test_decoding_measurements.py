"""What counts as a numerical tie."""

import math

import pytest
import torch

from seam.bench.inference.decoding_measurements import compare, in_bf16_steps


def test_steps_between_bf16_numbers():
    # Of the eight bits of a bf16 number's fraction one is not stored: from 4 to 8 the step is 4 / 128.
    assert in_bf16_steps(5.0, 5.0 + 4 / 128) == 1
    assert in_bf16_steps(-1.5, -1.5 + 3 / 128) == 3
    assert in_bf16_steps(0.0, 0.0) == 0


def logits(place: int) -> torch.Tensor:
    """Of two rows over five tokens: the first row nearly ties 1 and 2 at place 1, the second does not."""
    assert place == 1
    return torch.tensor([[0, 5.0, 5.0 + 4 / 128, 0, 0], [0, 5.0, 3.0, 0, 0]])


@pytest.mark.parametrize(("dtype", "ties"), [(torch.bfloat16, 1), (torch.float32, 0)])
def test_the_first_difference_decides(dtype, ties):
    comparison = compare([[3, 2, 4], [3, 2, 4]], [[3, 1, 0], [3, 1, 4]], dtype, logits)
    assert (comparison.rows, comparison.differing, comparison.ties) == (2, 2, ties)
    assert comparison.gaps == [1, 64]


def test_equal_rows_are_not_looked_into_and_repeats_are_the_same_rows():
    comparison = compare([[3, 1], [3, 1], [3, 2]], [[3, 1], [3, 1], [3, 1]], torch.bfloat16, logits)
    assert (comparison.rows, comparison.differing, comparison.ties) == (3, 1, 1)  # the third is the first one again
    assert not comparison.gaps[1:]


def test_a_row_that_is_too_long_is_no_tie():
    comparison = compare([[3, 1, 1]], [[3, 1]], torch.bfloat16, logits)
    assert comparison.gaps == [math.inf] and comparison.ties == 0
