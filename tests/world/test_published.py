"""Graphs and tasks that others published, GenEval's rules, and the folders that its scorer reads."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from minireflect.ranges import Refusal
from minireflect.streams import choices
from minireflect.world.canvas import read_picture
from minireflect.world.graphs import Entity, GraphError, SceneGraph, parse_graph
from minireflect.world.prompts import Prompt, draw_prompts
from minireflect.world.published import (
    from_laion_sg,
    geneval_right,
    geneval_scores,
    read_benchmark,
    read_graphs,
    write_samples,
)
from minireflect.world.scenes import Object, Objects


def test_items_that_are_alike_are_counted() -> None:
    items = [{"item_id": i, "label": "ball", "attributes": ["red"]} for i in (4, 5)]
    graph = from_laion_sg(json.dumps({"items": items, "relations": []}))
    assert graph.entities == (Entity("ball", "red", 2),) and graph.sentence == "two red balls"


# records of the forms that T2I-R1's and LAION-SG's repositories have, on things of the world
RECORDS = {
    '{"triples": [["red ball", "on", "blue box"]]}': "red ball on blue box",
    '{"triples": [["red ball", "left_of", "blue box"], ["the Red  ball", "above", "green cone"]]}':
        "red ball left of blue box; red ball above green cone",
    '{"task_type": "spatial", "prompt": "a red ball on the left of a blue box", "nouns": ["ball", "box"],'
    ' "attr_nouns": ["red ball", "blue box"], "spatial_info": {"obj1": "ball", "obj2": "box",'
    ' "locality": "on the left of"}}': "red ball left of blue box",
    '{"nouns": ["ball", "cube"], "attr_nouns": ["red ball", "blue cube"]}': "red ball; blue block",
    '{"nouns": ["red ball"], "numeracy_info": [{"obj_name": "red ball", "num": 3}]}': "three red balls",
}  # fmt: skip


@pytest.mark.parametrize("text", RECORDS)
def test_records_of_published_datasets_are_graphs(text: str) -> None:
    assert from_laion_sg(text) == parse_graph(RECORDS[text])


NO_WORDS = '{"nouns": ["ball"], "attr_nouns": [""]}'
LACKING = {
    '{"prompt": "a photo of a car below a zebra", "nouns": ["car", "zebra"], "spatial_info": {"obj1": "car",'
    ' "obj2": "zebra", "locality": "below"}, "task_type": "spatial"}': "no thing named 'car'",
    '{"triples": [["house", "made_of", "stone"]]}': "no thing named 'house'",
    '{"nouns": ["sports ball"]}': "'sports ball'",
    '{"nouns": ["ball"]}': "say its colour",
    '{"triples": [["red ball", "near", "blue box"]]}': "no relation 'near'; there are left of",
    '{"nouns": ["red ball"], "numeracy_info": [{"obj_name": "red ball", "num": 9}]}': "9 things; at most 4",
    '{"nouns": ["red ball"], "numeracy_info": [{"obj_name": "red ball", "num": "x"}]}': "not a graph",
    '{"nouns": "ball", "spatial_info": 3}': "not a graph",
    '{"triples": [["red ball", "on"]]}': "not a graph",
    '{"nouns": [3]}': "not a graph",
    '{"items": [], "relations": [{"item1": [], "relation": "on", "item2": 0}]}': "not a graph",
    '{"items": [{"item_id": 0, "label": "ball", "attributes": ["red"]}],'
    ' "relations": [{"item1": 0, "relation": "on", "item2": 7}]}': "item 7",
    **dict.fromkeys(("[", "{}", "3"), "not a graph of LAION-SG or T2I-R1"),
    '{"items": [{"label": "ball"}]}': "not a graph of LAION-SG or T2I-R1.*: a record has no 'item_id'",
    NO_WORDS: "not a graph.*: each of attr_nouns must end in another one of nouns",
    # nothing of a record is dropped or made up
    '{"items": [{"item_id": 1, "label": "ball", "attributes": ["red"]},'
    ' {"item_id": 1, "label": "cone", "attributes": ["red"]}]}': "item 1 is listed twice",
    '{"items": [{"item_id": 1, "label": "ball", "attributes": ["red"]},'
    ' {"item_id": 1.0, "label": "cone", "attributes": ["red"]}]}': "item_id must be",
    '{"items": [{"item_id": 1, "label": "ball", "attributes": ["red"]}], "triples": []}': "items and triples",
    '{"items": [{"item_id": 1, "label": "ball", "attributes": ["red"]}], "numeracy_info": []}':
        "items and numeracy_info",
    '{"nouns": ["ball"], "attr_nouns": ["red ball", "blue ball"]}': "attr_nouns",
    '{"nouns": ["ball"], "attr_nouns": ["red ball", "green cone"]}': "attr_nouns",
    '{"nouns": ["red ball", "red ball"]}': "listed twice",
    '{"nouns": ["red ball"], "numeracy_info": [{"obj_name": "cone", "num": 2}]}': "item 'cone'",
    '{"nouns": ["two red balls"], "numeracy_info": [{"obj_name": "two red balls", "num": 3}]}':
        "another number",
    '{"nouns": ["red ball"], "numeracy_info": [{"obj_name": "red ball", "num": 2},'
    ' {"obj_name": "red ball", "num": 3}]}': "listed twice",
    **{f'{{"nouns": ["red ball"], "numeracy_info": [{{"obj_name": "red ball", "num": {n}}}]}}': "num must be"
       for n in ("true", "0", "-1", "2.0")},
    '{"triples": ["abc"]}': "triples",
    '{"triples": [["two red balls", "above", "blue box"], ["three red balls", "above", "blue box"]]}':
        "give one number",
}  # fmt: skip


@pytest.mark.parametrize("text", LACKING)
def test_what_the_world_lacks_of_a_record_is_named(text: str) -> None:
    with pytest.raises(GraphError, match=LACKING[text]):
        from_laion_sg(text)


def test_a_file_has_a_graph_or_one_a_line(tmp_path: Path) -> None:
    file, lines = tmp_path / "graphs.json", list(RECORDS)
    file.write_text(lines[0])
    assert read_graphs(str(file)) == [parse_graph(RECORDS[lines[0]])]
    file.write_text("\n".join(lines) + "\n")
    assert read_graphs(str(file)) == [parse_graph(text) for text in RECORDS.values()]
    file.write_text("\n".join([*lines, next(iter(LACKING))]))
    with pytest.raises(GraphError, match=r"line 6 of .*: no thing named 'car'"):
        read_graphs(str(file))
    for end in ("\r", " \r\n", "\n\n"):
        file.write_bytes(end.join([*lines, ""]).encode())
        assert read_graphs(str(file)) == [parse_graph(text) for text in RECORDS.values()], repr(end)
    file.write_text("")
    with pytest.raises(GraphError, match=r"graphs.json: not a graph"):  # which of several files
        read_graphs(str(file))


BALL, CONE = Object("ball", "red", xy=(12, 30)), Object("cone", "blue", xy=(40, 30))
OTHER = Object("ball", "green", xy=(58, 30))  # right of the cone: any two that are so related suffice


def asking(task: str, *entities: Entity, relation: str = "") -> Prompt:
    graph = SceneGraph(entities, ((0, relation, 1),) if relation else ())
    return Prompt(graph.sentence, "arrangement", "arrangement", graph=graph, task=task)


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
        ((BALL, CONE, OTHER), asking("position", Entity("ball"), Entity("cone"), relation="left of"), True),
        ((OTHER, CONE, BALL), asking("position", Entity("ball"), Entity("cone"), relation="right of"), True),
        ((BALL, CONE), asking("color attribution", Entity("ball", "red"), Entity("cone", "blue")), True),
        ((BALL, CONE), asking("color attribution", Entity("ball", "blue"), Entity("cone", "red")), False),
        ((), asking("single object", Entity("ball")), False),
    ],
)
def test_its_rules_on_scenes_made_by_hand(things: Objects, prompt: Prompt, right: bool) -> None:
    assert geneval_right(things, prompt) is right


def test_scenes_made_for_a_task_are_right_and_overall_is_the_mean_of_the_kinds() -> None:
    draw = choices(0, "geneval")
    prompts = draw_prompts("arrangement", "test", 60, draw)
    things = [p.scene(draw).objects for p in prompts]
    score = geneval_scores(things, prompts)
    assert set(score.values()) == {1.0} and len(score) == 7
    things = [() if p.task == "counting" else seen for p, seen in zip(prompts, things)]
    assert geneval_scores(things, prompts)["counting"] == 0
    assert geneval_scores(things, prompts)["overall"] == pytest.approx(5 / 6)
    few = [asking("single object", Entity("ball"))] * 3 + [asking("colors", Entity("ball", "blue"))]
    assert (
        geneval_scores([(BALL,)] * 4, few)["overall"] == 1 / 2
    )  # three right of one task, one wrong of another


def test_pictures_go_where_its_scripts_look(tmp_path: Path) -> None:
    about = [{"prompt": text, "tag": "counting"} for text in ("one ball", "two balls", "three balls")]
    write_samples(tmp_path, about, torch.zeros(12, 3, 64, 64), first=1)
    assert (read_picture(tmp_path / "00001" / "samples" / "0002.png") == 128).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00001", "00002", "00003"]
    samples = sorted(p.name for p in (tmp_path / "00003" / "samples").iterdir())
    assert samples == [f"{j:04d}.png" for j in range(4)]
    assert json.loads((tmp_path / "00002" / "metadata.jsonl").read_text()) == about[1]


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", '{"prompt": 5}'), ("a.jsonl", '{"tag": "x"}'), ("a.jsonl", "[]"), ("a.txt", ""),
    ("a.csv", "Prompts\n" + 200_000 * "x"), ("a.csv", "Prompts\na red cat, on a bike"),
    ("a.jsonl", '{"prompt": " "}'), ("a.csv", "Prompts,prompts\na cat,a dog"), ("a.csv", 'Prompts\n"a cat'),
    ("a.json", '["a cat"]'), ("a.tsv", "Prompts\ta cat"), ("a.txt", "a\0cat"), ("a.txt", "  # a comment"),
])  # fmt: skip
def test_a_benchmark_without_prompts_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_benchmark(tmp_path / name)


def test_texts_of_a_benchmark_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.CSV").write_text('Prompts,Category\n"a cat\non a mat, asleep",x\n\n')
    assert read_benchmark(tmp_path / "a.CSV") == [{"tag": "x", "prompt": "a cat\non a mat, asleep"}]
    (tmp_path / "a.JSONL").write_text('{"prompt": "a\u2028cat"}\r\n\n')
    assert read_benchmark(tmp_path / "a.JSONL") == [{"prompt": "a\u2028cat"}]
    graph = {"items": [{"item_id": 1, "label": "ball", "attributes": ["red"]}], "caption": "a\u2028b"}
    (tmp_path / "a.jsonl").write_text(2 * (json.dumps(graph, ensure_ascii=False) + "\n"))
    assert [g.sentence for g in read_graphs(str(tmp_path / "a.jsonl"))] == 2 * ["a red ball"]


def test_pictures_of_two_exports_are_not_mixed(tmp_path: Path) -> None:
    write_samples(tmp_path, [{"prompt": "a cat"}], torch.zeros(3, 3, 8, 8))
    with pytest.raises(Refusal, match="already has pictures"):
        write_samples(tmp_path, [{"prompt": "a dog"}], torch.zeros(1, 3, 8, 8))


def test_pictures_are_read_upright_and_without_starting_a_program(tmp_path: Path) -> None:
    file, wide = tmp_path / "x.png", Image.new("RGB", (4, 2), "red")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    wide.save(file, "JPEG", exif=turned)
    assert read_picture(file).shape == (4, 2, 3)
    wide.save(file, "EPS")
    with pytest.raises(Refusal, match="cannot identify image file; formats are PNG"):
        read_picture(file)
    wide.save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 2), "blue")])
    with pytest.raises(Refusal, match="2 frames"):
        read_picture(file)
