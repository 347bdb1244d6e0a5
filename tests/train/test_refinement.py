import pytest
import torch

from seam.train.recipe import RecipeError
from seam.train.refinement import drop_misheard
from seam.train.stage1_decoding import DecodedUtterance


def heard(position: int, transcript: list[int], tokens: list[int]) -> DecodedUtterance:
    return DecodedUtterance(position, torch.LongTensor(transcript), torch.LongTensor(tokens))


def test_what_was_hardly_heard_is_left_out(caplog):
    right = heard(0, [1, 2, 3, 4], [1, 2, 3, 4])
    one_in_four = heard(1, [1, 2, 3, 4], [1, 9, 3, 4])
    looped = heard(2, [1, 2], [1, 2, 2, 2, 2])
    items = [right, one_in_four, looped]
    for limit, kept in ((0, [0]), (25, [0, 1]), (24.9, [0]), (150, [0, 1, 2])):
        assert [item.position for item in drop_misheard(items, limit)] == kept
    with pytest.raises(RecipeError, match="max_error_rate is 10: Stage 1 made more errors in every utterance"):
        drop_misheard(items[1:], 10)
