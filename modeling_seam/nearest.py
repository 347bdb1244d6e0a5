"""The alignment distance (Eq. 3 and Eq. 7) and the nearest-neighbour lookup built on it (Eq. 8): one definition."""

from functools import cached_property

import torch

# Below this product of norms a direction is meaningless; the value is that of `torch.nn.functional.cosine_similarity`.
COSINE_EPS = 1e-8
# Predictions looked up at once: 256 rows of a vocabulary of 150,000 are 0.16 GB in fp32.
LOOKUP_ROWS = 256


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


class NearestToken:
    """
    The embedding table of the language model as Stage 1 sees it: feeds tokens back and finds the nearest ones (Eq. 8).

    Not an `nn.Module`: the table belongs to the language model, this only adds the squared norms and the mask of ids
    that can be returned. All arithmetic is fp32: a half-precision product picks another token in 4 % of hard cases.

    Args:
        table (`torch.Tensor` of shape `(vocab_size, d_llm)`): the embedding table.
        alignment_lambda, reduction: see `distance_from_products`.
        excluded_ids: ids that are never returned.
    """

    def __init__(self, table: torch.Tensor, alignment_lambda: float, reduction: str, excluded_ids: list[int]):
        self.table = table.detach()
        self.alignment_lambda = alignment_lambda
        self.reduction = reduction
        self._excluded = torch.tensor(excluded_ids, dtype=torch.long, device=table.device)

    @cached_property
    def _table32(self) -> torch.Tensor:
        """Made when first looked into: training feeds and compares embeddings, but looks nothing up."""
        return self.table.float()

    @cached_property
    def _square(self) -> torch.Tensor:
        return self._table32.square().sum(-1)

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
        predicted = predicted.to(self._table32.device).float()  # parts may lie on several devices
        with torch.autocast(predicted.device.type, enabled=False):  # autocast would make it a half-precision product
            dot = predicted @ self._table32.T
        distances = distance_from_products(
            dot,
            predicted.square().sum(-1, keepdim=True),
            self._square,
            predicted.shape[-1],
            self.alignment_lambda,
            self.reduction,
        )
        return distances.index_fill(-1, self._excluded, torch.inf)

    def nearest(self, predicted: torch.Tensor) -> torch.LongTensor:
        """Eq. 8: `(..., d_llm)` predictions to `(...)` ids. In slices, for a row of distances is a whole vocabulary."""
        rows = predicted.flatten(0, -2)
        nearest = [self.distances(part).argmin(-1) for part in rows.split(LOOKUP_ROWS)]
        return torch.cat(nearest).view(predicted.shape[:-1])

    def closest_other(self, token_id: int) -> tuple[int, float]:
        """The returnable id nearest to `token_id`'s own embedding, itself left out, and the cosine between the two."""
        embedding = self._table32[token_id]
        distances = self.distances(embedding)
        distances[token_id] = torch.inf
        other = int(distances.argmin())
        return other, float(torch.nn.functional.cosine_similarity(embedding, self._table32[other], dim=0))
