"""The alignment distance (Eq. 3 and Eq. 7) and the nearest-neighbour lookup built on it (Eq. 8): one definition."""

from collections.abc import Iterable
from functools import cached_property

import torch

from .fast_matmul import UNIT, Bf16Table, Int8Table, fp32_pieces, is_int8_fast, sum_error

# Below this norm a direction is meaningless; the value is that of `torch.nn.functional.cosine_similarity`.
COSINE_EPS = 1e-8
# Predictions looked up at once: 32 rows of a vocabulary of 150,000 are 20 MB in fp32.
LOOKUP_ROWS = 32
# Rows of distances that are processed at once so that they stay in a cache: 4 of them are 2.4 MB.
CACHED_ROWS = 4
# Numbers in a table that is small: its fp32 copy takes 64 MB, and one product with it next to no time.
SMALL_TABLE = 2**24
# Candidates of one prediction that are measured one by one; when there are more, all ids are measured.
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
    Compute the alignment distance from inner products, so that a whole vocabulary costs one matrix product.

    The distance is lambda * |p - t|^2 + (1 - lambda) * (1 - cos(p, t)), which is linear in `p.t` and falls as it grows:

        d = lambda * (p.p + t.t) + (1 - lambda) - p.t * (2 * lambda + (1 - lambda) / (|p| |t|))

    Args:
        dot: `p.t`, any shape.
        predicted_square, target_square: `p.p` and `t.t`, broadcastable to `dot`.
        dim: number of dimensions of the embeddings; `reduction="mean"` divides the squared distance by it.
        alignment_lambda: lambda of Eq. 3 and Eq. 7.
        reduction: `"sum"` (as printed) or `"mean"`.
    """
    scale = alignment_lambda / dim if reduction == "mean" else alignment_lambda
    inverse, other_inverse = (square.clamp_min(COSINE_EPS**2).rsqrt() for square in (predicted_square, target_square))
    slope = ((1 - alignment_lambda) * inverse) * other_inverse + 2 * scale
    return (scale * predicted_square + (1 - alignment_lambda)) + scale * target_square - dot * slope


def alignment_distance(
    predicted: torch.Tensor, target: torch.Tensor, alignment_lambda: float, reduction: str
) -> torch.Tensor:
    """
    Compute the distance of each predicted embedding to its own target, in fp32 (the summand of Eq. 3).

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


