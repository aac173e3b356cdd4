"""Published formats: read scene graphs and benchmarks, and write pictures for the scripts of GenEval.

Scene graphs come from LAION-SG (arXiv 2412.08580) and T2I-R1 (arXiv 2505.00703), tasks from GenEval (arXiv
2310.11513) and DrawBench.  GenEval's rules are milder than those of prompts.py, because other objects may be
in the picture.  They are needed for a comparison with its tables:

    single_object   a ball                         at least one
    two_object      a ball and a cone              at least one of each
    counting        three red balls                exactly three red balls
    colors          a red ball                     at least one of this colour
    position        a ball left of a cone          by the centres, see `holds` in graphs.py
    color_attr      a red ball and a blue cone     at least one of each, in these colours
    overall         the unweighted mean of the six

GenEval reads pictures with a detector and takes the most confident objects.  The inspector has no confidence,
so a position is right if it holds for any two of the named objects.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from ..disk import parse_json, read_text, write_text
from ..ranges import Count, Refusal, expect, hints, quote
from .canvas import to_pixels, write_picture
from .graphs import SYNONYMS, Entity, GraphError, SceneGraph, graph_of, holds, parse_entity, parse_graph
from .prompts import TASKS, Prompt
from .scenes import Objects


def read_graphs(text: str) -> list[SceneGraph]:
    """Parse triples or a sentence, or read a .json or .jsonl file with one graph or one graph a line.

    `from_laion_sg` has the formats of a file.  Raises GraphError, and the errors of `read_text`.
    """
    if not text.lower().endswith((".json", ".jsonl")):
        return [parse_graph(text)]
    written, graphs = read_text(text).strip(), []
    lines = written.split("\n") if re.match(r"{.*}\s*\n", written) else [written]
    for number, line in enumerate(lines, 1):
        try:
            # empty lines are left out, but an empty file is refused
            graphs += [from_laion_sg(line)] if line.strip() or not written else []
        except GraphError as error:
            where = f"line {number} of {text}" if len(lines) > 1 else text
            raise GraphError(f"{where}: {error}") from None
    return graphs


# the three forms of graphs; other keys, such as the prompt and the address of a picture, are not needed
FORMS = {
    "items": TypedDict("Items", {
        "items": list[TypedDict("Item", {"item_id": int | str, "label": str, "attributes": list[str]})],
        "relations": list[TypedDict("Link", {"item1": int | str, "relation": str, "item2": int | str})]}),
    "triples": TypedDict("Triples", {"triples": list[tuple[str, str, str]]}),
    "nouns": TypedDict("Nouns", {
        "nouns": list[str], "attr_nouns": list[str] | None,
        "spatial_info": TypedDict("Place", {"obj1": str, "locality": str, "obj2": str}) | None,
        "numeracy_info": list[TypedDict("Number", {"obj_name": str, "num": Count})] | None}),
}  # fmt: skip


def from_laion_sg(text: str) -> SceneGraph:
    """Parse a graph in the JSON of LAION-SG (the first form) or T2I-R1 (the last), or a list of triples.

        {"items": [{"item_id", "label", "attributes"}], "relations": [{"item1", "relation", "item2"}]}
        {"triples": [["red ball", "on", "blue box"]]}
        {"nouns", "attr_nouns", "spatial_info": {"obj1", "locality", "obj2"}, "numeracy_info"}

    Equal items become one entity with a count.  Raises GraphError, also for objects that this world lacks.
    """
    try:
        data = parse_json(text, dict, "it")
        form = next((form for form in FORMS if form in data), "none of these")
        others = {key for name in FORMS if name != form for key in hints(FORMS[name])} & data.keys()
        if form not in FORMS or others:
            raise ValueError(f"it has {' and '.join([form, *sorted(others)])}")
        things, links, numbers = _facts(expect(data, FORMS[form], "it"))
        ids, counted = [i for i, _ in things], [i for i, _ in numbers]
    except (ValueError, KeyError) as error:
        why = f"a record has no {error}" if isinstance(error, KeyError) else error
        raise GraphError(f"not a graph of LAION-SG or T2I-R1, with items, triples or nouns: {why}") from None
    if twice := [i for each in (ids, counted) for k, i in enumerate(each) if i in each[:k]]:
        raise GraphError(f"item {quote(twice[0])} is listed twice")
    links = [(s, " ".join(p.lower().replace("_", " ").split()), o) for s, p, o in links]
    links = [(s, SYNONYMS.get(p, p), o) for s, p, o in links]
    if form == "triples":
        return graph_of((s.lower(), p, o.lower()) for s, p, o in links)
    kinds = {i: parse_entity(label.lower()) for i, label in things}
    if strays := [i for i in (*(i for s, _, o in links for i in (s, o)), *counted) if i not in kinds]:
        raise GraphError(f"a relation or number names item {quote(strays[0])}, which is not among the items")
    if odd := [i for i, n in numbers if kinds[i].count not in (1, n)]:
        raise GraphError(f"item {quote(odd[0])} has another number in numeracy_info")
    alike = list(dict.fromkeys(kinds.values()))
    counts = [sum(dict(numbers).get(i, k.count) for i, k in kinds.items() if k == kind) for kind in alike]
    relations = dict.fromkeys((alike.index(kinds[s]), p, alike.index(kinds[o])) for s, p, o in links)
    return SceneGraph(tuple(Entity(e.name, e.color, n) for e, n in zip(alike, counts)), tuple(relations))


def _facts(data: dict) -> tuple[list[tuple], list[tuple], list[tuple]]:
    """-> (id, label) of every item; relations (id, predicate, id); (id, count) of items with a count"""
    if "triples" in data:
        return [], data["triples"], []
    if "items" in data:
        labels = [(i["item_id"], " ".join([*i.get("attributes", []), i["label"]])) for i in data["items"]]
        return labels, [(r["item1"], r["relation"], r["item2"]) for r in data.get("relations", [])], []
    full, at = data.get("attr_nouns") or [], data.get("spatial_info")
    named = {noun: [words for words in full if words.split()[-1:] == [noun]] for noun in data["nouns"]}
    if sum(map(len, named.values())) != len(full) or any(len(words) > 1 for words in named.values()):
        raise ValueError(f"each of attr_nouns must end in another one of nouns: {quote(', '.join(full))}")
    said = [(number["obj_name"], number["num"]) for number in data.get("numeracy_info") or []]
    links = [(at["obj1"], at["locality"], at["obj2"])] if at else []
    return [(noun, *(named[noun] or [noun])) for noun in data["nouns"]], links, said


def geneval_right(things: Objects, prompt: Prompt) -> bool:
    """Whether a picture of these objects is right by GenEval's rules, see the top of this file."""
    entities = prompt.graph.entities
    found = [[t for t in things if e.matches(t)] for e in entities]
    surplus = [len(f) - e.count for f, e in zip(found, entities)]
    if min(surplus) < 0 or (prompt.task == "counting" and max(surplus) > 0):
        return False
    return all(any(holds(p, a, b) for a in found[s] for b in found[o]) for s, p, o in prompt.graph.relations)


