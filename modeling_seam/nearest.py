"""The alignment distance (Eq. 3 and Eq. 7) and the nearest-neighbour lookup built on it (Eq. 8): one definition."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from .few_rows import few_rows_product

# Below this product of norms a direction is meaningless; the value is that of `torch.nn.functional.cosine_similarity`.
COSINE_EPS = 1e-8
# Predictions looked up at once: 256 rows of a vocabulary of 150,000 are 0.16 GB in fp32.
LOOKUP_ROWS = 256
# Numbers in a table that is small: its fp32 copy takes 64 MB, and one product with it next to no time.
SMALL_TABLE = 2**24
# Ids of one prediction that are measured one by one; when more may be the nearest, all are.
SHORTLIST = 1024


def distance_from_products(
    dot: torch.Tensor,
    predicted_square: torch.Tensor,
    target_square: torch.Tensor,
    dim: int,
    alignment_lambda: float,
    reduction: str,
) -> torch.Tensor:
    """
    The alignment distance written in inner products, so that distances to a whole vocabulary cost one matrix product:

        d = lambda * (p.p - 2 p.t + t.t) + (1 - lambda) * (1 - p.t / (|p| |t|))

    Args:
        dot: `p.t`, any shape.
        predicted_square, target_square: `p.p` and `t.t`, broadcastable to `dot`.
        dim: number of dimensions of the embeddings; `reduction="mean"` divides the squared distance by it.
        alignment_lambda: lambda of Eq. 3 and Eq. 7.
        reduction: `"sum"` (as printed) or `"mean"`.
    """
    squared = predicted_square - 2 * dot + target_square
    if reduction == "mean":
        squared = squared / dim
    norms = (predicted_square * target_square).clamp_min(COSINE_EPS**2).sqrt()
    return alignment_lambda * squared + (1 - alignment_lambda) * (1 - dot / norms)


def alignment_distance(
    predicted: torch.Tensor, target: torch.Tensor, alignment_lambda: float, reduction: str
) -> torch.Tensor:
    """
    Distance of each predicted embedding to its own target, in fp32 (the summand of Eq. 3).

    Args:
        predicted, target: `torch.FloatTensor` of shape `(..., d_llm)`.

    Returns:
        `torch.FloatTensor` of shape `(...)`.
    """
    predicted, target = predicted.float(), target.float()
    return distance_from_products(
        (predicted * target).sum(-1),
        predicted.square().sum(-1),
        target.square().sum(-1),
        predicted.shape[-1],
        alignment_lambda,
        reduction,
    )


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


class NearestToken:
    """
    The embedding table of the language model as Stage 1 sees it: feeds tokens back and finds the nearest ones (Eq. 8).

    Not an `nn.Module`: the table belongs to the language model, this only adds the squared norms and the choice of ids
    that can be returned. Distances are fp32: a half-precision product alone picks another token in 4 % of hard cases.
    In a large table it serves to leave out the ids that cannot be the nearest, by a bound on its error; the rest are
    measured in fp32.

    Args:
        table (`torch.Tensor` of shape `(vocab_size, d_llm)`): the embedding table.
        alignment_lambda, reduction: see `distance_from_products`.
        excluded_ids: ids that are never returned.
        active_ids: when given, only these are returned, and no others are compared.
    """

    def __init__(
        self,
        table: torch.Tensor,
        alignment_lambda: float,
        reduction: str,
        excluded_ids: list[int],
        active_ids: list[int] | None = None,
    ):
        self.table = table.detach()
        self.alignment_lambda = alignment_lambda
        self.reduction = reduction
        self.direct_rows = 0  # predictions for which the bound left too many ids, so that all were measured in fp32
        if active_ids is None:
            self._ids = None  # of the rows that are compared: all of them
            self._excluded = torch.tensor(excluded_ids, dtype=torch.long, device=table.device)
        else:
            active = sorted(set(active_ids) - set(excluded_ids))
            self._ids = torch.tensor(active, dtype=torch.long, device=table.device)
            self._excluded = self._ids[:0]

    # What follows is made when first looked into: training feeds and compares embeddings, but looks nothing up.

    @cached_property
    def _rows(self) -> torch.Tensor:
        """The embeddings that are compared, `(rows, d_llm)`."""
        return self.table if self._ids is None else self.table[self._ids]

    @cached_property
    def _is_small(self) -> bool:
        return self._rows.numel() <= SMALL_TABLE

    @cached_property
    def _rows32(self) -> torch.Tensor:
        """Kept for small tables only."""
        return self._rows.float()

    def _slices(self) -> Iterator[torch.Tensor]:
        """`_rows` in fp32; of a large table in pieces, so that there is never a copy of all."""
        if self._is_small:
            yield self._rows32
        else:
            for piece in self._rows.split(SMALL_TABLE // self._rows.shape[-1]):
                yield piece.float()

    @cached_property
    def _square(self) -> torch.Tensor:
        return torch.cat([piece.square().sum(-1) for piece in self._slices()])

    @cached_property
    def _coarse(self) -> torch.Tensor:
        """`_rows` in bf16: themselves, where that is what they are in."""
        return self._rows.bfloat16()

    @cached_property
    def _largest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest norm of a row that can be returned, and the largest error of `_coarse` relative to its norm."""
        norm = self._square.index_fill(0, self._excluded, 0).amax().sqrt()
        if self._rows.dtype == torch.bfloat16:
            return norm, torch.zeros_like(norm)
        coarse = self._coarse.split(SMALL_TABLE // self._rows.shape[-1])
        error = torch.cat(
            [(piece - c.float()).square().sum(-1).sqrt() for piece, c in zip(self._slices(), coarse, strict=True)]
        )
        return norm, torch.where(error == 0, error, error / self._square.sqrt()).amax()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`(...)` ids to `(..., d_llm)` embeddings."""
        return torch.nn.functional.embedding(token_ids, self.table)

    def distances(self, predicted: torch.Tensor) -> torch.Tensor:
        """
        Eq. 7 against the whole vocabulary; ids that cannot be returned are at infinity.

        Args:
            predicted: `torch.FloatTensor` of shape `(..., d_llm)`.

        Returns:
            `torch.FloatTensor` of shape `(..., vocab_size)`.
        """
        distances = self._row_distances(predicted)
        if self._ids is None:
            return distances
        everything = distances.new_full((*distances.shape[:-1], len(self.table)), torch.inf)
        return everything.index_copy_(-1, self._ids, distances)

    def _row_distances(self, predicted: torch.Tensor) -> torch.Tensor:
        """Eq. 7 against `_rows`: `(..., d_llm)` to `(..., rows)`."""
        predicted = predicted.to(self._rows.device).float()  # parts may lie on several devices
        with torch.autocast(predicted.device.type, enabled=False):  # autocast would make it a half-precision product
            dot = torch.cat([predicted @ piece.T for piece in self._slices()], dim=-1)
        return self._from_products(dot, predicted.square().sum(-1, keepdim=True))

    def _from_products(self, dot: torch.Tensor, predicted_square: torch.Tensor) -> torch.Tensor:
        """Eq. 7 from products with `_rows`."""
        distances = distance_from_products(
            dot, predicted_square, self._square, self._rows.shape[-1], self.alignment_lambda, self.reduction
        )
        return distances.index_fill_(-1, self._excluded, torch.inf)

    def nearest(self, predicted: torch.Tensor) -> torch.LongTensor:
        """Eq. 8: `(..., d_llm)` predictions to `(...)` ids. In slices, for a row of distances is a whole vocabulary."""
        predicted, shape = predicted.flatten(0, -2), predicted.shape[:-1]
        find = self._nearest_by_distances if self._is_small else self._nearest_by_shortlist
        nearest = torch.cat([find(part) for part in predicted.split(LOOKUP_ROWS)])
        return (nearest if self._ids is None else self._ids[nearest]).view(shape)

    def _nearest_by_distances(self, predicted: torch.Tensor) -> torch.LongTensor:
        """`(n, d_llm)` predictions to `(n,)` places in `_rows`."""
        return self._row_distances(predicted).argmin(-1)

    def _nearest_by_shortlist(self, predicted: torch.Tensor) -> torch.LongTensor:
        """
        The same from a bf16 product: a row that is further than the nearest by more than twice the error that the
        distances can have is not the nearest; the others are measured in fp32, the lowest id first.
        """
        predicted = predicted.to(self._rows.device).float()
        coarse = predicted.bfloat16()
        with torch.autocast(predicted.device.type, enabled=False), fp32_accumulation():
            dot = few_rows_product(coarse, self._coarse).float()
        square = predicted.square().sum(-1, keepdim=True)
        distances = self._from_products(dot, square)
        bound = distances.amin(-1, keepdim=True) + 2 * self._largest_error(predicted, coarse, square)
        close = ~(distances > bound)  # not `<=`: what overflowed into nan stays in
        is_short = close.sum(-1) <= SHORTLIST
        close &= is_short[:, None]
        row, place = close.nonzero(as_tuple=True)
        exact = alignment_distance(predicted[row], self._rows[place], self.alignment_lambda, self.reduction)
        least = exact.new_full((len(predicted),), torch.inf).scatter_reduce(0, row, exact, "amin")
        none = len(self._rows)
        nearest = place.new_full((len(predicted),), none).scatter_reduce(
            0, row, place.masked_fill(exact != least[row], none), "amin"
        )
        is_open = (nearest == none).nonzero().flatten()
        if len(is_open):
            self.direct_rows += len(is_open)
            nearest[is_open] = self._nearest_by_distances(predicted[is_open])
        return nearest

    def _largest_error(self, predicted: torch.Tensor, coarse: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """
        A bound, for each prediction, on how far the distances of bf16 products and those of fp32 can both lie from
        Eq. 7, together. Every product is wrong by at most a fraction of |p| |t|: the roundings of its factors
        (Cauchy-Schwarz), of an fp32 sum of d terms, and of the result to bf16.

        Args:
            predicted, coarse: `(n, d_llm)` predictions in fp32 and in bf16; square: `(n, 1)`, p.p.

        Returns:
            `(n, 1)`.
        """
        unit = torch.finfo(torch.float32).eps / 2
        total = (predicted.shape[-1] + 16) * unit  # relative error of a sum of d products, in whatever order
        norm = square.sqrt().clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
        rounding = (predicted - coarse.float()).square().sum(-1, keepdim=True).sqrt() / norm
        largest, table_rounding = self._largest
        product = rounding * (1 + table_rounding) + (1 + rounding) * (
            table_rounding + total + torch.finfo(torch.bfloat16).eps
        )
        scale = self.alignment_lambda
        if self.reduction == "mean":
            scale = scale / predicted.shape[-1]
        in_squared = 2 * (product + total) * norm * largest + 2 * total * largest**2 + 8 * unit * (norm + largest) ** 2
        in_cosine = product + 3 * total + 16 * unit
        smallest = predicted.shape[-1] * torch.finfo(torch.float32).tiny  # where products lie below all numbers
        return 1.02 * (scale * in_squared + (1 - self.alignment_lambda) * in_cosine) + smallest

    def closest_other(self, token_id: int) -> tuple[int, float]:
        """The returnable id nearest to `token_id`'s own embedding, itself left out, and the cosine between the two."""
        embedding = self.table[token_id].float()
        distances = self.distances(embedding)
        distances[token_id] = torch.inf
        other = int(distances.argmin())
        return other, float(torch.nn.functional.cosine_similarity(embedding, self.table[other].float(), dim=0))
