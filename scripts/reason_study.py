"""Do the words help, and what does reinforcing them do?  ReasonGen-R1 and its controls, read by the inspector.

    python scripts/reason_study.py [--out runs/reason] [--seeds 0 1 2]          writes docs/reasongen.md and docs/reasongen_*.png

A codebook is trained, and one model learns to draw in its words, from prompts and from dense captions, then goes on with other pictures and learns
what a rationale is, but never to draw from its own: the base.  From it three ways of fine-tuning (true rationales, none, another scene's), then GRPO on them.
Every seed has its own pictures, training, prompts and noise, these two aside; all rows of a seed share prompts.  It can be stopped at any time and goes on where it stopped.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from reason_report import arms_figure, entropy_figure, page
from rig_study import cached, train

from minireflect.config import preset
from minireflect.evaluate_reason import ReasonScore, evaluate_painter
from minireflect.models.reasongen import SamplingConfig
from minireflect.reason_stages import judge_of, load_painter
from minireflect.run import read_metrics, write_text

ROOT = Path(__file__).parent.parent
THOUGHTS = ("true", "none", "shuffled")
DRAWING = ["--sft.rationales", "none", "--sft.dense", "0.5", "--sft.bf16"]
LEGS = {  # each goes on from the one before, with pictures of its own
    "base-1": DRAWING,
    "base-2": [*DRAWING, "--sft.continued", "--seed", "1", "--sft.steps", "5000", "--sft.lr", "1.5e-3", "--sft.told", "64"],
    "base-3": [*DRAWING, "--sft.continued", "--seed", "2", "--sft.steps", "6000", "--sft.lr", "1e-3", "--sft.told", "32", "--sft.arrangements", "0.45"],
}  # fmt: skip
COOL = SamplingConfig(temperature=0.4)
TUNING = ["--sft.continued", "--sft.steps", "1000", "--sft.batch", "48", "--sft.pictures", "20000", "--sft.lr", "5e-4", "--sft.bf16"]  # fmt: skip
REINFORCED = {  # name: (which fine-tuning it starts from, options)
    "true": ("true", []),
    "none": ("none", []),
    "freed": ("base", ["--grpo.freed", "--grpo.no-controls"]),
    "steady": ("true", ["--grpo.no-adaptive", "--grpo.no-controls"]),
}
ARMS = {  # name in the table: (kind of run, its row)
    "drawing only, before fine-tuning": ("base", "SFT"),
    "no rationale": ("sft-none", "SFT"),
    "no rationale, best of 2": ("grpo-none", "SFT, best of 2"),
    "no rationale, best of 4": ("grpo-none", "SFT, best of 4"),
    "no rationale + GRPO (AR-GRPO)": ("grpo-none", "SFT + GRPO"),
    "no rationale + GRPO at temperature 0.4": ("cool-none", "SFT"),
    "GRPO without SFT": ("grpo-freed", "SFT + GRPO"),
    "shuffled rationale": ("sft-shuffled", "SFT"),
    "rationale": ("sft-true", "SFT"),
    "rationale, best of 2": ("grpo-true", "SFT, best of 2"),
    "rationale, best of 4": ("grpo-true", "SFT, best of 4"),
    "SFT + GRPO": ("grpo-true", "SFT + GRPO"),
    "SFT + GRPO at temperature 0.4": ("cool-true", "SFT"),
    "SFT + GRPO, another prompt's rationale": ("swapped", "SFT"),
    "SFT + GRPO without adaptive entropy": ("grpo-steady", "SFT + GRPO"),
}


def scores(folder: Path) -> dict[str, ReasonScore]:
    """Every row that a run has measured."""
    return {row["model"]: ReasonScore(**row["score"]) for row in read_metrics(folder, "evaluation")}


def measured(
    weights: Path, args: argparse.Namespace, seed: int, name: str, **changes: object
) -> dict[str, ReasonScore]:
    """A row that no run measures itself, with changes to how it is measured.  Measured once."""
    name = f"{name}-{seed}"
    config = replace(preset("cpu").reasoning, pictures=args.pictures, seed=1_000 + seed, **changes)
    path = args.out / f"{name}.json"
    score = cached(
        path, lambda: vars(evaluate_painter(load_painter(weights), judge_of(weights), config, name))
    )
    return {"SFT": ReasonScore(**score)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reason"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=120, help="held-out prompts of each kind")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True), args.docs.mkdir(parents=True, exist_ok=True)
    arms, training = [], {"true": [], "steady": []}
    base = train("vq", args.out / "vq", [])
    for name, words in LEGS.items():
        base = train("reason-sft", args.out / name, [*words, "--weights", str(base)])
    for seed in args.seeds:
        common = ["--seed", str(seed), "--reasoning.seed", str(1_000 + seed)]
        common += ["--reasoning.pictures", str(args.pictures)]
        runs = {"sft-base": base}
        for kind in THOUGHTS:
            words = [*common, *TUNING, "--weights", str(base), "--sft.rationales", kind]
            runs[f"sft-{kind}"] = train("reason-sft", args.out / f"sft-{kind}-{seed}", words)
        for name, (start, options) in REINFORCED.items():
            words = [*common, *options, "--weights", str(runs[f"sft-{start}"])]
            runs[f"grpo-{name}"] = train("reason-grpo", args.out / f"grpo-{name}-{seed}", words)
        found = {kind: scores(folder) for kind, folder in runs.items()}
        weights = {name: folder / "weights" for name, folder in runs.items()}
        found["base"] = measured(weights["sft-base"], args, seed, "base")
        found["swapped"] = measured(weights["grpo-true"], args, seed, "swapped", swapped=True)
        for name in ("none", "true"):
            found[f"cool-{name}"] = measured(weights[f"grpo-{name}"], args, seed, f"cool-{name}", sampling=COOL)  # fmt: skip
        arms.append({arm: found[kind][row] for arm, (kind, row) in ARMS.items()})
        for name, rows in training.items():
            rows.append(read_metrics(runs[f"grpo-{name}"], "reason-grpo"))
    targets = {"text": preset("cpu").grpo.text.target, "image": preset("cpu").grpo.image.target}
    arms_figure(arms, args.docs / "reasongen_arms.png")
    entropy_figure(training, targets, args.docs / "reasongen_entropy.png")
    write_text(args.docs / "reasongen.md", page(arms, args.seeds, args.pictures))
    print(args.docs / "reasongen.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
