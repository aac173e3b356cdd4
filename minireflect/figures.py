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

from .evaluate import Score, wilson
from .evaluate_graphs import GraphScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, TRUTH, REWARD, BASE, OTHER, WRONG = "#282e3c", "#28a046", "#285adc", "#999999", "#922ebe", "#de2c2c"

Cell = tuple[
    Tensor, str, bool | None
]  # a picture (3 h w), the line under it, right or wrong if that can be said


class Line(NamedTuple):
    """A curve of a panel."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
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


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **options: bool
) -> "tuple[Figure, list[Axes]]":
    """An empty figure of so many inches, and its plots row by row; `options` are those of matplotlib's
    subplots.
    """
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False, **options).flat if columns else []
    return figure, list(plots)


def save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """The mean of the last `span` values, of fewer at the start."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (total[ends] - total[starts]) / (ends - starts)


# --------------------------------------------------------------------------------------------------- curves
def curves(path: Path, *panels: Panel, columns: int = 0) -> None:
    """Draw panels side by side, at most `columns` in a row if given."""
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    figure, plots = new_figure(max(6.4, 4.2 * columns), 3.6 * rows, columns, rows)
    for axes, panel in zip(plots, panels):
        draw_panel(axes, panel)
    save(figure, path)


def draw_panel(axes: "Axes", panel: Panel) -> None:
    for line in panel.lines:
        (drawn,) = axes.plot(
            line.x, smooth(line.y, line.span), line.style, color=line.color, label=line.label
        )
        if line.span > 1:
            axes.plot(line.x, line.y, color=drawn.get_color(), alpha=0.25, lw=0.8, zorder=1)
    for label, height, color in panel.levels:
        axes.axhline(height, color=color, ls=":", lw=1, label=label)
    axes.set_title(panel.title, fontsize=9)
    axes.set(
        xlabel=panel.xlabel, ylabel=panel.ylabel, ylim=panel.ylim, yscale="log" if panel.log else "linear"
    )
    axes.locator_params(axis="x", nbins=5)
    axes.legend(fontsize=7)


def of_rounds(rows: list[dict], key: str, x: str, span: int = 1) -> list[Line]:
    """For each round a curve of a value that metrics.jsonl lists by round."""
    lines = []
    for k in range(max(len(r[key]) for r in rows)):
        points = [(r[x], r[key][k]) for r in rows if len(r[key]) > k]
        lines.append(Line(f"round {k}", *map(list, zip(*points)), span=span))
    return lines


def training_curve(rows: list[dict], keys: dict[str, str], path: Path) -> None:
    """Values of a pretraining stage over its steps; `keys` maps names in metrics.jsonl to labels."""
    x = [r["step"] for r in rows]
    lines = [Line(label, x, [r[key] for r in rows], span=25) for key, label in keys.items()]
    curves(path, Panel(f"{path.stem}: training", "step", ", ".join(keys.values()), lines, log=True))


def learning_curve(rows: list[dict], path: Path, base: tuple[float, float] | None = None) -> None:
    """Reward and truth of round 0 in training; `base` = (reward, share right) of held-out prompts before
    training.

    Training prompts are of combinations that the base was trained on, so the curves start above the base's
    levels.
    """
    calls, names = (
        [r["reward_calls"] for r in rows],
        ("learned reward, mean", "right by the inspector, share"),
    )
    lines = [
        Line(name, calls, [r[key][0] for r in rows], color, span=15)
        for name, key, color in zip(names, ("reward_by_round", "right_by_round"), (REWARD, TRUTH))
    ]
    levels = [(f"{name}: held-out prompts, before", value, color)
              for name, value, color in zip(("reward", "right"), base or (), (REWARD, TRUTH))]  # fmt: skip
    title = "Round 0 of training prompts (held-out ones are harder: new combinations)"
    curves(path, Panel(title, "reward calls", "share right, mean reward", lines, levels, (0, 1)))


def reward_curve(rows: list[dict], path: Path, name: str) -> None:
    """The reward of every round in training on real pictures, which no inspector can read."""
    title = "Training prompts; nothing says whether the pictures are better"
    curves(path, Panel(title, "reward calls", name, of_rounds(rows, "reward_by_round", "reward_calls", 5)))


def latent_moments(rows: list[dict], path: Path) -> None:
    """Mean and standard deviation of the start latents of every round: 0 and 1 on the noise prior."""
    prior = (("mean", 0.0), ("std", 1.0))
    curves(path, *(
        Panel("Start latents by round", "iteration", name, of_rounds(rows, f"latent_{name}", "step"),
              [("of the prior", value, INK)])
        for name, value in prior
    ))  # fmt: skip


def phases(stages: dict[str, list[dict]], path: Path) -> None:
    """RL-RIG's two phases side by side: the reward of the first round's edits, and how many are right."""
    labels = {
        "reward": ("requirements met, says the Checker", REWARD),
        "accepted": ("pictures right, says the Checker", OTHER),
        "right": ("pictures right by the inspector", TRUTH),
    }
    panels = []
    for name, rows in stages.items():
        x = [r["step"] for r in rows]
        lines = [Line(text, x, [r[key] for r in rows], color, 8) for key, (text, color) in labels.items()]
        panels.append(
            Panel(
                f"{name}: edits of wrong pictures, training graphs", "iteration", "share", lines, ylim=(0, 1)
            )
        )
    curves(path, *panels)


