"""What the studies share: arguments, commands that are run once, and tables and figures of arms over seeds.

An arm is a row of a study. Arms of one seed are a dictionary {arm: {measure: value}}, several seeds a list of
these.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from minireflect import figures
from minireflect.disk import write_text
from minireflect.evaluate import Table

ROOT = Path(__file__).parent.parent
Arms = dict[str, dict[str, float]]


def described(about: str) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def arguments(
    about: str, out: str, pictures: int, of: str, seeds: Sequence[int] = (0, 1, 2)
) -> argparse.Namespace:
    """The options of a study; makes its folders.  `about` is shown by --help."""
    parser, where = described(about), "folder of the runs (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=Path(out), help=where)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page and its figures")
    parser.add_argument("--seeds", type=int, nargs="*", default=seeds, help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=pictures, help=f"{of} (default: %(default)s)")
    args = parser.parse_args()
    for folder in (args.out, args.docs):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def train(command: str, folder: Path, options: list[str]) -> Path:
    """Run a command of train.py with the preset cpu, go on with it where it was stopped, or leave it if it is
    finished.
    """
    if not (folder / "state" / f"{command}.done").exists():
        started = (folder / "config.json").exists()
        more = ["--resume"] if started else [*options, "--preset", "cpu"]
        words = [str(ROOT / "train.py"), command, *more, "--out", str(folder)]
        subprocess.run([sys.executable, *words], check=True)
    return folder


def once(path: Path, make: Callable[[], dict]) -> dict:
    """A JSON file, made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def page(name: str, path: Path, **values: object) -> None:
    """Write the page of a study: scripts/pages/NAME.md with its {places} filled, tables as Markdown."""
    text = {key: v.markdown if isinstance(v, Table) else v for key, v in values.items()}
    write_text(path, (ROOT / "scripts" / "pages" / f"{name}.md").read_text().format(**text))
    print(path)


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval (Student's t) of the mean over seeds; 0 for one seed, which has none."""
    n = len(values)
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5) if n > 1 else 0.0


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± half of the 95 % interval of what several seeds gave."""
    half = f" ± {half_interval(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{half}"


def with_ends(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds and both ends of its 95 % interval, cut off at 0 and 1."""
    mean, half = float(np.mean(values)), half_interval(values)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def means(title: str, seeds: list[Arms], columns: dict[str, str]) -> Table:
    """A row for each arm, a column for each measure (measure: its name): mean and interval over the seeds."""
    rows = {}
    for arm in seeds[0]:
        rows[arm] = {name: over_seeds([s[arm][key] for s in seeds]) for key, name in columns.items()}
    return Table(title, rows)


def differences(
    title: str, seeds: list[Arms], pairs: dict[str, tuple[str, str]], columns: dict[str, str]
) -> Table:
    """How far one arm is ahead of another, seed by seed; `pairs` maps the name of a row to the two."""
    rows = {}
    for name, (one, other) in pairs.items():
        both = [s for s in seeds if {one, other} <= s.keys()]
        ahead = {key: [s[one][key] - s[other][key] for s in both] for key in columns}
        rows[name] = {label: over_seeds(ahead[key]) for key, label in columns.items()}
    return Table(title, rows)


def arms_figure(seeds: list[Arms], measures: dict[str, str], path: Path, best_by: str = "") -> None:
    """A panel for each measure (measure: its name), a bar for each arm with the interval of its seeds.

    Arms come in the order of the seeds, or the best by a measure first.
    """
    plots, arms = {}, list(dict.fromkeys(chain(*seeds)))
    if best_by:
        arms.sort(key=lambda arm: -np.mean([s[arm][best_by] for s in seeds if arm in s]))
    for key, title in measures.items():
        values = {arm: [s[arm][key] for s in seeds if arm in s] for arm in arms}
        plots[title] = {"": {arm: with_ends(v) for arm, v in values.items()}}
    figures.bars(path, "mean of the seeds; lines: 95 % intervals", plots)


def over_runs(label: str, x: list[float], runs: list[list[float]], color: str) -> list[figures.Line]:
    """The mean curve of several seeds, and dotted the least and the greatest of them at each place."""
    values = np.array(runs)
    ends = (values.min(0), values.max(0)) if len(runs) > 1 else ()
    edges = [figures.Line("_range", x, end, color, style=":") for end in ends]
    return [figures.Line(label, x, values.mean(0), color), *edges]


def auc(values: np.ndarray, right: np.ndarray) -> float:
    """Area under the ROC curve: the share of (right, wrong) pairs in which the right one has the higher
    value, ties count half.
    """
    above, below = values[right], values[~right]
    pairs = np.sign(above[:, None] - below)  # (right wrong)
    return float((pairs.mean() + 1) / 2) if pairs.size else float("nan")
