"""The product of few rows with a large matrix is that of a linear layer."""

import pytest
import torch
from torch import nn

from seam.modeling_seam.few_rows import few_rows_linear, few_rows_product


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_linear_layers_product(rows, dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 160, bias=bias).to(dtype)
    states = torch.randn(rows, 96).to(dtype)
    expected = states.double() @ linear.weight.double().T
    product = few_rows_product(states, linear.weight)
    assert product.shape == (rows, 160) and product.dtype == dtype and product.is_contiguous()
    eps = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(product.double(), expected, rtol=eps, atol=eps)
    if bias:
        expected = expected + linear.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(few_rows_linear(linear, states).double(), expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_sum_is_one_in_fp32(rows):
    """4,096 products of 1/16 after one of 256: a sum in bf16, whose numbers lie 2 apart there, would stay at 256."""
    states = torch.full((rows, 4097), 0.25).bfloat16()
    weight = torch.full((8, 4097), 0.25).bfloat16()
    states[:, 0], weight[:, 0] = 16, 16
    assert (few_rows_product(states, weight) == 512).all()


def test_a_layer_of_another_kind_computes_itself():
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    layer, states = Doubled(8, 8).bfloat16(), torch.randn(1, 8).bfloat16()
    torch.testing.assert_close(few_rows_linear(layer, states), layer(states))
