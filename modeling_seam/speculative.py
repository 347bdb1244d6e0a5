"""
What both checking loops share: how far drafts agreed, how much to propose next, where they go on, and which searches of
`GenerationMixin.generate` the loops may stand for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

# What is believed of the agreement before anything was measured: 96 %, on the evidence of two tokens, so that a bad
# draft is soon recognised.
PRIOR_AGREEING, PRIOR_PROPOSED = 1.92, 2.0

# Proposals are made where they promise to cut the rest of the work to this share. Less is not to be relied on: one
# position alone is cheaper than counted here, by how much depends on the machine.
WORTHWHILE = 0.8

# Extra work that may be lost on bad drafts, as a share of the plain loop's.
STAKE = 0.08

# Tokens back, and draft tokens either way, that are looked at to find where the draft goes on.
WINDOW = 8


@dataclass
class Row:
    """
    One utterance.

    Args:
        draft: ids to be checked.
        written: what the model wrote so far, ids; at first what it was given (the guiding token, or nothing).
        limit: number of tokens to write.
        place: where in the draft the next token is expected.
        forwards, accepted, rejected: forwards of the model that checks; draft tokens that agreed and that did not.
        mismatches: proposals that did not agree to their end.
    """

    draft: list[int]
    written: list[int]
    limit: int
    place: int = 0
    forwards: int = 0
    accepted: int = 0
    rejected: int = 0
    mismatches: int = 0
    ended: bool = False

    @property
    def rest(self) -> int:
        """Draft tokens that can still be proposed; after the last one there must be room for the model's own."""
        return max(min(len(self.draft) - self.place, self.limit - 1), 0)

    @property
    def agreement(self) -> float:
        """Probability that the next draft token agrees."""
        return (self.accepted + PRIOR_AGREEING) / (self.accepted + self.mismatches + PRIOR_PROPOSED)

    def propose(self, length: int) -> list[int]:
        return self.draft[self.place : self.place + min(length, self.rest)]

    def read(self, proposal: list[int], choices: list[int], ends: set[int]) -> list[int]:
        """
        Take what the model chose before the proposal's first token and after each of its tokens: the longest
        agreeing prefix and then the model's own token. Returns the new tokens, up to the first end token.
        """
        agreeing = 0
        while agreeing < len(proposal) and proposal[agreeing] == choices[agreeing]:
            agreeing += 1
        new = choices[: agreeing + 1]
        length = next((place for place, token in enumerate(new, start=1) if token in ends), len(new))
        self.ended = length < len(new) or new[-1] in ends or len(new) == self.limit
        agreeing, new = min(agreeing, length), new[:length]
        self.forwards += 1
        self.accepted += agreeing
        self.rejected += len(proposal) - agreeing
        self.mismatches += agreeing < len(proposal)
        self.limit -= len(new)
        self.written += new
        # The model's own token stands for the draft's (substitution), unless the alignment says otherwise.
        self.place = min(self.place + agreeing + 1, len(self.draft))
        if proposal:
            self.place = resume(self.draft, self.written, self.place)
        return new


def resume(draft: list[int], written: list[int], place: int) -> int:
    """
    Where the draft goes on after what was written: the end of its part that is nearest by edit distance to the last
    tokens of `written`, which are believed to have begun where they would have if none was inserted or left out since.
    Among equally near ends, one whose token is the last written, then the nearest to `place`.
    """
    recent = written[-WINDOW:]
    begin = place - len(recent)
    low, high = max(begin - WINDOW, 0), min(place + WINDOW, len(draft))
    costs = [abs(end - begin) for end in range(low, high + 1)]
    for token in recent:
        before, costs = costs, [costs[0] + 1]
        for i, other in enumerate(draft[low:high]):
            costs.append(min(before[i] + (token != other), before[i + 1] + 1, costs[i] + 1))

    def order(end: int) -> tuple[int, bool, int]:
        return costs[end - low], end == 0 or draft[end - 1] != written[-1], abs(end - place)

    return min(range(low, high + 1), key=order)


