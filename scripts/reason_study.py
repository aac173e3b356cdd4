"""Study of ReasonGen-R1: do rationales help, and what does GRPO add?  The inspector measures all pictures.

    python scripts/reason_study.py [--out runs/reason] [--seeds 0 1 2]

It writes docs/reasongen_study.md and docs/reasongen_*.png.

All seeds share the shipped codebooks, the captioner that reads rationales, and the base.  The base is trained
to generate pictures from prompts and dense captions, and to write rationales, but not to generate a picture
from its own rationale.  For each seed it is then fine-tuned in three ways (with true rationales, with none,
and with those of other scenes), followed by GRPO.  Each seed has its own training, evaluation prompts and
noise; all rows of a seed share prompts.  The study can be stopped at any time, and continues when started
again.
"""

import argparse
from pathlib import Path

from reports import Arms, arguments, arms_figure, differences, means, once, over_seeds, page, train
from torch import Generator

from minireflect.checkpoints.ours import load_reasongen, save_reasongen
from minireflect.config import preset
from minireflect.evaluate import EvaluationConfig, Score, Table
from minireflect.evaluate_reason import another_of_its_kind, evaluate_reason, table_row
from minireflect.figures import BASE, REWARD, TRUTH, Line, Panel, curves
from minireflect.models.reasongen import Sampled, SamplingConfig
from minireflect.pipeline import ReasonPipeline
from minireflect.rl.rewards import reward_beside
from minireflect.run import read_metrics
from minireflect.world.prompts import understand

COLUMNS = {
    "overall": "GenEval mean", "accepted": "reward accepts", "fooled": "of these wrong",
    "planned": "rationale right", "kept": "picture keeps it",
}  # fmt: skip
SHOWN = {"overall": "GenEval mean", "physical": "physical laws", "unconventional": "against the laws"}
FULL = "SFT + GRPO"
COOL = 0.2  # a second temperature, at which improbable tokens are rarely sampled

RATIONALES = ("true", "none", "shuffled")
# examples that no prompt asks for, and bfloat16
BEYOND = ["--recombined", "0.5", "--related-captions", "0.4", "--bf16"]
START = ["--rationales", "none", "--dense", "0.5", "--text-only", "32", "--arrangements", "0.4", *BEYOND]
START += ["--pictures", "120000", "--steps", "12000"]
# the base is trained on other pictures a second time
AGAIN = ["--continued", "--seed", "1", "--pictures", "40000", "--steps", "3000", "--lr", "1e-3"]
TUNING = ["--continued", "--steps", "1000", "--batch", "48", "--pictures", "20000", "--lr", "5e-4", *BEYOND]
REINFORCING = ["--no-controls", "--bf16"]
FREED = ["--no-read-rationales", "--recall", "0"]  # recall would train on true rationales, as SFT does
STEADY = ["--entropy-bound", "0"]
# name: (the fine-tuned model that GRPO starts from, options)
REINFORCED = {
    "true": ("true", []), "none": ("none", []), "freed": ("freed", FREED), "steady": ("true", STEADY),
}  # fmt: skip
STRAIN = ["--iterations", "40", "--beta", "0", "--recall", "0", "--lr", "1e-3"]
STRONG = ["--entropy-bound", "0.1", "--entropy-lr", "4e-3"]
# first seed only: without KL and recall, and with a larger learning rate, to test adaptive entropy
STRAINED = {"strained": [*STRAIN, *STRONG], "strained-steady": [*STRAIN, *STEADY]}
ARMS = {  # name in the table: (run, how it is measured)
    "pictures only, before fine-tuning": ("sft-base", {}),
    "no rationale": ("sft-none", {}),
    "no rationale, best of 2": ("sft-none", {"best_of": 2}),
    "no rationale, best of 4": ("sft-none", {"best_of": 4}),
    "no rationale + GRPO (AR-GRPO)": ("grpo-none", {}),
    "GRPO without SFT": ("grpo-freed", {}),
    "shuffled rationale": ("sft-shuffled", {}),
    "rationale": ("sft-true", {}),
    "rationale, best of 2": ("sft-true", {"best_of": 2}),
    "rationale, best of 4": ("sft-true", {"best_of": 4}),
    FULL: ("grpo-true", {}),
    "SFT + GRPO, another prompt's rationale": ("grpo-true", {"swapped": True}),
    "SFT + GRPO without adaptive entropy": ("grpo-steady", {}),
    "SFT + GRPO, training combinations": ("grpo-true", {"split": "train"}),
}
COOLED = ("no rationale", "no rationale + GRPO (AR-GRPO)", "rationale", FULL)
for arm in (*COOLED, f"{FULL}, training combinations"):
    ARMS[f"{arm}, temperature {COOL}"] = ARMS[arm][0], ARMS[arm][1] | {"sampling": SamplingConfig(COOL)}


class Swapped(ReasonPipeline):
    """Samples each picture with the rationale of another prompt, if possible of the same law or task."""

    def sample(self, texts: list[str], sampling: SamplingConfig, generator: Generator) -> Sampled:
        rationales = super().sample(texts, sampling, generator).rationale
        rows = another_of_its_kind([understand(text) for text in texts])
        return super().sample(texts, sampling, generator, rationales[rows])


