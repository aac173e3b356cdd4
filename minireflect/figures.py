"""Pictures of a run.  Every plot of the learned reward has the exact checker beside it."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from .evaluate import Score
from .evaluate_graphs import GraphScore

matplotlib.use("Agg")  # files only, no display needed


INK, TRUTH, REWARD, BASE = "#282e3c", "#28a046", "#285adc", "#999999"


def save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def smooth(values: list[float], span: int) -> np.ndarray:
    """A running mean over `span` values, shorter at the start."""
    total = np.cumsum(np.insert(np.asarray(values, float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (total[ends] - total[starts]) / (ends - starts)


def training_curve(rows: list[dict], keys: dict[str, str], path: Path) -> None:
    """Values of a pretraining stage over its steps; `keys` maps names in metrics.jsonl to labels."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for key, label in keys.items():
        axes.plot([r["step"] for r in rows], smooth([r[key] for r in rows], 25), label=label)
    axes.set(xlabel="step", yscale="log")
    axes.legend()
    save(figure, path)


def learning_curve(rows: list[dict], path: Path, base: tuple[float, float] | None = None) -> None:
    """Reward and checker accuracy of the first pictures in training, before any reflection; `base` = (reward, accuracy) at the start."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    calls = [r["reward_calls"] for r in rows]
    for key, color, label in (
        ("reward_by_round", REWARD, "learned reward, mean"),
        ("right_by_round", TRUTH, "right by the inspector, share"),
    ):
        values = [r[key][0] for r in rows]
        axes.plot(calls, values, color=color, alpha=0.2, lw=0.8)
        axes.plot(calls, smooth(values, 15), color=color, label=label)
    if base:
        axes.axhline(base[0], color=REWARD, ls=":", lw=1, label="base, held-out prompts, reward")
        axes.axhline(base[1], color=TRUTH, ls=":", lw=1, label="base, held-out prompts, right")
    axes.set(xlabel="reward calls", ylim=(0, 1), title="Training prompts, first pictures (round 0)")
    axes.legend(loc="lower right", fontsize=8)
    save(figure, path)


def accuracy_by_law(columns: dict[str, dict[str, Score]], path: Path) -> None:
    """Bars of accuracy per law, one panel a kind of prompt, one colour a model."""
    kinds = list(next(iter(columns.values())))
    figure, panels = plt.subplots(1, len(kinds), figsize=(5.2 * len(kinds), 3.4), sharey=True, squeeze=False)
    colors = [BASE, TRUTH, REWARD, "#922ebe"]
    for axes, kind in zip(panels[0], kinds):
        laws = list(next(iter(columns.values()))[kind].by_law)
        width = 0.8 / len(columns)
        for i, (name, scores) in enumerate(columns.items()):
            heights = [scores[kind].by_law[law] for law in laws]
            axes.bar(
                np.arange(len(laws)) + i * width,
                heights,
                width,
                label=f"{name}: {scores[kind].accuracy:.2f}",
                color=colors[i % 4],
            )
        axes.set_xticks(np.arange(len(laws)) + 0.4 - width / 2, laws, rotation=40, ha="right")
        axes.set(title=f"{kind}, held-out", ylim=(0, 1.2), yticks=np.linspace(0, 1, 6))
        axes.legend(fontsize=8, ncols=len(columns), loc="upper center")  # above the highest bar
    panels[0][0].set_ylabel("right by the inspector")
    save(figure, path)


def reward_curve(rows: list[dict], path: Path, name: str) -> None:
    """The reward of every round in training, where there is no checker to stand beside it."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for k in range(max(len(r["reward_by_round"]) for r in rows)):
        points = [(r["reward_calls"], r["reward_by_round"][k]) for r in rows if len(r["reward_by_round"]) > k]
        calls, values = zip(*points)
        line = axes.plot(calls, smooth(list(values), 5), label=f"round {k}")
        axes.plot(calls, values, color=line[0].get_color(), alpha=0.25, lw=0.8)
    axes.set(
        xlabel="reward calls",
        ylabel=name,
        title="Training prompts; no checker says whether the pictures are better",
    )
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    save(figure, path)


