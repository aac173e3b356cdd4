"""The page and the figures of reason_study.py."""

from pathlib import Path

from reports import Arms, arms_figure, differences, means

from minireflect.evaluate import Table, over_seeds
from minireflect.evaluate_reason import ReasonScore
from minireflect.figures import BASE, REWARD, TRUTH, Line, Panel, curves

COLUMNS = {
    "overall": "GenEval mean",
    "accepted": "reward accepts",
    "fooled": "of these wrong",
    "planned": "rationale right",
    "kept": "picture keeps it",
}
FULL = "SFT + GRPO"
COOL = 0.2  # a second temperature, at which fewer tokens are sampled that the model itself thinks unlikely


def rows_of(scores: list[dict[str, ReasonScore]]) -> list[Arms]:
    return [{arm: score.row for arm, score in seed.items()} for seed in scores]


def differences_table(arms: list[Arms]) -> Table:
    """Each row beside the whole at its own temperature."""
    pairs = {}
    for arm in arms[0]:
        name, comma, temperature = arm.partition(", temperature")
        if name != FULL and "training" not in name:
            pairs[arm] = (FULL + comma + temperature, arm)
    keys = {"overall": "GenEval mean", "physical": "physical", "unconventional": "unconventional"}
    return differences(f"{FULL} minus", arms, pairs, keys)


def parts_table(scores: list[dict[str, ReasonScore]], arm: str) -> Table:
    """Where a row is right, and where it is not: task by task and law by law, means over the seeds."""
    heads = ("right", "rationale right", "picture keeps it")
    parts = scores[0][arm].parts
    cells = {part: zip(*(seed[arm].parts[part] for seed in scores)) for part in parts}
    return Table(arm, {part: dict(zip(heads, map(over_seeds, values))) for part, values in cells.items()})


def reason_arms_figure(scores: list[dict[str, ReasonScore]], path: Path) -> None:
    keys = {"overall": "GenEval mean", "physical": "physical laws", "unconventional": "against the laws"}
    arms_figure(rows_of(scores), keys, path)


def entropy_figure(training: dict[str, list[list[dict]]], targets: dict[str, float], path: Path) -> None:
    """Entropy by modality, reward and truth meanwhile; every seed a line.  In the second row the same under strain."""
    panels = []
    for pair, title in (
        (("true", "steady"), "default"),
        (("strained", "strained-steady"), "no KL, no recall, lr 1e-3"),
    ):
        for key in ("text_entropy", "image_entropy", "reward", "right"):
            lines, share = [], key in ("reward", "right")
            for name, label, color in zip(pair, ("adaptive", "without"), (REWARD, BASE)):
                for number, steps in enumerate(training[name]):
                    shown = [r for r in steps if key in r]
                    x, y = [r["step"] for r in shown], [r[key] for r in shown]
                    lines.append(Line("_seed" if number else label, x, y, color, span=6))
            words = key.replace("_", " ").replace("right", "right by the inspector")
            levels = [] if share else [("target", targets[key.split("_")[0]], TRUTH)]
            panels.append(Panel(title, "iteration", f"{words}, {'share' if share else 'nats per token'}", lines, levels,
                                (0, 1 if share else None)))  # fmt: skip
    curves(path, *panels, columns=4)


def page(scores: list[dict[str, ReasonScore]], seeds: list[int], pictures: int) -> str:
    arms = rows_of(scores)
    columns = {key: COLUMNS.get(key, key) for key in arms[0][FULL]}
    return f"""# Study of ReasonGen-R1: do rationales help, and what does GRPO add?

Made by `python scripts/reason_study.py`: seeds {", ".join(map(str, seeds))}, {pictures} prompts each of arrangements (GenEval's six tasks in turn), physical
laws and unconventional outcomes, measured by the inspector. Every seed has its own training, prompts and noise; means over the seeds with 95 % intervals (Student's t).
*Rationale right*: the rationale, parsed, states what the prompt asks for. *Picture keeps it*: of the rationales that parse, the share whose statement the
inspector finds in the picture. *Tokens*: sampled per prompt. *Reward accepts*: reward of at least 0.5. Temperature 0.8 unless a row says otherwise.
*Best of N*: the picture with the highest reward. [What it means](reasongen.md#results).

{means("arm", arms, columns).markdown}

![arms](reasongen_arms.png)

{differences_table(arms).markdown}

Rows: *shuffled rationale* is fine-tuned on rationales of other scenes of the same law, so the same tokens in the same numbers. *Another prompt's rationale* is the model
after GRPO, given the rationale that it wrote for another prompt of the same law. *GRPO without SFT* starts from the model without rationales, lets it sample text tokens, and
rewards the picture alone; in the other rows with rationales a captioner must also find the rationale in the picture. Besides the rewarded samples GRPO trains on true
pictures, with rationales where the model writes them; *without SFT* it does not. *Training combinations*: new prompts of combinations of objects and colours seen in
training; all other rows use held-out ones.

{parts_table(scores, f"{FULL}, temperature {COOL}").markdown}

## Entropy

GRPO with and without the adaptive entropy term on training prompts; each line is a seed. Above: the default settings. Below: the first seed without the KL term, without
training on true pictures, with three times the learning rate; the weight of the entropy is bounded by 0.1 in place of 0.005:

![entropy](reasongen_entropy.png)
"""
