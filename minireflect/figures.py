"""Figures: curves, bars, strips and galleries of pictures. In the synthetic world, a learned reward is always
plotted beside the inspector's verdict.

Figures are made without pyplot: importing this file does not change matplotlib's backend or need a display. A
notebook with `%matplotlib inline` shows the figure that a cell returns.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from .disk import replacing
from .ranges import plain
from .world.canvas import to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, TRUTH, REWARD, BASE, OTHER, WRONG = "#282e3c", "#28a046", "#285adc", "#999999", "#922ebe", "#de2c2c"

# a picture (3 h w), the text under it, and whether the picture is right (None if unknown)
Cell = tuple[Tensor, str, bool | None]
DPI = 110  # of figures in a notebook
FONT = 9  # points, for all texts
SIDE = 1.35  # inches of a picture: more than 128 pixels in a notebook
STEP = 1.45  # inches from one picture to the next
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
    "Round 0 of training prompts (dotted: evaluation, see the table)", "reward calls",
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


def edge(right: bool | None) -> dict[str, object]:
    """Style of a frame: green if the picture is right, red if it is wrong, thin if that is not known."""
    color = INK if right is None else TRUTH if right else WRONG
    return {"color": color, "linewidth": 1 if right is None else 2, "clip_on": False}


def gallery(cells: Sequence[Cell | None], columns: int = 6, labels: Sequence[str] = ()) -> "Figure":
    """For a notebook: pictures in rows, each with its text below, and `labels` above the rows.

    A cell that is None leaves its place empty.
    """
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    return strip(rows, labels or [""] * len(rows))


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
    rows: Sequence[Sequence[Cell | None]], labels: Sequence[str], heads: Sequence[str] = (),
    path: Path | None = None, abreast: int = 1,
) -> "Figure":  # fmt: skip
    """Draw rows of pictures with a label above each row and a text under each picture, and save the figure if
    there is a path.

    `heads` are the titles of the columns, such as rounds or models. `abreast` rows are put side by side. A
    cell that is None leaves its place empty.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    # one plot, whose coordinates are inches from the top left: a plot per picture takes twice as long
    columns, fits = max(map(len, rows)), min(abreast, len(rows))
    width = STEP * columns + 0.1  # of a row
    shrunk = max(1.0, fits * width / PAGE)
    line, text = 0.155 * shrunk, {"size": FONT * shrunk, "parse_math": False}
    labels = [wrap(plain(label), int(20 * columns / shrunk)) for label in labels]
    axes, y = Figure(dpi=DPI).add_axes((0, 0, 1, 1)), line * bool(heads)
    for k, head in enumerate(heads):
        for i in range(fits):
            if any(k < len(row) for row in rows[i::abreast]):
                axes.text(i * width + STEP * k, 0, head, va="top", weight="bold", **text)
    for first in range(0, len(rows), abreast):
        lane, below = range(first, min(first + abreast, len(rows))), 0
        y += line * max(1.5 + labels[i].count("\n") if labels[i] else 0 for i in lane)
        for i in lane:
            axes.text((i - first) * width, y - 0.05, labels[i], va="bottom", **text)
            for k, cell in enumerate(rows[i]):
                if cell:
                    x, mark = (i - first) * width + STEP * k, wrap(cell[1], int(20 / shrunk))
                    place = (x, x + SIDE, y + SIDE, y)
                    axes.imshow(to_pixels(cell[0][None])[0], extent=place, interpolation="nearest")
                    axes.add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, **edge(cell[2])))
                    axes.text(x + SIDE / 2, y + SIDE + 0.05, mark, ha="center", va="top", **text)
                    below = max(below, 1 + mark.count("\n") if mark else 0)
        y += SIDE + line * below + 0.1
    axes.set(xlim=(0, fits * width), ylim=(y, 0), aspect="auto")
    axes.set_axis_off()
    axes.figure.set_size_inches(fits * width, y)
    return save(axes.figure, path)
