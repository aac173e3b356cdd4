"""Study of RL-RIG: does the loop help, and does training it?  The inspector measures all pictures.

    python scripts/rig_study.py [--out runs/rig] [--seeds 0 1 2]

It writes docs/rlrig_study.md and docs/rlrig_*.png.

Each run of `train.py rlrig` starts from the shipped weights, and measures the Diffuser, best-of-N, the raw
loop and both phases.  This script adds further controls on the same test graphs and noise, and ablations.
Each seed has its own graphs, noise and training.  The study can be stopped at any time, and continues when
started again.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from reports import Arms, arguments, arms_figure, differences, means, once, over_runs, over_seeds, page, train
from rig_checker import asked_of_renders, asked_of_the_loop, calibration, checker_table

from minireflect.config import preset
from minireflect.evaluate import EvaluationConfig, Table
from minireflect.evaluate_graphs import evaluate_loop
from minireflect.figures import BASE, INK, REWARD, TRUTH, Line, Panel, curves
from minireflect.methods.rlrig import EditPrompts, Loop, load_parts, loop_of, silent_actor
from minireflect.rl.rewards import Answers, load_checker
from minireflect.run import read_metrics
from minireflect.streams import choices
from minireflect.world.captions import scripted_edit
from minireflect.world.graphs import SceneGraph

GROUPS = (2, 4, 8, 16)
SHORT = ["--actor-iterations", "8", "--editor-iterations", "25", "--no-controls"]
T_STARS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
COLUMNS = {
    "sg_iou": "SG-IoU", "entity_iou": "Entity-IoU", "relation_iou": "Relation-IoU", "met": "requirements met",
    "right": "pictures fully right", "judge": "requirements met, judge",
    "checker": "requirements met, Checker", "repaired": "repaired", "damaged": "damaged",
    "fooled": "Checker fooled", "evaluations": "UNet evaluations", "calls": "Checker calls",
}  # fmt: skip
TRAINED = "phase 1 + 2"


def scores(folder: Path) -> Arms:
    """The scores of all models that a run has measured."""
    return {row["model"]: row["score"] for row in read_metrics(folder, "evaluation")}


def scripted_actor(
    latents: torch.Tensor, graphs: list[SceneGraph], answers: Answers, generator: torch.Generator
) -> EditPrompts:
    """Control: an Actor that plans positions from the graph alone, and names those for unmet requirements."""
    draw = choices(int(torch.randint(2**31, (), generator=generator)), "script")
    return EditPrompts([scripted_edit(g, met, draw) for g, met in zip(graphs, answers.met.tolist())])


def more_arms(weights: Path) -> dict[str, Loop]:
    """Controls that a run does not measure: of the raw loop, and of the trained editor without an Actor."""
    loop, raw = preset("cpu").rlrig.loop, load_parts(weights, "base_actor", "unet")
    trained = load_parts(weights)
    n = math.ceil(loop.rounds * loop.edit_cost / loop.generate_cost)  # N - 1 of the run's best-of-N
    fewer, repeated = math.ceil(2 * n / 3), loop.generating(n, edit_all=False)
    editor_only = trained._replace(diffuser=trained.editor)
    return {
        f"best of {fewer + 1}": loop_of(raw, loop.generating(fewer, edit_all=True), silent_actor),
        "repeated generation": loop_of(raw, repeated, silent_actor),
        "raw loop, silent": loop_of(raw, loop, silent_actor),
        "raw loop, scripted Actor": loop_of(raw, loop, scripted_actor),
        "trained editor, repeated generation": loop_of(editor_only, repeated, silent_actor),
        "trained editor, silent": loop_of(trained, loop, silent_actor),
    }


def all_arms(folder: Path, seed: int, out: Path, pictures: int) -> Arms:
    """The scores of all arms of a seed, in the order of the table."""
    config, found = EvaluationConfig(pictures=pictures, seed=1_000 + seed), {}
    judge = load_checker(folder / "weights", "judge")
    for name, loop in more_arms(folder / "weights").items():
        path = out / "rows" / f"{name}-{seed}-{pictures}.json"
        found[name] = once(path, partial(evaluate_loop, loop, judge, config, name))
    found |= scores(folder)
    order = ("base", "best", "repeated", "raw", "phase", "trained")
    return {name: found[name] for name in sorted(found, key=lambda name: order.index(name.split()[0]))}


def by_t_star(folder: Path, seed: int, pictures: int) -> dict[str, list[dict]]:
    """Scores of the raw loop, the raw loop with DDIM inversion, and the trained loop, at each t*.

    The trained loop was trained at the default t* only.
    """
    config, rows = EvaluationConfig(pictures=pictures, seed=1_000 + seed), {}
    loop, judge = preset("cpu").rlrig.loop, load_checker(folder / "weights", "judge")
    raw, trained = load_parts(folder / "weights", "base_actor", "unet"), load_parts(folder / "weights")
    for name, parts, fresh in (
        ("raw loop", raw, loop.fresh_noise),
        ("raw loop, noise inverted, a quarter of its variance new", raw, 0.5),
        ("trained", trained, loop.fresh_noise),
    ):
        arms = {t: loop_of(parts, replace(loop, t_star=t, fresh_noise=fresh)) for t in T_STARS}
        rows[name] = [evaluate_loop(arm, judge, config, f"{name}, t* {t}") for t, arm in arms.items()]
    return rows


# -------------------------------------------------------------------------------- the page and its figures
def reliability_figure(answers: dict[str, dict[str, list]], path: Path) -> None:
    """Share of true requirements against the predicted probability."""
    lines = [Line("perfectly calibrated", [0, 1], [0, 1], INK, style=":")]
    for (name, found), color in zip(answers.items(), (REWARD, TRUTH)):
        (x, y, _), error = calibration(found)
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
    """Four measures against t*: the mean over seeds, and dotted lines for their range."""
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
    """The shares of `asked_of_the_loop` as a table."""
    rows = {f"{loop}, {name}": v for loop, who in fooled.items() for name, v in who.items()}
    names = {"agreement": "agrees with the inspector"}
    names |= {key: f"a {key[6:]} is wrong" for key in ("wrong yes", "wrong no")}
    return Table("pictures of, asked", {row: {n: v[k] for k, n in names.items()} for row, v in rows.items()})


def rig_page(
    path: Path, arms: list[Arms], checkers: Table, fooled: dict, seeds: list[int], pictures: int
) -> None:
    minus = {arm: (TRAINED, arm) for arm in arms[0] if arm != TRAINED}
    some = {key: COLUMNS[key] for key in ("sg_iou", "met", "right")}
    ahead = differences("the trained loop minus", arms, minus, some)
    gain = over_seeds([rows[TRAINED]["sg_iou"] / rows["base"]["sg_iou"] - 1 for rows in arms])
    values = {"arms": means("arm", arms, COLUMNS), "differences": ahead, "fooled": fooled_table(fooled)}
    values |= {"gain": gain, "checkers": checkers, "seeds": ", ".join(map(str, seeds)), "pictures": pictures}
    page("rlrig", path, **values)


def main() -> None:
    args = arguments(__doc__, "runs/rig", 160, "test graphs of every row")
    common = ["--evaluation.pictures", str(args.pictures)]
    words = {s: ["--seed", str(s), "--evaluation.seed", str(1_000 + s), *common] for s in args.seeds}
    runs = [train("rlrig", args.out / f"rlrig-{s}", words[s]) for s in args.seeds]
    edits = preset("cpu").rlrig.graphs * preset("cpu").rlrig.group
    short = {g: [*SHORT, *common, "--group", str(g), "--graphs", str(edits // g)] for g in GROUPS}
    groups = {g: train("rlrig", args.out / f"group-{g}", words) for g, words in short.items()}
    make = {s: partial(by_t_star, r, s, args.pictures // 2) for r, s in zip(runs, args.seeds)}
    t_star = [once(args.out / f"t-star-{s}.json", make[s]) for s in args.seeds]
    answers = {n: once(args.out / f"{n}.json", partial(asked_of_renders, n)) for n in ("checker", "judge")}
    fooled = once(args.out / "fooled.json", lambda: asked_of_the_loop(runs[0] / "weights"))
    arms = [all_arms(r, s, args.out, args.pictures) for r, s in zip(runs, args.seeds)]
    arms_figure(arms, {"sg_iou": "SG-IoU", "right": "pictures fully right"}, args.docs / "rlrig_arms.png")
    groups_figure({g: scores(r) for g, r in groups.items()}, args.docs / "rlrig_groups.png")
    t_star_figure(T_STARS, t_star, args.docs / "rlrig_t_star.png")
    reliability_figure(answers, args.docs / "rlrig_reliability.png")
    rig_page(args.docs / "rlrig_study.md", arms, checker_table(answers), fooled, args.seeds, args.pictures)


if __name__ == "__main__":
    main()
