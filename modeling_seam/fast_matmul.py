"""Fast products with a large matrix: with few rows, and in low precision with bounds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Numbers of a table that are made fp32 at once: 8 MB, which a cache holds.
PIECE = 2**21
# Shares of the dimensions after which the products in 8 bits are looked at.
SHARES = (0.25, 0.5, 1.0)
# Norms of roundings are rounded themselves.
MARGIN = 1.002
UNIT = torch.finfo(torch.float32).eps / 2


def fp32_pieces(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """A table in fp32, in pieces, so that there is never a copy of all."""
    for piece in rows.split(max(PIECE // rows.shape[-1], 1)):
        yield piece.float()


def sum_error(terms: int) -> float:
    """Relative error of an fp32 sum of products, in whatever order."""
    return (terms + 16) * UNIT


def is_int8_fast(device: torch.device) -> bool:
    """Whether there are exact products in 8 bits: without VNNI a CPU may saturate their sums."""
    return device.type == "cpu" and getattr(torch.cpu, "_is_vnni_supported", bool)() and hasattr(torch, "_int_mm")


@contextmanager
def fp32_accumulation() -> Iterator[None]:
    """Half-precision products are summed in fp32. They always are on a CPU; cuBLAS may sum partial sums in bf16."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


class Bf16Table:
    """
    Products in bf16, which read half of what fp32 ones read.

    Args:
        rows (`torch.Tensor` of shape `(rows, d)`): a table; of one in bf16 there is no copy.
    """

    def __init__(self, rows: torch.Tensor):
        self.coarse = rows.bfloat16()
        norm, rounding = [], []
        for piece, coarse in zip(fp32_pieces(rows), fp32_pieces(self.coarse), strict=True):
            norm.append(piece.norm(dim=-1))
            rounding.append((piece - coarse).norm(dim=-1))
        self.errors = MARGIN * torch.stack([torch.cat(rounding), torch.cat(norm)])

    def upper_products(self, predicted: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        Args:
            predicted: `(n, d)`, fp32.

        Yields:
            What no product of `predicted` with a row of the table is greater than, `(n, rows)`, fp32; once.
        """
        coarse = predicted.bfloat16()
        with fp32_accumulation():
            dot = few_rows_product(coarse, self.coarse).float()
        # The roundings of both factors (Cauchy-Schwarz), of the sum, and of the result to bf16.
        norm, rounding = predicted.norm(dim=-1, keepdim=True), (predicted - coarse.float()).norm(dim=-1, keepdim=True)
        rest = sum_error(predicted.shape[-1]) + torch.finfo(torch.bfloat16).eps
        yield torch.addmm(dot, torch.cat([norm + rounding, rest * norm + rounding], dim=-1), self.errors)


class Int8Table:
    """
    Products in 8 bits, over the first dimensions, then over more of them, then over all. A prediction that lies near
    a row of the table leaves few candidates after a quarter.

    Args:
        rows (`torch.Tensor` of shape `(rows, d)`): a table. A copy of it is kept, of a byte a number.
    """

    def __init__(self, rows: torch.Tensor):
        ends = [round(share * rows.shape[-1]) for share in SHARES]
        self.parts = list(zip([0, *ends], ends, strict=False))
        self.coarse = [torch.empty(len(rows), end - start, dtype=torch.int8) for start, end in self.parts]
        self.scale = torch.empty(len(self.parts), len(rows))
        # After each part, norms of: the roundings so far, the numbers so far, and those that are left. A little more.
        self.errors = torch.empty(len(self.parts), 3, len(rows))
        begin = 0
        for piece in fp32_pieces(rows):
            place = slice(begin, begin + len(piece))
            rounding = torch.empty_like(piece)
            for i, (start, end) in enumerate(self.parts):
                coarse, scale = self._in_8_bits(piece[:, start:end])
                self.coarse[i][place], self.scale[i, place] = coarse, scale
                rounding[:, start:end] = piece[:, start:end] - coarse.float() * scale[:, None]
                norms = [rounding[:, :end].norm(dim=-1), piece[:, :end].norm(dim=-1), piece[:, end:].norm(dim=-1)]
                self.errors[i, :, place] = MARGIN * torch.stack(norms)
            begin += len(piece)

    @staticmethod
    def _in_8_bits(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(n, d)` to whole numbers and their scales `(n,)`."""
        scale = (vectors.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (vectors / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    def upper_products(self, predicted: torch.Tensor) -> Iterator[torch.Tensor]:
        """As that of [`Bf16Table`]; once after each part, each time nearer."""
        dot = predicted.new_zeros(len(predicted), len(self.scale[0]))
        rounding = torch.empty_like(predicted)
        for i, (start, end) in enumerate(self.parts):
            own = predicted[:, start:end]
            coarse, scale = self._in_8_bits(own)
            rounding[:, start:end] = own - coarse.float() * scale[:, None]
            whole = torch._int_mm(self.coarse[i], coarse.T).T.contiguous()  # exact
            dot.addcmul_(whole * scale[:, None], self.scale[i])
            # p.t is what was computed, and p~.(t - t~) + (p - p~).t so far, and p.t of what is left.
            norm, error = (v[:, :end].norm(dim=-1) for v in (predicted, rounding))
            left = predicted[:, end:].norm(dim=-1)
            factors = torch.stack([norm + error, error + sum_error(predicted.shape[-1]) * norm, left], dim=-1)
            yield torch.addmm(dot, factors, self.errors[i])


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
