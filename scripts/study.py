"""Does reflection help?  Every arm from the shipped base, several seeds, by the inspector, and beside each
figure its cost.

    python scripts/study.py [--out runs/study] [--seeds 0 1 2]

It writes docs/study.md and docs/study_*.png.

Arms are trained by `train.py`, one after the other, and drawn from in several ways. It can be stopped at any
time and goes on where it stopped: a run that is finished is not trained again, and a row that is measured is
not drawn again. K = 0 differs from SRRL in nothing but reflection: the reward calls that SRRL spends on
drawing refused pictures again go to new prompts.  How many that is, 84 an iteration in place of 64, was read
off a run of SRRL. With few prompts it is the same to blind SRRL: as many pictures to learn from, as often,
and no reflection.
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path

from reports import arguments, train
from study_report import bars, cost_curves, hacking, study_page
from study_ways import KINDS, MORE_WAYS, WAYS, Way, measure

from minireflect import load_pipeline
from minireflect.checkpoints.ours import PARTS, SHIPPED
from minireflect.pipeline import LatentDiffusion
from minireflect.rl.rewards import Reward, load_reward
from minireflect.run import read_metrics, write_text

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
# A reward trained on clean renders only, and what RL makes of it in long runs: one seed each.
JUDGE = ["--no-corrupted", "--steps", "800"]
LONG, FAST = (["--iterations", "120"], ["--iterations", "160", "--lr", "5e-4", "--cooldown", "0"])
CLEAN = "reward from clean renders"
HACKED = {
    f"{CLEAN}, fast": [*QUICK, *FAST, "--anchor-below", "0"],
    f"{CLEAN}, fast, anchored": [*QUICK, *FAST],
    CLEAN: [*QUICK, *LONG, "--anchor-below", "0"],
    f"{CLEAN}, anchored": [*QUICK, *LONG],
}
SHOWN = [f"{CLEAN}, fast", f"{CLEAN}, fast, anchored", "SRRL"]  # in the figure


def clean_judge(folder: Path) -> Path:
    """The shipped weights with a reward that was trained on clean renders only."""
    weights = folder / "weights"
    if not (weights / "reward.safetensors").exists():
        train("reward", folder, JUDGE)
    for part in PARTS:
        shutil.copyfile(SHIPPED / f"{part}.safetensors", weights / f"{part}.safetensors")
    return folder


def training(folder: Path) -> dict:
    """What a finished run took."""
    end = read_metrics(folder, "srrl")[-1]
    minutes = float((folder / "table.md").read_text().split("\n\n")[1].split(" ")[0])
    return {k: end[k] for k in ("reward_calls", "unet_evaluations")} | {"minutes": minutes}


def add(
    results: Path,
    arm: str,
    models: tuple[LatentDiffusion, Reward],
    ways: dict[str, Way],
    row: dict,
    pictures: int,
) -> None:
    """Measure an arm in every way of sampling that `results` does not have yet; `row` is what every line of
    it says.
    """
    known = {(r["arm"], r["way"], r["seed"]) for r in read_rows(results)}
    for name, way in ways.items():
        if (arm, name, row["seed"]) in known:
            continue
        clock = time.time()
        found = {"arm": arm, "way": name, **row, **measure(*models, way, row["seed"], pictures)}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        shares = " ".join(f"{kind} {found[kind]['accuracy']:.3f}" for kind in KINDS)
        print(f"{arm} · {name} · seed {row['seed']}: {shares} ({time.time() - clock:.0f} s)", flush=True)


def read_rows(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main() -> int:
    args = arguments(__doc__, "runs/study", 256, "of each kind of prompt in every row")
    results = args.out / "results.jsonl"
    runs: dict[str, list[Path]] = {}
    judge = ["--weights", str(clean_judge(args.out / "judge-of-clean-pictures"))]
    clean = {arm: [*options, *judge] for arm, options in HACKED.items()}
    for arms, seeds in ((COMPARED, args.seeds), (clean, args.seeds[:1])):
        for arm, options in arms.items():
            for seed in seeds:
                folder = args.out / f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"
                train("srrl", folder, ["--seed", str(seed), *options])
                runs[arm] = [*runs.get(arm, []), folder]
                models = load_pipeline(folder), load_reward(folder)  # the reward that it was trained with
                add(results, arm, models, WAYS, {"seed": seed, "training": training(folder)}, args.pictures)
    for seed in args.seeds:
        models = load_pipeline(), load_reward()
        add(results, "base", models, WAYS | MORE_WAYS, {"seed": seed}, args.pictures)
    rows = read_rows(results)
    rows.sort(key=lambda r: ["base", *runs].index(r["arm"]))
    compared = {arm: runs[arm] for arm in COMPARED}
    options, hacks = (
        "\n".join(f"- **{arm}**: `{' '.join(['python train.py srrl', *o])}`" for arm, o in arms.items())
        for arms in (COMPARED, HACKED)
    )
    judge = " ".join(["python train.py reward", *JUDGE])
    write_text(args.docs / "study.md", study_page(rows, compared, options, hacks, judge))
    bars(rows, args.docs / "study_arms.png")
    cost_curves(compared, args.docs / "study_curves.png")
    hacking({arm: runs[arm] for arm in SHOWN}, args.docs / "study_hacking.png")
    shutil.copyfile(runs[SHOWN[0]][0] / "figures" / "before_and_after.png", args.docs / "study_hacked.png")
    print(args.docs / "study.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
