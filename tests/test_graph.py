"""Scene graphs: read from text and JSON, contradictions named, laid out so that the inspector reads back what was asked."""

import json
import random

import pytest
import torch

from minireflect.world.captions import PROMPT_LENGTH, hearsay, hint, plan, training_caption
from minireflect.world.captions import graph_vocabulary as vocabulary
from minireflect.world.graphs import (
    PREDICATES,
    Entity,
    GraphError,
    SceneGraph,
    from_laion_sg,
    parse_graph,
    stands,
)
from minireflect.world.inspector import inspect
from minireflect.world.layout import held_out, lay_out, sample_graph
from minireflect.world.render import render
from minireflect.world.scenes import Object, Scene


def test_triples_sentences_and_json_say_the_same_graph() -> None:
    graph = parse_graph("red ball on blue box; green cube left of yellow cylinder")
    assert graph.triples == (("red ball", "on", "blue box"), ("green block", "left of", "yellow cylinder"))
    assert graph.sentence == "a red ball on a blue box and a green block left of a yellow cylinder"
    assert parse_graph(graph.sentence) == graph
    annotation = {
        "items": [
            {"item_id": 0, "label": "ball", "attributes": ["red"]},
            {"item_id": 1, "label": "box", "attributes": ["blue"]},
            {"item_id": 2, "label": "cube", "attributes": ["green"]},
            {"item_id": 3, "label": "cylinder", "attributes": ["yellow"]},
        ],
        "relations": [
            {"triple_id": 0, "item1": 0, "relation": "on", "item2": 1},
            {"triple_id": 1, "item1": 2, "relation": "left of", "item2": 3},
        ],
    }
    assert from_laion_sg(json.dumps(annotation)) == graph


def test_sentences_of_sampled_graphs_read_back() -> None:
    draw = random.Random(0)
    for i in range(100):
        graph = sample_graph(draw, ("train", "held-out")[i % 2])
        again = parse_graph(graph.sentence)
        assert set(again.triples) == set(graph.triples)
        assert set(again.entities) == set(graph.entities)
        assert len(graph.sentence.split()) + 2 <= PROMPT_LENGTH
        assert set(graph.sentence.split()) <= set(vocabulary())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        ("red ball under blue box", "relations are left of"),
        ("red cat on blue box", "no thing named 'cat'"),
        ("ball on blue box", "say its colour"),
        ("pink ball on blue box", "cannot read 'pink ball'"),
        ("red ball left of blue box; blue box left of red ball", "contradicts itself"),
        ("red ball left of blue box; red ball right of blue box", "contradicts itself"),
        ("red ball above blue box; blue box above red cone; red cone on red ball", "a ball; block"),
        ("red ball above blue box; blue box above red cone; red cone above red ball", "contradicts itself"),
        ("red ball left of red ball", "to itself"),
        ("two red balls and three blue boxes", "5 things, at most 4"),
        ("red ball inside blue block", "only a box"),
        ("red box inside blue box", "too big"),
        ("red ball inside red box", "differ in colour"),
        ("red ball inside blue box; green ball inside blue box", "no way was found"),
        ("two red balls on a blue box", "single thing"),
        (
            "red ball left of blue box; red ball above blue box; red cone left of blue box; red cone above blue box; "
            "red cone below red ball",
            "5 relations, at most 4",
        ),
    ],
)
def test_a_bad_graph_is_named(text: str, named: str) -> None:
    with pytest.raises(GraphError, match=named):
        lay_out(parse_graph(text), random.Random(0))


def test_bad_json_is_named() -> None:
    for text in ("[", "{}", '{"items": [{"label": "ball"}]}', "3"):
        with pytest.raises(GraphError, match="not an annotation of LAION-SG"):
            from_laion_sg(text)
    stray = {"items": [{"item_id": 0, "label": "ball", "attributes": ["red"]}]}
    stray["relations"] = [{"item1": 0, "relation": "on", "item2": 7}]
    with pytest.raises(GraphError, match="item 7"):
        from_laion_sg(json.dumps(stray))


def test_items_that_are_alike_are_counted() -> None:
    items = [{"item_id": i, "label": "ball", "attributes": ["red"]} for i in (4, 5)]
    graph = from_laion_sg(json.dumps({"items": items, "relations": []}))
    assert graph.entities == (Entity("ball", "red", 2),) and graph.sentence == "two red balls"


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


