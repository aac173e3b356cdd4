"""The page and the figures of study.py."""

import os
from pathlib import Path

import numpy as np
import torch
from reports import COSTS, Arms, arms_figure, differences, mean_and_ends, over_runs, over_seeds, page
from study_ways import KINDS, SAMPLER

from minireflect import figures
from minireflect.evaluate import Table
from minireflect.figures import OTHER, REWARD, TRUTH, Panel, curves, smooth
from minireflect.run import read_metrics

PAIRS = (
    ("SRRL", "K = 0, pairs"), ("SRRL", "K = 0, more pairs"), ("SRRL", "K = 0, single pictures"),
    ("SRRL, opposite pairs", "K = 0, pairs"), ("SRRL", "SRRL, new noise"), ("SRRL", "regression"),
    ("regression", "regression, K = 0"), ("PPO", "PPO, K = 0"), ("SRRL", "PPO"),
)  # fmt: skip
BINS = (0.05, 0.2, 0.5)  # of the base's share of right pictures of a prompt
OFF = ("reward", "unreadable", "diversity", "edges", "brightness")  # shown as means of both kinds of prompts


def by_seed(rows: list[dict]) -> list[Arms]:
    """The accuracy of every arm and way of sampling, seed by seed; those of fewer seeds come in the first."""
    seeds: dict[int, Arms] = {seed: {} for seed in sorted({r["seed"] for r in rows})}
    for r in rows:
        found = {kind: r[kind]["accuracy"] for kind in KINDS}
        found["mean"] = sum(found.values()) / len(KINDS)
        seeds[r["seed"]][f"{r['arm']} · {r['way']}"] = found
    return list(seeds.values())


def table(rows: list[dict]) -> Table:
    """One line for each arm and way of sampling."""
    lines = {}
    for arm, way in dict.fromkeys((r["arm"], r["way"]) for r in rows):
        mine = [r for r in rows if (r["arm"], r["way"]) == (arm, way)]
        took = mine[0].get("training")
        minutes = f"{np.mean([r['training']['minutes'] for r in mine]):.1f}" if took else "0"
        lines[f"{arm} · {way}"] = {
            **{kind: over_seeds([r[kind]["accuracy"] for r in mine]) for kind in KINDS},
            **{key: over_seeds([np.mean([r[kind][key] for kind in KINDS]) for r in mine]) for key in OFF},
            "UNet evaluations a picture": f"{mine[0]['unet']:.0f}",
            "reward calls a picture": f"{mine[0]['rewards']:.0f}",
            "reward calls in training": f"{took['reward_calls']:,}" if took else "0",
            "UNet evaluations in training": f"{took['unet_evaluations']:,}" if took else "0",
            "minutes of training": minutes,
        }
    return Table("arm · sampled by", lines)


def paired(rows: list[dict]) -> Table:
    """By how much one arm is ahead of another, seed by seed, and the interval of the mean."""
    pairs = {f"{one} − {other}": (f"{one} · one picture", f"{other} · one picture") for one, other in PAIRS}
    seeds = by_seed(rows)
    there = {name: p for name, p in pairs.items() if all({*p} <= s.keys() for s in seeds[:2])}
    return differences("test prompts", seeds, there, {k: k for k in (*KINDS, "mean")})


def at_equal_cost(runs: dict[str, list[Path]], window: int = 8) -> Table:
    """SRRL beside each other arm once both have spent what the cheaper of the two has: right first pictures
    of training prompts, mean of the `window` iterations up to there.
    """
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    rows = {}
    for arm in list(runs)[1:]:
        rows[arm] = {}
        for key, name in COSTS.items():
            budget = min(log[-1][key] for several in (logs["SRRL"], logs[arm]) for log in several)
            rows[arm][f"at {name}"] = f"{budget:,}"
            for who, several in (("SRRL", logs["SRRL"]), ("the other", logs[arm])):
                spent = [[r for r in log if r[key] <= budget][-window:] for log in several]
                right = [np.mean([r["right_by_round"][0] for r in part]) for part in spent]
                rows[arm][f"{who} at these {name}"] = over_seeds(right)
    return Table("SRRL and", rows)


def by_success(before: dict[str, float], after: dict[str, list[dict[str, float]]], path: Path) -> Table:
    """Right pictures of training prompts after training, in bins of the base's success rate; a figure too.
    Bins without a prompt are left out.

    `before` gives the base's rate by prompt, `after` that of every arm and seed.
    """
    edges, rows, points = (0.0, *BINS, 1.01), {}, {arm: [] for arm in ("base", *after)}
    for low, high in zip(edges, edges[1:]):
        texts = [text for text, rate in before.items() if low <= rate < high]
        if not texts:
            continue
        row = {"prompts": str(len(texts))}
        for arm, seeds in {"base": [before], **after}.items():
            shares = [float(np.mean([seed[t] for t in texts])) for seed in seeds if seed]
            row[arm] = over_seeds(shares)
            points[arm].append(mean_and_ends(shares))
        rows[f"{low:g} to {min(high, 1):g}"] = row
    groups = {arm: dict(zip(rows, values)) for arm, values in points.items()}
    title = "Training prompts, by the base's success rate"
    figures.bars(path, "right by the inspector, share; 95 % intervals", {title: groups})
    return Table("base's success rate", rows)


def study_page(rows: list[dict], runs: dict[str, list[Path]], options: str, bins: Table) -> str:
    """docs/study.md."""
    took = {(r["arm"], r["seed"]): r["training"]["minutes"] for r in rows if "training" in r}
    machine = f"{os.cpu_count()} cores {'and a' if torch.cuda.is_available() else 'without a'} GPU"
    tables = {"table": table(rows), "paired": paired(rows), "bins": bins, "equal_cost": at_equal_cost(runs)}
    numbers = {"pictures": rows[0]["physical"]["pictures"], "steps": SAMPLER.steps, "options": options}
    numbers |= {"machine": machine, "minutes": sum(took.values())}
    return page("study", **numbers, **tables)


def bars(rows: list[dict], path: Path) -> None:
    """Accuracy of every arm and way, best first."""
    titles = {kind: f"Right, {kind} test prompts" for kind in KINDS}
    arms_figure(by_seed(rows), titles, path, best_by="mean")


def cost_curves(runs: dict[str, list[Path]], path: Path) -> None:
    """Right pictures in training against both costs: the mean over seeds, and dotted their range."""
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    panels = []
    for key, name in COSTS.items():
        lines = []  # in the colours of `by_success`
        for (arm, several), color in zip(logs.items(), (TRUTH, REWARD, OTHER)):
            right = [smooth([r["right_by_round"][0] for r in log], 8) for log in several]
            lines += over_runs(arm, [r[key] for r in several[0]], right, color)
        label = "right by the inspector, share"
        panels.append(Panel("Training prompts, round 0", name, label, lines, ylim=(0, 1)))
    curves(path, *panels)
