"""The page and the figures of study.py."""

import os
from pathlib import Path

import numpy as np
import torch
from reports import Arms, arms_figure, differences, over_runs, over_seeds, page
from study_ways import KINDS, SAMPLER, WAYS

from minireflect.evaluate import Table
from minireflect.figures import REWARD, TRUTH, Line, Panel, curves, smooth
from minireflect.run import read_metrics

OFF = ("reward", "unreadable", "diversity", "edges", "brightness")  # shown as means of both kinds of prompts


def by_seed(rows: list[dict]) -> list[Arms]:
    """The accuracy of every arm and way of sampling, seed by seed; arms of fewer seeds are left out."""
    seeds = list(dict.fromkeys(r["seed"] for r in rows))
    names = [n for n in dict.fromkeys((r["arm"], r["way"]) for r in rows)
             if sum((r["arm"], r["way"]) == n for r in rows) == len(seeds)]  # fmt: skip
    of = {(r["arm"], r["way"], r["seed"]): {kind: r[kind]["accuracy"] for kind in KINDS} for r in rows}
    return [{f"{arm} · {way}": of[arm, way, seed] for arm, way in names} for seed in seeds]


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


def paired(rows: list[dict], others: list[str]) -> Table:
    """By how much SRRL is ahead of every other trained arm, seed by seed, and the interval of the mean."""
    pairs = {f"{arm} · {way}": (f"SRRL · {way}", f"{arm} · {way}") for arm in others for way in WAYS}
    seeds = by_seed(rows)
    there = {name: pair for name, pair in pairs.items() if seeds[0].keys() >= {*pair}}
    return differences("SRRL minus", seeds, there, {kind: kind for kind in KINDS})


def at_equal_cost(runs: dict[str, list[Path]], window: int = 8) -> Table:
    """SRRL beside each other arm once both have spent what the cheaper of the two has: right first pictures
    of training prompts, mean of the `window` iterations up to there.
    """
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    rows = {}
    for arm in list(runs)[1:]:
        rows[arm] = {}
        for key, name in (("reward_calls", "reward calls"), ("unet_evaluations", "UNet evaluations")):
            budget = min(log[-1][key] for several in (logs["SRRL"], logs[arm]) for log in several)
            rows[arm][f"at {name}"] = f"{budget:,}"
            for who, several in (("SRRL", logs["SRRL"]), ("the other", logs[arm])):
                spent = [[r for r in log if r[key] <= budget][-window:] for log in several]
                right = [np.mean([r["right_by_round"][0] for r in part]) for part in spent]
                rows[arm][f"{who} at these {name}"] = over_seeds(right)
    return Table("SRRL and", rows)


def study_page(
    rows: list[dict], compared: dict[str, list[Path]], options: str, hacks: str, judge: str
) -> str:
    """docs/study.md; `hacks`: options of the arms with the clean reward, `judge`: those of that reward."""
    took = {(r["arm"], r["seed"]): r["training"]["minutes"] for r in rows if "training" in r}
    return page(
        "study",
        minutes=sum(took.values()),
        machine=f"{os.cpu_count()} cores {'and a' if torch.cuda.is_available() else 'without a'} GPU",
        seeds=len(next(iter(compared.values()))),
        pictures=rows[0]["physical"]["pictures"],
        steps=SAMPLER.steps,
        table=table(rows),
        paired=paired(rows, list(compared)[1:]),
        equal_cost=at_equal_cost(compared),
        options=options,
        hacks=hacks,
        judge=judge,
    )


def bars(rows: list[dict], path: Path) -> None:
    """Accuracy of every arm and way, best first."""
    seeds = by_seed(rows)
    best = sorted(seeds[0], key=lambda name: -np.mean([s[name][kind] for s in seeds for kind in KINDS]))
    ordered = [{name: s[name] for name in best} for s in seeds]
    arms_figure(ordered, {kind: f"{kind}: right" for kind in KINDS}, path)


def cost_curves(runs: dict[str, list[Path]], path: Path) -> None:
    """Right pictures in training against both costs: the mean over seeds, and dotted their range."""
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    panels = []
    for key, name in (("reward_calls", "reward calls"), ("unet_evaluations", "UNet evaluations")):
        lines = []
        for i, (arm, several) in enumerate(logs.items()):
            right = [smooth([r["right_by_round"][0] for r in log], 8) for log in several]
            lines += over_runs(arm, [r[key] for r in several[0]], right, f"C{i}")
        panels.append(
            Panel("Training prompts, round 0", name, "right by the inspector, share", lines, ylim=(0, 1))
        )
    curves(path, *panels)


def hacking(runs: dict[str, list[Path]], path: Path) -> None:
    """Learned reward and truth of round 0 over a long training, all panels to the same number of reward
    calls.
    """
    panels, longest = [], 0
    for name, folders in runs.items():
        log = read_metrics(folders[0], "srrl")
        calls = [r["reward_calls"] for r in log]
        longest = max(longest, calls[-1])
        shown = (
            ("reward_by_round", "learned reward", REWARD),
            ("right_by_round", "right by the inspector", TRUTH),
        )
        lines = [Line(label, calls, [r[key][0] for r in log], color, 15) for key, label, color in shown]
        panels.append(Panel(name, "reward calls", "mean reward, share right", lines, ylim=(0, 1)))
    curves(path, *(p._replace(lines=[*p.lines, Line("_end", [longest], [0])]) for p in panels))
