"""Figures: curves, bars, strips and galleries of pictures.  A learned reward is never plotted without the
inspector's truth beside it.

Figures are made without pyplot, so that importing this file changes no backend and needs no display.  A
notebook with `%matplotlib inline` shows the figure that a cell returns.
"""

import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from .disk import replacing
from .ranges import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, TRUTH, REWARD, BASE, OTHER, WRONG = "#282e3c", "#28a046", "#285adc", "#999999", "#922ebe", "#de2c2c"

# a picture (3 h w), the line under it, right or wrong if that is known
Cell = tuple[Tensor, str, bool | None]
DPI = 110  # of a notebook's figures
FONT = 9  # points, of every mark, label, title and legend
SIDE = 1.35  # inches of a picture in a notebook: over 128 pixels, with its frame
PAGE = 9.0  # inches; a wider figure is shrunk to this by the page that shows it
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


def new_figure(width: float, height: float, rows: int, columns: int, **options: object) -> "list[Axes]":
    """The plots of an empty figure of so many inches, row by row; `options` are those of matplotlib's
    subplots.
    """
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout="compressed")
    return list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def save(figure: "Figure", path: Path | None) -> "Figure":
    """The figure; written to a file if there is a path."""
    if path is None:
        return figure
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=130, bbox_inches="tight", facecolor="white")
    return figure


def smooth(values: Sequence[float], span: int) -> list[float]:
    """The mean of the last `span` values, of fewer at the start."""
    return [float(np.mean(values[max(0, end - span) : end])) for end in range(1, len(values) + 1)]


def of_run(panel: Panel, rows: list[dict]) -> Panel:
    """The panel with the values that metrics.jsonl has of its lines.  A list by round makes a line for each
    round.
    """
    flat, lines = [], []
    for row in rows:
        lists = {key: values for key, values in row.items() if isinstance(values, list)}
        flat.append(row | {f"{key} {k}": v for key, values in lists.items() for k, v in enumerate(values)})
    for line in panel.lines:
        rounds = max((len(r[line.y]) for r in rows if isinstance(r.get(line.y), list)), default=0)
        names = {f"{line.y} {k}": f"{line.label} {k}" for k in range(rounds)} or {line.y: line.label}
        for key, label in names.items():
            x, y = ([r[name] for r in flat if key in r] for name in (line.x, key))
            lines.append(line._replace(label=label, x=x, y=y))
    return panel._replace(lines=lines)


def curves(path: Path | None, *panels: Panel, columns: int = 0) -> "Figure":
    """Draw panels side by side, at most `columns` in a row if given; saved if there is a path.

    Panels side by side over the same thing have the same range of x.
    """
    columns = columns or len(panels)
    rows, same = -(-len(panels) // columns), len({panel.xlabel for panel in panels}) == 1
    plots = new_figure(max(6.4, 4.2 * columns), 3.6 * rows, rows, columns, sharex=same and rows == 1)
    for axes, panel in zip(plots, panels):
        for line in panel.lines:
            mean = smooth(np.asarray(line.y, float), line.span)
            (drawn,) = axes.plot(line.x, mean, line.style, color=line.color, label=line.label)
            if line.span > 1:
                axes.plot(line.x, line.y, color=drawn.get_color(), alpha=0.25, lw=0.8, zorder=1)
        for label, height, color in panel.levels:
            axes.axhline(height, color=color, ls=":", lw=1, label=label)
        axes.set_title(panel.title, fontsize=FONT)
        axes.set_yscale("log" if panel.log else "linear")  # before the limits
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)
        axes.locator_params(axis="x", nbins=5)
        axes.legend(fontsize=FONT)
    return save(plots[0].figure, path)


def bars(path: Path | None, xlabel: str, plots: dict[str, Bars]) -> "Figure":
    """Horizontal bars of shares with their intervals: a plot for each title, a bar for each name and group.

    All plots have the same names.  A group named "" is alone and has no legend.  Saved if there is a path.
    """
    names = list(next(iter(next(iter(plots.values())).values())))
    panels = new_figure(max(7.2, 4.2 * len(plots)), 0.4 * len(names) + 1.4, 1, len(plots), sharey=True)
    below = -0.55 / (0.4 * len(names) + 0.4)  # of the height of a plot: under its label
    for axes, (title, groups) in zip(panels, plots.items()):
        height = 0.8 / len(groups)
        for i, ((group, shares), color) in enumerate(zip(groups.items(), (BASE, TRUTH, REWARD, OTHER))):
            y = np.arange(len(names)) + (i + 0.5) * height - 0.4
            value, *ends = np.array(list(shares.values())).T  # (n) each
            axes.barh(y, value, 0.95 * height, color=color, label=group)
            axes.errorbar(value, y, xerr=np.abs(ends - value), fmt="none", ecolor=INK, elinewidth=0.8)
        axes.set_title(title, fontsize=FONT)
        axes.set(xlabel=xlabel, xlim=(0, 1))
        axes.grid(axis="x", alpha=0.3)
        if "" not in groups:
            place = {"bbox_to_anchor": (0, below), "ncols": len(groups), "fontsize": FONT}
            axes.legend(loc="upper left", frameon=False, **place)
    panels[0].set_yticks(range(len(names)), names, fontsize=FONT)
    panels[0].invert_yaxis()
    return save(panels[0].figure, path)