class NearestToken:
    """
    Find the nearest tokens in the language model's embedding table (Eq. 8), and embed them.

    Not an `nn.Module`: the table belongs to the language model; here are only the squared norms and the choice of ids
    that can be returned. Distances are fp32: a half-precision product alone picks another token in 4 % of hard cases.
    In a large table, low-precision products and a bound on their error exclude the ids that cannot be the nearest; the
    rest are measured in fp32.

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
        self.direct_rows = 0  # predictions with too many candidates, so that all ids were measured in fp32
        if active_ids is None:
            self._ids = None  # of the rows that are compared: all of them
            self._excluded = torch.tensor(excluded_ids, dtype=torch.long, device=table.device)
        else:
            active = sorted(set(active_ids) - set(excluded_ids))
            self._ids = torch.tensor(active, dtype=torch.long, device=table.device)
            self._excluded = self._ids[:0]

    # What follows is computed when first used: training embeds and compares, but looks nothing up.

    @cached_property
    def _rows(self) -> torch.Tensor:
        """Return the embeddings that are compared, `(rows, d_llm)`."""
        return self.table if self._ids is None else self.table[self._ids]

    @cached_property
    def returnable(self) -> torch.Tensor:
        """Return the ids that can be returned, `(returnable,)`, in ascending order."""
        if self._ids is not None:
            return self._ids
        keep = torch.ones(len(self.table), dtype=torch.bool, device=self.table.device)
        keep[self._excluded] = False
        return keep.nonzero().flatten()

    def index_of(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map ids `(...)` to their indices in `returnable`, and those that cannot be returned to -1."""
        ids = self.returnable
        index = torch.searchsorted(ids, token_ids.to(ids.device)).clamp_max(len(ids) - 1)
        return torch.where(ids[index] == token_ids.to(ids.device), index, -1)

    @cached_property
    def _is_small(self) -> bool:
        return self._rows.numel() <= SMALL_TABLE

    @cached_property
    def _rows32(self) -> torch.Tensor:
        """Return them in fp32; for small tables only."""
        return self._rows.float()

    @cached_property
    def _square(self) -> torch.Tensor:
        return torch.cat([piece.square().sum(-1) for piece in fp32_pieces(self._rows)])

    @cached_property
    def _largest(self) -> torch.Tensor:
        """Return the largest norm of a row that can be returned."""
        return self._square.index_fill(0, self._excluded, 0).amax().sqrt()

    @cached_property
    def _low_precision_tables(self) -> list[Int8Table | Bf16Table]:
        """Return them from the one that costs least to the one that leaves the fewest candidates."""
        bf16 = Bf16Table(self._rows)
        return [Int8Table(self._rows), bf16] if is_int8_fast(self._rows.device) else [bf16]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map `(...)` ids to `(..., d_llm)` embeddings."""
        return torch.nn.functional.embedding(token_ids, self.table)

    def distances(self, predicted: torch.Tensor) -> torch.Tensor:
        """
        Compute Eq. 7 against the whole vocabulary; ids that cannot be returned are at infinity.

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

    def _pieces(self) -> Iterable[torch.Tensor]:
        return [self._rows32] if self._is_small else fp32_pieces(self._rows)

    def _row_distances(self, predicted: torch.Tensor) -> torch.Tensor:
        """Compute Eq. 7 against `_rows`: `(..., d_llm)` to `(..., rows)`."""
        predicted = predicted.to(self._rows.device).float()  # parts may lie on several devices
        with torch.autocast(predicted.device.type, enabled=False):  # autocast would make it a half-precision product
            dot = torch.cat([predicted @ piece.T for piece in self._pieces()], dim=-1)
        return self._from_products(dot, predicted.square().sum(-1, keepdim=True))

    def _from_products(self, dot: torch.Tensor, predicted_square: torch.Tensor) -> torch.Tensor:
        """Compute Eq. 7 from products with `_rows`."""
        distances = distance_from_products(
            dot, predicted_square, self._square, self._rows.shape[-1], self.alignment_lambda, self.reduction
        )
        return distances.index_fill_(-1, self._excluded, torch.inf)

    def nearest(self, predicted: torch.Tensor) -> torch.Tensor:
        """Map `(..., d_llm)` predictions to `(...)` ids (Eq. 8), in slices: each has a distance to every token."""
        predicted, shape = predicted.flatten(0, -2), predicted.shape[:-1]
        find = self._nearest_by_distances if self._is_small else self._nearest_by_shortlist
        with torch.autocast(self._rows.device.type, enabled=False):  # it would make them half-precision products
            nearest = torch.cat([find(part) for part in predicted.split(LOOKUP_ROWS)])
        return (nearest if self._ids is None else self._ids[nearest]).view(shape)

    def _nearest_by_distances(self, predicted: torch.Tensor) -> torch.Tensor:
        """Map `(n, d_llm)` predictions to `(n,)` indices into `_rows`."""
        return self._row_distances(predicted).argmin(-1)

    def _nearest_by_shortlist(self, predicted: torch.Tensor) -> torch.Tensor:
        """Do the same by low-precision products, where these leave few candidates."""
        predicted = predicted.to(self._rows.device).float()
        none = len(self._rows)  # no index
        nearest = torch.full((len(predicted),), none, device=predicted.device)
        is_open = torch.arange(len(predicted), device=predicted.device)
        for table in self._low_precision_tables:
            given, first = predicted[is_open], is_open
            for upper in table.upper_products(given):
                for part in (nearest[first] == none).nonzero().flatten().split(CACHED_ROWS):
                    nearest[first[part]] = self._among_candidates(given[part], upper[part])
                is_open = (nearest == none).nonzero().flatten()
                if not len(is_open):
                    return nearest
        self.direct_rows += len(is_open)
        nearest[is_open] = self._nearest_by_distances(predicted[is_open])
        return nearest

    def _among_candidates(self, predicted: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """
        Find the nearest row among the candidates, which are measured in fp32; of equal ones the lowest id.

        Candidates are the rows whose smallest possible distance, from the upper bound of the product, is not greater
        than the distance of some row.

        Args:
            predicted: `(n, d_llm)`, fp32.
            upper: `(n, rows)`, upper bounds of the products.

        Returns:
            Indices into `_rows`, `(n,)`; where there are more candidates than `SHORTLIST`, the number of rows.
        """
        square, none = predicted.square().sum(-1, keepdim=True), len(self._rows)
        least = self._from_products(upper, square)
        some = self._rows[least.argmin(-1)]
        distance = alignment_distance(predicted, some, self.alignment_lambda, self.reduction)
        bound = distance[:, None] + self._rounding(square)
        close = (least > bound).logical_not_()  # not `<=`: what overflowed into nan stays in
        close[close.count_nonzero(-1) > SHORTLIST] = False
        row, index = close.nonzero(as_tuple=True)
        exact = alignment_distance(predicted[row], self._rows[index], self.alignment_lambda, self.reduction)
        smallest = exact.new_full((len(predicted),), torch.inf).scatter_reduce(0, row, exact, "amin")
        index = index.masked_fill(exact != smallest[row], none)
        return index.new_full((len(predicted),), none).scatter_reduce(0, row, index, "amin")

    def _rounding(self, square: torch.Tensor) -> torch.Tensor:
        """
        Bound the summed error of two fp32 distances of each prediction: one from exact products, one measured directly.

        Args:
            square: `(n, 1)`, p.p.

        Returns:
            `(n, 1)`.
        """
        dim = self._rows.shape[-1]
        total = 2 * sum_error(dim)
        norm = square.sqrt()
        scale = self.alignment_lambda / (dim if self.reduction == "mean" else 1)
        in_squared = 2 * total * (norm + self._largest) ** 2
        smallest = dim * torch.finfo(torch.float32).tiny  # where products lie below all numbers
        return scale * in_squared + (1 - self.alignment_lambda) * (4 * total + 16 * UNIT) + smallest

    def closest_other(self, token_id: int) -> tuple[int, float]:
        """Return the id nearest to `token_id`'s embedding, other than itself, and the cosine between the two."""
        embedding = self.table[token_id].float()
        distances = self.distances(embedding)
        distances[token_id] = torch.inf
        other = int(distances.argmin())
        return other, float(torch.nn.functional.cosine_similarity(embedding, self.table[other].float(), dim=0))
