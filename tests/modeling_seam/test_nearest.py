"""Eq. 3, 7 and 8 against the formulas as printed."""

import pytest
import torch

from seam.modeling_seam import fast_matmul
from seam.modeling_seam import nearest as nearest_module
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


def test_only_the_active_vocabulary_is_returned():
    table = torch.randn(50, 24)
    lookup = NearestToken(table, 0.5, "sum", [9], active_ids=[30, 4, 9, 12])
    distances = NearestToken(table, 0.5, "sum", []).distances(table)
    expected = torch.full_like(distances, torch.inf)
    expected[:, [4, 12, 30]] = distances[:, [4, 12, 30]]
    torch.testing.assert_close(lookup.distances(table), expected)
    assert torch.equal(lookup.nearest(table), expected.argmin(-1))
    assert lookup.nearest(table)[[4, 12, 30]].tolist() == [4, 12, 30]


@pytest.fixture(params=["with 8 bits", "without"])
def large(request, monkeypatch):
    """Tables of the tests are large ones: they are not compared directly."""
    monkeypatch.setattr(nearest_module, "SMALL_TABLE", 600)
    monkeypatch.setattr(fast_matmul, "PIECE", 5000)
    if request.param == "without":
        monkeypatch.setattr(nearest_module, "is_int8_fast", lambda device: False)
    elif not fast_matmul.is_int8_fast(torch.device("cpu")):
        pytest.skip("this CPU has no exact products in 8 bits (VNNI)")


def near_duplicates(rows, dim, dtype):
    """Make groups of ten that differ by less than a bf16 product can tell."""
    base = torch.randn(rows // 10, dim)
    return (base.repeat_interleave(10, 0) * (1 + 2e-3 * torch.randn(rows, dim))).to(dtype)


TABLES = {
    "ordinary": lambda dtype: (torch.randn(900, 48) * torch.rand(900, 1)).to(dtype),
    "near duplicates": lambda dtype: near_duplicates(900, 48, dtype),
    "exact duplicates": lambda dtype: torch.randn(90, 48).to(dtype).repeat(10, 1),
    "norms of all sizes": lambda dtype: (torch.randn(900, 48) * 10 ** torch.randn(900, 1)).to(dtype),
    "tiny": lambda dtype: (torch.randn(900, 48) * 1e-6).to(dtype),
    "zero vectors": lambda dtype: (torch.randn(900, 48) * (torch.rand(900, 1) > 0.5)).to(dtype),
    "one direction": lambda dtype: (torch.ones(900, 48) * torch.rand(900, 1) + 1e-3 * torch.randn(900, 48)).to(dtype),
}


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_large_table_gives_the_ids_of_the_fp32_distances(large, dtype, kind, weight, reduction):
    torch.manual_seed(0)
    table = TABLES[kind](dtype)
    lookup = NearestToken(table, weight, reduction, [3, 7])
    one, other = table[torch.randint(900, (2, 150))].float()
    predicted = torch.cat([one, (one + other) / 2, one + 0.3 * torch.randn_like(one) * one.norm(dim=-1)[:, None] / 7])
    predicted = torch.cat([predicted, torch.zeros(1, 48), 1e3 * predicted[:5], 1e-7 * predicted[5:10]])
    nearest = lookup.nearest(predicted)
    distances = lookup.distances(predicted)
    chosen = distances.gather(1, nearest[:, None])[:, 0]
    least, same = distances.min(-1).values, distances.argmin(-1)
    # What fp32 cannot tell apart, in whatever order it adds, are the terms' own roundings.
    norms = table[torch.stack([same, nearest])].float().norm(dim=-1).amax(0)
    terms = 1 + weight * (predicted.norm(dim=-1) + norms).square()
    assert (chosen - least <= 1e-6 * terms).all()
    second = distances.topk(2, largest=False).values[:, 1]
    clear = second - least > 1e-6 * terms
    assert torch.equal(nearest[clear], same[clear])
    assert not {3, 7} & set(nearest.tolist())
    if kind == "ordinary":
        assert clear.float().mean() > 0.9, "the test needs answers that are clear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_rows_the_lowest_id_is_returned(large, dtype):
    torch.manual_seed(0)
    table = torch.randn(90, 48).to(dtype)
    lookup = NearestToken(table.repeat(10, 1), 0.5, "sum", [5])
    assert lookup.nearest(table.float()).tolist() == [95 if row == 5 else row for row in range(90)]


def test_where_many_may_be_nearest_all_are_measured(large, monkeypatch):
    monkeypatch.setattr(nearest_module, "SHORTLIST", 20)
    torch.manual_seed(0)
    table = torch.randn(900, 48)
    table[100:200] = table[100] * (1 + 1e-2 * torch.randn(100, 48))
    lookup = NearestToken(table, 0.5, "sum", [])
    assert lookup.nearest(table[:100]).tolist() == list(range(100))
    assert lookup.direct_rows == 0
    assert lookup.nearest(table[100:150]).tolist() == list(range(100, 150))
    assert lookup.direct_rows == 50


def test_overflow_is_measured_directly(large):
    torch.manual_seed(0)
    table = torch.randn(900, 48)
    lookup = NearestToken(table, 0.0, "sum", [])
    predicted = torch.full((2, 48), 3.4e38)  # infinite in bf16
    predicted[1] = table[4]
    assert lookup.nearest(predicted)[1] == 4
    assert lookup.direct_rows == 1


def test_near_predictions_cost_a_quarter_of_the_table(large):
    """What lies near a row is found by the first products; what lies between many needs the others."""
    torch.manual_seed(0)
    table = torch.randn(900, 48).bfloat16()
    lookup = NearestToken(table, 0.5, "sum", [])
    first, seen = lookup._low_precision_tables[0], []
    original = first.upper_products
    first.upper_products = lambda predicted: (seen.append(len(upper)) or upper for upper in original(predicted))
    assert lookup.nearest(table[:20].float() + 0.05 * torch.randn(20, 48)).tolist() == list(range(20))
    assert seen == [20]


def test_a_large_half_precision_table_is_not_copied_in_its_own_precision(large):
    table = torch.randn(900, 48).bfloat16()
    lookup = NearestToken(table, 0.5, "sum", [])
    lookup.nearest(torch.randn(20, 48))
    lookup.distances(table[:20])
    kept = [value for holder in (lookup, *lookup._low_precision_tables) for value in vars(holder).values()]
    kept = [value for value in kept if torch.is_tensor(value) and value.numel() >= table.numel() / 4]
    assert kept and all(value.data_ptr() == table.data_ptr() for value in kept)


def test_the_active_vocabulary_of_a_large_table(large):
    torch.manual_seed(0)
    table = torch.randn(900, 48).bfloat16()
    active = torch.randperm(900)[:300].tolist()
    lookup = NearestToken(table, 0.5, "sum", active[:2], active)
    predicted = torch.randn(200, 48)
    assert torch.equal(lookup.nearest(predicted), lookup.distances(predicted).argmin(-1))
    assert set(lookup.nearest(predicted).tolist()) <= set(active[2:])


def test_autocast_does_not_reach_the_lookup_in_a_large_table(large):
    torch.manual_seed(0)
    lookup = NearestToken(near_duplicates(900, 48, torch.float32), 0.5, "sum", [])
    predicted = lookup.table[::3] * (1 + 5e-4 * torch.randn(300, 48))
    expected = lookup.nearest(predicted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lookup.nearest(predicted), expected)
