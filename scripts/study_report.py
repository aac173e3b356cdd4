"""What the study writes: the page with its tables, and three figures."""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from study_ways import KINDS, SAMPLER, WAYS

from minireflect import figures
from minireflect.evaluate import over_seeds
from minireflect.run import read_metrics


def table(rows: list[dict]) -> str:
    """One line for each arm and way of drawing."""
    lines = [
        "| arm | sampled by | physical | unconventional | reward | unreadable | diversity | edges | brightness | UNet evaluations, reward calls a picture | in training: reward calls, UNet evaluations, minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm, way in dict.fromkeys((r["arm"], r["way"]) for r in rows):
        mine = [r for r in rows if (r["arm"], r["way"]) == (arm, way)]

        def both(key: str, mine: list[dict] = mine) -> str:
            return over_seeds([np.mean([r[kind][key] for kind in KINDS]) for r in mine])

        training = mine[0].get("training")
        lines.append(
            "| "
            + " | ".join(
                [arm, way]
                + [over_seeds([r[kind]["accuracy"] for r in mine]) for kind in KINDS]
                + [both(key) for key in ("reward", "unreadable", "diversity", "edges", "brightness")]
                + [f"{mine[0]['unet']:.0f}, {mine[0]['rewards']:.0f}"]
                + [
                    f"{training['reward_calls']:,}, {training['unet_evaluations']:,}, {np.mean([r['training']['minutes'] for r in mine]):.1f}"
                    if training
                    else "0"
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def paired(rows: list[dict], others: list[str]) -> str:
    """By how much SRRL is ahead of every other trained arm: both kinds of prompts, seed by seed, and the interval of the mean."""
    lines = ["| SRRL minus | sampled by | physical | unconventional |", "|---|---|---|---|"]
    of = {(r["arm"], r["way"], r["seed"]): r for r in rows}
    for arm in others:
        for way in WAYS:
            seeds = [s for a, w, s in of if (a, w) == (arm, way) and ("SRRL", way, s) in of]
            if not seeds:
                continue
            ahead = [
                over_seeds(
                    [of["SRRL", way, s][kind]["accuracy"] - of[arm, way, s][kind]["accuracy"] for s in seeds]
                )
                for kind in KINDS
            ]
            lines.append(f"| {arm} | {way} | {' | '.join(ahead)} |")
    return "\n".join(lines)


def at_equal_cost(runs: dict[str, list[Path]], window: int = 8) -> str:
    """SRRL beside each other arm once both have spent what the cheaper of the two has: right first pictures of training prompts,
    mean of the `window` iterations up to there."""
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    lines = [
        "| SRRL and | at reward calls | SRRL | the other | at UNet evaluations | SRRL | the other |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in list(runs)[1:]:
        cells = []
        for key in ("reward_calls", "unet_evaluations"):
            budget = min(log[-1][key] for several in (logs["SRRL"], logs[arm]) for log in several)
            cells.append(f"{budget:,}")
            for several in (logs["SRRL"], logs[arm]):
                spent = [[r for r in log if r[key] <= budget][-window:] for log in several]
                cells.append(over_seeds([np.mean([r["right_by_round"][0] for r in part]) for part in spent]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rows: list[dict], compared: dict[str, list[Path]], options: str, hacks: str, judge: str) -> str:
    """docs/study.md: the compared arms' runs and options, the options of those with the clean judge, and how that judge is made."""
    took = {(r["arm"], r["seed"]): r["training"]["minutes"] for r in rows if "training" in r}
    minutes, seeds = sum(took.values()), len(next(iter(compared.values())))
    return f"""# Study of SRRL: does reflection help?

Made by `python scripts/study.py`, {minutes:.0f} minutes of training in all, on {os.cpu_count()} cores{" and a GPU" if torch.cuda.is_available() else " without a GPU"}. Every arm starts from the shipped base and
the shipped reward; {seeds} seeds, mean ± 95 % interval over them (Student's t). {rows[0]["physical"]["pictures"]} held-out prompts of each kind; right = by the inspector.
[What it means](srrl.md#does-reflection-help).

{options}

*One picture*: {SAMPLER.steps} steps, the reward is not used. *Reflect while wrong*: a picture that the reward refuses is turned into noise and sampled again
from the negative of that noise, at most three times; *new noise while wrong*: the same from independent noise. *Best of N*: N pictures, of which the one with the highest reward is taken. *Reflect, blind*: one round of re-noising with the guidance gap, without
the reward. *Zigzag*: re-noising with the gap inside every step. *Diversity*: mean distance of two pictures of one prompt, on the latents. Edges and
brightness are statistics of the pictures that the reward does not measure.

{table(rows)}

![Accuracy of all arms](study_arms.png)

## Differences, seed by seed

{paired(rows, list(compared)[1:])}

## At equal cost in training

{at_equal_cost(compared)}

![Right pictures in training against both costs](study_curves.png)

## When the reward is wrong

A reward trained on clean renders only (`{judge}`) has never seen a damaged picture. SRRL with it, one seed each, with `--weights` of that run:

{hacks}

![Learned reward and truth of first pictures in training](study_hacking.png)

The same prompts and noise before and after the run of the left panel, with the inspector's verdict and the reward under each picture:

![Pictures of the hacked reward](study_hacked.png)
"""


def bars(rows: list[dict], path: Path) -> None:
    """Accuracy of every arm and way, with intervals over seeds."""
    names = list(dict.fromkeys((r["arm"], r["way"]) for r in rows))
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 1))
    for j, (kind, color) in enumerate(zip(KINDS, (figures.REWARD, figures.TRUTH))):
        values = [[r[kind]["accuracy"] for r in rows if (r["arm"], r["way"]) == n] for n in names]
        y = np.arange(len(names)) + 0.2 * (2 * j - 1)
        axes.barh(y, [np.mean(v) for v in values], 0.38, color=color, label=kind)
        for yy, v in zip(y, values):
            axes.plot(v, [yy] * len(v), "o", ms=2.5, color=figures.INK)
    axes.set_yticks(range(len(names)), [f"{a} · {w}" for a, w in names], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="right by the inspector, held-out; a dot is a seed")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figures.save(figure, path)


def curves(runs: dict[str, list[Path]], path: Path) -> None:
    """Right pictures in training against both costs, mean over seeds and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for (arm, folders), color in zip(runs.items(), plt.get_cmap("tab10").colors):
        logs = [read_metrics(f, "srrl") for f in folders]
        right = np.array([figures.smooth([r["right_by_round"][0] for r in log], 8) for log in logs])
        for axes, key in zip(panels, ("reward_calls", "unet_evaluations")):
            x = [r[key] for r in logs[0]]
            axes.plot(x, right.mean(0), color=color, label=arm)
            axes.fill_between(x, right.min(0), right.max(0), color=color, alpha=0.15, lw=0)
            axes.set(xlabel=key.replace("_", " ").replace("unet", "UNet"), ylim=(0, 1))
            axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel("right by the inspector, round 0,\ntraining prompts")
    panels[0].legend(fontsize=7, loc="lower right")
    figures.save(figure, path)


def hacking(runs: dict[str, list[Path]], path: Path) -> None:
    """Learned reward and truth of round 0 over a long training."""
    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), sharey=True, squeeze=False)
    for axes, (name, folders) in zip(panels[0], runs.items()):
        log = read_metrics(folders[0], "srrl")
        calls = [r["reward_calls"] for r in log]
        for key, color, label in (
            ("reward_by_round", figures.REWARD, "learned reward"),
            ("right_by_round", figures.TRUTH, "right"),
        ):
            axes.plot(calls, figures.smooth([r[key][0] for r in log], 15), color=color, label=label)
        axes.set(title=name, xlabel="reward calls", ylim=(0, 1))
        axes.title.set_fontsize(10)
        axes.locator_params(axis="x", nbins=5)
        axes.legend(fontsize=8, loc="lower right")
    figures.save(figure, path)
