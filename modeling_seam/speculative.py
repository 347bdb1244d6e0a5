"""
What both speculative loops share: how many draft tokens to propose, which to accept, and where a draft goes on.

Also, which searches of `GenerationMixin.generate` the loops are equal to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

# The prior of the agreement: 96 %, with the weight of two tokens, so that a bad draft is soon recognised.
PRIOR_AGREEING, PRIOR_PROPOSED = 1.92, 2.0

# Proposals are made where they are expected to cut the remaining work to this share. A smaller gain is uncertain: one
# position alone is cheaper than counted here, and how much cheaper depends on the machine.
WORTHWHILE = 0.8

# Extra work that may be lost on bad drafts, as a share of the plain loop's.
STAKE = 0.08

# Tokens back, and draft tokens to either side, that are compared to find where the draft goes on.
REALIGN_WINDOW = 8


@dataclass
class Row:
    """
    One utterance.

    Args:
        draft: ids to be verified.
        output: ids so far; at first the given ones (the guiding token, or none).
        limit: number of tokens that may follow.
        position: in the draft, of the next token.
        forwards, accepted, rejected: forwards of the model that verifies; draft tokens that agreed and that did not.
        mismatches: proposals that did not agree to their end.
        ended: whether the output is complete.
    """

    draft: list[int]
    output: list[int]
    limit: int
    position: int = 0
    forwards: int = 0
    accepted: int = 0
    rejected: int = 0
    mismatches: int = 0
    ended: bool = False

    @property
    def remaining(self) -> int:
        """Return the number of draft tokens that can still be proposed; one token of the model's own must fit after."""
        return max(min(len(self.draft) - self.position, self.limit - 1), 0)

    @property
    def agreement(self) -> float:
        """Return the probability that the next draft token agrees."""
        return (self.accepted + PRIOR_AGREEING) / (self.accepted + self.mismatches + PRIOR_PROPOSED)

    def propose(self, length: int) -> list[int]:
        """Return the next draft tokens, at most `length`."""
        return self.draft[self.position : self.position + min(length, self.remaining)]

    def accept(self, proposal: list[int], choices: list[int], ends: set[int]) -> list[int]:
        """
        Accept the longest agreeing prefix of a proposal, and then the model's own token.

        Args:
            choices: the model's, before the proposal's first token and after each of its tokens.
            ends: ids of end tokens.

        Returns:
            The new tokens, up to the first end token.
        """
        agreeing = 0
        while agreeing < len(proposal) and proposal[agreeing] == choices[agreeing]:
            agreeing += 1
        new = choices[: agreeing + 1]
        length = next((count for count, token in enumerate(new, start=1) if token in ends), len(new))
        self.ended = length < len(new) or new[-1] in ends or len(new) == self.limit
        agreeing, new = min(agreeing, length), new[:length]
        self.forwards += 1
        self.accepted += agreeing
        self.rejected += len(proposal) - agreeing
        self.mismatches += agreeing < len(proposal)
        self.limit -= len(new)
        self.output += new
        # The model's own token replaces the draft's (substitution), unless the edit distance says otherwise.
        self.position = min(self.position + agreeing + 1, len(self.draft))
        if proposal:
            self.position = realign(self.draft, self.output, self.position)
        return new


def realign(draft: list[int], output: list[int], position: int) -> int:
    """
    Find the position in the draft from which it goes on after the output.

    It is the end of the part of the draft that is nearest by edit distance to the last tokens of the output; where
    these began is taken to be where they would have begun if none was inserted or left out since. Among equally near
    ends, it is one whose token is the last of the output, then the one nearest to `position`.
    """
    recent = output[-REALIGN_WINDOW:]
    begin = position - len(recent)
    low, high = max(begin - REALIGN_WINDOW, 0), min(position + REALIGN_WINDOW, len(draft))
    costs = [abs(end - begin) for end in range(low, high + 1)]
    for token in recent:
        before, costs = costs, [costs[0] + 1]
        for i, other in enumerate(draft[low:high]):
            costs.append(min(before[i] + (token != other), before[i + 1] + 1, costs[i] + 1))

    def order(end: int) -> tuple[int, bool, int]:
        return costs[end - low], end == 0 or draft[end - 1] != output[-1], abs(end - position)

    return min(range(low, high + 1), key=order)


