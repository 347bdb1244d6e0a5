"""An `Explanation` as a picture, as a table for people and as an object for programs."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from seam.data.files import replacing
from seam.evaluation.explanation import Change, Edit, Explanation, Token

# In inches: of the figure, and heights of a token's line, a line of text, the spectrogram, the colour bar and the rest.
WIDTH, LINE, TEXT_LINE, SOUND, COLOUR_BAR, BETWEEN = 13, 0.26, 0.17, 1.2, 0.12, 2.0
CHARACTERS = 170  # of a line of text
SHADES = {
    Change.SUBSTITUTED: {"color": "tab:orange", "alpha": 0.25, "lw": 0},
    Change.INSERTED: {"color": "tab:green", "alpha": 0.25, "lw": 0},
    Change.DELETED: {"color": "tab:red", "alpha": 0.25, "lw": 0},
}
PLACE = {"fill": False, "edgecolor": "tab:red", "lw": 1.2}
MARGIN = {"color": "grey", "lw": 0.8, "marker": "|", "markevery": [-1]}
NAMES = {"fontsize": 9, "fontweight": "bold"}


def write_picture(explanation: Explanation, path: Path, title: str) -> None:
    """
    Write a PNG: the log-mel spectrogram over the cross-attention, with a line for each token of Stage 1 and each one
    that the LLM inserted; beside it the token's distance, the runner-up's, and what the LLM wrote.

    Args:
        path: of the PNG.
        title: for instance the file's name.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a token is a dollar
        figure = _draw(explanation, title)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _draw(explanation: Explanation, title: str) -> Figure:
    text = [part for line in [title, *summary(explanation)] for part in textwrap.wrap(line, CHARACTERS)]
    heights = [SOUND, LINE * max(len(explanation.edits), 4), COLOUR_BAR]
    size = (WIDTH, TEXT_LINE * len(text) + sum(heights) + BETWEEN)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[2.4, 1], height_ratios=heights)
    sound, legend = (figure.add_subplot(grid[0, column]) for column in range(2))
    attention = figure.add_subplot(grid[1, 0], sharex=sound)
    distances = figure.add_subplot(grid[1, 1], sharey=attention)
    _draw_sound(sound, explanation)
    weights = _draw_attention(attention, explanation)
    _draw_distances(distances, explanation)
    for index, edit in enumerate(explanation.edits):
        for axes in (attention, distances):
            if edit.change in SHADES:
                axes.axhspan(index - 0.5, index + 0.5, **SHADES[edit.change])
    _draw_legend(legend)
    colorbar = figure.colorbar(
        weights, cax=figure.add_subplot(grid[2, 0]), orientation="horizontal", ticks=MaxNLocator(5)
    )
    colorbar.set_label("attention weight, mean of all layers and heads (a line sums to 1)", fontsize=9)
    figure.suptitle("\n".join(text), fontsize=10, x=0.01, ha="left")
    return figure


def _draw_sound(axes: Axes, explanation: Explanation) -> None:
    mels, frames = explanation.log_mel.shape
    axes.imshow(
        explanation.log_mel,
        extent=(0, frames * explanation.frame_seconds, 0, mels),
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
    )
    for token in explanation.heard:
        if token.start:
            axes.axvline(token.start, color="white", lw=0.8, ls=":")
    axes.set_title("log-mel spectrogram, as the encoder gets it", loc="left", **NAMES)
    axes.set_yticks([])
    axes.tick_params(labelbottom=False)


def _draw_attention(axes: Axes, explanation: Explanation) -> AxesImage:
    """Heat map; the line of an inserted token, which Stage 1 did not predict, stays empty."""
    mean = explanation.attention.mean(0)
    lines = np.full((len(explanation.edits), mean.shape[1]), np.nan)
    labels = {}
    for index, edit in enumerate(explanation.edits):
        if edit.heard is None:
            continue
        token = explanation.heard[edit.heard]
        lines[index], labels[index] = mean[edit.heard], visible(token)
        if token.start is not None:
            axes.add_patch(Rectangle((token.start, index - 0.5), token.end - token.start, 1, **PLACE))
    image = axes.imshow(
        lines,
        extent=(0, mean.shape[1] * explanation.state_seconds, len(lines) - 0.5, -0.5),
        aspect="auto",
        cmap="Greys",
        norm=PowerNorm(0.5, vmin=0),  # most of the weights are small
        interpolation="nearest",
    )
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_title("cross-attention of Stage 1's tokens", loc="left", **NAMES)
    axes.set_xlabel("seconds")
    return image


def _draw_distances(axes: Axes, explanation: Explanation) -> None:
    for index, edit in enumerate(explanation.edits):
        if edit.heard is None:
            continue
        token = explanation.heard[edit.heard]
        axes.barh(index, token.distance, 0.6, color="black")
        axes.plot([token.distance, token.runner_up_distance], [index, index], **MARGIN)
        axes.text(token.runner_up_distance, index, f"  {visible(token.runner_up)}", va="center", fontsize=8)
    axes.set_xlim(0, 1.5 * max(token.runner_up_distance for token in explanation.heard))  # room for the names
    axes.tick_params(labelleft=False, left=False)
    axes.set_title("distance", loc="left", **NAMES)
    axes.set_xlabel("alignment distance (Eq. 7)")
    llm = axes.secondary_yaxis("right")
    llm.set_yticks(range(len(explanation.edits)), [decision(explanation, edit) for edit in explanation.edits])
    llm.tick_params(length=0)
    axes.annotate(
        "what the LLM wrote", (1.02, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", **NAMES
    )


def _draw_legend(axes: Axes) -> None:
    axes.axis("off")
    axes.legend(
        handles=[
            Rectangle((0, 0), 1, 1, **PLACE, label="the token's place in the audio"),
            Patch(color="black", label="distance of the token"),
            Line2D([], [], **MARGIN, label="up to the distance of the runner-up"),
            *(Patch(**shade, label=f"{change} by the LLM") for change, shade in SHADES.items()),
        ],
        loc="center left",
        ncols=2,
        fontsize=9,
        frameon=False,
    )


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
