"""Figures: curves, bars, strips and galleries of pictures. In the synthetic world, a learned reward is always
plotted beside the inspector's verdict.

Figures are made without pyplot: importing this file does not change matplotlib's backend or need a display. A
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

# a picture (3 h w), the text under it, and whether the picture is right (None if unknown)
Cell = tuple[Tensor, str, bool | None]
DPI = 110  # of figures in a notebook
FONT = 9  # points, for all texts
SIDE = 1.35  # inches of a picture in a notebook: slightly more than 128 pixels, with its frame
PAGE = 9.0  # inches; pages shrink wider figures to this width
Bars = dict[str, dict[str, tuple[float, float, float]]]  # group -> name -> share, both ends of interval


class Line(NamedTuple):
    """A curve of a panel. `x` and `y` are values, or names of metrics that `of_run` replaces by values."""

    label: str
    x: Sequence[float] | str
    y: Sequence[float] | str
    color: str | None = None  # default: the next color of matplotlib's cycle
    span: int = 1  # length of the running mean; above 1 the values themselves are also drawn, pale
    style: str = "-"


class Panel(NamedTuple):
    """A plot of a figure: title, axis labels, curves, and labelled dotted horizontal lines."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    levels: Sequence[tuple[str, float, str]] = ()  # (label, height, color) of horizontal lines
    ylim: tuple[float | None, float | None] = (None, None)
    log: bool = False


# The plots of a run. "reward_by_round 0" is the first value of the list reward_by_round.
# fmt: off
LEARNING = Panel(
    "Round 0 of training prompts (held-out combinations are harder)", "reward calls",
    "share right, mean reward", [
        Line("learned reward, mean", "reward_calls", "reward_by_round 0", REWARD, 15),
        Line("right by the inspector, share", "reward_calls", "right_by_round 0", TRUTH, 15)], ylim=(0, 1))
UNREAD = Panel("Training prompts; a higher reward need not mean better pictures", "reward calls", "reward",
               [Line("round", "reward_calls", "reward_by_round", span=5)])
LATENTS = [Panel("Start latents by round", "iteration", name, [Line("round", "step", f"latent_{name}")],
                 [("of the prior", value, INK)]) for name, value in (("mean", 0.0), ("std", 1.0))]
EDITS = Panel("edits of wrong pictures, training graphs", "iteration", "share", [
    Line("requirements met according to the Checker", "step", "reward", REWARD, 8),
    Line("pictures right according to the Checker", "step", "accepted", OTHER, 8),
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
    """The axes of a new figure, row by row. `width` and `height` are in inches; `options` are passed to
    matplotlib's `subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=DPI, layout="compressed")
    return list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def save(figure: "Figure", path: Path | None) -> "Figure":
    """Write the figure to a file, if a path is given.  -> the figure"""
    if path is None:
        return figure
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=130, bbox_inches="tight", facecolor="white")
    return figure


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Running mean over the last `span` values, over fewer at the start."""
    return [float(np.mean(values[max(0, end - span) : end])) for end in range(1, len(values) + 1)]


def of_run(panel: Panel, rows: list[dict]) -> Panel:
    """The panel with the values of a run's metrics. A metric with a list of rounds gives a line per round."""
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
    """Draw panels side by side, at most `columns` in a row if given. Saves the figure if there is a path.

    Panels in one row share the x axis if they have the same x label.
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
        axes.set_yscale("log" if panel.log else "linear")  # must precede the limits
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim)
        axes.locator_params(axis="x", nbins=5)
        axes.legend(fontsize=FONT)
    return save(plots[0].figure, path)


def bars(path: Path | None, xlabel: str, plots: dict[str, Bars]) -> "Figure":
    """Horizontal bars of shares with their intervals: a plot per title, a bar per name and group.

    All plots have the same names. A group named "" must be the only one and has no legend. Saves the figure
    if there is a path.
    """
    names = list(next(iter(next(iter(plots.values())).values())))
    panels = new_figure(max(7.2, 4.2 * len(plots)), 0.4 * len(names) + 1.4, 1, len(plots), sharey=True)
    below = -0.55 / (0.4 * len(names) + 0.4)  # in heights of a plot: legend below the x label
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
    """Show a picture with a text under it, and a green frame if it is right, a red one if it is wrong.

    Shapes: image (3 h w)
    """
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    color, width = (INK, 1) if right is None else (TRUTH if right else WRONG, 2)
    axes.spines[:].set(color=color, linewidth=width)
    axes.set_xlabel(mark, fontsize=FONT * max(1.0, axes.figure.get_figwidth() / PAGE), parse_math=False)


def gallery(cells: Sequence[Cell | None], columns: int = 6, labels: Sequence[str] = ()) -> "Figure":
    """For a notebook: pictures in rows, each with its text below, and `labels` left of the rows.

    A cell that is None leaves its place empty.
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
    """For a notebook with ipywidgets: a slider that shows `draw(name=value)`.

    A notebook without a running kernel shows no slider, so also show the result in a figure.
    """
    try:
        from ipywidgets import SelectionSlider, interact
    except ImportError:
        return print(f"a slider over {name} needs ipywidgets: pip install -e '.[notebooks]'")
    interact(draw, **{name: SelectionSlider(options=values, description=name, continuous_update=False)})


def wrap(text: str, width: int = 34) -> str:
    """Wrap every line of a text at word boundaries."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def strip(
    rows: list[list[Cell]], labels: Sequence[str], heads: Sequence[str], path: Path, abreast: int = 1
) -> None:
    """Save rows of pictures with a label above each row and a text under each picture.

    `heads` are the titles of the columns, such as rounds or models. `abreast` rows are put side by side.
    """
    columns, fits = max(map(len, rows)), min(abreast, len(rows))
    shrunk = max(1.0, 1.65 * columns * fits / PAGE)
    labels = [wrap(plain(label), int(22 * columns / shrunk)) for label in labels]
    above = shrunk * (19 + 12 * max(label.count("\n") for label in labels[:abreast]))  # points, of the heads
    rows = [[(image, wrap(mark, int(21 / shrunk)), right) for image, mark, right in row] for row in rows]
    most = max(text.count("\n") for text in [*labels, *(mark for row in rows for _, mark, _ in row)])
    # taller than needed: the compressed layout closes the gaps, and `save` cuts off the margin
    lanes, widths = -(-len(rows) // abreast), [*[1] * columns, 0.06] * fits  # a narrow gap after every row
    height = lanes * (2.4 + 0.2 * shrunk * most)  # inches
    plots = new_figure(1.65 * columns * fits, height, lanes, len(widths), width_ratios=widths)
    text = {"xycoords": "axes fraction", "textcoords": "offset points", "size": FONT * shrunk}
    for i, axes in enumerate(plots):
        row, k = divmod(i, columns + 1)
        if row < len(rows) and k < len(rows[row]):
            picture(axes, *rows[row][k])
        else:
            axes.set_axis_off()
        if k == 0 and row < len(rows):  # an empty title reserves the height of the label, but not its width
            axes.annotate(labels[row], (0, 1), (0, 4), in_layout=False, parse_math=False, **text)
            axes.set_title("\n" * (1 + labels[row].count("\n")), fontsize=FONT * shrunk)
        if row < abreast and k < len(heads) and any(k < len(below) for below in rows[row::abreast]):
            axes.annotate(heads[k], (0, 1), (0, above), weight="bold", parse_math=False, **text)
    save(plots[0].figure, path)
