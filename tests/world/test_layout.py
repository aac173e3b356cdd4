"""Layouts: the inspector reads back what was laid out, and one changed fact is not accepted."""

import random

import pytest
import torch

from minireflect.world.graphs import Entity, SceneGraph
from minireflect.world.inspector import inspect
from minireflect.world.layout import held_out, lay_out, place, sample_graph
from minireflect.world.render import render
from minireflect.world.scenes import Object


def test_the_inspector_reads_back_what_was_laid_out() -> None:
    draw = random.Random(3)
    for i in range(60):
        graph = sample_graph(draw, ("train", "held-out")[i % 2])
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
    for split in ("train", "held-out"):
        for _ in range(50):
            g = sample_graph(draw, split)
            new = [held_out(g.entities[s], g.entities[o]) for s, _, o in g.relations]
            assert any(new) == (split == "held-out")
    with pytest.raises(ValueError, match="not one of"):
        sample_graph(draw, "test")


def test_a_graph_without_relations_is_a_list_of_things() -> None:
    graph = SceneGraph((Entity("ball", "red", 2), Entity("box", "blue")))
    assert graph.sentence == "two red balls and a blue box"
    assert [r.words for r in graph.requirements] == ["two red balls", "a blue box", "three things"]
    scene = lay_out(graph, random.Random(0))
    assert torch.isfinite(render(scene)).all() and graph.fulfilled_by(scene.objects)


def test_nine_places() -> None:
    assert [place((x, y)) for y in (10, 32, 54) for x in (10, 32, 54)] == [
        "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right",
    ]  # fmt: skip


def test_a_held_out_graph_is_never_trained_on() -> None:
    chance = random.Random(0)
    trained = {g.triples for g in (sample_graph(chance) for _ in range(300))}
    assert not trained & {sample_graph(chance, "held-out").triples for _ in range(100)}
