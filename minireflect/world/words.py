"""A scene in words: its caption and its graph of triples; the reasons for it are in rationales.py."""

from .arrangement import RELATIONS, holds
from .laws import LAWS
from .prompts import law_prompt
from .scenes import Scene


def caption(scene: Scene) -> str:
    """One sentence that says everything a checker would look for, the outcome included."""
    if scene.law != "arrangement":
        return law_prompt(scene.law, scene.objects, scene.outcome).text
    return " and ".join(f"a {thing.words}" for thing in scene.objects)


def graph(scene: Scene) -> list[tuple[str, str, str]]:
    """(subject, relation, object) triples that hold in the scene; arrangements list every relation of every pair."""
    if scene.law != "arrangement":
        return LAWS[scene.law].triples(scene.objects, scene.outcome)
    return [
        (a.words, relation, b.words)
        for a in scene.objects
        for b in scene.objects
        if a is not b
        for relation in RELATIONS
        if holds(relation, a.xy, b.xy)
    ]
