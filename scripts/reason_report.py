"""The page and the figures of reason_study.py."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from minireflect.evaluate import over_seeds
from minireflect.evaluate_reason import ReasonScore
from minireflect.figures import BASE, REWARD, TRUTH, save, smooth

COLUMNS = {
    "physical": "physical",
    "unconventional": "unconventional",
    "accepted": "reward accepts",
    "fooled": "of these wrong",
    "unreadable": "unreadable",
    "planned": "rationale right",
    "kept": "picture keeps it",
}
FULL = "SFT + GRPO"
COOL = 0.2  # a second temperature, at which fewer tokens are drawn that the model itself thinks unlikely


def values(score: ReasonScore) -> dict[str, float]:
    """Everything that a row shows."""
    return {**score.geneval, **{key: getattr(score, key) for key in COLUMNS}}


def spread(arms: list[dict[str, ReasonScore]], arm: str, key: str) -> str:
    found = [values(rows[arm])[key] for rows in arms]
    return "" if key in ("planned", "kept") and not any(found) else over_seeds(found)  # no rationale


def difference(arms: list[dict[str, ReasonScore]], arm: str, other: str, key: str) -> str:
    return over_seeds([values(rows[arm])[key] - values(rows[other])[key] for rows in arms])


def arms_table(arms: list[dict[str, ReasonScore]]) -> str:
    tasks = list(arms[0][FULL].geneval)
    heads = [*tasks[:-1], "**GenEval mean**", *COLUMNS.values(), "tokens"]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for arm in arms[0]:
        cells = [spread(arms, arm, key) for key in [*tasks, *COLUMNS]]
        tokens = f"{np.mean([rows[arm].tokens for rows in arms]):.0f}"
        lines.append(f"| {arm} | " + " | ".join([*cells, tokens]) + " |")
    return "\n".join(lines)


def differences_table(arms: list[dict[str, ReasonScore]]) -> str:
    """Each row beside the whole at its own temperature."""
    keys = ("overall", "physical", "unconventional")
    lines = [f"| {FULL} minus | GenEval mean | physical | unconventional |", "|---|---|---|---|"]
    for arm in arms[0]:
        name, comma, temperature = arm.partition(", temperature")
        if name != FULL and "training" not in name:
            whole = FULL + comma + temperature
            lines.append(f"| {arm} | " + " | ".join(difference(arms, whole, arm, key) for key in keys) + " |")
    return "\n".join(lines)


def parts_table(arms: list[dict[str, ReasonScore]], arm: str) -> str:
    """Where a row is right, and where it is not: task by task and law by law, means over the seeds."""
    lines = [f"| {arm} | right | rationale right | picture keeps it |", "|---|---|---|---|"]
    for name in arms[0][arm].parts:
        cells = [over_seeds(values) for values in zip(*(rows[arm].parts[name] for rows in arms))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arms_figure(arms: list[dict[str, ReasonScore]], path: Path) -> None:
    """Every arm a row, every seed a point, their mean a line."""
    keys = {"overall": "GenEval mean", "physical": "physical laws", "unconventional": "against the laws"}
    figure, panels = plt.subplots(1, 3, figsize=(11, 0.32 * len(arms[0]) + 1.4), sharey=True)
    y = np.arange(len(arms[0]))
    for axes, (key, title), color in zip(panels, keys.items(), (REWARD, TRUTH, BASE)):
        for i, arm in enumerate(arms[0]):
            points = [values(rows[arm])[key] for rows in arms]
            axes.barh(i, np.mean(points), 0.7, color=color, alpha=0.35)
            axes.plot(points, [i] * len(points), "o", color=color, ms=4)
        axes.set_title(f"{title}, by the inspector", fontsize=10)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(y, list(arms[0]), fontsize=8)
    panels[0].invert_yaxis()
    save(figure, path)


def entropy_figure(training: dict[str, list[list[dict]]], targets: dict[str, float], path: Path) -> None:
    """Entropy per modality, and what the judge and the inspector say meanwhile; every seed a line.  Below, the same under strain."""
    figure, rows = plt.subplots(2, 4, figsize=(15, 6.6))
    pairs = (("true", "steady"), ("strained", "strained-steady"))
    for panels, (adaptive, steady) in zip(rows, pairs):
        for name, label, color in ((adaptive, "adaptive", REWARD), (steady, "without", BASE)):
            for number, steps in enumerate(training[name]):
                learnt = [r for r in steps if "text_entropy" in r]
                keys = {"text_entropy": learnt, "image_entropy": learnt, "reward": steps, "right": steps}
                for axes, (key, shown) in zip(panels, keys.items()):
                    x, y = [r["step"] for r in shown], [r[key] for r in shown]
                    axes.plot(x, smooth(y, 6), color=color, lw=1, label=label if number == 0 else None)
        for axes, key in zip(panels, ("text", "image")):
            axes.axhline(targets[key], color=TRUTH, ls=":", lw=1, label="target")
            axes.set(title=f"entropy of {key} tokens, nats", ylim=(0, None))
        panels[2].set(title="rewarded, by reward and captioner", ylim=(0, 1))
        panels[3].set(title="right, by the inspector", ylim=(0, 1))
        for axes in panels:
            axes.set_xlabel("iteration")
            axes.legend(fontsize=7)
    rows[1][0].set_ylabel("no KL, nothing recalled, lr 1e-3, one seed")
    figure.tight_layout()
    save(figure, path)


def page(arms: list[dict[str, ReasonScore]], seeds: list[int], pictures: int) -> str:
    return f"""# Study of ReasonGen-R1: do rationales help, and what does GRPO add?

Made by `python scripts/reason_study.py`: seeds {", ".join(map(str, seeds))}, {pictures} prompts each of arrangements (GenEval's six tasks in turn), physical
laws and unconventional outcomes, measured by the inspector. Every seed has its own training, prompts and noise; means over the seeds with 95 % intervals (Student's t).
*Rationale right*: the rationale, parsed, states what the prompt asks for. *Picture keeps it*: of the rationales that parse, the share whose statement the
inspector finds in the picture. *Tokens*: sampled per prompt. *Reward accepts*: reward of at least 0.5. Temperature 0.8 unless a row says otherwise.
*Best of N*: the picture with the highest reward. [What it means](reasongen.md#results).

{arms_table(arms)}

![arms](reasongen_arms.png)

{differences_table(arms)}

Rows: *shuffled rationale* is fine-tuned on rationales of other scenes of the same law, so the same tokens in the same numbers. *Another prompt's rationale* is the model
after GRPO, given the rationale that it wrote for another prompt of the same law. *GRPO without SFT* starts from the model without rationales, lets it sample text tokens, and
rewards the picture alone; in the other rows with rationales a captioner must also find the rationale in the picture. Besides the rewarded samples GRPO trains on true
pictures, with rationales where the model writes them; *without SFT* it does not. *Training combinations*: new prompts of combinations of objects and colours seen in
training; all other rows use held-out ones.

{parts_table(arms, f"{FULL}, temperature {COOL}")}

## Entropy

GRPO with and without the adaptive entropy term on training prompts; each line is a seed. Above: the default settings. Below: the first seed without the KL term, without
training on true pictures, with three times the learning rate; the weight of the entropy is bounded by 0.1 in place of 0.005:

![entropy](reasongen_entropy.png)
"""