def test_relations_are_what_their_words_say() -> None:
    base, r = Object("block", "blue", xy=(32, 32)), {}
    for x, y in ((10, 32), (54, 32), (32, 10), (32, 54), (32, 18), (40, 36), (32, 32)):
        r[x, y] = {p for p in PREDICATES if stands(p, Object("ball", "red", xy=(x, y)), base)}
    assert r[10, 32] == {"left of"} and r[54, 32] == {"right of"}
    assert r[32, 10] == {"above"} and r[32, 54] == {"below"}
    assert r[32, 18] == {"above", "on"}
    assert r[40, 36] == {"right of", "in front of"}
    assert r[32, 32] == set()
    box = Object("box", "blue", xy=(32, 32))
    assert stands("inside", Object("ball", "red", xy=(33, 31)), box)
    assert not stands("inside", Object("ball", "red", xy=(33, 38)), box)
    with pytest.raises(ValueError, match="no relation 'under'"):
        stands("under", base, base)


def test_splits_do_not_share_a_related_pair() -> None:
    draw = random.Random(1)
    for split in ("train", "held-out"):
        for _ in range(50):
            g = sample_graph(draw, split)
            new = [held_out(g.entities[s], g.entities[o]) for s, _, o in g.relations]
            assert any(new) == (split == "held-out")
    with pytest.raises(ValueError, match="not one of"):
        sample_graph(draw, "test")


def test_a_plan_puts_right_what_is_wrong_and_keeps_the_rest() -> None:
    draw = random.Random(2)
    graph = parse_graph("red ball left of blue block")
    things = Object("block", "blue", xy=(28, 32)), Object("ball", "red", xy=(44, 32))  # room on both sides
    scene = Scene("arrangement", things, "")
    met = [r.met_by(scene.objects) for r in graph.requirements]
    assert met == [True, True, False, True]
    block = next(o for o in scene.objects if o.name == "block")
    ball = next(o for o in scene.objects if o.name == "ball")
    said = [plan(graph, met, draw, scene) for _ in range(20)]
    pairs = [s.split(" and ") for s in said]  # one of the two moves, the other stays where it is
    assert all("red ball" in a and "blue block" in b for a, b in pairs)  # as the relation tells them
    stays = [(a == hint(ball)) + (b == hint(block)) for a, b in pairs]
    assert (
        sum(n < 2 for n in stays) >= 15 and sum(n > 0 for n in stays) >= 8
    )  # there is not always room to move one
    assert plan(graph, [True] * 4, draw) == ""
    # a contradiction in the picture's own places falls back on a new layout, and never raises
    for _ in range(50):
        g = sample_graph(draw)
        s = lay_out(sample_graph(draw), draw)
        plan(g, [r.met_by(s.objects) for r in g.requirements], draw, s)


def test_captions_are_true_and_of_known_words() -> None:
    draw = random.Random(4)
    kinds = set()
    for _ in range(100):
        graph = sample_graph(draw)
        scene = lay_out(graph, draw)
        text = training_caption(graph, scene, draw, told=1.0)
        assert set(text.split()) <= set(vocabulary()) and len(text.split()) + 2 <= PROMPT_LENGTH
        kinds.add((text.startswith("with"), " with " in text))
        places = {hint(o) for o in scene.objects}
        if " at the " in text:
            said = text.split("with ", 1)[1].split(" and ")
            assert set(said) <= places
    assert kinds == {(False, False), (False, True), (True, False)}


def test_hearsay_gets_relations_wrong_as_often_as_it_is_told_to_and_things_never() -> None:
    draw, relations, kept = random.Random(5), 0, 0
    for _ in range(200):
        graph = sample_graph(draw)
        said = hearsay(graph, draw, told=0.5)
        assert said.entities == graph.entities and len(said.relations) == len(graph.relations)
        assert hearsay(graph, draw, told=1.0) == graph
        relations += len(graph.relations)
        kept += sum(a == b for a, b in zip(graph.relations, said.relations))
    assert 0.42 < kept / relations < 0.58  # 400 tosses of a coin, three standard errors


def test_a_graph_without_relations_is_a_list_of_things() -> None:
    graph = SceneGraph((Entity("ball", "red", 2), Entity("box", "blue")))
    assert graph.sentence == "two red balls and a blue box"
    assert [r.words for r in graph.requirements] == ["two red balls", "a blue box", "three things"]
    scene = lay_out(graph, random.Random(0))
    assert torch.isfinite(render(scene)).all() and graph.fulfilled_by(scene.objects)
