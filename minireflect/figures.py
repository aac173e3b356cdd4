"""Figures: curves, bars and strips of pictures.  A learned reward is never plotted without the inspector's
truth beside it.

Figures are made without pyplot, so that importing this file changes no backend and needs no display.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, TRUTH, REWARD, BASE, OTHER, WRONG = "#282e3c", "#28a046", "#285adc", "#999999", "#922ebe", "#de2c2c"

Cell = tuple[
    Tensor, str, bool | None
]  # a picture (3 h w), the line under it, right or wrong if that is known
Bars = dict[str, dict[str, tuple[float, float, float]]]  # group -> name -> share, both ends of its interval


class Line(NamedTuple):
    """A curve of a panel.  `x` and `y` are values, or names of metrics, which `of_run` replaces."""

    label: str
    x: Sequence[float] | str
    y: Sequence[float] | str
    color: str | None = None  # the next of matplotlib's when not given
    span: int = 1  # values of the running mean; above 1 the values themselves are drawn pale behind it
    style: str = "-"


class Panel(NamedTuple):
    """A plot of a figure: its title, axis labels, curves, and dotted horizontal lines with their labels."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    levels: Sequence[tuple[str, float, str]] = ()  # label, height, colour
    ylim: tuple[float | None, float | None] = (None, None)
    log: bool = False


# What is plotted of a run. "reward_by_round 0" is the first value of a list.
# fmt: off
LEARNING = Panel(
    "Round 0 of training prompts (held-out ones are harder: new combinations)", "reward calls",
    "share right, mean reward", [
        Line("learned reward, mean", "reward_calls", "reward_by_round 0", REWARD, 15),
        Line("right by the inspector, share", "reward_calls", "right_by_round 0", TRUTH, 15)], ylim=(0, 1))
UNREAD = Panel("Training prompts; nothing says whether the pictures are better", "reward calls", "reward",
               [Line("round", "reward_calls", "reward_by_round", span=5)])
LATENTS = [Panel("Start latents by round", "iteration", name, [Line("round", "step", f"latent_{name}")],
                 [("of the prior", value, INK)]) for name, value in (("mean", 0.0), ("std", 1.0))]
EDITS = Panel("edits of wrong pictures, training graphs", "iteration", "share", [
    Line("requirements met, says the Checker", "step", "reward", REWARD, 8),
    Line("pictures right, says the Checker", "step", "accepted", OTHER, 8),
    Line("pictures right by the inspector", "step", "right", TRUTH, 8)], ylim=(0, 1))
TOKENS = [
    Panel("Training prompts", "iteration", "share", [
        Line("learned reward", "step", "reward", REWARD, 8),
        Line("right by the inspector", "step", "right", TRUTH, 8)], ylim=(0, 1)),
    Panel("Entropy", "iteration", "nats per token", [
        Line("text tokens", "step", "text_entropy", REWARD),
        Line("image tokens", "step", "image_entropy", TRUTH)], ylim=(0, None)),
    Panel("Weight of the entropy: above 0 it is penalised", "iteration", "alpha", [
        Line("of text tokens", "step", "alpha_text", REWARD),
        Line("of image tokens", "step", "alpha_image", TRUTH)]),
]
# fmt: on


def new_figure(
    width: float, height: float, columns: int, rows: int = 1, layout: str = "constrained",
    widths: Sequence[float] | None = None,
) -> "tuple[Figure, list[Axes]]":  # fmt: skip
    """An empty figure of so many inches, and its plots row by row; `widths` of the columns are relative."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout=layout)
    return figure, list(figure.subplots(rows, columns, squeeze=False, width_ratios=widths).flat)


def save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """The mean of the last `span` values, of fewer at the start."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (total[ends] - total[starts]) / (ends - starts)


def of_run(panel: Panel, rows: list[dict]) -> Panel:
    """The panel with the values that metrics.jsonl has of its lines.  A list by round makes a line for each
    round.
    """
    lines = []
    flat = [r | {f"{k} {i}": v for k, values in r.items() if isinstance(values, list)
                 for i, v in enumerate(values)} for r in rows]  # fmt: skip
    for line in panel.lines:
        rounds = max((len(r[line.y]) for r in rows if isinstance(r.get(line.y), list)), default=0)
        names = {f"{line.y} {k}": f"{line.label} {k}" for k in range(rounds)} or {line.y: line.label}
        for key, label in names.items():
            there = [r for r in flat if key in r]
            x, y = ([r[name] for r in there] for name in (line.x, key))
            lines.append(line._replace(label=label, x=x, y=y))
    return panel._replace(lines=lines)


