"""Batches by a budget: full, within it, and together the data set."""

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard

from seam.data.samplers import LengthBatchSampler, budget_shares


@pytest.fixture
def seconds():
    return np.random.default_rng(0).uniform(1, 30, 500)


def padded(batches, lengths):
    return [len(batch) * max(lengths[place] for place in batch) for batch in batches]


def test_shares_of_the_tightest_budget():
    np.testing.assert_allclose(budget_shares([[10, 5], [2, 40]], [100, 50]), [0.1, 0.8])


def test_by_hand():
    # 12 s of padded audio: [6], [6, 4] would be 2 x 6; 4 s go by three, 2 s by six, of which there are four.
    lengths = [2, 6, 4, 2, 4, 6, 2, 4, 2]
    batches = LengthBatchSampler(budget_shares([[length] for length in lengths], [12]))
    assert len(batches) == 3
    assert sorted(sorted(lengths[place] for place in batch) for batch in batches) == [[2, 2, 2, 2], [4, 4, 4], [6, 6]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_an_epoch_is_the_data_set_once_within_the_budget(seconds, ranks):
    sampler = LengthBatchSampler(seconds / 100, ranks, seed=1)
    seen = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and len(batches) % ranks == 0
        assert sorted(place for batch in batches for place in batch) == list(range(500))
        assert max(padded(batches, seconds)) <= 100 + 1e-6
        seen.add(str(batches))
    assert len(seen) == 3
    if ranks == 1:  # little of the audio is padding: uniform lengths in shuffled batches of 100 s would have half
        assert seconds.sum() / sum(padded(batches, seconds)) > 0.9
        assert np.mean(padded(batches, seconds)) > 80


def test_two_budgets_hold_together(seconds):
    tokens = np.random.default_rng(1).integers(1, 100, 500)
    batches = list(LengthBatchSampler(budget_shares(np.stack([seconds, tokens], 1), [100, 300])))
    assert max(padded(batches, seconds)) <= 100 + 1e-6 and max(padded(batches, tokens)) <= 300 + 1e-6


def test_seed_and_epoch_decide_the_order(seconds):
    def epoch(number, seed=0):
        sampler = LengthBatchSampler(seconds / 100, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    np.random.seed(5)
    assert epoch(2) == epoch(2) and epoch(2) != epoch(1) and epoch(2) != epoch(2, seed=1)
    mixed = sum(batch in epoch(1) for batch in epoch(2))
    assert mixed < len(epoch(1)) / 2  # batches of other utterances, not the same ones in another order


@pytest.mark.parametrize("even_batches", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_accelerate_deals_them_out_without_overlap_or_loss(seconds, ranks, even_batches):
    sampler = LengthBatchSampler(seconds / 100, ranks)
    shares = [
        list(BatchSamplerShard(sampler, num_processes=ranks, process_index=rank, even_batches=even_batches))
        for rank in range(ranks)
    ]
    assert {len(share) for share in shares} == {len(sampler) // ranks}
    assert sorted(place for share in shares for batch in share for place in batch) == list(range(500))


def test_ranks_work_at_like_lengths(seconds):
    batches = list(LengthBatchSampler(seconds / 100, ranks=2))
    steps = [[np.mean(seconds[batch]) for batch in batches[start : start + 2]] for start in range(0, len(batches), 2)]
    assert np.mean([abs(one - other) for one, other in steps]) < 2


def test_what_fits_no_batch_is_refused(seconds):
    with pytest.raises(ValueError, match="the longest utterance takes 1.20 times the budget"):
        LengthBatchSampler([0.5, 1.2])
    with pytest.raises(ValueError, match="2 utterances are too few for 3 processes"):
        LengthBatchSampler([0.5, 0.5], ranks=3)
    with pytest.raises(ValueError, match="3 batches of one utterance cannot be divided among 2 processes"):
        LengthBatchSampler([1, 1, 1], ranks=2)
    assert sorted(LengthBatchSampler([0.2, 0.2, 0.2], ranks=3)) == [[0], [1], [2]]
