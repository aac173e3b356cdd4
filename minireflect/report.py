"""An HTML page about one or several runs: results, curves, pictures, laws, costs and options.

    minireflect report runs/srrl-1 runs/ddpo-1 -o report.html

The page is the template report.html of this folder with the data of the runs inserted; it needs no network.
The data are read from config.json, metrics.jsonl and album/ (see `showcase.album`), so the page can also be
made from an interrupted run.
"""

import base64
import json
import warnings
from pathlib import Path
from statistics import fmean

from .disk import read_bytes, read_json, write_text
from .evaluate import law_bars
from .ranges import expect
from .run import RunError, flat, read_metrics
from .world.canvas import read_picture

TEMPLATE = Path(__file__).with_suffix(".html")
POINTS = 200  # most points of a curve
# metrics of the reward with those of the inspector, and their labels and kinds; then metrics of other stages
TRUTHS = (("reward_by_round", "right_by_round"), ("reward", "right"))
LABELS = {"reward": ("learned reward", "reward"), "right": ("right by the inspector", "right")}
FURTHER = ("accepted", "loss", "kl", "text_entropy", "image_entropy", "sg_iou")
# types of a row of album/STEP.json
ROW = {"prompt": str, "round": int, "reward": float, "right": bool | None}


def write_report(folders: list[Path], out: Path) -> int:
    """Write the page.  -> its size in bytes.  Raises RunError if a folder is not a run folder."""
    if not folders:
        raise RunError("there is no run; try: minireflect report runs/srrl-1 -o report.html")
    if out.suffix != ".html":
        raise RunError(f"the page is written to {out}, whose name must end in .html")
    runs = [described(folder) | {"name": name} for folder, name in zip(folders, names(folders))]
    data = json.dumps(runs).replace("<", "\\u003c")  # so that a prompt cannot close the <script> element
    page = TEMPLATE.read_text("utf-8").replace("/*RUNS*/[]", data)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return len(page.encode())


def names(folders: list[Path]) -> list[str]:
    """Names of the folders: the last parts of their paths, as many as are needed to distinguish them."""
    parts = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(1, 9) if len({p[-n:] for p in parts}) == len(parts)), 1)
    return ["/".join(p[-depth:]) for p in parts]


def described(folder: Path) -> dict:
    """The data of a run for the page.  Raises RunError if the folder is not a run folder."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is not a run folder: {error}") from error
    rows = read_metrics(folder)
    stages = [s for s in dict.fromkeys(row["stage"] for row in rows) if s != "evaluation"]
    scores = {row["model"]: row.get("scores") or row["score"] for row in rows if row["stage"] == "evaluation"}
    trained = [row for row in rows if row["stage"] in stages[-1:]]
    return {
        "heading": heading(scores, trained),
        "config": {key: str(value) for key, value in flat(config).items()},
        "curves": {stage: curves([row for row in rows if row["stage"] == stage]) for stage in stages},
        "laws": law_bars(scores),
        "scores": {model: plain(score) for model, score in scores.items()},
        "cost": cost(trained),
        "album": album(folder),
    }


def heading(scores: dict, rows: list[dict]) -> str:
    """The result of a run in one or two sentences."""

    def complete(score: object) -> bool:
        return isinstance(score, dict) and {"accuracy", "interval", "reward"} <= score.keys()

    first, *_, last = scores.values() if len(scores) > 1 else ({}, {})
    pairs = {k: (a, last[k]) for k, a in first.items() if complete(a) and complete(last.get(k))}
    if pairs:
        form = "{} prompts right {:.2f} → {:.2f} [{:.2f}, {:.2f}]".format
        said = [form(k, a["accuracy"], b["accuracy"], *b["interval"]) for k, (a, b) in pairs.items()]
        gap = max(b["reward"] - b["accuracy"] for _, b in pairs.values())
        trust = "the two agree" if abs(gap) < 0.05 else "do not trust the reward here"
        return f"{'; '.join(said)}, by the inspector. Reward minus truth at most {gap:.2f}: {trust}."
    values = [fmean(row["reward_by_round"]) for row in rows if row.get("reward_by_round")]
    values = values or [row["reward"] for row in rows if row.get("reward") is not None]
    if not values:
        return f"{len(rows)} steps logged."
    n = max(1, len(values) // 10)
    before, after = fmean(values[:n]), fmean(values[-n:])
    seen = any(row.get("right") is not None for row in rows)
    doubt = "" if seen else " No inspector has checked the pictures: look at them."
    return f"Reward of training prompts {before:.3f} → {after:.3f} over {len(rows)} iterations.{doubt}"


def curves(rows: list[dict]) -> list[dict]:
    """The curves of a stage, reward and inspector's verdict in one plot.  -> titles, x labels, lines"""
    x = "reward_calls" if any("reward_calls" in row for row in rows) else "step"
    pair = next((pair for pair in TRUTHS if any(row.get(pair[0]) for row in rows)), ())
    plots = {"reward and truth, round 0": pair, **{key: (key,) for key in FURTHER}}
    drawn = {title: [line(rows, x, key) for key in keys] for title, keys in plots.items()}
    shown = {title: [each for each in lines if each["points"]] for title, lines in drawn.items()}
    return [{"title": title, "x": x, "lines": lines} for title, lines in shown.items() if lines]


def line(rows: list[dict], x: str, key: str) -> dict:
    """The curve of a metric, or of the first value if it is a list, thinned out to at most POINTS points."""
    label, kind = LABELS.get(key.removesuffix("_by_round"), (key, "other"))
    values = [(row[x], row[key]) for row in rows if row.get(key) not in (None, []) and x in row]
    values = [(a, b[0] if isinstance(b, list) else b) for a, b in values]
    values = [pair for pair in values if all(isinstance(number, int | float) for number in pair)]
    return {"label": label, "kind": kind, "points": values[:: -(-len(values) // POINTS) or 1]}


def plain(score: dict) -> dict[str, float]:
    """The numbers of a score, without those of single laws; named "physical.accuracy" if it has kinds."""
    return {k: v for k, v in flat(score).items() if isinstance(v, float) and "by_law" not in k}


def cost(rows: list[dict]) -> dict[str, float]:
    """The cost of a run, from the last line of its metrics."""
    last = rows[-1] if rows else {}
    keys = ("updates_total", "reward_calls", "unet_evaluations")
    return {"iterations": len(rows)} | {key.replace("_", " "): last[key] for key in keys if key in last}


def album(folder: Path) -> list[dict]:
    """The sheets of pictures that a run has saved, in order: iteration, rows, and picture as a data URI.

    A sheet that is damaged or incomplete, as after a kill, is left out with a warning.
    """
    found = []
    for sheet in sorted((folder / "album").glob("*.jpg")):
        try:
            step, rows = int(sheet.stem), read_json(sheet.with_suffix(".json"), list[dict])
            for key, kind in ROW.items():
                expect([row.get(key) for row in rows], list[kind], key)
            read_picture(sheet)
            picture = base64.b64encode(read_bytes(sheet)).decode()
            found.append({"step": step, "rows": rows, "picture": f"data:image/jpeg;base64,{picture}"})
        except (ValueError, OSError) as error:
            warnings.warn(f"{sheet.name} is left out: {error}", stacklevel=2)
    return found
