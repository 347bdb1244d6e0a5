"""Eq. 3, 7 and 8 against the formulas as printed."""

import pytest
import torch

from seam.modeling_seam.nearest import NearestToken, alignment_distance


def printed_distance(predicted, target, weight, reduction):
    """Eq. 7, term by term, in fp64."""
    predicted, target = predicted.double(), target.double()
    squared = (predicted - target).square()
    squared = squared.sum(-1) if reduction == "sum" else squared.mean(-1)
    return weight * squared + (1 - weight) * (1 - torch.nn.functional.cosine_similarity(predicted, target, dim=-1))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_alignment_distance_is_eq_7(weight, reduction):
    torch.manual_seed(0)
    predicted, target = torch.randn(40, 24), torch.randn(40, 24)
    torch.testing.assert_close(
        alignment_distance(predicted, target, weight, reduction).double(),
        printed_distance(predicted, target, weight, reduction),
        rtol=1e-5,
        atol=1e-5,
    )


def test_distance_of_an_embedding_to_itself_is_zero():
    target = torch.randn(10, 24)
    torch.testing.assert_close(alignment_distance(target, target, 0.5, "sum"), torch.zeros(10), rtol=0, atol=1e-4)


def test_distance_is_differentiable_at_a_zero_prediction():
    predicted = torch.zeros(3, 24, requires_grad=True)
    alignment_distance(predicted, torch.randn(3, 24), 0.5, "sum").sum().backward()
    assert torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_lookup_finds_the_argmin_of_the_printed_formula(weight):
    torch.manual_seed(0)
    table = torch.randn(500, 24) * torch.rand(500, 1)
    # Between two rows: hard cases, where small errors would change the answer.
    predicted = (table[torch.randint(500, (2000,))] + table[torch.randint(500, (2000,))]) / 2
    predicted += 0.1 * torch.randn_like(predicted)
    lookup = NearestToken(table, weight, "sum", [])
    distances = printed_distance(predicted[:, None], table[None], weight, "sum")
    torch.testing.assert_close(lookup.distances(predicted).double(), distances, rtol=1e-4, atol=1e-4)
    chosen = distances.gather(1, lookup.nearest(predicted)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.min(1).values, rtol=0, atol=1e-5)


def test_the_loss_and_the_lookup_measure_the_same():
    table, predicted = torch.randn(50, 24), torch.randn(7, 24)
    lookup = NearestToken(table, 0.5, "sum", [])
    nearest = lookup.nearest(predicted)
    torch.testing.assert_close(
        alignment_distance(predicted, table[nearest], 0.5, "sum"), lookup.distances(predicted).min(-1).values
    )


def test_excluded_ids_are_never_returned():
    table = torch.randn(50, 24)
    lookup = NearestToken(table, 0.5, "sum", [3, 7])
    assert lookup.nearest(table).tolist()[:3] == [0, 1, 2]
    assert not {3, 7} & set(lookup.nearest(table).tolist())


def test_the_lookup_is_fp32_under_autocast_and_in_slices():
    torch.manual_seed(0)
    table = torch.randn(5000, 64)
    predicted = (table[torch.randint(5000, (3, 700))] + table[torch.randint(5000, (3, 700))]) / 2
    lookup = NearestToken(table, 0.5, "sum", [])
    with torch.autocast("cpu", torch.bfloat16):
        nearest = lookup.nearest(predicted)
    assert torch.equal(nearest, lookup.distances(predicted).argmin(-1))


def test_half_precision_predictions_are_looked_up_in_fp32():
    table = torch.randn(50, 24).bfloat16()
    assert NearestToken(table, 0.5, "sum", []).distances(table).dtype == torch.float32


def test_closest_other_sees_a_twin():
    table = torch.randn(50, 24)
    table[9] = table[4] + 1e-3
    assert NearestToken(table, 0.5, "sum", []).closest_other(4)[0] == 9
    assert NearestToken(table, 0.5, "sum", []).closest_other(4)[1] > 0.999
