"""One table over several runs of `train.py srrl` that differ in their seed: mean and 95 % interval (Student's t).

python scripts/seeds.py runs/srrl-1 runs/srrl-2 runs/srrl-3
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from minireflect.evaluate import over_seeds
from minireflect.run import read_metrics


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    folders = parser.parse_args().runs
    if len(folders) < 2:
        parser.error("a spread needs two runs or more")
    before, after, last = [], [], []
    for folder in folders:
        scores = {row["model"]: row["scores"] for row in read_metrics(folder, "evaluation")}
        if "SRRL" not in scores:
            parser.error(f"{folder} holds no finished run of srrl")
        before.append(scores["base"]), after.append(scores["SRRL"])
        last.append(read_metrics(folder, "srrl")[-1])
    print(f"| {len(folders)} seeds | base | after SRRL | difference |\n|---|---|---|---|")
    for kind in before[0]:
        for key in ("accuracy", "reward", "unreadable", "diversity"):
            a, b = ([s[kind][key] for s in scores] for scores in (before, after))
            row = [over_seeds(a), over_seeds(b), over_seeds([y - x for x, y in zip(a, b)])]
            print(f"| {kind}: {key} | " + " | ".join(row) + " |")
        for law in before[0][kind]["by_law"]:
            a, b = ([s[kind]["by_law"][law] for s in scores] for scores in (before, after))
            print(f"| {kind}, {law} | {np.mean(a):.2f} | {np.mean(b):.2f} | {np.mean(b) - np.mean(a):+.2f} |")
    for key in ("updates_total", "reward_calls", "unet_evaluations"):
        print(f"{key.replace('_', ' ')}: " + ", ".join(f"{row[key]:,}" for row in last))
    return 0


if __name__ == "__main__":
    sys.exit(main())
