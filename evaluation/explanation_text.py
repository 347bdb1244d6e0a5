"""An `Explanation` as text: a table for people and an object for programs."""

from typing import Any

from rich.table import Table

from seam.evaluation.explanation import Change, Edit, Explanation, Token


def visible(token: Token) -> str:
    """A token's text on one line, its spaces shown as `␣`."""
    shown = (character if character.isprintable() else repr(character)[1:-1] for character in token.text)
    return "".join(shown).replace(" ", "␣")


def decision(explanation: Explanation, edit: Edit) -> str:
    """What the LLM did in one step, in a few words."""
    if edit.change is None:
        return ""
    written = "" if edit.written is None else visible(explanation.written[edit.written])
    return {
        Change.GIVEN: f"{written} (given: first token guidance)",
        Change.KEPT: written,
        Change.SUBSTITUTED: f"→ {written} (substituted)",
        Change.INSERTED: f"+ {written} (inserted)",
        Change.DELETED: "− (deleted)",
    }[edit.change]


def summary(explanation: Explanation) -> list[str]:
    """What Stage 1 heard, the transcript, and what else there is to know."""
    lines = [f"Stage 1:    {explanation.stage1}", f"transcript: {explanation.text}"]
    if explanation.ended and len(explanation.heard) == 1:
        lines.append("Stage 1 heard nothing: the first embedding that it predicted was nearest to <EOA>.")
    if not explanation.ended:
        lines.append(f"Stage 1 did not end: the aligner has positions for {len(explanation.heard)} tokens only.")
    return lines


def table(explanation: Explanation) -> Table:
    """A line for each token of Stage 1 and each one that the LLM inserted."""
    result = Table("seconds", "Stage 1", "distance", "runner-up", "its distance", "LLM")
    for edit in explanation.edits:
        cells = [""] * 5
        if edit.heard is not None:
            token = explanation.heard[edit.heard]
            cells = [
                "" if token.start is None else f"{token.start:.2f}–{token.end:.2f}",
                visible(token),
                f"{token.distance:.4f}",
                visible(token.runner_up),
                f"{token.runner_up_distance:.4f}",
            ]
        result.add_row(*cells, decision(explanation, edit))
    return result


def record(explanation: Explanation) -> dict[str, Any]:
    """Everything but the attention and the spectrogram, for JSON."""

    def token(one: Token) -> dict[str, Any]:
        return {"id": one.id, "text": one.text}

    return {
        "seconds": round(explanation.seconds, 3),
        "stage1": explanation.stage1,
        "text": explanation.text,
        "ended": explanation.ended,
        "heard": [
            {
                **token(one),
                "distance": one.distance,
                "runner_up": {**token(one.runner_up), "distance": one.runner_up_distance},
                "start": None if one.start is None else round(one.start, 3),
                "end": None if one.end is None else round(one.end, 3),
            }
            for one in explanation.heard
        ],
        "written": [token(one) for one in explanation.written],
        "edits": [{"change": edit.change, "heard": edit.heard, "written": edit.written} for edit in explanation.edits],
    }
