"""Does reflection help?  Every arm from the shipped base, several seeds, by the inspector on test prompts.

    python scripts/study.py [--out runs/study] [--seeds 0 1 2 3 4]

It writes docs/study.md, whose numbers the README quotes, and docs/study_*.png.

Arms are trained by `train.py srrl` and differ in one thing each, named by their options. All have the same
optimiser steps and learn from the pictures of the last four iterations. K = 0 has the reward calls of SRRL,
84 an iteration, read off a run on validation prompts; "more" has its UNet evaluations.  CLAIM arms have all
seeds, the others the first three.  The study can be stopped at any time and goes on where it stopped; several
may run at once with different --seeds, on one core each.  `--seeds` without a number only writes the page.
"""

import json
import re
import time
from functools import partial
from pathlib import Path

import torch
from reports import arguments, cached, publish, train
from study_report import bars, by_success, cost_curves, study_page
from study_ways import KINDS, MORE_WAYS, WAYS, Way, measure

from minireflect import load_pipeline, rng
from minireflect.evaluate import EvaluationConfig
from minireflect.rl.rewards import inspector_reward, load_reward
from minireflect.run import read_metrics
from minireflect.world.prompts import prompt_set

QUICK = ["--evaluation.pictures", "8"]  # train.py's own table; the study samples its own
FEW = ["--rounds", "0", "--prompts-per-iteration"]
PPO = ["--objective", "ppo", "--group", "2", "--clip-range", "1e-3", "--ratio", "guard"]
ARMS = {  # options of train.py
    "SRRL": [],
    "K = 0, pairs": [*FEW, "42", "--group", "2"],
    "regression": ["--objective", "regress"],
    "K = 0, more pairs": [*FEW, "46", "--group", "2"],
    "SRRL, opposite pairs": ["--rounds", "1", "--redraw", "all", "--prompts-per-iteration", "42"],
    "SRRL, new noise": ["--wrong", "fresh"],
    "K = 0, single pictures": [*FEW, "84"],
    "regression, K = 0": ["--objective", "regress", *FEW, "84"],
    "PPO": [*PPO, "--rounds", "1", "--redraw", "all", "--prompts-per-iteration", "21"],
    "PPO, K = 0": [*PPO, *FEW, "21", "--group", "4"],
    "DDPO as published": ["--method", "ddpo"],
    "SRRL as published": ["--method", "paper"],
}
CLAIM = ("SRRL", "K = 0, pairs", "K = 0, more pairs")  # all seeds; the others have the first three
TRIED = 8  # pictures of each training prompt after training; the base samples four times as many


def training(folder: Path) -> dict:
    """What a finished run took."""
    end = read_metrics(folder, "srrl")[-1]
    minutes = float((folder / "table.md").read_text().split("\n\n")[1].split(" ")[0])
    return {k: end[k] for k in ("reward_calls", "unet_evaluations", "updates_total")} | {"minutes": minutes}


def add(results: Path, row: dict, folder: Path | None, ways: dict[str, Way], n: int) -> None:
    """Measure an arm in every way of sampling that `results` does not have yet; `row` names the arm, and
    `folder` is its run, None for the base.
    """
    known = {(r["arm"], r["way"], r["seed"]) for r in read_rows(results)}
    for name in [name for name in ways if (row["arm"], name, row["seed"]) not in known]:
        clock, pipe = time.time(), load_pipeline(folder)
        found = {**row, "way": name, **measure(pipe, load_reward(), ways[name], row["seed"], n)}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        shares = " ".join(f"{kind} {found[kind]['accuracy']:.3f}" for kind in KINDS)
        took = f"{time.time() - clock:.0f} s"
        print(f"{row['arm']} · {name} · seed {row['seed']}: {shares} ({took})", flush=True)


def read_rows(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@torch.no_grad()
def success(folder: Path | None, tries: int, seed: int) -> dict[str, float]:
    """The share of right pictures of each training prompt, ten steps each.  -> by prompt"""
    pipe, batch = load_pipeline(folder), EvaluationConfig().batch
    texts = [p.text for kind in KINDS for p in prompt_set(kind, "train")]
    right = torch.zeros(len(texts))
    for k in range(tries):
        for i in range(0, len(texts), batch):
            part = texts[i : i + batch]
            images = pipe.generate(part, 10, generator=rng(3_000 + seed, "success", k, i))
            right[i : i + batch] += inspector_reward(images, part)
    return dict(zip(texts, (right / tries).tolist()))


def main() -> None:
    args = arguments(__doc__, "runs/study", 256, "of each kind of prompt in every row", seeds=[0, 1, 2, 3, 4])
    results, few = args.out / "results.jsonl", [s for s in args.seeds if s < 3]
    for seed in few:
        add(results, {"arm": "base", "seed": seed}, None, WAYS | MORE_WAYS, args.pictures)
    for arm, options in ARMS.items():
        for seed in args.seeds if arm in CLAIM else few:
            folder = train("srrl", args.out / named(arm, seed), ["--seed", str(seed), *QUICK, *options])
            row = {"arm": arm, "seed": seed, "training": training(folder)}
            ways = WAYS if arm == "SRRL" else {"one picture": WAYS["one picture"]}
            add(results, row, folder, ways, args.pictures)
            if arm in CLAIM:
                cached(args.out / "success" / f"{folder.name}.json", partial(success, folder, TRIED, seed))
    before = cached(args.out / "success" / "base.json", partial(success, None, 4 * TRIED, 9))
    rows, order = read_rows(results), ["base", *ARMS]
    rows.sort(key=lambda r: (order.index(r["arm"]), r["seed"]))
    seeds = {arm: list(dict.fromkeys(r["seed"] for r in rows if r["arm"] == arm)) for arm in ARMS}
    runs = {arm: [args.out / named(arm, seed) for seed in found] for arm, found in seeds.items() if found}
    lines = {arm: " ".join(["python train.py", *ARMS[arm]]) for arm in ARMS}
    options = "\n".join(f"- **{arm}**: `{lines[arm]}`; seeds: {seeds[arm] or 'none yet'}" for arm in ARMS)
    after = {arm: [cached(args.out / "success" / f"{f.name}.json", dict) for f in runs[arm]] for arm in CLAIM}
    bins = by_success(before, after, args.docs / "study_success.png")
    bars(rows, args.docs / "study_arms.png")
    cost_curves({arm: runs[arm] for arm in CLAIM}, args.docs / "study_curves.png")
    publish(args.docs / "study.md", study_page(rows, runs, options, bins))


def named(arm: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"


if __name__ == "__main__":
    main()
