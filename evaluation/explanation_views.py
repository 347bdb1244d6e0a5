"""Show an `Explanation`: as a picture, as a table, and as a JSON object."""

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

# In inches: width of the figure; heights of a token's row, a line of text, spectrogram, colour bar and gaps.
WIDTH, ROW, TEXT_LINE, SPECTROGRAM, COLOUR_BAR, GAPS = 13, 0.26, 0.17, 1.2, 0.12, 2.0
CHARACTERS = 170  # in a line of text
SHADES = {
    Change.SUBSTITUTED: {"color": "tab:orange", "alpha": 0.25, "lw": 0},
    Change.INSERTED: {"color": "tab:green", "alpha": 0.25, "lw": 0},
    Change.DELETED: {"color": "tab:red", "alpha": 0.25, "lw": 0},
}
SPAN = {"fill": False, "edgecolor": "tab:red", "lw": 1.2}
MARGIN = {"color": "grey", "lw": 0.8, "marker": "|", "markevery": [-1]}
TITLE = {"fontsize": 9, "fontweight": "bold"}


def plot_explanation(explanation: Explanation, path: Path, title: str) -> None:
    """
    Plot the log-mel spectrogram above the cross-attention, with a row for each token of Stage 1 or inserted by the LLM.

    Beside each row are the distances of the token and of the runner-up, and the LLM's output.

    Args:
        explanation: what to plot.
        path: of the PNG.
        title: for instance the file's name.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a token is a dollar
        figure = _draw(explanation, title)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _draw(explanation: Explanation, title: str) -> Figure:
    text = [line for given in [title, *summary(explanation)] for line in textwrap.wrap(given, CHARACTERS)]
    heights = [SPECTROGRAM, ROW * max(len(explanation.edits), 4), COLOUR_BAR]
    size = (WIDTH, TEXT_LINE * len(text) + sum(heights) + GAPS)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=[2.4, 1], height_ratios=heights)
    spectrogram, legend = (figure.add_subplot(grid[0, column]) for column in range(2))
    attention = figure.add_subplot(grid[1, 0], sharex=spectrogram)
    distances = figure.add_subplot(grid[1, 1], sharey=attention)
    _draw_spectrogram(spectrogram, explanation)
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
    colorbar.set_label("attention weight, mean of all layers and heads (a row sums to 1)", fontsize=9)
    figure.suptitle("\n".join(text), fontsize=10, x=0.01, ha="left")
    return figure


def _draw_spectrogram(axes: Axes, explanation: Explanation) -> None:
    mels, frames = explanation.log_mel.shape
    axes.imshow(
        explanation.log_mel,
        extent=(0, frames * explanation.frame_seconds, 0, mels),
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
    )
    for token in explanation.stage1_tokens:
        if token.start:
            axes.axvline(token.start, color="white", lw=0.8, ls=":")
    axes.set_title("log-mel spectrogram, the input of the encoder", loc="left", **TITLE)
    axes.set_yticks([])
    axes.tick_params(labelbottom=False)


def _draw_attention(axes: Axes, explanation: Explanation) -> AxesImage:
    """Draw a heat map; the row of an inserted token, which Stage 1 did not predict, stays empty."""
    mean = explanation.attention.mean(0)
    rows = np.full((len(explanation.edits), mean.shape[1]), np.nan)
    labels = {}
    for index, edit in enumerate(explanation.edits):
        if edit.stage1_index is None:
            continue
        token = explanation.stage1_tokens[edit.stage1_index]
        rows[index], labels[index] = mean[edit.stage1_index], visible(token)
        if token.start is not None:
            axes.add_patch(Rectangle((token.start, index - 0.5), token.end - token.start, 1, **SPAN))
    image = axes.imshow(
        rows,
        extent=(0, mean.shape[1] * explanation.state_seconds, len(rows) - 0.5, -0.5),
        aspect="auto",
        cmap="Greys",
        norm=PowerNorm(0.5, vmin=0),  # most of the weights are small
        interpolation="nearest",
    )
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_title("cross-attention of Stage 1's tokens", loc="left", **TITLE)
    axes.set_xlabel("seconds")
    return image


def _draw_distances(axes: Axes, explanation: Explanation) -> None:
    for index, edit in enumerate(explanation.edits):
        if edit.stage1_index is None:
            continue
        token = explanation.stage1_tokens[edit.stage1_index]
        axes.barh(index, token.distance, 0.6, color="black")
        axes.plot([token.distance, token.runner_up_distance], [index, index], **MARGIN)
        axes.text(token.runner_up_distance, index, f"  {visible(token.runner_up)}", va="center", fontsize=8)
    axes.set_xlim(0, 1.5 * max(token.runner_up_distance for token in explanation.stage1_tokens))  # room for the names
    axes.tick_params(labelleft=False, left=False)
    axes.set_title("distance", loc="left", **TITLE)
    axes.set_xlabel("alignment distance (Eq. 7)")
    llm = axes.secondary_yaxis("right")
    llm.set_yticks(range(len(explanation.edits)), [decision(explanation, edit) for edit in explanation.edits])
    llm.tick_params(length=0)
    axes.annotate("LLM output", (1.02, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", **TITLE)


def _draw_legend(axes: Axes) -> None:
    axes.axis("off")
    axes.legend(
        handles=[
            Rectangle((0, 0), 1, 1, **SPAN, label="the token's span of the audio"),
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
    """Return a token's text on one line, its spaces shown as `␣`."""
    shown = (character if character.isprintable() else repr(character)[1:-1] for character in token.text)
    return "".join(shown).replace(" ", "␣")


def decision(explanation: Explanation, edit: Edit) -> str:
    """Describe in a few words what the LLM did in one edit."""
    if edit.change is None:
        return ""
    token = "" if edit.index is None else visible(explanation.tokens[edit.index])
    return {
        Change.GIVEN: f"{token} (given: first token guidance)",
        Change.KEPT: token,
        Change.SUBSTITUTED: f"→ {token} (substituted)",
        Change.INSERTED: f"+ {token} (inserted)",
        Change.DELETED: "− (deleted)",
    }[edit.change]


def summary(explanation: Explanation) -> list[str]:
    """Return the texts of Stage 1 and of the transcript, and what is unusual about them, as lines."""
    lines = [f"Stage 1:    {explanation.stage1}", f"transcript: {explanation.text}"]
    if explanation.ended and len(explanation.stage1_tokens) == 1:
        lines.append("Stage 1 found no words: the first embedding that it predicted was nearest to <EOA>.")
    if not explanation.ended:
        lines.append(
            f"Stage 1 did not end: the aligner has positions for {len(explanation.stage1_tokens)} tokens only."
        )
    return lines


def table(explanation: Explanation) -> Table:
    """Return a table with a row for each token of Stage 1 and each one that the LLM inserted."""
    result = Table("seconds", "Stage 1", "distance", "runner-up", "its distance", "LLM")
    for edit in explanation.edits:
        cells = [""] * 5
        if edit.stage1_index is not None:
            token = explanation.stage1_tokens[edit.stage1_index]
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
    """Return everything but the attention and the spectrogram as a JSON object."""

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
            for one in explanation.stage1_tokens
        ],
        "written": [token(one) for one in explanation.tokens],
        "edits": [
            {"change": edit.change, "heard": edit.stage1_index, "written": edit.index} for edit in explanation.edits
        ],
    }
