"""Scene graphs: read from text and JSON, contradictions named, met or not."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minireflect.world.captions import PROMPT_LENGTH
from minireflect.world.captions import graph_vocabulary as vocabulary
from minireflect.world.graphs import (
    PREDICATES,
    RELATIONS,
    THINGS,
    Entity,
    GraphError,
    SceneGraph,
    holds,
    parse_graph,
)
from minireflect.world.laws import render
from minireflect.world.layout import arrange, lay_out, sample_graph
from minireflect.world.prompts import prompt_set
from minireflect.world.published import from_laion_sg
from minireflect.world.scenes import SPLITS, Object


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
        graph = sample_graph(draw, SPLITS[i % 3])
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
        ("red ball left of blue box; blue box left of red ball", "contradict each other"),
        ("red ball left of blue box; red ball right of blue box", "contradict each other"),
        (
            "red ball above blue box; blue box above red cone; red cone on red ball",
            "a ball is not flat; block",
        ),
        (
            "red ball above blue box; blue box above red cone; red cone above red ball",
            "contradict each other",
        ),
        ("red ball left of red ball", "related to itself"),
        ("two red balls and three blue boxes", "5 things; at most 4"),
        ("red ball inside blue block", "only a box"),
        ("red box inside blue box", "too big"),
        ("red ball inside red box", "differ in colour"),
        ("red ball on blue block; blue block in front of red ball", "cycle of things that touch"),
        ("red ball inside blue box; green ball inside blue box", "no layout was found"),
        ("two red balls on a blue box", "single thing"),
        (
            "red ball left of blue box; red ball above blue box; red cone left of blue box; "
            "red cone above blue box; red cone below red ball",
            "5 relations; only 4 fit",
        ),
    ],
)
def test_a_bad_graph_is_named(text: str, named: str) -> None:
    with pytest.raises(GraphError, match=named):
        lay_out(parse_graph(text), random.Random(0))


def test_an_entity_listed_twice_is_named() -> None:
    with pytest.raises(GraphError, match="red ball is listed twice; use a number instead: two red balls"):
        SceneGraph((Entity("ball", "red"), Entity("ball", "red", 2)))


def test_graphs_with_open_colours_by_hand() -> None:
    """GenEval's tasks: counts are exact, colours belong to their object, left is left."""
    ball, block = Object("ball", "red", xy=(15, 30)), Object("block", "blue", xy=(45, 32))
    pair = (Entity("ball"), Entity("block"))
    assert SceneGraph(pair, ((0, "left of", 1),)).fulfilled_by((ball, block))
    assert not SceneGraph(pair, ((0, "above", 1),)).fulfilled_by((ball, block))
    assert SceneGraph((Entity("ball", "red"), Entity("block", "blue"))).fulfilled_by((ball, block))
    assert not SceneGraph((Entity("ball", "blue"), Entity("block", "red"))).fulfilled_by((ball, block))
    assert not SceneGraph((Entity("ball", "red"),)).fulfilled_by((ball, block))  # one object too many
    assert not SceneGraph((Entity("ball", "", 2),)).fulfilled_by((ball,))
    assert SceneGraph((Entity("ball", "", 3),)).sentence == "three balls"
    with pytest.raises(GraphError, match="ball: say its colour"):
        parse_graph("a ball left of a block")  # RL-RIG's sentences name every colour


@given(st.integers(10, 54), st.integers(10, 54), st.integers(10, 54), st.integers(10, 54))
def test_relations_are_opposite_and_exclusive(ax: int, ay: int, bx: int, by: int) -> None:
    a, b = Object("ball", "red", xy=(ax, ay)), Object("ball", "blue", xy=(bx, by))
    for one, other in (("left of", "right of"), ("above", "below")):
        assert holds(one, a, b) == holds(other, b, a)
        assert not (holds(one, a, b) and holds(other, a, b))
    assert not any(holds(r, a, a) for r in RELATIONS)


def geneval_relations(a: Object, b: Object) -> set[str]:
    """Of evaluate_images.py's `relative_position`, from boxes as it has them."""
    center = np.array(a.xy, float), np.array(b.xy, float)
    size = 2 * a.radius * np.ones(2), 2 * b.radius * np.ones(2)
    offset = center[0] - center[1]
    revised = np.maximum(np.abs(offset) - 0.1 * (size[0] + size[1]), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    shares = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, share in shares.items() if share > 0.5}