def proposal_length(rows: list[Row], weights: float, allowed: float) -> int:
    """
    Return the number of draft tokens to propose that makes the remaining work cheapest; 0 is the plain loop.

    Of `n` tokens that agree with probability `p` each, a forward yields 1 + p + ... + p^n. For a single utterance whose
    draft has agreed so far, it is all of them: a good draft is one forward.

    Args:
        weights: cost of a forward beside its positions, in positions.
        allowed: positions that may be lost.
    """
    left = torch.tensor([row.remaining for row in rows])
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


def compact_rows(count: int, ended: list[int]) -> list[int]:
    """Return which of `count` rows go on, in their new order: the last ones move to where others ended."""
    kept = list(range(count))
    for row in reversed(ended):
        kept[row] = kept[-1]
        kept.pop()
    return kept


class DraftedBatch:
    """
    The rows of a batch, from their drafts to the verified output.

    Args:
        drafts: per row the ids to be verified, given ones included.
        given: per row the ids that the output begins with.
        limit: number of tokens to decode, given ones not counted; at least 1.
        weights: cost of a forward beside its positions, in positions.
    """

    def __init__(self, drafts: list[list[int]], given: list[list[int]], limit: int, weights: float):
        self.all_rows = [Row(draft, list(ids), limit, len(ids)) for draft, ids in zip(drafts, given, strict=True)]
        self.rows = self.all_rows  # that have not ended
        self.weights, self._limit, self._slowest = weights, limit, 0
        each = weights / len(self.rows) + 1
        self._allowed = STAKE * each * sum(min(len(row.draft) + 1, limit) for row in self.rows)

    def propose(self) -> list[list[int]]:
        """Return each row's draft tokens for the next forward; when no row has any, it is a step of the plain loop."""
        length = proposal_length(self.rows, self.weights, self._allowed)
        return [row.propose(length) for row in self.rows]

    def accept(
        self, proposals: list[list[int]], choices: list[list[int]], ends: set[int]
    ) -> tuple[list[list[int]], list[int]]:
        """
        Accept what the model chose (see `Row.accept`).

        Returns:
            The new tokens of each row, and which rows go on: they are `rows` from now on.
        """
        new = [
            row.accept(proposal, choice, ends)
            for row, proposal, choice in zip(self.rows, proposals, choices, strict=True)
        ]
        self._allowed += sum(map(len, new)) - len(new) * (1 + max(map(len, proposals)))
        kept = compact_rows(len(self.rows), [i for i, row in enumerate(self.rows) if row.ended])
        self.rows = [self.rows[i] for i in kept]
        if self.rows:
            # Forwards that were saved; the plain loop waits for its slowest row, too.
            before, self._slowest = self._slowest, min(self._limit - row.limit for row in self.rows)
            self._allowed += self.weights * (self._slowest - before - 1)
        return new, kept


# Fields of a generation config that change nothing in greedy search but where it ends, and values that mean "off" (so
# do `None` and, except for the cache, `False`).
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
    """Return the settings of `model.generate` with this config: the model's own apply where it says nothing."""
    settings = generation_config.to_dict()
    for name, value in model.generation_config.to_dict().items():
        settings[name] = value if settings.get(name) is None else settings[name]
    return settings


def is_plain_greedy(settings: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """
    Return whether these ask for greedy search and nothing else: no processors, criteria, scores, or anything unknown.

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
    """Return whether several processes share the weights, and must therefore make the same number of forwards."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
