"""The page and the figures of rig_study.py."""

from pathlib import Path

import numpy as np
from reports import Arms, differences, means, over_runs, over_seeds, page

from minireflect.evaluate import Table
from minireflect.figures import BASE, INK, REWARD, TRUTH, Line, Panel, curves

COLUMNS = {
    "sg_iou": "SG-IoU", "entity_iou": "Entity-IoU", "relation_iou": "Relation-IoU", "met": "requirements met",
    "right": "pictures fully right", "judge": "requirements met, judge",
    "checker": "requirements met, Checker", "repaired": "repaired", "damaged": "damaged",
    "fooled": "Checker fooled", "evaluations": "UNet evaluations", "calls": "Checker calls",
}  # fmt: skip
TRAINED = "phase 1 + 2"


def checker_table(answers: dict[str, dict[str, list]]) -> Table:
    """Share of right answers by kind of question, and the calibration error."""

    def right(a: dict[str, list], kind: str) -> str:
        asked = zip(a["probability"], a["truth"], a["kind"])
        rows = [(p >= 0.5) == t for p, t, k in asked if kind in ("all", k)]
        return f"{np.mean(rows):.3f} of {len(rows):,}"

    kinds = ["all", *dict.fromkeys(k for a in answers.values() for k in a["kind"])]
    rows = {kind: {name: right(a, kind) for name, a in answers.items()} for kind in kinds}
    errors = {name: calibration(a)[1] for name, a in answers.items()}
    return Table("right answers", rows | {"calibration error": errors})


def calibration(answers: dict[str, list], bins: int = 10) -> tuple[list[tuple[float, float, int]], float]:
    """(mean probability, share true, number) of each bin, and the expected calibration error (Guo et al.
    2017, equation 3).
    """
    p, t = np.array(answers["probability"]), np.array(answers["truth"], float)
    which = np.minimum((p * bins).astype(int), bins - 1)
    chosen = [which == b for b in range(bins) if (which == b).any()]
    rows = [(p[c].mean(), t[c].mean(), int(c.sum())) for c in chosen]
    return rows, sum(n * abs(a - b) for a, b, n in rows) / len(p)


def reliability_figure(answers: dict[str, dict[str, list]], path: Path) -> None:
    """Share of true answers against the probability of yes."""
    lines = [Line("perfectly calibrated", [0, 1], [0, 1], INK, style=":")]
    for (name, found), color in zip(answers.items(), (REWARD, TRUTH)):
        rows, error = calibration(found)
        x, y, _ = zip(*rows)
        lines.append(Line(f"{name}: error {error:.3f}", x, y, color, style="o-"))
    curves(path, Panel("Questions about test scenes", "probability of yes", "share that is true", lines))


def groups_figure(groups: dict[int, Arms], path: Path) -> None:
    """SG-IoU and share fully right by group size, before and after phase 2."""
    lines = []
    for key, color, name in (("sg_iou", REWARD, "SG-IoU"), ("right", TRUTH, "fully right")):
        for arm, style in (("phase 1", "o--"), (TRAINED, "o-")):
            values = [rows[arm][key] for rows in groups.values()]
            lines.append(Line(f"{name}, {arm}", list(groups), values, color, style=style))
    title = "One seed, shorter training, test graphs"
    xlabel = "group size G, at equal edits an iteration"
    curves(path, Panel(title, xlabel, "by the inspector", lines, ylim=(0, 1)))


def t_star_figure(t_stars: tuple[float, ...], runs: list[dict[str, list[dict]]], path: Path) -> None:
    """Four measures by t*: mean of the seeds, and dotted their range."""
    names = {"sg_iou": "SG-IoU", "right": "Fully right", "repaired": "Repaired", "damaged": "Damaged"}
    panels = []
    for key, title in names.items():
        lines = []
        for name, color in zip(runs[0], (INK, BASE, REWARD)):
            lines += over_runs(name, t_stars, [[row[key] for row in run[name]] for run in runs], color)
        xlabel = "t*, share of the steps that an edit goes back"
        panels.append(Panel(title, xlabel, "by the inspector", lines, ylim=(0, 1)))
    curves(path, *panels)


def fooled_table(fooled: dict[str, dict[str, dict[str, float]]]) -> Table:
    rows = {f"{loop}, {name}": v for loop, who in fooled.items() for name, v in who.items()}
    names = {"agreement": "agrees with the inspector"}
    names |= {key: f"a {key[6:]} is wrong" for key in ("wrong yes", "wrong no")}
    return Table("pictures of, asked", {row: {n: v[k] for k, n in names.items()} for row, v in rows.items()})


def rig_page(arms: list[Arms], checkers: Table, fooled: dict, seeds: list[int], pictures: int) -> str:
    minus = {arm: (TRAINED, arm) for arm in arms[0] if arm != TRAINED}
    some = {key: COLUMNS[key] for key in ("sg_iou", "met", "right")}
    ahead = differences("the trained loop minus", arms, minus, some)
    gain = over_seeds([rows[TRAINED]["sg_iou"] / rows["base"]["sg_iou"] - 1 for rows in arms])
    told = {"arms": means("arm", arms, COLUMNS), "differences": ahead, "fooled": fooled_table(fooled)}
    told |= {"gain": gain, "checkers": checkers, "seeds": ", ".join(map(str, seeds)), "pictures": pictures}
    return page("rlrig", **told)
