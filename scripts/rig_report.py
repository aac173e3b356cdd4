"""The page and the figures of rig_study.py."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from minireflect.evaluate import over_seeds
from minireflect.evaluate_graphs import GraphScore
from minireflect.figures import BASE, INK, REWARD, TRUTH, save

COLUMNS = {
    "sg_iou": "SG-IoU",
    "entity_iou": "Entity-IoU",
    "relation_iou": "Relation-IoU",
    "met": "requirements met",
    "right": "pictures fully right",
    "judge": "requirements met, judge",
    "checker": "requirements met, Checker",
    "repaired": "repaired",
    "damaged": "damaged",
    "fooled": "Checker fooled",
}
TRAINED = "phase 1 + 2"


def spread(arms: list[dict[str, GraphScore]], arm: str, key: str) -> str:
    return over_seeds([getattr(rows[arm], key) for rows in arms])


def difference(arms: list[dict[str, GraphScore]], arm: str, other: str, key: str) -> str:
    return over_seeds([getattr(rows[arm], key) - getattr(rows[other], key) for rows in arms])


def arms_table(arms: list[dict[str, GraphScore]]) -> str:
    lines = ["| | " + " | ".join([*COLUMNS.values(), "UNet evaluations", "Checker calls"]) + " |"]
    lines.append("|---|" + "---|" * (len(COLUMNS) + 2))
    for arm in arms[0]:
        cells = [spread(arms, arm, key) for key in COLUMNS]
        costs = [
            f"{np.mean([getattr(rows[arm], key) for rows in arms]):.1f}" for key in ("evaluations", "calls")
        ]
        lines.append(f"| {arm} | " + " | ".join([*cells, *costs]) + " |")
    return "\n".join(lines)


def differences_table(arms: list[dict[str, GraphScore]]) -> str:
    lines = [
        "| the trained loop minus | SG-IoU | requirements met | pictures fully right |",
        "|---|---|---|---|",
    ]
    for arm in arms[0]:
        if arm != TRAINED:
            cells = [difference(arms, TRAINED, arm, key) for key in ("sg_iou", "met", "right")]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checker_table(answers: dict[str, dict[str, list]]) -> str:
    """Share of right answers by kind of question, and the calibration error."""
    kinds = list(dict.fromkeys(k for a in answers.values() for k in a["kind"]))
    lines = ["| right answers | " + " | ".join(answers) + " |", "|---|" + "---|" * len(answers)]

    def right(a: dict[str, list], kind: str | None) -> str:
        rows = [
            (p >= 0.5) == t for p, t, k in zip(a["probability"], a["truth"], a["kind"]) if kind in (None, k)
        ]
        return f"{np.mean(rows):.3f} of {len(rows):,}"

    for kind in (None, *kinds):
        lines.append(
            f"| {kind or '**all**'} | " + " | ".join(right(a, kind) for a in answers.values()) + " |"
        )
    lines.append(
        "| calibration error | " + " | ".join(f"{calibration(a)[1]:.3f}" for a in answers.values()) + " |"
    )
    return "\n".join(lines)


def calibration(answers: dict[str, list], bins: int = 10) -> tuple[list[tuple[float, float, int]], float]:
    """(mean probability, share true, number) of each bin, and the expected calibration error (Guo et al. 2017, equation 3)."""
    p, t = np.array(answers["probability"]), np.array(answers["truth"], float)
    which = np.minimum((p * bins).astype(int), bins - 1)
    rows = [
        (p[which == b].mean(), t[which == b].mean(), int((which == b).sum()))
        for b in range(bins)
        if (which == b).any()
    ]
    return rows, sum(n * abs(a - b) for a, b, n in rows) / len(p)


def reliability_figure(answers: dict[str, dict[str, list]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.4, 4))
    axes.plot([0, 1], [0, 1], color=INK, ls=":", lw=1, label="perfectly calibrated")
    for (name, found), color in zip(answers.items(), (REWARD, TRUTH)):
        rows, error = calibration(found)
        axes.plot(
            [r[0] for r in rows],
            [r[1] for r in rows],
            color=color,
            marker="o",
            ms=3,
            label=f"{name}: error {error:.3f}",
        )
        for x, y, n in rows:
            axes.annotate(str(n), (x, y), fontsize=5, color=color, xytext=(3, -6), textcoords="offset points")
    axes.set(xlabel="probability of yes", ylabel="share that is true", title="held-out scenes")
    axes.legend(fontsize=8)
    save(figure, path)


def arms_figure(arms: list[dict[str, GraphScore]], path: Path) -> None:
    """SG-IoU and share fully right of every arm against what it costs; every seed a point, their mean a bar."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for axes, key, name in zip(panels, ("sg_iou", "right"), ("SG-IoU", "pictures fully right")):
        for i, arm in enumerate(arms[0]):
            x = [rows[arm].evaluations for rows in arms]
            y = [getattr(rows[arm], key) for rows in arms]
            axes.plot(x, y, "os^D"[i // 3], color=f"C{i}", ms=4, label=arm)
            axes.plot(np.mean(x), np.mean(y), "_", color=f"C{i}", ms=18, mew=2)
        axes.set(xlabel="UNet evaluations a picture", ylabel=f"{name}, by the inspector", ylim=(0, 0.7))
    panels[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    save(figure, path)


def groups_figure(groups: dict[int, dict[str, GraphScore]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.4))
    x = np.arange(len(groups))
    for key, color, name in (("sg_iou", REWARD, "SG-IoU"), ("right", TRUTH, "fully right")):
        for arm, style in (("phase 1", "--"), (TRAINED, "-")):
            values = [getattr(rows[arm], key) for rows in groups.values()]
            axes.plot(x, values, style, color=color, marker="o", ms=3, label=f"{name}, {arm}")
    axes.set_xticks(x, [str(g) for g in groups])
    axes.set(
        xlabel="group size G, at equal edits an iteration",
        ylim=(0, 1),
        title="one seed, shorter training, held-out graphs",
    )
    axes.legend(fontsize=7)
    save(figure, path)


def t_star_figure(t_stars: tuple[float, ...], runs: list[dict[str, list[dict]]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, keys in zip(panels, (("sg_iou", "right"), ("repaired", "damaged"))):
        for key, style in zip(keys, ("-", "--")):
            for name, color in zip(runs[0], (INK, BASE, REWARD)):
                values = np.array([[row[key] for row in run[name]] for run in runs])  # (seeds t)
                axes.plot(
                    t_stars,
                    values.mean(0),
                    style,
                    color=color,
                    label=f"{key.replace('sg_iou', 'SG-IoU')}, {name}",
                )
                axes.fill_between(t_stars, values.min(0), values.max(0), color=color, alpha=0.12, lw=0)
        axes.set(xlabel="t*, share of the steps that an edit goes back", ylim=(0, 1))
        axes.legend(fontsize=7)
    save(figure, path)


def fooled_table(fooled: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| pictures of | asked | agrees with the inspector | a yes is wrong | a no is wrong |",
        "|---|---|---|---|---|",
    ]
    for loop, who in fooled.items():
        for name, v in who.items():
            lines.append(
                f"| {loop} | {name} | "
                + " | ".join(f"{v[k]:.3f}" for k in ("agreement", "wrong yes", "wrong no"))
                + " |"
            )
    return "\n".join(lines)


def page(
    arms: list[dict[str, GraphScore]], checkers: str, fooled: dict, seeds: list[int], pictures: int
) -> str:
    gain = [rows[TRAINED].sg_iou / rows["base"].sg_iou - 1 for rows in arms]
    return f"""# Study of RL-RIG: does the loop help, and does training it?

Made by `python scripts/rig_study.py`: seeds {", ".join(map(str, seeds))}, {pictures} held-out graphs of two to four things and one to four relations
each, measured by the inspector. Every seed has its own graphs, noise and training; means over the seeds with 95 % intervals (Student's t).
All rows of a seed share graphs and the start noise of round 0. [What it means](rlrig.md#results). *Repaired*: of the pictures that were wrong in round 0, the share that is right in the end; *damaged*:
of those that were right, the share that is not. *Checker fooled*: of the pictures that the Checker accepts, the share that the inspector does not.
*Judge*: a second Checker that no training uses. *Raw loop*: the loop before reinforcement. *Silent*: the edit prompt is empty. *Scripted Actor*: the
edit prompt comes from a program that plans places from the graph. *Repeated generation*: a new picture from new noise until the Checker accepts.

{arms_table(arms)}

![arms](rlrig_arms.png)

Relative gain in SG-IoU of the trained loop over the Diffuser alone: {over_seeds(gain)}.

{differences_table(arms)}

## Checker and judge

Yes/no questions about 1,000 held-out scenes, half of them clean and half through the autoencoder, half of the questions with a fact changed:

{checkers}

![reliability](rlrig_reliability.png)

All requirements of the 256 pictures that each loop returns, compared with the inspector:

{fooled_table(fooled)}

## Ablations

Group size (edits of one picture that are compared with each other), at equal edits per iteration, in a shorter training (8 and 25 iterations) of one seed:

![group sizes](rlrig_groups.png)

t*, the share of the steps that an edit goes back; half as many graphs of each seed (mean, and range over the seeds). The trained loop was trained at the default t*:

![levels](rlrig_t_star.png)
"""
