"""Layouts of scene graphs, read back by the inspector, and random graphs of the splits."""

import math
import random
from dataclasses import replace

import pytest

from minireflect.world.graphs import THINGS, Entity, SceneGraph, parse_graph
from minireflect.world.inspector import inspect
from minireflect.world.laws import render
from minireflect.world.layout import arrange, lay_out, pair_split, sample_graph, sample_picture
from minireflect.world.scenes import COLORS, SPLITS, Object, distance


def test_the_inspector_reads_back_what_was_laid_out() -> None:
    draw = random.Random(3)
    for i in range(60):
        graph = sample_graph(draw, SPLITS[i % 3])
        scene = lay_out(graph, draw)
        assert graph.fulfilled_by(scene.objects)
        reading = inspect(render(scene))
        assert reading.agrees_with(scene), (graph.sentence, reading.why)
        assert graph.fulfilled_by(reading.scene.objects)


def test_a_picture_with_one_fact_wrong_is_not_accepted() -> None:
    draw = random.Random(5)
    wrong = 0
    for _ in range(40):
        graph = sample_graph(draw)
        scene = lay_out(graph, draw)
        for i in range(len(scene.objects)):
            fewer = scene.objects[:i] + scene.objects[i + 1 :]
            assert not graph.fulfilled_by(fewer)
        extra = (*scene.objects, Object("ball", "red", xy=(1, 1)))
        assert not graph.fulfilled_by(extra)
        mirrored = tuple(Object(o.name, o.color, xy=(63 - o.xy[0], o.xy[1])) for o in scene.objects)
        sideways = any(p in ("left of", "right of") for _, p, _ in graph.relations)
        wrong += sideways
        assert not (sideways and graph.fulfilled_by(mirrored))
    assert wrong > 5


def test_splits_do_not_share_a_related_pair() -> None:
    draw = random.Random(1)
    for split in SPLITS:
        seen = []
        for _ in range(50):
            g = sample_graph(draw, split)
            seen.append({pair_split(g.entities[s], g.entities[o]) for s, _, o in g.relations})
            assert seen[-1] - {"train"} == {split} - {"train"}
        assert sum("train" in pairs for pairs in seen) > 10  # training pairs are in all
    with pytest.raises(ValueError, match="not one of"):
        sample_graph(draw, "held-out")


def test_a_pair_is_in_one_split_in_any_order_and_number_and_a_fifth_is_held_out() -> None:
    kinds = [Entity(name, color) for name in THINGS for color in COLORS]
    pairs = [(a, b) for i, a in enumerate(kinds) for b in kinds[:i]]
    of = [pair_split(a, b) for a, b in pairs]
    assert of == [pair_split(b, replace(a, count=2)) for a, b in pairs] and len(of) == 300
    assert 212 < of.count("train") < 268  # four standard errors about 0.8
    assert 9 < of.count("validation") < 51 and 9 < of.count("test") < 51


def test_a_held_out_graph_is_never_trained_on() -> None:
    chance = random.Random(0)
    trained = {g.triples for g in (sample_graph(chance) for _ in range(300))}
    assert not trained & {sample_graph(chance, "test").triples for _ in range(100)}


def test_graphs_are_of_the_training_split_unless_another_is_named() -> None:
    draw = random.Random(0)
    for graph in [sample_graph(draw) for _ in range(40)] + [sample_picture(draw)[0] for _ in range(40)]:
        pairs = {pair_split(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations}
        assert pairs == {"train"}
    for split in ("validation", "test"):
        graph, scene = sample_picture(draw, split)
        assert split in {pair_split(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations}
        assert graph.fulfilled_by(scene.objects)


def test_shapes_that_do_not_touch_are_three_pixels_apart_and_those_of_a_task_nineteen() -> None:
    """The smallest distances of many layouts; between the centres of a task's shapes."""
    draw, apart, between = random.Random(0), [], []
    for _ in range(60):
        a, b = lay_out(parse_graph("red ball and blue box"), draw).objects
        apart.append(distance(a, b) - a.radius - b.radius)
        a, b = arrange(SceneGraph((Entity("ball", "red"), Entity("cone", "blue"))), draw).objects
        between.append(math.dist(a.xy, b.xy))
    assert min(apart) == 3 and 19 <= min(between) < 21


def test_half_of_the_held_out_pairs_are_for_validation() -> None:
    things = [Entity(name, color) for name in THINGS for color in COLORS]
    splits = [pair_split(a, b) for i, a in enumerate(things) for b in things[:i]]  # 300 pairs
    assert abs(splits.count("validation") / 300 - 0.1) < 0.07 and abs(splits.count("test") / 300 - 0.1) < 0.07
    held_out = splits.count("validation") / (300 - splits.count("train"))
    assert 0.3 < held_out < 0.7
