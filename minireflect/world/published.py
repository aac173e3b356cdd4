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
import json
import re
from operator import index
from pathlib import Path

from torch import Tensor

from ..disk import parse_json, read_text, write_text
from ..ranges import Refusal, quote
from .canvas import to_pixels, write_picture
from .graphs import SYNONYMS, Entity, GraphError, SceneGraph, holds, parse_entity, parse_graph
from .prompts import TASKS, Prompt
from .scenes import Objects


def read_graphs(text: str) -> list[SceneGraph]:
    """Parse triples or a sentence, or read a .json or .jsonl file with one graph or one graph a line.

    `from_laion_sg` has the formats of a file.  Raises GraphError.
    """
    if not text.lower().endswith((".json", ".jsonl")):
        return [parse_graph(text)]
    try:
        written = read_text(text).strip()
    except (OSError, Refusal) as error:
        raise GraphError(f"cannot read {text}: {getattr(error, 'strerror', None) or error}") from None
    if not re.match(r"{.*}\r?\n", written):
        return [from_laion_sg(written)]
    graphs = []
    for number, line in enumerate(written.splitlines(), 1):
        try:
            graphs += [from_laion_sg(line)] if line.strip() else []
        except GraphError as error:
            raise GraphError(f"line {number} of {text}: {error}") from None
    return graphs


def from_laion_sg(text: str) -> SceneGraph:
    """Parse a graph in the JSON of LAION-SG (the first form) or T2I-R1 (the last), or a list of triples.

        {"items": [{"item_id", "label", "attributes"}], "relations": [{"item1", "relation", "item2"}]}
        {"triples": [["red ball", "on", "blue box"]]}
        {"nouns", "attr_nouns", "spatial_info": {"obj1", "locality", "obj2"}, "numeracy_info"}

    Equal items become one entity with a count.  Raises GraphError, also for objects that this world lacks.
    """
    try:
        labels, links, numbers = _facts(parse_json(text, dict, "it"))
        numbers = {i: index(n) for i, n in numbers.items()}
        strays = [i for s, _, o in links for i in (s, o) if i not in labels]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        forms = "items and relations, triples, or nouns"
        why = quote(str(error) or type(error).__name__)
        raise GraphError(f"not a graph of LAION-SG or T2I-R1, which has {forms}: {why}") from None
    kinds = {i: parse_entity(label) for i, label in labels.items()}
    if strays:
        raise GraphError(f"a relation names item {quote(strays[0])}, which is not among the items")
    counts: dict[Entity, int] = {}
    for i, kind in kinds.items():
        counts[kind] = counts.get(kind, 0) + numbers.get(i, kind.count)
    alike = list(counts)
    relations = dict.fromkeys((alike.index(kinds[s]), p, alike.index(kinds[o])) for s, p, o in links)
    return SceneGraph(tuple(Entity(e.name, e.color, counts[e]) for e in alike), tuple(relations))


def _facts(data: dict) -> tuple[dict, list[tuple], dict]:
    """-> id -> label of every item; relations (id, predicate, id); id -> count of the items with a count"""
    if "triples" in data:
        links, labels = data["triples"], {words: words for s, _, o in data["triples"] for words in (s, o)}
    elif "nouns" in data:
        at, full = data.get("spatial_info"), data.get("attr_nouns") or []
        named = {noun: [words for words in full if words.split()[-1] == noun] for noun in data["nouns"]}
        labels = {noun: words[0] if words else noun for noun, words in named.items()}
        links = [(at["obj1"], at["locality"], at["obj2"])] if at else []
    else:
        words = {i["item_id"]: [*map(str, i.get("attributes", [])), i["label"]] for i in data["items"]}
        labels = {i: " ".join(of_item) for i, of_item in words.items()}
        links = [(r["item1"], r["relation"], r["item2"]) for r in data.get("relations", [])]
    said = {i["obj_name"]: i["num"] for i in data.get("numeracy_info") or []}
    predicates = [" ".join(str(p).lower().replace("_", " ").split()) for _, p, _ in links]
    links = [(s, SYNONYMS.get(p, p), o) for (s, _, o), p in zip(links, predicates)]
    return {i: label.lower() for i, label in labels.items()}, links, said


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
    Shapes: images (n*k 3 h w) in [-1, 1], with the k images of a prompt next to each other
    """
    for i, (values, part) in enumerate(zip(about, images.split(len(images) // len(about))), first):
        place = folder / f"{i:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        write_text(place / "metadata.jsonl", json.dumps(values))
        for j, pixels in enumerate(to_pixels(part)):
            write_picture(pixels, place / "samples" / f"{j:04d}.png")


def read_benchmark(path: Path) -> list[dict]:
    """Read the tasks of a benchmark: GenEval's .jsonl, DrawBench's .csv, or a text file with a prompt a line.

    -> a dictionary for each task, with the key "prompt".  Raises ValueError if a task has no prompt.
    """
    lines = read_text(path).splitlines()
    if path.suffix == ".jsonl":
        tasks = [parse_json(line, dict, f"a line of {path}") for line in lines if line.strip()]
    elif path.suffix == ".csv":
        try:
            table = [*csv.DictReader(lines)]
        except csv.Error as error:
            raise ValueError(f"{path} is not a table with commas: {error}") from error
        rows = [{key.lower(): value for key, value in row.items() if key} for row in table]
        tasks = [{"tag": r.get("category"), "prompt": r.get("prompts", r.get("prompt"))} for r in rows]
    else:
        tasks = [{"prompt": line.strip()} for line in lines if line.strip() and line[0] != "#"]
    if not tasks or not all(isinstance(task.get("prompt"), str) and task["prompt"] for task in tasks):
        raise ValueError(f"{path} has no prompts: not GenEval's .jsonl, DrawBench's .csv, or a prompt a line")
    return tasks