def freed(base: Path, folder: Path) -> Path:
    """The base, set to write a rationale before each picture; GRPO without SFT starts from it."""
    if not folder.exists():
        (folder / "weights").mkdir(parents=True)
        pipe = load_reasongen(base / "weights")._replace(writes_rationale=True)
        save_reasongen(folder / "weights", "reasongen", pipe)
    return folder


def measured(weights: Path, args: argparse.Namespace, seed: int, arm: str) -> Score:
    """The score of an arm, which is measured once and then read from a file."""
    options = dict(ARMS[arm][1])
    split, swapped = options.pop("split", "test"), options.pop("swapped", False)
    config = EvaluationConfig(args.pictures, split, 1_000 + seed)
    path = args.out / "rows" / f"{arm}-{seed}-{args.pictures}.json"

    def measure() -> dict:
        pipe = load_reasongen(weights)
        pipe = Swapped._make(pipe) if swapped else pipe
        return evaluate_reason(pipe, reward_beside(weights), config, arm, **options)

    return once(path, measure)


# -------------------------------------------------------------------------------- the page and its figures
def rows_of(scores: list[dict[str, Score]]) -> list[Arms]:
    return [{arm: table_row(score) for arm, score in seed.items()} for seed in scores]


def differences_table(arms: list[Arms]) -> Table:
    """FULL minus each other arm, both at the same temperature."""
    pairs = {}
    for arm in arms[0]:
        name, comma, temperature = arm.partition(", temperature")
        if name != FULL and "training" not in name:
            pairs[arm] = (FULL + comma + temperature, arm)
    keys = {"overall": "GenEval mean", "physical": "physical", "unconventional": "unconventional"}
    return differences(f"{FULL} minus", arms, pairs, keys)


def parts_table(scores: list[dict[str, Score]], arm: str) -> Table:
    """Shares of one arm for each task and law, as means over the seeds."""
    heads = ("right", "rationale right", "picture keeps it")
    parts = [seed[arm]["parts"] for seed in scores]
    cells = {part: zip(*(seed[part] for seed in parts)) for part in parts[0]}
    return Table(arm, {part: dict(zip(heads, map(over_seeds, values))) for part, values in cells.items()})


def entropy_figure(training: dict[str, list[list[dict]]], path: Path) -> None:
    """Entropy of text and image tokens, reward, and share of right pictures; a line for each seed.

    The second row of panels shows the runs of STRAINED.
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
            levels = [] if share else [("target", getattr(preset("cpu").grpo, key), TRUTH)]
            label = f"{words}, {'share' if share else 'nats per token'}"
            panels.append(Panel(title, "iteration", label, lines, levels, (0, 1 if share else None)))
    curves(path, *panels, columns=4)


def reason_page(path: Path, scores: list[dict[str, Score]], seeds: list[int], pictures: int) -> None:
    arms = rows_of(scores)
    table = means("arm", arms, {key: COLUMNS.get(key, key) for key in arms[0][FULL]})
    for arm, row in table.rows.items():
        row["tokens"] = f"{sum(seed[arm]['tokens'] for seed in arms) / len(arms):.0f}"
        if not any(seed[arm]["planned"] for seed in arms):  # the model writes no rationale
            row |= dict.fromkeys((COLUMNS["planned"], COLUMNS["kept"]), "")
    tables = {"arms": table, "differences": differences_table(arms)}
    tables["parts"] = parts_table(scores, f"{FULL}, temperature {COOL}")
    page("reasongen", path, seeds=", ".join(map(str, seeds)), pictures=pictures, **tables)


def main() -> None:
    args = arguments(__doc__, "runs/reason", 360, "prompts of each kind in every row")
    arms, training = [], {}
    captioner = train("captioner", args.out / "captioner", [])
    base = train("reason-sft", args.out / "base", [*START, "--weights", str(captioner)])
    base = train("reason-sft", args.out / "base-2", [*START, *AGAIN, "--weights", str(base)])
    for seed in args.seeds:
        common = ["--seed", str(seed), "--evaluation.pictures", "24"]  # the study measures on its own
        runs = {"sft-base": base, "sft-freed": freed(base, args.out / "freed")}
        for kind in RATIONALES:
            words = [*common, *TUNING, "--weights", str(base), "--rationales", kind]
            runs[f"sft-{kind}"] = train("reason-sft", args.out / f"sft-{kind}-{seed}", words)
        reinforced = REINFORCED | {n: ("true", o) for n, o in STRAINED.items() if seed == args.seeds[0]}
        for name, (start, options) in reinforced.items():
            words = [*common, *REINFORCING, *options, "--weights", str(runs[f"sft-{start}"])]
            runs[f"grpo-{name}"] = train("reason-grpo", args.out / f"grpo-{name}-{seed}", words)
            if start == "true":
                training.setdefault(name, []).append(read_metrics(runs[f"grpo-{name}"], "reason-grpo"))
        arms.append({arm: measured(runs[run] / "weights", args, seed, arm) for arm, (run, _) in ARMS.items()})
    arms_figure(rows_of(arms), SHOWN, args.docs / "reasongen_arms.png")
    entropy_figure(training, args.docs / "reasongen_entropy.png")
    reason_page(args.docs / "reasongen_study.md", arms, args.seeds, args.pictures)


if __name__ == "__main__":
    main()
