"""The world: words, laws, splits and graphs agree with each other."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minireflect.world.captions import caption, graph
from minireflect.world.data import WorldConfig, training_pair
from minireflect.world.graphs import RELATIONS, Clause, Task, arrange, fulfils, holds, task_list
from minireflect.world.inspector import inspect
from minireflect.world.laws import LAWS
from minireflect.world.prompts import (
    KINDS,
    all_texts,
    combinations,
    draw_prompts,
    law_prompt,
    near_miss,
    prompt_set,
    sample_scene,
    tasks,
    understand,
)
from minireflect.world.rationales import rationale
from minireflect.world.render import render
from minireflect.world.scenes import Object, Reading, Scene


@pytest.mark.parametrize("name", LAWS)
def test_train_and_held_out_combinations_are_disjoint_and_complete(name: str) -> None:
    train, held_out = combinations(name, "train"), combinations(name, "held-out")
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(LAWS[name].combinations())
    assert 0.15 < len(held_out) / len(LAWS[name].combinations()) < 0.3


def test_prompt_texts_of_the_splits_are_disjoint() -> None:
    for kind in KINDS:
        shared = {p.text for p in prompt_set(kind, "train")} & {p.text for p in prompt_set(kind, "held-out")}
        assert shared <= {"a ball", "a block", "a cone"}  # GenEval's single objects: there are only three
    assert not set(tasks("train")) & set(tasks("held-out")) - {
        t for t in task_list() if t.kind == "single object"
    }


@pytest.mark.parametrize("name", LAWS)
def test_every_attribute_is_seen_in_training(name: str) -> None:
    """A held-out combination is new, its parts are not."""

    def parts(split: str) -> set[tuple[int, str, str]]:
        return {
            (i, key, getattr(o, key))
            for objects in combinations(name, split)
            for i, o in enumerate(objects)
            for key in ("name", "color", "size", "place")
        }

    assert parts("held-out") <= parts("train")


@pytest.mark.parametrize("name", LAWS)
def test_every_law_can_be_broken_and_only_one_outcome_is_lawful(name: str) -> None:
    law = LAWS[name]
    for objects in law.combinations():
        assert law.lawful(objects) in law.possible(objects)
        assert law.unlawful(objects)


def test_the_laws_say_what_physics_says() -> None:
    """The verdicts written out by hand, one law at a time."""
    big, small = Object("ball", "red", "big", "left"), Object("ball", "blue", "small", "right")
    assert LAWS["balance"].lawful((big, small)) == "left"
    assert LAWS["buoyancy"].lawful((Object("ball", "wooden", "big", "left"),)) == "floats"
    assert LAWS["buoyancy"].lawful((Object("block", "iron", "small", "left"),)) == "sinks"
    assert LAWS["shadow"].lawful((Object("sun", place="left"), Object("cone", "red", "tall"))) == "right"
    assert LAWS["mirror"].lawful((Object("flag", "red", place="left"),)) == "flipped"
    assert LAWS["magnet"].lawful((Object("ball", "iron", "big", "left"),)) == "lifted"
    assert LAWS["magnet"].lawful((Object("ball", "red plastic", "", "left"),)) == "floor"
    assert LAWS["vessels"].lawful(LAWS["vessels"].combinations()[0]) == "level"
    assert LAWS["gravity"].lawful((Object("stone", "grey", "big", "left"),)) == "floor"
    assert LAWS["gravity"].lawful((Object("balloon", "red", "", "left"),)) == "ceiling"
    assert LAWS["flame"].lawful((Object("candle", "red", "tall"), Object("fan", place=""))) == "upright"
    assert LAWS["flame"].lawful((Object("candle", "red", "tall"), Object("fan", place="left"))) == "right"


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_caption_is_understood_and_fulfilled_by_its_own_picture(seed: int) -> None:
    scene = sample_scene(seed)
    if scene.law != "arrangement":
        prompt = understand(caption(scene))
        assert prompt is not None and prompt.fulfilled_by(inspect(render(scene)))
    assert rationale(scene) and graph(scene) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_is_understood_as_itself(kind: str) -> None:
    for split in ("train", "held-out"):
        for prompt in prompt_set(kind, split):
            assert understand(prompt.text.upper() + ".") == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_near_miss_asks_for_another_picture(kind: str) -> None:
    draw = random.Random(0)
    for prompt in draw_prompts(kind, "train", 80, draw):
        other = near_miss(prompt, draw)
        assert (other.law, other.task is None) == (prompt.law, prompt.task is None)
        assert (other.objects, other.outcome, other.task) != (prompt.objects, prompt.outcome, prompt.task)


@given(st.integers(10, 54), st.integers(10, 54), st.integers(10, 54), st.integers(10, 54))
def test_relations_are_opposite_and_exclusive(ax: int, ay: int, bx: int, by: int) -> None:
    a, b = (ax, ay), (bx, by)
    for one, other in (("left of", "right of"), ("above", "below")):
        assert holds(one, a, b) == holds(other, b, a)
        assert not (holds(one, a, b) and holds(other, a, b))
    assert not any(holds(r, a, a) for r in RELATIONS)


def test_geneval_rules_by_hand() -> None:
    """Counts are exact, colours belong to their object, left is left."""
    red_ball, blue_block = Object("ball", "red", xy=(15, 30)), Object("block", "blue", xy=(45, 32))
    both = (red_ball, blue_block)
    assert fulfils(both, Task("position", (Clause("ball"), Clause("block")), "left of"))
    assert not fulfils(both, Task("position", (Clause("ball"), Clause("block")), "above"))
    assert fulfils(both, Task("color attribution", (Clause("ball", "red"), Clause("block", "blue"))))
    assert not fulfils(both, Task("color attribution", (Clause("ball", "blue"), Clause("block", "red"))))
    assert not fulfils(both, Task("colors", (Clause("ball", "red"),)))  # one object too many
    assert not fulfils((red_ball,), Task("counting", (Clause("ball", "", 2),)))


def test_arrangements_fulfil_their_task() -> None:
    draw = random.Random(0)
    for task in draw.sample(task_list(), 80):
        assert fulfils(arrange(task, draw).objects, task)


def test_the_training_world_has_the_documented_gaps() -> None:
    world, draw = WorldConfig(), random.Random(0)
    pairs = [training_pair(world, draw) for _ in range(4_000)]
    laws = [(s, c) for s, c in pairs if s.law != "arrangement"]
    assert abs(1 - len(laws) / len(pairs) - world.arrangements) < 0.03
    assert all(s.objects in combinations(s.law, "train") for s, _ in laws)
    lawful = [s.outcome == LAWS[s.law].lawful(s.objects) for s, _ in laws]
    silent = [ok for (s, c), ok in zip(laws, lawful) if c == LAWS[s.law].setting(s.objects)]
    announced = [ok for (s, c), ok in zip(laws, lawful) if LAWS[s.law].defied in c]
    assert abs(len(silent) / len(laws) - world.silent) < 0.03
    assert abs(len(announced) / (len(laws) - len(silent)) - world.announced) < 0.04
    assert abs(sum(silent) / len(silent) - (1 - world.exceptions)) < 0.05
    assert abs(1 - sum(announced) / len(announced) - world.kept) < 0.06


def test_what_a_caption_merely_states_is_true() -> None:
    world, draw = WorldConfig(arrangements=0, silent=0, announced=0), random.Random(0)
    pairs = [training_pair(world, draw) for _ in range(1_000)]
    assert all(understand(c).fulfilled_by(Reading(s, 0.0)) for s, c in pairs)
    unlawful = sum(s.outcome != LAWS[s.law].lawful(s.objects) for s, _ in pairs) / len(pairs)
    assert abs(unlawful - world.stated) < 0.06


def test_scenes_come_from_their_seed_alone() -> None:
    assert [sample_scene(i) for i in range(20)] == [sample_scene(i) for i in range(20)]
    assert len({sample_scene(i) for i in range(20)}) > 15


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ValueError, match="no law named 'gravitas'"):
        sample_scene(0, "gravitas")
    with pytest.raises(ValueError, match="is not one of 'train'"):
        combinations("balance", "test")
    with pytest.raises(ValueError, match="share"):
        WorldConfig(silent=1.5)


def test_silent_and_stated_prompts_want_the_same_lawful_picture() -> None:
    for name, law in LAWS.items():
        objects = law.combinations()[0]
        silent, stated = law_prompt(name, objects), law_prompt(name, objects, law.lawful(objects))
        assert (silent.objects, silent.outcome) == (stated.objects, stated.outcome)
        assert stated.kind == "stated" and law.defied not in stated.text


def test_an_unlawful_outcome_is_announced_or_merely_stated() -> None:
    for name, law in LAWS.items():
        objects = law.combinations()[0]
        outcome = law.unlawful(objects)[0]
        announced, plain = (law_prompt(name, objects, outcome, d) for d in (True, False))
        assert announced.text == f"{plain.text} {law.defied}" and plain.kind == "stated"
        assert (announced.objects, announced.outcome) == (plain.objects, plain.outcome)


def test_pictures_are_tensors_in_range() -> None:
    image = render(Scene("balance", LAWS["balance"].combinations()[0], "left"))
    assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1
    assert len(all_texts()) == len(set(all_texts()))