def picture(axes: "Axes", image: Tensor, mark: str = "", right: bool | None = None) -> None:
    """One picture with a line under it; its frame is green when right, red when wrong.

    Shapes: image (3 h w)
    """
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    color, width = (INK, 1) if right is None else (TRUTH if right else WRONG, 2)
    axes.spines[:].set(color=color, linewidth=width)
    axes.set_xlabel(mark, fontsize=FONT * max(1.0, axes.figure.get_figwidth() / PAGE), parse_math=False)


def gallery(cells: Sequence[Cell | None], columns: int = 6, labels: Sequence[str] = ()) -> "Figure":
    """For a notebook: pictures in rows, each with its mark below; `labels` stand left of the rows.

    None leaves a place empty.
    """
    rows, width = -(-len(cells) // columns), (SIDE + 0.07) * columns + 0.3 * bool(labels)
    shrunk = max(1.0, width / PAGE)
    marks = [wrap(cell[1], int(19 / shrunk)) if cell else "" for cell in cells]
    below = 0.17 * shrunk * (1 + max(mark.count("\n") for mark in marks))  # inches
    plots = new_figure(width, (SIDE + below + 0.05) * rows, rows, columns)
    for axes, cell, mark in zip_longest(plots, cells, marks):
        if cell:
            picture(axes, cell[0], mark, cell[2])
        else:
            axes.set(xticks=[], yticks=[], frame_on=False)
    for axes, label in zip(plots[::columns], labels):
        axes.set_ylabel(wrap(label, int(18 / shrunk)), fontsize=FONT * shrunk)
    return plots[0].figure


def slider(name: str, values: Sequence[float], draw: "Callable[..., Figure]") -> None:
    """For a notebook with ipywidgets: a slider that shows `draw(name=value)`.  A page without a kernel has no
    slider, so show the result in a figure, too.
    """
    try:
        from ipywidgets import SelectionSlider, interact
    except ImportError:
        return print(f"a slider over {name} needs ipywidgets: pip install -e '.[notebooks]'")
    interact(draw, **{name: SelectionSlider(options=values, description=name, continuous_update=False)})


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
    columns, fits = max(map(len, rows)), min(abreast, len(rows))
    shrunk = max(1.0, 1.65 * columns * fits / PAGE)
    labels = [wrap(plain(label), int(22 * columns / shrunk)) for label in labels]
    above = shrunk * (19 + 12 * max(label.count("\n") for label in labels[:abreast]))  # points, of the heads
    rows = [[(image, wrap(mark, int(21 / shrunk)), right) for image, mark, right in row] for row in rows]
    most = max(text.count("\n") for text in [*labels, *(mark for row in rows for _, mark, _ in row)])
    # higher than needed: the compressed layout moves the rows together, and the margin is cut off
    lanes, widths = -(-len(rows) // abreast), [*[1] * columns, 0.06] * fits  # a gap behind every row
    height = lanes * (2.4 + 0.2 * shrunk * most)  # inches
    plots = new_figure(1.65 * columns * fits, height, lanes, len(widths), width_ratios=widths)
    text = {"xycoords": "axes fraction", "textcoords": "offset points", "size": FONT * shrunk}
    for i, axes in enumerate(plots):
        row, k = divmod(i, columns + 1)
        if row < len(rows) and k < len(rows[row]):
            picture(axes, *rows[row][k])
        else:
            axes.set_axis_off()
        if k == 0 and row < len(rows):  # an empty title keeps room for the label's lines, not for its width
            axes.annotate(labels[row], (0, 1), (0, 4), in_layout=False, parse_math=False, **text)
            axes.set_title("\n" * (1 + labels[row].count("\n")), fontsize=FONT * shrunk)
        if row < abreast and k < len(heads) and any(k < len(below) for below in rows[row::abreast]):
            axes.annotate(heads[k], (0, 1), (0, above), weight="bold", parse_math=False, **text)
    save(plots[0].figure, path)