def curves(path: Path, *panels: Panel, columns: int = 0) -> None:
    """Draw panels side by side, at most `columns` in a row if given."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure, plots = new_figure(max(6.4, 4.2 * columns), 3.6 * rows, columns, rows)
    for axes, panel in zip(plots, panels):
        for line in panel.lines:
            style = {"color": line.color, "label": line.label}
            (drawn,) = axes.plot(line.x, smooth(line.y, line.span), line.style, **style)
            if line.span > 1:
                axes.plot(line.x, line.y, color=drawn.get_color(), alpha=0.25, lw=0.8, zorder=1)
        for label, height, color in panel.levels:
            axes.axhline(height, color=color, ls=":", lw=1, label=label)
        axes.set_title(panel.title, fontsize=9)
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)
        axes.set_yscale("log" if panel.log else "linear")
        axes.locator_params(axis="x", nbins=5)
        axes.legend(fontsize=7)
    save(figure, path)


def bars(path: Path, xlabel: str, plots: dict[str, Bars]) -> None:
    """Horizontal bars of shares with their intervals: for every name one bar of each group; a plot for each
    title.
    """
    first = next(iter(plots.values()))
    names = list(next(iter(first.values())))
    figure, panels = new_figure(max(7.2, 4.6 * len(plots)), 0.4 * len(names) + 1.4, len(plots))
    for axes, (title, groups) in zip(panels, plots.items()):
        height = 0.8 / len(groups)
        for i, ((group, shares), color) in enumerate(zip(groups.items(), (BASE, TRUTH, REWARD, OTHER))):
            y = np.arange(len(names)) + (i + 0.5) * height - 0.4
            value, *ends = np.array(list(shares.values())).T  # (n) each
            axes.barh(y, value, 0.95 * height, color=color, label=group)
            axes.errorbar(value, y, xerr=np.abs(ends - value), fmt="none", ecolor=INK, elinewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set(xlabel=xlabel, xlim=(0, 1))
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
        below = -0.55 / (figure.get_figheight() - 1)  # of the height of the plot: under its label
        where = {"loc": "upper left", "bbox_to_anchor": (0, below), "ncols": len(groups)}
        axes.legend(fontsize=7, frameon=False, **where)
    save(figure, path)


def picture(axes: "Axes", image: Tensor, mark: str = "", right: bool | None = None) -> None:
    """One picture with a line under it; its frame is green when right, red when wrong.

    Shapes: image (3 h w)
    """
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        color, width = (INK, 1) if right is None else (TRUTH if right else WRONG, 2)
        side.set(color=color, linewidth=width)
    axes.set_xlabel(mark, fontsize=7)


def wrap(text: str, width: int = 34) -> str:
    """Break every line of a text at words."""
    return "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.splitlines())


def strip(
    rows: list[list[Cell]], labels: Sequence[str], heads: Sequence[str], path: Path, abreast: int = 1
) -> None:
    """Rows of pictures, each with what was asked for above it and a verdict under each picture; `abreast`
    rows side by side.

    `heads` stand above the columns: rounds, models.
    """
    columns, lanes, fits = max(map(len, rows)), -(-len(rows) // abreast), min(abreast, len(rows))
    labels = [wrap(label, 27 * columns) for label in labels]
    lines = [1 + label.count("\n") for label in labels]
    widths = [*[1] * columns, 0.06] * fits  # a gap behind every row
    # higher than needed: the compressed layout moves the rows together, and the margin is cut off
    figure, plots = new_figure(1.65 * columns * fits, 3 * lanes, len(widths), lanes, "compressed", widths)
    for i, axes in enumerate(plots):
        row, k = divmod(i, columns + 1)
        if row >= len(rows) or k >= len(rows[row]):
            axes.remove()
            continue
        image, mark, right = rows[row][k]
        picture(axes, image, wrap(mark, 27), right)
        heights = [(heads[k], 9 + 10 * max(lines[:abreast]))] if row < abreast and k < len(heads) else []
        if k == 0:  # the layout keeps room for the lines of a title, but it must not for their width
            axes.set_title("\n" * lines[row], fontsize=7.5)
            heights.append((labels[row], 4))
        for text, points in heights:
            place = {"xytext": (0, points), "textcoords": "offset points", "in_layout": text in heads}
            weight = "bold" if text in heads else "normal"
            axes.annotate(text, (0, 1), xycoords="axes fraction", fontsize=7.5, weight=weight, **place)
    save(figure, path)
