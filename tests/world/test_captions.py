"""Captions and edit prompts: true, of known words, and wrong where they are meant to be."""

import random

from minireflect.world.captions import (
    PROMPT_LENGTH,
    hint,
    randomise_relations,
    scripted_edit,
    training_caption,
)
from minireflect.world.captions import graph_vocabulary as vocabulary
from minireflect.world.graphs import parse_graph
from minireflect.world.layout import lay_out, sample_graph
from minireflect.world.scenes import Object, Scene


def test_a_scripted_edit_puts_right_what_is_wrong_and_keeps_the_rest() -> None:
    draw = random.Random(2)
    graph = parse_graph("red ball left of blue block")
    things = Object("block", "blue", xy=(28, 32)), Object("ball", "red", xy=(44, 32))  # room on both sides
    scene = Scene("arrangement", things, "")
    met = [r.met_by(scene.objects) for r in graph.requirements]
    assert met == [True, True, False, True]
    block = next(o for o in scene.objects if o.name == "block")
    ball = next(o for o in scene.objects if o.name == "ball")
    said = [scripted_edit(graph, met, draw, scene) for _ in range(20)]
    pairs = [s.split(" and ") for s in said]  # one of the two moves, the other stays where it is
    assert all("red ball" in a and "blue block" in b for a, b in pairs)  # as the relation tells them
    stays = [(a == hint(ball)) + (b == hint(block)) for a, b in pairs]
    assert (
        sum(n < 2 for n in stays) >= 15 and sum(n > 0 for n in stays) >= 8
    )  # there is not always room to move one
    assert scripted_edit(graph, [True] * 4, draw) == ""
    # a contradiction in the picture's own places falls back on a new layout, and never raises
    for _ in range(50):
        g = sample_graph(draw)
        s = lay_out(sample_graph(draw), draw)
        scripted_edit(g, [r.met_by(s.objects) for r in g.requirements], draw, s)


def test_captions_are_true_and_of_known_words() -> None:
    draw = random.Random(4)
    kinds = set()
    for _ in range(100):
        graph = sample_graph(draw)
        scene = lay_out(graph, draw)
        text = training_caption(graph, scene, draw, accuracy=1.0)
        assert set(text.split()) <= set(vocabulary()) and len(text.split()) + 2 <= PROMPT_LENGTH
        kinds.add((text.startswith("with"), " with " in text))
        places = {hint(o) for o in scene.objects}
        if " at the " in text:
            said = text.split("with ", 1)[1].split(" and ")
            assert set(said) <= places
    assert kinds == {(False, False), (False, True), (True, False)}


def test_relations_are_wrong_as_often_as_wanted_and_entities_never() -> None:
    draw, relations, kept = random.Random(5), 0, 0
    for _ in range(200):
        graph = sample_graph(draw)
        said = randomise_relations(graph, draw, 0.5)
        assert said.entities == graph.entities and len(said.relations) == len(graph.relations)
        assert randomise_relations(graph, draw, 1.0) == graph
        relations += len(graph.relations)
        kept += sum(a == b for a, b in zip(graph.relations, said.relations))
    assert 0.42 < kept / relations < 0.58  # 400 tosses of a coin, three standard errors
