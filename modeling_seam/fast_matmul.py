"""Fast products with a large matrix: skinny ones, and low-precision ones with bounds on their error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Numbers of a table that are converted to fp32 at once: 8 MB, which fit into a cache.
PIECE = 2**21
# Shares of the dimensions after which bounds follow from the products in 8 bits.
SHARES = (0.25, 0.5, 1.0)
# Norms of roundings are rounded themselves.
MARGIN = 1.002
UNIT = torch.finfo(torch.float32).eps / 2


def fp32_pieces(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a table in fp32, in pieces, so that there is never a copy of all."""
    for piece in rows.split(max(PIECE // rows.shape[-1], 1)):
        yield piece.float()


def sum_error(terms: int) -> float:
    """Return the relative error of an fp32 sum of products, in whatever order."""
    return (terms + 16) * UNIT


def is_int8_fast(device: torch.device) -> bool:
    """Return whether there are exact products in 8 bits: without VNNI a CPU may saturate their sums."""
    return device.type == "cpu" and getattr(torch.cpu, "_is_vnni_supported", bool)() and hasattr(torch, "_int_mm")


@contextmanager
def fp32_accumulation() -> Iterator[None]:
    """Sum half-precision products in fp32. A CPU always does; cuBLAS may add partial sums in bf16."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before


class Bf16Table:
    """
    Bound products from above by products in bf16, which read half of what fp32 ones read.

    Args:
        rows (`torch.Tensor` of shape `(rows, d)`): a table; one in bf16 is not copied.
    """

    def __init__(self, rows: torch.Tensor):
        self.rounded = rows.bfloat16()
        norm, rounding = [], []
        for piece, rounded in zip(fp32_pieces(rows), fp32_pieces(self.rounded), strict=True):
            norm.append(piece.norm(dim=-1))
            rounding.append((piece - rounded).norm(dim=-1))
        self.errors = MARGIN * torch.stack([torch.cat(rounding), torch.cat(norm)])

    def upper_products(self, predicted: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        Bound the products with the rows of the table.

        Args:
            predicted: `(n, d)`, fp32.

        Yields:
            Upper bounds of the products of `predicted` with the rows, `(n, rows)`, fp32; once.
        """
        rounded = predicted.bfloat16()
        with fp32_accumulation():
            dot = skinny_matmul(rounded, self.rounded).float()
        # The roundings of both factors (Cauchy-Schwarz), of the sum, and of the result to bf16.
        norm, rounding = predicted.norm(dim=-1, keepdim=True), (predicted - rounded.float()).norm(dim=-1, keepdim=True)
        rest = sum_error(predicted.shape[-1]) + torch.finfo(torch.bfloat16).eps
        yield torch.addmm(dot, torch.cat([norm + rounding, rest * norm + rounding], dim=-1), self.errors)


class Int8Table:
    """
    Bound products from above by products in 8 bits, over the first dimensions, then over more of them, then over all.

    A prediction that lies near a row of the table leaves few candidates after a quarter.

    Args:
        rows (`torch.Tensor` of shape `(rows, d)`): a table. A copy of it is kept, one byte for each number.
    """

    def __init__(self, rows: torch.Tensor):
        ends = [round(share * rows.shape[-1]) for share in SHARES]
        self.parts = list(zip([0, *ends], ends, strict=False))
        self.rounded = [torch.empty(len(rows), end - start, dtype=torch.int8) for start, end in self.parts]
        self.scale = torch.empty(len(self.parts), len(rows))
        # After each part, norms of: the roundings so far, the numbers so far, and those that are left. A little more.
        self.errors = torch.empty(len(self.parts), 3, len(rows))
        begin = 0
        for piece in fp32_pieces(rows):
            own = slice(begin, begin + len(piece))
            rounding = torch.empty_like(piece)
            for i, (start, end) in enumerate(self.parts):
                rounded, scale = self._in_8_bits(piece[:, start:end])
                self.rounded[i][own], self.scale[i, own] = rounded, scale
                rounding[:, start:end] = piece[:, start:end] - rounded.float() * scale[:, None]
                norms = [rounding[:, :end].norm(dim=-1), piece[:, :end].norm(dim=-1), piece[:, end:].norm(dim=-1)]
                self.errors[i, :, own] = MARGIN * torch.stack(norms)
            begin += len(piece)

    @staticmethod
    def _in_8_bits(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize `(n, d)` to whole numbers and their scales `(n,)`."""
        scale = (vectors.abs().amax(-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (vectors / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale

    def upper_products(self, predicted: torch.Tensor) -> Iterator[torch.Tensor]:
        """Bound the products as [`Bf16Table`] does, once after each part, each time more tightly."""
        dot = predicted.new_zeros(len(predicted), len(self.scale[0]))
        rounding = torch.empty_like(predicted)
        for i, (start, end) in enumerate(self.parts):
            own = predicted[:, start:end]
            rounded, scale = self._in_8_bits(own)
            rounding[:, start:end] = own - rounded.float() * scale[:, None]
            product = torch._int_mm(self.rounded[i], rounded.T).T.contiguous()  # exact
            dot.addcmul_(product * scale[:, None], self.scale[i])
            # p.t is what was computed, and p~.(t - t~) + (p - p~).t so far, and p.t of what is left.
            norm, error = (v[:, :end].norm(dim=-1) for v in (predicted, rounding))
            left = predicted[:, end:].norm(dim=-1)
            factors = torch.stack([norm + error, error + sum_error(predicted.shape[-1]) * norm, left], dim=-1)
            yield torch.addmm(dot, factors, self.errors[i])


# Above this number of rows the product is bound by arithmetic, not by reading the matrix.
SKINNY_ROWS = 32


def skinny_matmul(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    Compute `rows @ weight.T`, as `torch.nn.functional.linear` without a bias does.

    On a CPU in bf16 the library's way to compute `rows @ weight.T` takes 1.4 times as long as reading `weight` does;
    the same product the other way round, `weight @ rows.T`, takes as long as reading it (measured with AMX, 1 to 16
    rows).

    Args:
        rows: `(n, d)`.
        weight: `(m, d)`.

    Returns:
        `(n, m)`, contiguous.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or len(rows) > SKINNY_ROWS:
        return nn.functional.linear(rows, weight)
    if len(rows) == 1:
        return torch.mv(weight, rows[0])[None]
    return (weight @ rows.T).T.contiguous()


def skinny_linear(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """
    Compute `linear(rows)` for rows `(n, d)`.

    A module that is anything else than a plain linear layer (quantized, with an adapter) computes it itself.
    """
    if type(linear) is not nn.Linear or rows.dtype != linear.weight.dtype:
        return linear(rows)
    product = skinny_matmul(rows, linear.weight)
    return product if linear.bias is None else product.add_(linear.bias)
