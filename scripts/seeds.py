"""Compare runs of `train.py srrl` that differ in seed or method: a table of means and 95 % intervals.

    python scripts/seeds.py runs/srrl-1 runs/srrl-2 runs/srrl-3
    python scripts/seeds.py runs/grpo-1 runs/ddpo-1 runs/srrl-1 --figure methods.png

It reads runs on the laws, and runs with --base.  The columns are the base, each method, and the difference of
each method to the base.  Intervals are Student's t over the runs.
"""

import sys
from pathlib import Path

from reports import Arms, described, differences, means

from minireflect import figures
from minireflect.evaluate import Table
from minireflect.run import flat, read_metrics

COLORS = (figures.TRUTH, figures.REWARD, figures.OTHER, figures.WRONG)


def measured(folder: Path) -> Arms:
    """The measures of a run's base and of its trained model, {model: {measure: value}}.

    Raises ValueError if the run is not finished.
    """
    rows = read_metrics(folder, "evaluation")
    if len(rows) < 2 or not read_metrics(folder, "srrl"):
        raise ValueError(f"{folder} holds no finished run of srrl")
    found = {}
    for row in (rows[0], rows[-1]):
        values = {k: v for k, v in flat(row.get("scores") or row["score"]).items() if isinstance(v, float)}
        found[row["model"]] = {k.replace(".by_law.", ", ").replace(".", ": "): values[k] for k in values}
    return found


def table(runs: list[Arms]) -> Table:
    """A row for each measure.  Raises ValueError if the runs have different measures."""
    names = {key: key for key in runs[0]["base"]}
    if any(values.keys() != names.keys() for arms in runs for values in arms.values()):
        raise ValueError("the runs have different measures: compare runs that differ in seed or method only")
    methods = list(dict.fromkeys(arm for arms in runs for arm in arms if arm != "base"))
    ahead = {f"{method} - base": (method, "base") for method in methods}
    columns = differences("", runs, ahead, names).rows
    for arm in (*reversed(methods), "base"):
        columns = means("", [{arm: arms[arm]} for arms in runs if arm in arms], names).rows | columns
    return Table(f"{len(runs)} runs", {n: {c: row[n] for c, row in columns.items()} for n in names})


def figure(folders: list[Path], methods: list[str], path: Path) -> None:
    """A figure of the training reward of each run, in the colour of its method."""
    panel, colors, lines = figures.UNREAD, dict(zip(dict.fromkeys(methods), COLORS)), []
    for folder, method in zip(folders, methods):
        line = figures.Line(f"{method}, {folder.name}", "reward_calls", "reward", colors[method], span=5)
        lines += figures.of_run(panel._replace(lines=[line]), read_metrics(folder, "srrl")).lines
    figures.curves(path, panel._replace(lines=lines))


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, two or more")
    parser.add_argument("--figure", type=Path, help="write a figure of the rewards during training")
    args = parser.parse_args()
    if len(args.runs) < 2:
        parser.error("a comparison needs two runs or more")
    try:
        runs = [measured(folder) for folder in args.runs]
        print(table(runs).markdown)
    except ValueError as error:
        parser.error(str(error))
    ends = [read_metrics(folder, "srrl")[-1] for folder in args.runs]
    for key in ("updates_total", "reward_calls", "unet_evaluations"):
        print(f"{key.replace('_', ' ')}: " + ", ".join(f"{row[key]:,}" for row in ends))
    if args.figure:
        figure(args.runs, [list(arms)[-1] for arms in runs], args.figure)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