def geneval_scores(things: list[Objects], prompts: list[Prompt]) -> dict[str, float]:
    """The share of right pictures of each task, and their unweighted mean as "overall"."""
    right = [geneval_right(seen, prompt) for seen, prompt in zip(things, prompts)]
    groups = {task: [ok for ok, prompt in zip(right, prompts) if prompt.task == task] for task in TASKS}
    means = {task: sum(group) / len(group) for task, group in groups.items() if group}
    return {**means, "overall": sum(means.values()) / len(means)}


def write_samples(folder: Path, about: list[dict], images: Tensor, first: int = 0) -> None:
    """Write pictures in the layout that GenEval's scripts read.

    Each prompt has a folder, FOLDER/00000, with metadata.jsonl and samples/0000.png, samples/0001.png, ...
    about: the metadata of each of n prompts.
    first: the number of the first prompt.
    Raises Refusal if there are pictures of a prompt already.
    Shapes: images (n*k 3 h w) in [-1, 1], with the k images of a prompt next to each other
    """
    for i, (values, part) in enumerate(zip(about, images.split(len(images) // len(about))), first):
        place = folder / f"{i:05d}"
        if any(place.glob("samples/*")):
            raise Refusal(f"{place} already has pictures; export into another folder")
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_text(place / "metadata.jsonl", json.dumps(values))
        for j, pixels in enumerate(to_pixels(part)):
            write_picture(pixels, place / "samples" / f"{j:04d}.png")


def read_benchmark(path: Path) -> list[dict]:
    """Read the tasks of a benchmark: GenEval's .jsonl, DrawBench's .csv, or a .txt file with a prompt a line.

    Empty lines are left out, and in a .txt file lines that begin with #.  Raises ValueError if a task has no
    prompt.  -> a dictionary for each task, with the key "prompt"
    """
    text, kind = read_text(path), path.suffix.lower()
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if "\0" in text:  # a file in UTF-16 may also be valid UTF-8
        raise ValueError(f"{path} is not a text file in UTF-8: it has a NUL")
    if kind == ".jsonl":
        tasks = [parse_json(line, dict, f"line {number} of {path}") for number, line in lines.items()]
    elif kind == ".csv":
        tasks = _table(text, path)
    elif kind in (".txt", ""):
        tasks = [{"prompt": line} for line in lines.values() if line[0] != "#"]
    else:
        raise ValueError(f"{path} is not read as prompts: its name must end in .txt, .jsonl or .csv")
    for number, task in enumerate(tasks or [{}], 1):
        if not (isinstance(prompt := task.get("prompt"), str) and prompt.strip()):
            formats = "not GenEval's .jsonl, DrawBench's .csv, or a prompt a line"
            raise ValueError(f"{path} has no prompt {number}: {formats}")
    return tasks


def _table(text: str, path: Path) -> list[dict]:
    """The tasks of a table in the format of DrawBench."""
    try:
        head, *rows = [*csv.reader(io.StringIO(text, newline=""), strict=True)] or [[]]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a table with commas: {error}") from error
    head = [name.strip().lower() for name in head]
    if len(set(head) & {"prompt", "prompts"}) != 1 or len(set(head)) < len(head):
        raise ValueError(f"{path} needs one column Prompts, and none twice; it has {quote(', '.join(head))}")
    if odd := [row for row in rows if row and len(row) != len(head)]:
        raise ValueError(f"a row of {path} has {len(odd[0])} cells, not {len(head)}; quote texts with commas")
    tasks = [dict(zip(head, row)) for row in rows if row]
    return [{"tag": t.get("category"), "prompt": t.get("prompts", t.get("prompt"))} for t in tasks]
