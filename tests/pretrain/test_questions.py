"""Questions for RL-RIG's Checker: answers are true of the scene and of what is still visible of it."""

import random

from minireflect.pretrain.corrupt import block_error
from minireflect.pretrain.questions import answer, changed, changed_requirement, question, visible
from minireflect.world.graphs import lay_out, parse_graph, sample_picture
from minireflect.world.laws import render


def test_answers_are_true_of_what_is_visible() -> None:
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
        assert changed_requirement(graph.requirements[0], graph, chance) is not None
    assert min(both.values()) > 50


def test_an_object_that_is_painted_over_is_not_visible() -> None:
    scene = lay_out(parse_graph("red ball left of blue block"), random.Random(0))
    clean = render(scene)[None]
    ball = next(i for i, o in enumerate(scene.objects) if o.name == "ball")
    x, y = scene.objects[ball].xy
    painted = clean.clone()
    painted[:, :, y - 7 : y + 7, x - 7 : x + 7] = 0.95
    seen = visible(block_error(painted, clean)[0], scene)
    assert seen[ball] is False and seen[1 - ball] is True and seen[-1] is False
    assert all(visible(block_error(clean, clean)[0], scene))
    assert changed(scene, random.Random(1)) != scene
