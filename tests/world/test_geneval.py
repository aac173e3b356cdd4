"""GenEval on our scenes: its metadata, its rules on hand-made pictures, its folders."""

import json
from pathlib import Path

import pytest
import torch

from minireflect.streams import choices
from minireflect.world.canvas import read_picture
from minireflect.world.geneval import TAGS, export, is_right, metadata, scores
from minireflect.world.graphs import Entity, SceneGraph
from minireflect.world.prompts import TASKS, Prompt, draw_prompts
from minireflect.world.scenes import Object, Objects

BALL, CONE = Object("ball", "red", xy=(12, 30)), Object("cone", "blue", xy=(50, 30))


def asking(task: str, *entities: Entity, relation: str = "") -> Prompt:
    graph = SceneGraph(entities, ((0, relation, 1),) if relation else ())
    return Prompt(graph.sentence, "arrangement", "arrangement", graph=graph, task=task)


def test_metadata_is_as_geneval_writes_it() -> None:
    """Lines of its evaluation_metadata.jsonl, with our things in place of its own."""
    assert metadata(asking("counting", Entity("ball", count=2))) == {
        "tag": "counting", "include": [{"class": "ball", "count": 2}],
        "exclude": [{"class": "ball", "count": 3}],
        "prompt": "a photo of two balls",
    }  # fmt: skip
    assert metadata(asking("position", Entity("ball"), Entity("cone"), relation="right of")) == {
        "tag": "position",
        "include": [
            {"class": "cone", "count": 1},
            {"class": "ball", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a ball right of a cone",
    }
    assert metadata(asking("color attribution", Entity("ball", "red"), Entity("cone", "blue"))) == {
        "tag": "color_attr", "prompt": "a photo of a red ball and a blue cone",
        "include": [{"class": "ball", "count": 1, "color": "red"},
                    {"class": "cone", "count": 1, "color": "blue"}],
    }  # fmt: skip
    assert set(TAGS) == set(TASKS)


@pytest.mark.parametrize(
    "things, prompt, right",
    [
        ((BALL, CONE), asking("single object", Entity("ball")), True),  # other things do no harm
        ((CONE,), asking("single object", Entity("ball")), False),
        ((BALL, BALL), asking("single object", Entity("ball")), True),
        ((BALL, BALL), asking("counting", Entity("ball", count=2)), True),
        ((BALL, BALL, BALL), asking("counting", Entity("ball", count=2)), False),
        ((BALL,), asking("counting", Entity("ball", count=2)), False),
        ((BALL,), asking("colors", Entity("ball", "blue")), False),
        ((BALL, CONE), asking("position", Entity("ball"), Entity("cone"), relation="left of"), True),
        ((BALL, CONE), asking("position", Entity("ball"), Entity("cone"), relation="right of"), False),
        ((BALL, CONE), asking("position", Entity("ball"), Entity("cone"), relation="above"), False),
        ((BALL, CONE), asking("color attribution", Entity("ball", "red"), Entity("cone", "blue")), True),
        ((BALL, CONE), asking("color attribution", Entity("ball", "blue"), Entity("cone", "red")), False),
        ((), asking("single object", Entity("ball")), False),
    ],
)
def test_its_rules_on_scenes_made_by_hand(things: Objects, prompt: Prompt, right: bool) -> None:
    assert is_right(things, prompt) is right


def test_scenes_made_for_a_task_are_right_and_overall_is_the_mean_of_the_kinds() -> None:
    draw = choices(0, "geneval")
    prompts = draw_prompts("arrangement", "held-out", 60, draw)
    things = [p.scene(draw).objects for p in prompts]
    assert set(scores(things, prompts).values()) == {1.0} and len(scores(things, prompts)) == 7
    things = [() if p.task == "counting" else seen for p, seen in zip(prompts, things)]
    assert scores(things, prompts)["counting"] == 0
    assert scores(things, prompts)["overall"] == pytest.approx(5 / 6)


def test_pictures_go_where_its_scripts_look(tmp_path: Path) -> None:
    prompts = draw_prompts("arrangement", "held-out", 3, choices(0, "export"))
    export(tmp_path, prompts, torch.zeros(12, 3, 64, 64))
    assert (read_picture(tmp_path / "00001" / "samples" / "0002.png") == 128).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000", "00001", "00002"]
    assert sorted(p.name for p in (tmp_path / "00002" / "samples").iterdir()) == [
        f"{j:04d}.png" for j in range(4)
    ]
    assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == metadata(prompts[1])
    with pytest.raises(ValueError, match="cannot be divided evenly"):
        export(tmp_path, prompts, torch.zeros(4, 3, 64, 64))
    with pytest.raises(ValueError, match="no task like"):
        export(tmp_path, draw_prompts("physical", "train", 1, choices(0, "x")), torch.zeros(1, 3, 64, 64))
