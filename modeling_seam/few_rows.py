"""The product that decoding consists of: a large matrix with few rows."""

import torch
from torch import nn

# Above this number of rows the product is bound by arithmetic, not by reading the matrix.
FEW_ROWS = 32


def few_rows_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `rows @ weight.T`, as `torch.nn.functional.linear` without a bias.

    On a CPU in bf16 the library's way to compute `rows @ weight.T` takes 1.4 times as long as reading `weight` does;
    the same product the other way round, `weight @ rows.T`, takes as long as reading it (measured with AMX, 1 to 16
    rows).

    Args:
        rows: `(n, d)`.
        weight: `(m, d)`.

    Returns:
        `(n, m)`, contiguous.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or len(rows) > FEW_ROWS:
        return nn.functional.linear(rows, weight)
    if len(rows) == 1:
        return torch.mv(weight, rows[0])[None]
    return (weight @ rows.T).T.contiguous()


def few_rows_linear(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """
    `linear(rows)` for rows `(n, d)`. A module that is anything else than a plain linear layer (quantized, with an
    adapter) computes it itself.
    """
    if type(linear) is not nn.Linear or rows.dtype != linear.weight.dtype:
        return linear(rows)
    product = few_rows_product(rows, linear.weight)
    return product if linear.bias is None else product.add_(linear.bias)
