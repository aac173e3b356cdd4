"""Does reflection help?  Every arm from the shipped base, several seeds, the exact checker, and beside each figure its cost.

    python scripts/study.py [--out runs/study] [--seeds 0 1 2]        writes docs/study.md and docs/study_*.png

Arms are trained by `train.py`, one after the other, and drawn from in several ways. It can be stopped at any time and goes
on where it stopped: a run that is finished is not trained again, and a row that is measured is not drawn again.
K = 0 differs from SRRL in nothing but reflection: the reward calls that SRRL spends on drawing refused pictures again
go to new prompts.  How many that is, 84 an iteration in place of 64, was read off a run of SRRL.
With few prompts it is the same to blind SRRL: as many pictures to learn from, as often, and no reflection.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from study_report import bars, curves, hacking, page
from study_ways import KINDS, MORE_WAYS, WAYS, Way, measure

from minireflect import load_pipeline
from minireflect.checkpoints.ours import PARTS, SHIPPED
from minireflect.pipeline import LatentDiffusion
from minireflect.rl.rewards import Reward, load_reward
from minireflect.run import read_metrics, write_text

ROOT = Path(__file__).parent.parent
QUICK = ["--evaluation.pictures", "8"]  # train.py's own table; the study draws its own
COMPARED = {  # options of train.py
    "SRRL": [],
    "K = 0": [*QUICK, "--rounds", "0", "--prompts-per-iteration", "84"],
    "DDPO": [*QUICK, "--rounds", "0", "--prompts-per-iteration", "21", "--group", "4",
             "--objective", "ppo", "--lr", "3e-5", "--updates", "2"],
    "SRRL, blind": [*QUICK, "--mode", "blind", "--rounds", "1", "--prompts-per-iteration", "32",
                    "--w-renoise", "0.1", "--renoise-steps", "20", "--fresh-noise", "0"],
    "K = 0, few prompts": [*QUICK, "--rounds", "0", "--prompts-per-iteration", "32"],
}  # fmt: skip
# A reward that never saw a spoilt picture, and what RL makes of it, long: one seed each.
JUDGE = ["reward", "--no-spoilt", "--steps", "800"]
LONG, FAST = (["--iterations", "120"], ["--iterations", "160", "--lr", "5e-4", "--cooldown", "0"])
CLEAN = "reward from clean renders"
HACKED = {
    f"{CLEAN}, fast": [*QUICK, *FAST, "--anchor-below", "0"],
    f"{CLEAN}, fast, anchored": [*QUICK, *FAST],
    CLEAN: [*QUICK, *LONG, "--anchor-below", "0"],
    f"{CLEAN}, anchored": [*QUICK, *LONG],
}
SHOWN = [f"{CLEAN}, fast", f"{CLEAN}, fast, anchored", "SRRL"]  # in the figure


def train(folder: Path, words: list[str]) -> None:
    """Run train.py, or go on with it where it was stopped."""
    started = (folder / "config.json").exists()
    command = [sys.executable, str(ROOT / "train.py")]
    more = ["--resume"] if started else [*words, "--preset", "cpu"]
    subprocess.run([*command, *more, "--out", str(folder)], check=True)


def train_arm(folder: Path, seed: int, options: list[str]) -> None:
    """An arm, unless it is finished."""
    if not any(r["model"] == "SRRL" for r in read_metrics(folder, "evaluation")):
        train(folder, ["--seed", str(seed), *options])


def clean_judge(folder: Path) -> Path:
    """The shipped weights with a reward that was trained on clean renders only."""
    weights = folder / "weights"
    if not (weights / "reward.safetensors").exists():
        train(folder, JUDGE)
    for part in PARTS:
        shutil.copyfile(SHIPPED / f"{part}.safetensors", weights / f"{part}.safetensors")
    return folder


def training(folder: Path) -> dict:
    """What a finished run took."""
    end = read_metrics(folder, "srrl")[-1]
    minutes = float((folder / "table.md").read_text().split("\n\n")[1].split(" ")[0])
    return {k: end[k] for k in ("reward_calls", "unet_evaluations")} | {"minutes": minutes}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=256, help="of each kind of prompt in every row")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(r["arm"], r["way"], r["seed"]) for r in rows}

    def add(
        arm: str, pipe: LatentDiffusion, judge: Reward, ways: dict[str, Way], seed: int, more: dict
    ) -> None:
        for name, way in ways.items():
            if (arm, name, seed) in known:
                continue
            clock = time.time()
            row = {
                "arm": arm,
                "way": name,
                "seed": seed,
                **more,
                **measure(pipe, judge, way, seed, args.pictures),
            }
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            found = " ".join(f"{kind} {row[kind]['accuracy']:.3f}" for kind in KINDS)
            print(f"{arm} · {name} · seed {seed}: {found} ({time.time() - clock:.0f} s)", flush=True)

    runs: dict[str, list[Path]] = {}
    judge = ["--weights", str(clean_judge(args.out / "judge-of-clean-pictures"))]
    clean = {arm: [*options, *judge] for arm, options in HACKED.items()}
    for arms, seeds in ((COMPARED, args.seeds), (clean, args.seeds[:1])):
        for arm, options in arms.items():
            for seed in seeds:
                folder = args.out / f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"
                train_arm(folder, seed, options)
                runs[arm] = [*runs.get(arm, []), folder]
                own = load_reward(folder)  # the reward that it was trained with
                add(arm, load_pipeline(folder), own, WAYS, seed, {"training": training(folder)})
    for seed in args.seeds:
        add("base", load_pipeline(), load_reward(), WAYS | MORE_WAYS, seed, {})
    rows.sort(key=lambda r: ["base", *runs].index(r["arm"]))
    compared = {arm: runs[arm] for arm in COMPARED}
    options, hacks = (
        "\n".join(f"- **{arm}**: `{' '.join(['python train.py', *o])}`" for arm, o in arms.items())
        for arms in (COMPARED, HACKED)
    )
    judge = " ".join(["python train.py", *JUDGE])
    write_text(args.docs / "study.md", page(rows, compared, options, hacks, judge))
    bars(rows, args.docs / "study_arms.png")
    curves(compared, args.docs / "study_curves.png")
    hacking({arm: runs[arm] for arm in SHOWN}, args.docs / "study_hacking.png")
    shutil.copyfile(runs[SHOWN[0]][0] / "figures" / "before_and_after.png", args.docs / "study_hacked.png")
    print(args.docs / "study.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
