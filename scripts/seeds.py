"""One table over several runs of `train.py srrl` that differ in their seed: mean and 95 % interval (Student's
t).

    python scripts/seeds.py runs/srrl-1 runs/srrl-2 runs/srrl-3

For runs on the laws, and for runs with --base.
"""

import sys
from pathlib import Path

from reports import described, differences, means

from minireflect.evaluate import Table
from minireflect.run import flat, read_metrics


def measured(folder: Path) -> dict[str, dict[str, float]]:
    """What a run has measured before and after training, with flat names.  Raises ValueError if it is not
    finished.
    """
    rows = read_metrics(folder, "evaluation")
    if len(rows) < 2 or not read_metrics(folder, "srrl"):
        raise ValueError(f"{folder} holds no finished run of srrl")
    before, after = rows[0], rows[-1]  # base, and what it was trained to
    found = {}
    for name, row in (("before", before), ("after", after)):
        values = {key: v for key, v in flat(row.get("scores", row)).items() if isinstance(v, float)}
        found[name] = {key.replace(".by_law.", ", ").replace(".", ": "): v for key, v in values.items()}
    return found


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, two or more")
    folders = parser.parse_args().runs
    if len(folders) < 2:
        parser.error("a spread needs two runs or more")
    try:
        seeds = [measured(folder) for folder in folders]
    except ValueError as error:
        parser.error(str(error))
    names = {key: key for key in seeds[0]["before"]}
    columns = means("", seeds, names).rows
    ahead = differences("", seeds, {"difference": ("after", "before")}, names).rows
    rows = {n: {c: row[n] for c, row in {**columns, **ahead}.items()} for n in names}
    print(Table(f"{len(folders)} seeds", rows).markdown)
    ends = [read_metrics(folder, "srrl")[-1] for folder in folders]
    for key in ("updates_total", "reward_calls", "unet_evaluations"):
        print(f"{key.replace('_', ' ')}: " + ", ".join(f"{row[key]:,}" for row in ends))
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        code = 0
    sys.exit(code)
