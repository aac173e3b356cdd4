"""Questions about pictures of scene graphs, and which graphs are held out."""

import random

from minireflect.pretrain.matcher import altered_requirement as altered
from minireflect.pretrain.matcher import answer, changed, off_by, question, visible
from minireflect.world.graphs import parse_graph
from minireflect.world.layout import lay_out, sample_graph, sample_picture
from minireflect.world.render import render


def test_labels_are_true_of_what_can_be_seen() -> None:
    chance = random.Random(0)
    both = {True: 0, False: 0}
    for _ in range(200):
        graph, scene = sample_picture(chance)
        shown = [True] * (len(scene.objects) + 1)
        for own in graph.requirements:
            assert answer(own, scene, shown)
            assert not answer(own, scene, [False] * len(shown))
        asked, label = question(graph, scene, shown, chance)
        assert label == asked.met_by(scene.objects)
        both[label] += 1
        assert altered(graph.requirements[0], graph, chance) is not None
    assert min(both.values()) > 50


def test_what_is_painted_over_cannot_be_seen() -> None:
    scene = lay_out(parse_graph("red ball left of blue block"), random.Random(0))
    clean = render(scene)[None]
    ball = next(i for i, o in enumerate(scene.objects) if o.name == "ball")
    x, y = scene.objects[ball].xy
    painted = clean.clone()
    painted[:, :, y - 7 : y + 7, x - 7 : x + 7] = 0.95
    seen = visible(off_by(painted, clean)[0], scene)
    assert seen[ball] is False and seen[1 - ball] is True and seen[-1] is False
    assert all(visible(off_by(clean, clean)[0], scene))
    assert changed(scene, random.Random(1)) != scene


def test_a_held_out_graph_is_never_trained_on() -> None:
    chance = random.Random(0)
    trained = {g.triples for g in (sample_graph(chance) for _ in range(300))}
    assert not trained & {sample_graph(chance, "held-out").triples for _ in range(100)}
