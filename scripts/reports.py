"""Functions shared by the studies: arguments, commands that run once, tables and figures of arms over seeds.

An arm is one setting that a study compares.  The results of one seed are {arm: {measure: value}}; those of
several seeds are a list of such dictionaries.
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
    """A parser whose help shows a script's docstring with its line breaks."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def arguments(
    about: str, out: str, pictures: int, of: str, seeds: Sequence[int] = (0, 1, 2)
) -> argparse.Namespace:
    """Parse the options of a study and create its folders.  `about` is shown by --help."""
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
    """Run a command of train.py with the preset cpu; continue a stopped run, and skip a finished one."""
    if not (folder / "state" / f"{command}.done").exists():
        started = (folder / "config.json").exists()
        more = ["--resume"] if started else [*options, "--preset", "cpu"]
        words = [str(ROOT / "train.py"), command, *more, "--out", str(folder)]
        subprocess.run([sys.executable, *words], check=True)
    return folder


def once(path: Path, make: Callable[[], dict]) -> dict:
    """The contents of a JSON file, which is made first if it does not exist."""
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
    """Half width of the 95 % confidence interval (Student's t) of the mean over seeds; 0 for one seed."""
    n = len(values)
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5) if n > 1 else 0.0


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± half width of the 95 % interval over seeds, as a text."""
    half = f" ± {half_interval(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{half}"


def with_ends(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds, and the ends of its 95 % interval, limited to [0, 1]."""
    mean, half = float(np.mean(values)), half_interval(values)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def means(title: str, seeds: list[Arms], columns: dict[str, str]) -> Table:
    """A row for each arm, a column for each measure: mean and interval over the seeds.

    `columns` maps measures to the names of their columns.
    """
    rows = {}
    for arm in seeds[0]:
        rows[arm] = {name: over_seeds([s[arm][key] for s in seeds]) for key, name in columns.items()}
    return Table(title, rows)


def differences(
    title: str, seeds: list[Arms], pairs: dict[str, tuple[str, str]], columns: dict[str, str]
) -> Table:
    """Differences between two arms, seed by seed: mean and interval.

    `pairs` maps the name of a row to its two arms, and `columns` measures to the names of their columns.
    """
    rows = {}
    for name, (one, other) in pairs.items():
        both = [s for s in seeds if {one, other} <= s.keys()]
        ahead = {key: [s[one][key] - s[other][key] for s in both] for key in columns}
        rows[name] = {label: over_seeds(ahead[key]) for key, label in columns.items()}
    return Table(title, rows)


def arms_figure(seeds: list[Arms], measures: dict[str, str], path: Path, best_by: str = "") -> None:
    """A panel for each measure, and in it a bar for each arm with the interval over the seeds.

    `measures` maps measures to the titles of their panels.  With `best_by`, arms are sorted by this measure.
    """
    plots, arms = {}, list(dict.fromkeys(chain(*seeds)))
    if best_by:
        arms.sort(key=lambda arm: -np.mean([s[arm][best_by] for s in seeds if arm in s]))
    for key, title in measures.items():
        values = {arm: [s[arm][key] for s in seeds if arm in s] for arm in arms}
        plots[title] = {"": {arm: with_ends(v) for arm, v in values.items()}}
    figures.bars(path, "mean of the seeds; lines: 95 % intervals", plots)


def over_runs(label: str, x: list[float], runs: list[list[float]], color: str) -> list[figures.Line]:
    """The mean curve of several seeds, with dotted lines for their minimum and maximum at each x."""
    values = np.array(runs)
    ends = (values.min(0), values.max(0)) if len(runs) > 1 else ()
    edges = [figures.Line("_range", x, end, color, style=":") for end in ends]
    return [figures.Line(label, x, values.mean(0), color), *edges]


def auc(values: np.ndarray, right: np.ndarray) -> float:
    """Area under the ROC curve: share of (right, wrong) pairs in which right is higher; ties count half."""
    above, below = values[right], values[~right]
    pairs = np.sign(above[:, None] - below)  # (right wrong)
    return float((pairs.mean() + 1) / 2) if pairs.size else float("nan")
