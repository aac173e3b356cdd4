"""GenEval on our scenes: its metadata, its rules on hand-made pictures, its folders."""

import json
from pathlib import Path

import pytest
import torch

from minireflect.streams import choices
from minireflect.world.geneval import TAGS, export, is_right, metadata, scores
from minireflect.world.graphs import TASKS, Clause, Task, arrange
from minireflect.world.prompts import draw_prompts
from minireflect.world.scenes import Object

BALL, CONE = Object("ball", "red", xy=(12, 30)), Object("cone", "blue", xy=(50, 30))


def test_metadata_is_as_geneval_writes_it() -> None:
    """Lines of its evaluation_metadata.jsonl, with our things in place of its own."""
    assert metadata(Task("counting", (Clause("ball", count=2),))) == {
        "tag": "counting", "include": [{"class": "ball", "count": 2}], "exclude": [{"class": "ball", "count": 3}],
        "prompt": "a photo of two balls",
    }  # fmt: skip
    assert metadata(Task("position", (Clause("ball"), Clause("cone")), "right of")) == {
        "tag": "position", "include": [{"class": "cone", "count": 1}, {"class": "ball", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a ball right of a cone",
    }  # fmt: skip
    assert metadata(Task("color attribution", (Clause("ball", "red"), Clause("cone", "blue")))) == {
        "tag": "color_attr", "prompt": "a photo of a red ball and a blue cone",
        "include": [{"class": "ball", "count": 1, "color": "red"}, {"class": "cone", "count": 1, "color": "blue"}],
    }  # fmt: skip
    assert set(TAGS) == set(TASKS)


@pytest.mark.parametrize(
    "things, task, right",
    [
        ((BALL, CONE), Task("single object", (Clause("ball"),)), True),  # other things do no harm
        ((CONE,), Task("single object", (Clause("ball"),)), False),
        ((BALL, BALL), Task("single object", (Clause("ball"),)), True),
        ((BALL, BALL), Task("counting", (Clause("ball", count=2),)), True),
        ((BALL, BALL, BALL), Task("counting", (Clause("ball", count=2),)), False),
        ((BALL,), Task("counting", (Clause("ball", count=2),)), False),
        ((BALL,), Task("colors", (Clause("ball", "blue"),)), False),
        ((BALL, CONE), Task("position", (Clause("ball"), Clause("cone")), "left of"), True),
        ((BALL, CONE), Task("position", (Clause("ball"), Clause("cone")), "right of"), False),
        ((BALL, CONE), Task("position", (Clause("ball"), Clause("cone")), "above"), False),
        ((BALL, CONE), Task("color attribution", (Clause("ball", "red"), Clause("cone", "blue"))), True),
        ((BALL, CONE), Task("color attribution", (Clause("ball", "blue"), Clause("cone", "red"))), False),
        ((), Task("single object", (Clause("ball"),)), False),
    ],
)
def test_its_rules_on_scenes_made_by_hand(things: tuple[Object, ...], task: Task, right: bool) -> None:
    assert is_right(things, metadata(task)) is right


def test_scenes_made_for_a_task_are_right_and_overall_is_the_mean_of_the_kinds() -> None:
    draw = choices(0, "geneval")
    tasks = [p.task for p in draw_prompts("arrangement", "held-out", 60, draw)]
    things = [arrange(task, draw).objects for task in tasks]
    assert set(scores(things, tasks).values()) == {1.0} and len(scores(things, tasks)) == 7
    things = [() if task.kind == "counting" else seen for task, seen in zip(tasks, things)]
    assert scores(things, tasks)["counting"] == 0 and scores(things, tasks)["overall"] == pytest.approx(5 / 6)


def test_pictures_go_where_its_scripts_look(tmp_path: Path) -> None:
    prompts = draw_prompts("arrangement", "held-out", 3, choices(0, "export"))
    export(tmp_path, prompts, torch.zeros(12, 3, 64, 64))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000", "00001", "00002"]
    assert sorted(p.name for p in (tmp_path / "00002" / "samples").iterdir()) == [
        f"{j:04d}.png" for j in range(4)
    ]
    assert json.loads((tmp_path / "00001" / "metadata.jsonl").read_text()) == metadata(prompts[1].task)
    with pytest.raises(ValueError, match="cannot be shared out"):
        export(tmp_path, prompts, torch.zeros(4, 3, 64, 64))
    with pytest.raises(ValueError, match="no task like"):
        export(tmp_path, draw_prompts("physical", "train", 1, choices(0, "x")), torch.zeros(1, 3, 64, 64))