def latent_moments(rows: list[dict], path: Path) -> None:
    """Mean and standard deviation of the start latents of every round: 0 and 1 on the noise prior."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
    for axes, key, prior in zip(panels, ("latent_mean", "latent_std"), (0, 1)):
        rounds = max(len(r[key]) for r in rows)
        for k in range(rounds):
            points = [(r["step"], r[key][k]) for r in rows if len(r[key]) > k]
            axes.plot(*zip(*points), lw=1, label=f"round {k}")
        axes.axhline(prior, color=INK, ls=":", lw=1)
        axes.set(xlabel="iteration", title=key.replace("latent_", "start latents: "))
        axes.legend(fontsize=8)
    save(figure, path)


def picture(axes: plt.Axes, image: Tensor, mark: str = "", right: bool | None = None) -> None:
    """One picture with a line under it; its frame is green when right, red when wrong.  Shapes: image (3 h w)"""
    axes.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([]), axes.set_yticks([])
    for side in axes.spines.values():
        side.set(
            color=INK if right is None else TRUTH if right else "#de2c2c", linewidth=1 if right is None else 2
        )
    if mark:
        axes.set_xlabel(mark, fontsize=7)


def strip(
    rows: list[list[tuple[Tensor, str, bool | None]]], labels: list[str], heads: list[str], path: Path
) -> None:
    """Rows of pictures with a caption to the left and a verdict under each: a prompt a row, a round a column."""
    columns = max(len(r) for r in rows)
    lines = [1 + max(mark.count("\n") for _, mark, _ in row) for row in rows]  # under the pictures of a row
    size = (
        1.55 * columns + 2.6,
        sum(1.55 + 0.13 * n for n in lines) + 0.3,
    )  # inches; a line of 7 points takes 0.13
    figure, grid = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="compressed")
    for y, row in enumerate(rows):
        for x in range(columns):
            if x < len(row):
                picture(grid[y][x], *row[x])
            else:
                grid[y][x].axis("off")
            if y == 0 and x < len(heads):
                grid[y][x].set_title(heads[x], fontsize=8)
        grid[y][0].set_ylabel(wrap(labels[y]), rotation=0, ha="right", va="center", fontsize=7.5, labelpad=8)
    save(figure, path)


def blocks(
    rows: list[list[tuple[Tensor, str, bool | None]]], labels: list[str], abreast: int, path: Path
) -> None:
    """Pictures with a verdict under each, and above them what was asked for: a prompt a block, `abreast` blocks side by side."""
    line, side, gap = 0.13, 1.5, 0.12  # inches: of a line of 7 points, a picture, and between two
    columns = max(len(r) for r in rows)
    labels = [wrap(label, 27 * columns) for label in labels]
    lanes = [list(zip(labels, rows))[i : i + abreast] for i in range(0, len(rows), abreast)]
    above = [line * (1 + max(label.count("\n") for label, _ in lane)) + 0.08 for lane in lanes]
    below = [
        line * (1 + max(m.count("\n") for _, row in lane for _, m, _ in row)) + 2 * gap for lane in lanes
    ]
    width, height = (side + gap) * columns * len(lanes[0]), sum(above) + sum(below) + side * len(lanes)
    figure, y = plt.figure(figsize=(width, height)), height
    for lane, up, down in zip(lanes, above, below):
        y -= up + side
        for i, (label, row) in enumerate(lane):
            x = (side + gap) * columns * i
            middle = x + ((side + gap) * len(row) - gap) / 2
            figure.text(middle / width, (y + side + 0.06) / height, label, ha="center", va="bottom", fontsize=7.5)  # fmt: skip
            for k, cell in enumerate(row):
                box = ((x + (side + gap) * k) / width, y / height, side / width, side / height)
                picture(figure.add_axes(box), *cell)
        y -= down
    save(figure, path)


def wrap(text: str, width: int = 34) -> str:
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) >= width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def phases(stages: dict[str, list[dict]], path: Path) -> None:
    """RL-RIG's two phases side by side: the reward of the first round's edits, and how many are right."""
    figure, panels = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.4), sharey=True, squeeze=False)
    for axes, (name, rows) in zip(panels[0], stages.items()):
        for key, color, label in (
            ("reward", REWARD, "requirements met, says the Checker"),
            ("accepted", "#922ebe", "pictures right, says the Checker"),
            ("right", TRUTH, "pictures right, by the inspector"),
        ):
            values = [r[key] for r in rows]
            axes.plot([r["step"] for r in rows], values, color=color, alpha=0.25, lw=0.8)
            axes.plot([r["step"] for r in rows], smooth(values, 8), color=color, label=label)
        axes.set(xlabel="iteration", ylim=(0, 1), title=f"{name}: edits of wrong pictures, training graphs")
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7, loc="lower right")
    save(figure, path)


def reason_curves(rows: list[dict], targets: dict[str, float], path: Path) -> None:
    """ReasonGen-R1 in training: verdict and truth; the entropy of words and of image tokens with their targets; the weights that hold them."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    step = [r["step"] for r in rows]
    for key, color, label in (
        ("reward", REWARD, "reward: judge, and captioner where it reads"),
        ("right", TRUTH, "right, by the inspector"),
    ):
        panels[0].plot(step, smooth([r[key] for r in rows], 8), color=color, label=label)
    panels[0].set(xlabel="iteration", ylim=(0, 1), title="training prompts")
    learnt = [r for r in rows if "text_entropy" in r]
    for key, color in (("text", REWARD), ("image", TRUTH)):
        at = [r["step"] for r in learnt]
        panels[1].plot(at, [r[f"{key}_entropy"] for r in learnt], color=color, label=f"{key} tokens")
        panels[1].axhline(targets[key], color=color, ls=":", lw=0.8)
        panels[2].plot(step, [r[f"alpha_{key}"] for r in rows], color=color, label=f"alpha of {key}")
    panels[1].set(xlabel="iteration", ylabel="nats a token", title="entropy, targets dotted", ylim=(0, None))
    panels[2].set(xlabel="iteration", title="above 0 entropy is penalised")
    for axes in panels:
        axes.legend(fontsize=7)
    save(figure, path)


def graph_bars(rows: dict[str, GraphScore], path: Path) -> None:
    """SG-IoU and the share of pictures fully right of every loop, with its UNet evaluations."""
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(rows) + 1.2))
    y = np.arange(len(rows))
    axes.barh(y - 0.2, [r.sg_iou for r in rows.values()], 0.38, color=REWARD, label="SG-IoU")
    axes.barh(y + 0.2, [r.right for r in rows.values()], 0.38, color=TRUTH, label="fully right")
    for i, row in enumerate(rows.values()):
        said = f"{row.evaluations:.0f} evaluations"
        axes.text(row.right + 0.01, i + 0.2, said, fontsize=6.5, va="center", color=INK)
    axes.set_yticks(y, list(rows))
    axes.set(xlim=(0, 1), title="held-out graphs, read by the inspector")
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path)
