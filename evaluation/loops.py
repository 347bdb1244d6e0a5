"""Loops: a phrase that a decoder writes again and again."""

from collections.abc import Sequence

LONGEST_PHRASE = 8
REPETITIONS = 4


def is_loop(reference: Sequence[str], hypothesis: Sequence[str]) -> bool:
    """
    Whether some phrase of at most `LONGEST_PHRASE` words stands at least `REPETITIONS` times in a row in the
    hypothesis, and more often than in the reference: "no no no no" is no loop where that was said.
    """
    said = repetitions(reference)
    return any(
        count >= REPETITIONS and count > said.get(phrase, 0) for phrase, count in repetitions(hypothesis).items()
    )


def repetitions(words: Sequence[str]) -> dict[tuple[str, ...], int]:
    """
    How often in a row each phrase that is repeated at all stands in the text. A phrase goes by the first of its
    rotations in alphabetical order, for "go on go on go" repeats "go on" as much as "on go".
    """
    counts: dict[tuple[str, ...], int] = {}
    for length in range(1, LONGEST_PHRASE + 1):
        equal = 0  # words up to here, without a gap, that equal the word one phrase earlier
        for index in range(length, len(words)):
            equal = equal + 1 if words[index] == words[index - length] else 0
            if equal >= length:
                phrase = tuple(words[index - length + 1 : index + 1])
                phrase = min(phrase[shift:] + phrase[:shift] for shift in range(length))
                counts[phrase] = max(counts.get(phrase, 0), equal // length + 1)
    return counts
