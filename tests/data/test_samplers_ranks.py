"""Batches for several processes: each utterance once, and in each step what one process would take."""

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from seam.data.samplers import EvenBatchSampler


def batches_of_ranks(utterances: int, batch_size: int, ranks: int, **kwargs) -> list[list[list[int]]]:
    """Return the batches of every rank, as accelerate distributes them."""
    batches = EvenBatchSampler(SequentialSampler(range(utterances)), batch_size, ranks, **kwargs)
    shards = [BatchSamplerShard(batches, ranks, rank, even_batches=False) for rank in range(ranks)]
    rows = [list(shard) for shard in shards]
    assert [len(shard) for shard in shards] == [len(row) for row in rows] and len(batches) == sum(map(len, rows))
    return rows


def test_the_last_step_is_divided_evenly():
    assert batches_of_ranks(7, 2, 2) == [[[0, 1], [4]], [[2, 3], [5, 6]]]
    assert batches_of_ranks(6, 2, 2) == [[[0, 1], [4]], [[2, 3], [5]]]
    assert batches_of_ranks(8, 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_fewer_utterances_than_ranks_join_the_step_before():
    assert batches_of_ranks(5, 2, 2) == [[[0, 1]], [[2, 3, 4]]]
    assert batches_of_ranks(10, 1, 4) == [[[0], [4]], [[1], [5, 6]], [[2], [7]], [[3], [8, 9]]]
    assert batches_of_ranks(9, 1, 4) == [[[0], [4]], [[1], [5]], [[2], [6]], [[3], [7, 8]]]


def test_the_last_step_can_be_left_out():
    assert batches_of_ranks(7, 2, 2, drop_last=True) == [[[0, 1]], [[2, 3]]]
    assert batches_of_ranks(5, 2, 2, drop_last=True) == [[[0, 1]], [[2, 3]]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_utterance_once(ranks, batch_size):
    for utterances in range(ranks, 45):
        rows = batches_of_ranks(utterances, batch_size, ranks)
        steps = [sum(batches, []) for batches in zip(*rows, strict=True)]
        assert sum(steps, []) == list(range(utterances))
        assert all(1 <= len(batch) <= batch_size + 1 for row in rows for batch in row)
        one = list(BatchSampler(range(utterances), batch_size * ranks, drop_last=False))
        if len(one) > 1 and len(one[-1]) < ranks:
            one[-2:] = [one[-2] + one[-1]]
        assert steps == one


def test_too_few_utterances_are_refused():
    with pytest.raises(ValueError, match="2 utterances are too few for 3 processes"):
        EvenBatchSampler(SequentialSampler(range(2)), 1, 3)
