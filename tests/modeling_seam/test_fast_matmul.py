import pytest
import torch
from torch import nn

from seam.modeling_seam import fast_matmul
from seam.modeling_seam.fast_matmul import Bf16Table, Int8Table, fp32_pieces, skinny_linear, skinny_matmul

KINDS = [Bf16Table, pytest.param(Int8Table, marks=pytest.mark.skipif(not hasattr(torch, "_int_mm"), reason="no int8"))]


def hard_cases(dtype):
    """Vectors whose roundings all point the same way, outliers, all sizes, and nothing at all."""
    torch.manual_seed(0)
    up = 1 + 2.0**-8 - 2.0**-16  # just below the middle of two bf16 numbers: rounds down by the most
    middle = torch.full((20, 64), 63.4999)  # the same in 8 bits, beside a 127
    middle[:, ::16] = 127
    outliers = torch.randn(20, 64)
    outliers[:, 5] = 300
    vectors = [torch.full((20, 64), up), -torch.full((20, 64), up), middle, -middle, outliers]
    vectors += [torch.randn(400, 64), torch.randn(100, 64) * 10 ** torch.randn(100, 1), torch.zeros(2, 64)]
    return torch.cat(vectors).to(dtype)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_product_is_greater_than_its_bound(kind, dtype, scale, monkeypatch):
    monkeypatch.setattr(fast_matmul, "PIECE", 1000)
    table = hard_cases(dtype)
    predicted = scale * torch.cat([hard_cases(torch.float32)[::9], table[:30].float()])
    products = predicted.double() @ table.double().T
    size = predicted.double().norm(dim=-1)[:, None] * table.double().norm(dim=-1)
    bounds = [upper.double() for upper in kind(table).upper_products(predicted)]
    for upper in bounds:
        assert (upper >= products).all()
    excess = ((bounds[-1] - products) / size)[size > 0]
    assert excess.max() < 0.05, "the bound is of some use"
    assert excess.min() < 0.009, "a bound that is never approached tests nothing"
    for before, after in zip(bounds, bounds[1:], strict=False):
        assert (after - before).mean() < 0  # it becomes nearer


def test_what_is_left_of_a_row_counts(monkeypatch):
    """After the first quarter a product may still become as great as the norms of the rest allow."""
    table = torch.zeros(2, 8)
    table[0, 0], table[1, 7] = 1.0, 2.0
    predicted = torch.zeros(1, 8)
    predicted[0, 0], predicted[0, 6] = 1.0, 3.0
    first, second, third = Int8Table(table).upper_products(predicted)
    assert first[0].tolist() == pytest.approx([1.0, 6.0], rel=0.05)  # 3 x 2: the two could point the same way
    assert second[0].tolist() == pytest.approx([1.0, 6.0], rel=0.05)
    assert third[0].tolist() == pytest.approx([1.0, 0.0], abs=0.1)


def test_a_table_is_made_fp32_in_pieces(monkeypatch):
    monkeypatch.setattr(fast_matmul, "PIECE", 100)
    table = torch.randn(37, 24).bfloat16()
    pieces = list(fp32_pieces(table))
    assert [len(piece) for piece in pieces] == [4] * 9 + [1]
    assert torch.equal(torch.cat(pieces), table.float())


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_linear_layers_product(rows, dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias).to(dtype)
    states = torch.randn(rows, 96).to(dtype)
    expected = states.double() @ linear.weight.double().T
    product = skinny_matmul(states, linear.weight)
    assert product.shape == (rows, 160) and product.dtype == dtype and product.is_contiguous()
    eps = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(product.double(), expected, rtol=eps, atol=eps)
    if bias:
        expected = expected + linear.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(skinny_linear(linear, states).double(), expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_sum_is_one_in_fp32(rows):
    """4,096 products of 1/16 after one of 256: a sum in bf16, whose numbers lie 2 apart there, would stay at 256."""
    states = torch.full((rows, 4097), 0.25).bfloat16()
    weight = torch.full((8, 4097), 0.25).bfloat16()
    states[:, 0], weight[:, 0] = 16, 16
    assert (skinny_matmul(states, weight) == 512).all()


def test_a_layer_of_another_kind_computes_itself():
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    layer, states = Doubled(8, 8).bfloat16(), torch.randn(1, 8).bfloat16()
    torch.testing.assert_close(skinny_linear(layer, states), layer(states))
