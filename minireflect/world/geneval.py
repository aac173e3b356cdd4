"""GenEval's six kinds of task on our scenes, judged by its published rules, and pictures in its folder layout.

    Ghosh et al. 2023, arXiv 2310.11513; a picture is right when every `include` clause is met and no `exclude` clause is:

    single_object   a ball                         at least one
    two_object      a ball and a cone              at least one of each
    counting        three red balls                at least three, and not four
    colors          a red ball                     at least one of this colour
    position        a ball left of a cone          centres: an offset beyond a dead zone, and at most 60 degrees off the axis
    color_attr      a red ball and a blue cone     one each of these colours
    overall         the unweighted mean of the six

Other things in the picture do no harm by these rules; `Prompt.fulfilled_by`, which training and other tables here go by, is stricter.  Where GenEval has a
detector we have the inspector, whose objects have no confidence: a position counts if any two of the named things stand so.
"""

import json
from pathlib import Path

from torch import Tensor
from torchvision.utils import save_image

from .graphs import TASKS, Clause, Task, holds
from .prompts import Prompt
from .scenes import Object

TAGS = dict(
    zip(TASKS, ("single_object", "two_object", "counting", "colors", "position", "color_attr"))
)  # GenEval's names of our kinds


def metadata(task: Task) -> dict:
    """A line of GenEval's evaluation_metadata.jsonl."""
    clauses = task.clauses[::-1] if task.relation else task.clauses  # what another is placed by comes first
    include = [_clause(c) for c in clauses]
    if task.relation:
        include[1]["position"] = [task.relation, 0]
    line = {"tag": TAGS[task.kind], "include": include}
    if task.kind == "counting":
        line["exclude"] = [{**_clause(c), "count": c.count + 1} for c in clauses]
    return {**line, "prompt": f"a photo of {task.words}"}


def _clause(clause: Clause) -> dict:
    found = {"class": clause.name, "count": clause.count}
    return {**found, "color": clause.color} if clause.color else found


def is_right(things: tuple[Object, ...], line: dict) -> bool:
    """GenEval's verdict on what is seen in a picture; `line` is its metadata."""

    def found(clause: dict) -> list[Object]:
        return [t for t in things if t.name == clause["class"] and clause.get("color", t.color) == t.color]

    for clause in line["include"]:
        if len(found(clause)) < clause["count"]:
            return False
        if "position" in clause:
            relation, other = clause["position"]
            pairs = [(a, b) for a in found(clause) for b in found(line["include"][other])]
            if not any(holds(relation, a.xy, b.xy) for a, b in pairs):
                return False
    return not any(len(found(clause)) >= clause["count"] for clause in line.get("exclude", []))


def scores(things: list[tuple[Object, ...]], tasks: list[Task]) -> dict[str, float]:
    """Share of right pictures of each kind of task that was asked for, and "overall", their unweighted mean."""
    right = [is_right(seen, metadata(task)) for seen, task in zip(things, tasks)]
    rows = {
        kind: [ok for ok, task in zip(right, tasks) if task.kind == kind]
        for kind in TASKS
        if any(task.kind == kind for task in tasks)
    }
    means = {kind: sum(ok) / len(ok) for kind, ok in rows.items()}
    return {**means, "overall": sum(means.values()) / len(means)}


def export(folder: Path, prompts: list[Prompt], images: Tensor) -> None:
    """Write pictures as GenEval's scripts read them: FOLDER/00000/metadata.jsonl and samples/0000.png, ... for each prompt.

    Raises ValueError on a prompt that is no arrangement, or when the pictures cannot be shared out evenly.
    Shapes: images (n*k 3 h w) in [-1, 1], k of each of n prompts, one after the other
    """
    if not prompts or len(images) % len(prompts):
        raise ValueError(f"{len(images)} pictures cannot be shared out among {len(prompts)} prompts")
    each = len(images) // len(prompts)
    for i, (prompt, drawn) in enumerate(zip(prompts, images.split(each))):
        if prompt.task is None:
            raise ValueError(f"GenEval has no task like {prompt.text!r}: only arrangements can be exported")
        place = folder / f"{i:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        (place / "metadata.jsonl").write_text(json.dumps(metadata(prompt.task)))
        for j, image in enumerate(drawn):
            save_image((image.clamp(-1, 1) + 1) / 2, place / "samples" / f"{j:04d}.png")
