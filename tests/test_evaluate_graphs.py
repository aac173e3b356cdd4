"""Measuring loops on scene graphs: IoU counted by hand, and what a loop and its judges say against what is
there.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minireflect import evaluate_graphs
from minireflect.evaluate import EvaluationConfig
from minireflect.evaluate_graphs import evaluate_loop, evaluation_graphs, iou, named, seen_triples
from minireflect.rl.rewards import Answers
from minireflect.streams import choices
from minireflect.world.graphs import SceneGraph, parse_graph
from minireflect.world.laws import render
from minireflect.world.layout import lay_out
from minireflect.world.scenes import Object, arrangement


def test_metrics_on_graphs_made_by_hand() -> None:
    """The set definitions of LAION-SG, on cases counted with a pencil."""
    a, b = {("x", "on", "y"), ("y", "on", "z")}, {("x", "on", "y"), ("z", "on", "y")}
    assert iou([(a, a)]) == 1 and iou([(a, b)]) == iou([(b, a)]) == 1 / 3 and iou([(a, a), (a, b)]) == 2 / 3
    assert iou([(a, set())]) == 0 and iou([(set(), set())]) == 0
    graph = parse_graph("red ball left of blue block; green cone above blue block")
    ball, block, cone = (
        Object("ball", "red", xy=(12, 40)),
        Object("block", "blue", xy=(40, 40)),
        Object("cone", "green", xy=(40, 12)),
    )
    assert seen_triples((ball, block, cone), graph) == set(graph.triples)
    # the ball on the other side: its triple is gone, and no other predicate of the graph holds of it
    moved = Object("ball", "red", xy=(60, 40))
    assert seen_triples((moved, block, cone), graph) == {("green cone", "above", "blue block")}
    # the ball above the block: a triple that was not asked for, in the graph's words
    over = Object("ball", "red", xy=(38, 10))
    seen = seen_triples((over, block, cone), graph)
    assert seen == {("red ball", "above", "blue block"), ("green cone", "above", "blue block")}
    assert iou([(set(graph.triples), seen)]) == 1 / 3
    assert named((ball, ball, block)) == {"red ball", "blue block"}
    assert iou([({"red ball", "blue block", "green cone"}, named((ball, block)))]) == 2 / 3


def renders(graphs: list[SceneGraph]) -> Tensor:
    """A right picture of each graph.  -> (n 3 h w)"""
    return torch.stack([render(lay_out(g, choices(0, "measure", str(i)))) for i, g in enumerate(graphs)])


def test_a_loop_is_measured_as_what_it_does() -> None:
    """Of eight pictures the even ones are right at first, the odd ones and the first at the end, the others
    are blank; the Checker accepts the first four.
    """
    config = EvaluationConfig(pictures=8, batch=3)
    graphs = evaluation_graphs(config)
    row = {g: i for i, g in enumerate(graphs)}
    assert len(row) == 8
    good = renders(graphs)

    def answers(part: list, met: list[bool]) -> Answers:
        most = max(len(g.requirements) for g in part)
        asked = torch.tensor([[j < len(g.requirements) for j in range(most)] for g in part])
        says = torch.tensor(met)[:, None].float().expand(-1, most)
        return Answers(says.masked_fill(~asked, 1.0), asked)

    def loop(part: list, noise: torch.Generator) -> list[SimpleNamespace]:
        rows = [row[g] for g in part]
        even, odd = torch.tensor([[i % 2 == 0, i % 2 == 1 or i == 0] for i in rows]).T
        pictures, blank = good[rows], torch.zeros(len(rows), 3, 64, 64)
        said = answers(part, [i < 4 for i in rows])
        looks = [torch.where(keep.view(-1, 1, 1, 1), pictures, blank) for keep in (even, odd)]
        n = torch.arange(2)[:, None].expand(2, len(rows))
        return [
            SimpleNamespace(images=x, answers=said, evaluations=20 * (k + 1), calls=k + 1)
            for x, k in zip(looks, n)
        ]

    found = evaluate_loop(loop, lambda images, graphs: answers(graphs, [False] * len(graphs)), config, "test")
    assert found["right"] == found["met"] == found["sg_iou"] == found["entity_iou"] == 5 / 8
    assert (found["unreadable"], found["repaired"], found["damaged"]) == (3 / 8, 4 / 4, 3 / 4)
    assert found["checker"] == found["checker_right"] == 1 / 2 and found["fooled"] == 1 / 4
    assert (
        found["judge"] == found["judge_right"] == found["judge_fooled"] == 0
    )  # accepts nothing, so nothing fools it
    assert found["evaluations"] == 40 and found["calls"] == 2 and found["pictures"] == 8
    assert found["relation_iou"] == pytest.approx(5 / 8)


def test_judge_and_checker_are_asked_about_the_pictures_at_the_end() -> None:
    """None is right at first, one of four at the end; Checker and judge accept what is not blank."""
    config = EvaluationConfig(pictures=4, batch=4)
    graphs = evaluation_graphs(config)
    good = renders(graphs)

    def check(images: Tensor, part: list) -> Answers:
        met = (images != 0).flatten(1).any(1)[:, None].float()
        return Answers(met, torch.ones_like(met, dtype=torch.bool))

    def loop(part: list, noise: torch.Generator) -> list[SimpleNamespace]:
        ends = torch.where((torch.arange(4) < 1).view(-1, 1, 1, 1), good, 0.0)
        n = torch.ones(4, dtype=torch.long)
        looks = torch.zeros_like(good), ends
        return [SimpleNamespace(images=x, answers=check(x, part), evaluations=n, calls=n) for x in looks]

    found = evaluate_loop(loop, check, config, "test")
    assert found["judge"] == found["judge_right"] == found["checker"] == found["checker_right"] == 1 / 4
    assert found["right"] == 1 / 4 and found["fooled"] == found["judge_fooled"] == 0


def test_the_share_of_requirements_that_are_met_counts_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ball is there; the block is not, so neither is their relation, nor are there two things."""
    graph = parse_graph("red ball left of blue block")
    monkeypatch.setattr(evaluate_graphs, "evaluation_graphs", lambda _: [graph])
    image = render(arrangement([Object("ball", "red", xy=(12, 40))]))[None]
    no, n = Answers(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)), torch.ones(1)
    look = SimpleNamespace(images=image, answers=no, evaluations=n, calls=n)
    config = EvaluationConfig(pictures=1)
    found = evaluate_graphs.evaluate_loop(lambda *_: [look], lambda *_: no, config, "test")
    assert len(graph.requirements) == 4 and found["met"] == pytest.approx(1 / 4)