def proposal_length(rows: list[Row], weights: float, allowed: float) -> int:
    """
    The number of draft tokens to propose that makes the rest of the work cheapest, 0 being the plain loop: of `n`
    tokens that agree with probability `p` each, a forward yields 1 + p + ... + p^n. Of an utterance alone that has
    agreed so far, everything: a good draft is one forward.

    Args:
        weights: cost of a forward beside its positions, in positions.
        allowed: positions that may be lost.
    """
    left = torch.tensor([row.rest for row in rows])
    longest = min(int(left.max()), int(allowed // len(rows)))
    if longest <= 0:
        return 0
    if len(rows) == 1 and not rows[0].mismatches:
        return longest
    length = torch.arange(longest + 1)
    agreement = torch.tensor([row.agreement for row in rows])
    tokens = (agreement[:, None] ** length).masked_fill(length > left[:, None], 0).cumsum(-1)
    forwards = ((left[:, None] + 1) / tokens).clamp_min(1)
    # A batch goes on until its last row has ended; rows that have ended cost nothing.
    cost = weights * forwards.amax(0) + (1 + length) * forwards.sum(0)
    best = int(cost.argmin())
    return best if cost[best] < WORTHWHILE * cost[0] else 0


def close_ranks(count: int, ended: list[int]) -> list[int]:
    """Which of `count` rows go on, in their new order: the last ones take the places of those that ended."""
    kept = list(range(count))
    for row in reversed(ended):
        kept[row] = kept[-1]
        kept.pop()
    return kept


class DraftedBatch:
    """
    The rows of a batch, from their drafts to what the model wrote.

    Args:
        drafts: per row the ids to be checked, given ones included.
        given: per row the ids that `written` begins with.
        limit: number of tokens to write, given ones not counted; at least 1.
        weights: cost of a forward beside its positions, in positions.
    """

    def __init__(self, drafts: list[list[int]], given: list[list[int]], limit: int, weights: float):
        self.everything = [Row(draft, list(ids), limit, len(ids)) for draft, ids in zip(drafts, given, strict=True)]
        self.rows = self.everything  # that have not ended
        self.weights, self._limit, self._slowest = weights, limit, 0
        each = weights / len(self.rows) + 1
        self._allowed = STAKE * each * sum(min(len(row.draft) + 1, limit) for row in self.rows)

    def propose(self) -> list[list[int]]:
        """For each row the draft tokens to check in the next forward; none of any row is a step of the plain loop."""
        length = proposal_length(self.rows, self.weights, self._allowed)
        return [row.propose(length) for row in self.rows]

    def read(
        self, proposals: list[list[int]], choices: list[list[int]], ends: set[int]
    ) -> tuple[list[list[int]], list[int]]:
        """
        Take what the model chose (see `Row.read`). Returns the new tokens of each row, and which rows go on; they are
        `rows` from now on.
        """
        new = [row.read(*both, ends) for row, *both in zip(self.rows, proposals, choices, strict=True)]
        self._allowed += sum(map(len, new)) - len(new) * (1 + max(map(len, proposals)))
        kept = close_ranks(len(self.rows), [i for i, row in enumerate(self.rows) if row.ended])
        self.rows = [self.rows[i] for i in kept]
        if self.rows:
            # Forwards that were saved: the plain loop waits for its slowest row, too.
            before, self._slowest = self._slowest, min(self._limit - row.limit for row in self.rows)
            self._allowed += self.weights * (self._slowest - before - 1)
        return new, kept


# Fields of a generation config that change nothing in greedy search but its ends, and values that mean "off" (so do
# `None` and, but for the cache, `False`).
FREE_FIELDS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_new_tokens", "max_length"),
    *("temperature", "top_k", "top_p", "return_dict_in_generate"),
    *("transformers_version", "_from_model_config", "_commit_hash"),
}
OFF = {
    **{"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"use_cache": True},
}
# A matter of memory, for the loop to decide; others change the keys and values.
CACHES = (None, "dynamic", "static")


def merged_settings(generation_config: GenerationConfig, model: PreTrainedModel) -> dict[str, Any]:
    """The settings of `model.generate` with this config: the model's own stand where it says nothing."""
    settings = generation_config.to_dict()
    for name, value in model.generation_config.to_dict().items():
        settings[name] = value if settings.get(name) is None else settings[name]
    return settings


def is_plain_greedy(settings: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """
    Whether they ask for greedy search and nothing else: no processors, criteria, scores, or anything unknown.

    Args:
        settings: of `generate` (`merged_settings`).
        arguments: of `generate`, that are no fields of the config.
    """

    def is_off(name: str, value: Any) -> bool:
        if name == "cache_implementation":
            return value in CACHES
        return value is None or (name in OFF and value == OFF[name]) or (value is False and name != "use_cache")

    return all(value is None or value is False for value in arguments.values()) and all(
        name in FREE_FIELDS or is_off(name, value) for name, value in settings.items()
    )


def is_shared(model: nn.Module) -> bool:
    """Whether several processes share the weights, and must therefore make the same number of forwards."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
