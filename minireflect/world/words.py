"""A scene in words: its caption, the reasons for it, and its graph of triples."""

from .arrangement import RELATIONS, holds
from .laws import LAWS
from .prompts import law_prompt
from .scenes import Scene

PLACES = ("left", "middle", "right"), ("top", "middle", "bottom")


def caption(scene: Scene) -> str:
    """One sentence that says everything a checker would look for, the outcome included."""
    if scene.law != "arrangement":
        return law_prompt(scene.law, scene.objects, scene.outcome).text
    return " and ".join(f"a {thing.words}" for thing in scene.objects)


def rationale(scene: Scene) -> str:
    """A plan of the picture: what is in it, where, and what the law makes of it (or that it is defied)."""
    if scene.law == "arrangement":
        place = [PLACES[1][t.xy[1] * 3 // 64] + " " + PLACES[0][t.xy[0] * 3 // 64] for t in scene.objects]
        return ". ".join(f"a {t.words} at the {p}" for t, p in zip(scene.objects, place)) + "."
    law = LAWS[scene.law]
    reason = law.because(scene.objects)
    if scene.outcome == law.lawful(scene.objects):
        return f"{law.setting(scene.objects)}. {reason}."
    return f"{law.setting(scene.objects)}. by nature {reason}. here it is {law.result(scene.objects, scene.outcome)} instead."


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