def test_positions_are_genevals() -> None:
    draw = random.Random(0)
    for _ in range(5_000):
        a, b = (
            Object(draw.choice(THINGS), "red", xy=(draw.randint(5, 59), draw.randint(5, 59))) for _ in "ab"
        )
        assert {r for r in RELATIONS if holds(r, a, b)} == geneval_relations(a, b)


def test_training_pictures_of_positions_satisfy_geneval() -> None:
    draw = random.Random(1)
    for split in SPLITS:
        for prompt in prompt_set("arrangement", split):
            for s, relation, o in prompt.graph.relations * 20:
                things = {t.name: t for t in prompt.scene(draw).objects}
                names = (prompt.graph.entities[i].name for i in (s, o))
                assert relation in geneval_relations(*(things[name] for name in names))
    for _ in range(200):  # of two shapes of a task, apart as they are, one relation holds at least
        things = arrange(SceneGraph((Entity("ball"), Entity("cone"))), draw).objects
        assert geneval_relations(*things)


def test_a_relation_of_several_holds_for_each_of_them() -> None:
    (asked,) = SceneGraph(
        (Entity("ball", "red", 2), Entity("cone", "blue")), ((0, "left of", 1),)
    ).requirements[2:3]
    first, cone = Object("ball", "red", xy=(10, 30)), Object("cone", "blue", xy=(36, 30))
    for x, y, met in ((10, 50, True), (58, 30, False)):
        assert asked.met_by((first, cone, Object("ball", "red", xy=(x, y)))) is met
    assert not asked.met_by((first,)) and not asked.met_by((cone,))


def test_relations_are_what_their_words_say() -> None:
    base, r = Object("block", "blue", xy=(32, 32)), {}
    for x, y in ((10, 32), (54, 32), (32, 10), (32, 54), (32, 18), (40, 36), (32, 32)):
        r[x, y] = {p for p in PREDICATES if holds(p, Object("ball", "red", xy=(x, y)), base)}
    assert r[10, 32] == {"left of"} and r[54, 32] == {"right of"}
    assert r[32, 10] == {"above"} and r[32, 54] == {"below"}
    assert r[32, 18] == {"above", "on"}
    assert r[40, 36] == {"right of", "in front of"}
    assert r[32, 32] == set()
    box = Object("box", "blue", xy=(32, 32))
    assert holds("inside", Object("ball", "red", xy=(33, 31)), box)
    assert not holds("inside", Object("ball", "red", xy=(33, 38)), box)
    with pytest.raises(ValueError, match="no relation 'under'"):
        holds("under", base, base)


@pytest.mark.parametrize(
    ("relation", "base", "true", "false"),
    [
        ("on", "block", [(0, -11), (0, -17), (-7, -14)], [(0, -10), (0, -18), (8, -14)]),
        ("inside", "box", [(4, -4), (-4, 4)], [(5, 0), (0, 5), (0, -5)]),
        ("in front of", "block", [(4, 2), (-4, 13), (13, 5)], [(4, 1), (3, 5), (4, 14), (14, 5), (4, -5)]),
    ],
)
def test_what_touches_does_so_within_the_pixels_that_are_stated(
    relation: str, base: str, true: list[tuple[int, int]], false: list[tuple[int, int]]
) -> None:
    """By hand: a ball, 7 pixels in radius, beside a block of 7 or a box of 12; (x, y), y pointing down."""
    other = Object(base, "blue", xy=(32, 32))
    for places, wanted in ((true, True), (false, False)):
        for x, y in places:
            assert holds(relation, Object("ball", "red", xy=(32 + x, 32 + y)), other) is wanted, (x, y)
    assert not holds("inside", Object("box", "red", xy=(32, 32)), Object("box", "blue", xy=(32, 32)))
    assert not holds("inside", Object("ball", "red", xy=(32, 32)), Object("block", "blue", xy=(32, 32)))


def test_a_graph_without_relations_is_a_list_of_things() -> None:
    graph = SceneGraph((Entity("ball", "red", 2), Entity("box", "blue")))
    assert graph.sentence == "two red balls and a blue box"
    assert [r.words for r in graph.requirements] == ["two red balls", "a blue box", "three things"]
    scene = lay_out(graph, random.Random(0))
    assert torch.isfinite(render(scene)).all() and graph.fulfilled_by(scene.objects)
