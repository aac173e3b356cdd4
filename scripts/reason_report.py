"""The page and the figures of reason_study.py."""

from pathlib import Path

from reports import Arms, differences, means, over_seeds, page

from minireflect.evaluate import Score, Table
from minireflect.evaluate_reason import table_row
from minireflect.figures import BASE, REWARD, TRUTH, Line, Panel, curves

COLUMNS = {
    "overall": "GenEval mean", "accepted": "reward accepts", "fooled": "of these wrong",
    "planned": "rationale right", "kept": "picture keeps it",
}  # fmt: skip
SHOWN = {"overall": "GenEval mean", "physical": "physical laws", "unconventional": "against the laws"}
FULL = "SFT + GRPO"
COOL = 0.2  # a second temperature, at which fewer tokens are sampled that the model itself thinks unlikely


def rows_of(scores: list[dict[str, Score]]) -> list[Arms]:
    return [{arm: table_row(score) for arm, score in seed.items()} for seed in scores]


def differences_table(arms: list[Arms]) -> Table:
    """Each row beside the whole at its own temperature."""
    pairs = {}
    for arm in arms[0]:
        name, comma, temperature = arm.partition(", temperature")
        if name != FULL and "training" not in name:
            pairs[arm] = (FULL + comma + temperature, arm)
    keys = {"overall": "GenEval mean", "physical": "physical", "unconventional": "unconventional"}
    return differences(f"{FULL} minus", arms, pairs, keys)


def parts_table(scores: list[dict[str, Score]], arm: str) -> Table:
    """Where a row is right, and where it is not: task by task and law by law, means over the seeds."""
    heads = ("right", "rationale right", "picture keeps it")
    parts = scores[0][arm]["parts"]
    cells = {part: zip(*(seed[arm]["parts"][part] for seed in scores)) for part in parts}
    return Table(arm, {part: dict(zip(heads, map(over_seeds, values))) for part, values in cells.items()})


def entropy_figure(training: dict[str, list[list[dict]]], targets: dict[str, float], path: Path) -> None:
    """Entropy by modality, reward and truth meanwhile; every seed a line.  In the second row the same under
    strain.
    """
    panels = []
    strain = ("strained", "strained-steady"), "no KL, no recall, lr 1e-3"
    for pair, title in ((("true", "steady"), "default"), strain):
        for key in ("text_entropy", "image_entropy", "reward", "right"):
            lines, share = [], key in ("reward", "right")
            for name, label, color in zip(pair, ("adaptive", "without"), (REWARD, BASE)):
                for number, steps in enumerate(training[name]):
                    shown = [r for r in steps if key in r]
                    x, y = [r["step"] for r in shown], [r[key] for r in shown]
                    lines.append(Line("_seed" if number else label, x, y, color, span=6))
            words = key.replace("_", " ").replace("right", "right by the inspector")
            levels = [] if share else [("target", targets[key.split("_")[0]], TRUTH)]
            label = f"{words}, {'share' if share else 'nats per token'}"
            panels.append(Panel(title, "iteration", label, lines, levels, (0, 1 if share else None)))
    curves(path, *panels, columns=4)


def reason_page(scores: list[dict[str, Score]], seeds: list[int], pictures: int) -> str:
    arms = rows_of(scores)
    columns = {key: COLUMNS.get(key, key) for key in arms[0][FULL]}
    tables = {"arms": means("arm", arms, columns), "differences": differences_table(arms)}
    tables["parts"] = parts_table(scores, f"{FULL}, temperature {COOL}")
    return page("reasongen", seeds=", ".join(map(str, seeds)), pictures=pictures, **tables)