def reason_curves(rows: list[dict], targets: dict[str, float], path: Path) -> None:
    """ReasonGen-R1 in training: reward and truth; entropy of text and image tokens; the weights that hold it
    at its target.
    """
    x, learnt = [r["step"] for r in rows], [r for r in rows if "text_entropy" in r]
    shares = [Line(text, x, [r[key] for r in rows], color, 8) for key, text, color in (
        ("reward", "learned reward", REWARD), ("right", "right by the inspector", TRUTH)
    )]  # fmt: skip
    colors = {"text": REWARD, "image": TRUTH}
    entropy = [
        Line(f"{k} tokens", [r["step"] for r in learnt], [r[f"{k}_entropy"] for r in learnt], c)
        for k, c in colors.items()
    ]
    alpha = [Line(f"of {k} tokens", x, [r[f"alpha_{k}"] for r in rows], c) for k, c in colors.items()]
    levels = [(f"target, {k}", targets[k], c) for k, c in colors.items()]
    curves(
        path,
        Panel("Training prompts", "iteration", "share", shares, ylim=(0, 1)),
        Panel("Entropy", "iteration", "nats per token", entropy, levels, (0, None)),
        Panel("Weight of the entropy: above 0 it is penalised", "iteration", "alpha", alpha),
    )


# ----------------------------------------------------------------------------------------------------- bars
def bars(
    axes: "Axes",
    groups: dict[str, list[float]],
    names: Sequence[str],
    spans: dict[str, list[tuple[float, float]]] | None = None,
) -> None:
    """Horizontal bars of shares: for every name one bar of each group, with its interval (low, high) if
    `spans` has one.
    """
    palette, height = (BASE, TRUTH, REWARD, OTHER), 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        y = np.arange(len(names)) + (i + 0.5) * height - 0.4
        axes.barh(y, values, 0.95 * height, color=palette[i % 4], label=group)
        if spans:
            error = np.abs(np.array(spans[group]).T - np.array(values))  # (2 n)
            axes.errorbar(values, y, xerr=error, fmt="none", ecolor=INK, elinewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    below = -0.55 / (axes.figure.get_figheight() - 1)  # of the height of the plot: under its label
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, below), ncols=len(groups), frameon=False)


def accuracy_by_law(models: dict[str, dict[str, Score]], path: Path) -> None:
    """Accuracy per law with its 95 % interval: a panel for each kind of prompt, a colour for each model."""
    kinds = list(next(iter(models.values())))
    figure, plots = new_figure(4.6 * len(kinds), 4.2, len(kinds))
    for axes, kind in zip(plots, kinds):
        scores = {f"{name}: {model[kind].accuracy:.2f}": model[kind] for name, model in models.items()}
        laws = list(next(iter(scores.values())).by_law)
        values = {name: [s.by_law[law] for law in laws] for name, s in scores.items()}
        n = {name: round(s.pictures / len(laws)) for name, s in scores.items()}  # of each law
        bars(axes, values, laws, {name: [wilson(v, n[name]) for v in row] for name, row in values.items()})
        axes.set_title(f"{kind}, held-out prompts", fontsize=9)
        axes.set_xlabel("right by the inspector, share; lines: 95 % intervals")
    save(figure, path)


def graph_bars(loops: dict[str, GraphScore], path: Path) -> None:
    """SG-IoU and the share of pictures fully right of every loop, with its UNet evaluations."""
    figure, (axes,) = new_figure(7.2, 0.5 * len(loops) + 1.4)
    names = [f"{name}\n{score.evaluations:.0f} UNet evaluations" for name, score in loops.items()]
    scores = loops.values()
    bars(axes, {"SG-IoU": [s.sg_iou for s in scores], "fully right": [s.right for s in scores]}, names)
    axes.set(title="Held-out graphs, read by the inspector", xlabel="mean SG-IoU, share right")
    save(figure, path)


# --------------------------------------------------------------------------------------------------- strips
def picture(axes: "Axes", image: Tensor, mark: str = "", right: bool | None = None) -> None:
    """One picture with a line under it; its frame is green when right, red when wrong.

    Shapes: image (3 h w)
    """
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        color, width = (INK, 1) if right is None else (TRUTH if right else WRONG, 2)
        side.set(color=color, linewidth=width)
    if mark:
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
    line, side, gap, columns = (
        0.13,
        1.5,
        0.12,
        max(map(len, rows)),
    )  # inches: a line of text, a picture, between two
    row_width = (side + gap) * columns + gap
    labels = [wrap(label, 27 * columns) for label in labels]
    rows = [[(image, wrap(mark, 27), right) for image, mark, right in row] for row in rows]
    lanes = [list(zip(labels, rows))[i : i + abreast] for i in range(0, len(rows), abreast)]
    above = [line * (1 + max(label.count("\n") for label, _ in lane)) + 0.1 for lane in lanes]
    below = [
        line * (1 + max(m.count("\n") for _, row in lane for _, m, _ in row)) + 2 * gap for lane in lanes
    ]
    width, height = (
        row_width * min(abreast, len(rows)),
        sum(above) + sum(below) + side * len(lanes) + 2 * line,
    )
    figure, _ = new_figure(width, height, 0)
    figure.set_layout_engine("none")
    y = height - 2 * line
    for number, (lane, up, down) in enumerate(zip(lanes, above, below)):
        y -= up + side
        for i, (label, row) in enumerate(lane):
            x = row_width * i
            text = {"ha": "left", "va": "bottom", "fontsize": 7.5, "color": INK}
            figure.text(x / width, (y + side + 0.05) / height, label, **text)
            for k, cell in enumerate(row):
                left = x + (side + gap) * k
                if number == 0 and k < len(heads):
                    figure.text(left / width, 1 - line / height, heads[k], weight="bold", **text)
                picture(figure.add_axes((left / width, y / height, side / width, side / height)), *cell)
        y -= down
    save(figure, path)
