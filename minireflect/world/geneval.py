"""GenEval (Ghosh et al. 2023, arXiv 2310.11513) on our scenes: its published rules, and its folders.

    single_object   a ball                         at least one
    two_object      a ball and a cone              at least one of each
    counting        three red balls                at least three, and not four
    colors          a red ball                     at least one of this colour
    position        a ball left of a cone          centres: at most 60 degrees off the axis
    color_attr      a red ball and a blue cone     one each of these colours
    overall         the unweighted mean of the six

Other objects in the picture do no harm by these rules; `Prompt.fulfilled_by`, which training and other tables
use, is stricter.  GenEval reads pictures with a detector, we with the inspector, whose objects have no
confidence: a position counts if any two of the named objects are so related.
"""

import json
from pathlib import Path

from torch import Tensor

from .canvas import to_pixels, write_picture
from .graphs import Entity, holds
from .prompts import TASKS, Prompt
from .scenes import Objects

# GenEval's names of our tasks
TAGS = dict(zip(TASKS, ("single_object", "two_object", "counting", "colors", "position", "color_attr")))


def is_right(things: Objects, prompt: Prompt) -> bool:
    """GenEval's verdict on the objects of a picture."""
    entities = prompt.graph.entities
    found = [[t for t in things if e.matches(t)] for e in entities]
    surplus = [len(f) - e.count for f, e in zip(found, entities)]
    if min(surplus) < 0 or (prompt.task == "counting" and max(surplus) > 0):
        return False
    return all(any(holds(p, a, b) for a in found[s] for b in found[o]) for s, p, o in prompt.graph.relations)


def scores(things: list[Objects], prompts: list[Prompt]) -> dict[str, float]:
    """Share of right pictures for each task among the prompts, and "overall", their unweighted mean."""
    right = [is_right(seen, prompt) for seen, prompt in zip(things, prompts)]
    groups = {task: [ok for ok, prompt in zip(right, prompts) if prompt.task == task] for task in TASKS}
    means = {task: sum(group) / len(group) for task, group in groups.items() if group}
    return {**means, "overall": sum(means.values()) / len(means)}


def metadata(prompt: Prompt) -> dict:
    """A line of GenEval's evaluation_metadata.jsonl."""
    relations, include = prompt.graph.relations, [_clause(e, e.count) for e in prompt.graph.entities]
    if relations:  # the object that another is placed by comes first
        include = [include[1], {**include[0], "position": [relations[0][1], 0]}]
    line = {"tag": TAGS[prompt.task], "include": include}
    if prompt.task == "counting":
        line["exclude"] = [_clause(e, e.count + 1) for e in prompt.graph.entities]
    return {**line, "prompt": f"a photo of {prompt.text}"}


def _clause(entity: Entity, count: int) -> dict:
    color = {"color": entity.color} if entity.color else {}
    return {"class": entity.name, "count": count, **color}


def export(folder: Path, prompts: list[Prompt], images: Tensor) -> None:
    """Write pictures as GenEval's scripts read them: for each prompt FOLDER/00000/ with metadata.jsonl and
    samples/0000.png, ...

    Raises ValueError on a prompt that is no arrangement, or when the pictures cannot be divided evenly.
    Shapes: images (n*k 3 h w) in [-1, 1], k of each of n prompts, one after the other
    """
    if not prompts or len(images) % len(prompts):
        raise ValueError(f"{len(images)} pictures cannot be divided evenly among {len(prompts)} prompts")
    for i, (prompt, part) in enumerate(zip(prompts, images.split(len(images) // len(prompts)))):
        if prompt.graph is None:
            raise ValueError(f"GenEval has no task like {prompt.text!r}: only arrangements can be exported")
        place = folder / f"{i:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        (place / "metadata.jsonl").write_text(json.dumps(metadata(prompt)))
        for j, pixels in enumerate(to_pixels(part)):
            write_picture(pixels, place / "samples" / f"{j:04d}.png")
