"""Prompts: splits, meaning, near misses, scenes that fulfil them; GenEval's metadata, rules and folders."""

import random
from collections import Counter
from contextlib import nullcontext
from itertools import combinations as combinations_of

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minireflect.world.captions import caption
from minireflect.world.inspector import inspect
from minireflect.world.laws import LAWS, render
from minireflect.world.prompts import (
    KINDS,
    TASKS,
    Prompt,
    PromptMix,
    all_texts,
    combinations,
    draw_prompts,
    law_prompt,
    near_miss,
    prompt_set,
    sample_arrangement,
    sample_scene,
    understand,
)
from minireflect.world.scenes import SPLITS, Object

FIELDS = ("name", "color", "size", "place")


@pytest.mark.parametrize("name", LAWS)
def test_train_and_held_out_combinations_are_disjoint_and_complete(name: str) -> None:
    """Held out is every fifth of the shuffled combinations, in turns for validation and for test."""
    train, validation, test = (set(combinations(name, split)) for split in SPLITS)
    order = list(LAWS[name].combinations)
    random.Random(f"split/{name}").shuffle(order)
    assert (validation, test) == (set(order[::10]), set(order[5::10])) and validation and test
    assert train == set(order) - validation - test


def test_prompts_of_the_splits_are_disjoint() -> None:
    for kind in KINDS:
        for one, other in combinations_of(SPLITS, 2):
            here, there = prompt_set(kind, one), prompt_set(kind, other)
            assert not {p.text for p in here} & {p.text for p in there}
            assert not {p.content for p in here} & {p.content for p in there}


def facts(prompt: Prompt) -> set[str]:
    """What a sentence asks for, as sorted text, by a rule of its own: turn the relation, sort the things."""
    turn = {"right of": "left of", "below": "above"}
    for word, other in turn.items():
        if f" {word} " in prompt.text:
            first, second = prompt.text.split(f" {word} ")
            return {f"{second} {other} {first}"}
    return set(prompt.text.split(" and "))


@pytest.mark.parametrize("split", SPLITS[1:])
def test_what_a_held_out_arrangement_asks_for_is_in_no_other_split_in_other_words(split: str) -> None:
    rest = [p for other in SPLITS if other != split for p in prompt_set("arrangement", other)]
    known, new = [facts(p) for p in rest], prompt_set("arrangement", split)
    assert not [p.text for p in new if facts(p) in known]
    assert {p.task for p in new} == {*TASKS} - {"single object", "two objects"}  # of three contents each
    mirrored = [p for p in new if p.task in ("position", "color attribution")]
    assert all(sum(facts(p) == facts(q) for q in mirrored) == 2 for p in mirrored)  # both ways to say it


@pytest.mark.parametrize("split", SPLITS)
def test_an_evaluation_has_all_tasks_of_geneval_and_of_these_two_are_from_training(split: str) -> None:
    few, kind = {"single object", "two objects"}, "arrangement"
    drawn = draw_prompts(kind, split, 12, random.Random(0))
    drawn += [sample_arrangement(split, random.Random(i)) for i in range(60)]
    assert [p.task for p in drawn[:12]] == [*TASKS] * 2 and {p.task for p in drawn[12:]} == {*TASKS}
    assert all(p in prompt_set(kind, "train" if p.task in few else split) for p in drawn)
    for prompt in prompt_set(kind, split):
        assert prompt.group == prompt.task and prompt.text == prompt.graph.sentence


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

    assert parts("validation") | parts("test") <= parts("train")


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_caption_is_understood_and_fulfilled_by_its_own_picture(seed: int) -> None:
    scene = sample_scene(seed)
    if scene.law != "arrangement":
        prompt = understand(caption(scene))
        assert prompt is not None and prompt.fulfilled_by(inspect(render(scene)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_is_understood_as_itself(kind: str) -> None:
    for split in SPLITS:
        for prompt in prompt_set(kind, split):
            assert understand(prompt.text.upper() + ".") == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_near_miss_asks_for_another_picture(kind: str) -> None:
    draw = random.Random(0)
    for prompt in draw_prompts(kind, "train", 80, draw):
        other = near_miss(prompt, draw)
        assert (other.law, other.task) == (prompt.law, prompt.task)
        assert (other.objects, other.outcome, other.graph) != (prompt.objects, prompt.outcome, prompt.graph)


@pytest.mark.parametrize("split", SPLITS)
def test_a_near_miss_is_of_its_split_and_differs_as_little_as_can_be(split: str) -> None:
    """Of a law in half of the cases the outcome differs, else as few attributes as there can be."""
    draw = random.Random(0)

    def differ(a: tuple[Object, ...], b: tuple[Object, ...]) -> int:
        return sum(getattr(x, key) != getattr(y, key) for x, y in zip(a, b) for key in FIELDS)

    outcomes = 0
    for prompt in draw_prompts("physical", split, 200, draw):
        other, known = near_miss(prompt, draw, split), combinations(prompt.law, split)
        assert other.objects in known
        outcomes += other.objects == prompt.objects
        least = min(differ(prompt.objects, objects) for objects in known if objects != prompt.objects)
        assert differ(prompt.objects, other.objects) in (0, least)
    assert 72 < outcomes < 128  # four standard errors
    known = [p for p in prompt_set("arrangement", split) if p.task == "position"]
    assert all(near_miss(p, draw, split) in known for p in known)
    ball = understand("a red ball")  # a colour or a shape, never both
    others = {near_miss(ball, draw, "train").graph.entities[0] for _ in range(100)}
    assert all((e.color == "red") != (e.name == "ball") for e in others)


def test_scenes_are_of_the_split_and_obey_the_law_as_asked() -> None:
    for split in SPLITS:
        few = [p for p in prompt_set("arrangement", "train") if p.task in ("single object", "two objects")]
        arranged = [p.graph for p in (*prompt_set("arrangement", split), *few)]
        for i in range(30):
            scene = sample_scene(i, "arrangement", split)
            assert any(graph.fulfilled_by(scene.objects) for graph in arranged)
        for i, (name, law) in enumerate([*LAWS.items()] * 4):
            scene = sample_scene(i, name, split, lawful=i % 2 == 0)
            assert scene.objects in combinations(name, split)
            assert (scene.outcome == law.lawful(scene.objects)) == (i % 2 == 0)


def test_scenes_of_arrangements_fulfil_their_graph() -> None:
    draw = random.Random(0)
    for prompt in draw.sample([p for s in SPLITS for p in prompt_set("arrangement", s)], 80):
        assert prompt.graph.fulfilled_by(prompt.scene(draw).objects)


def test_the_mix_of_prompts_has_its_shares_and_refuses_impossible_ones() -> None:
    texts, groups = PromptMix(physical=3, unconventional=1, arrangement=0).draw(0, 400, 0)
    assert all(understand(t) is not None for t in texts)
    assert 0.68 < sum(g.startswith("physical/") for g in groups) / 400 < 0.82
    drawn = [tuple(PromptMix().draw(seed, 30, step)[0]) for seed in (0, 1) for step in (0, 1)]
    assert len({*drawn}) == 4  # every step of every seed has its own
    with pytest.raises(ValueError, match="must be at least 0"):
        PromptMix(physical=-0.1)


def test_every_law_has_its_share_of_the_mix_and_a_family_of_its_own() -> None:
    drawn, families = PromptMix(physical=1, unconventional=1, arrangement=0).draw(0, 400, 0)
    asked = [understand(text) for text in drawn]
    assert families == [f"{p.kind}/{p.law}" for p in asked]
    counts = Counter(p.law for p in asked)
    assert {*counts} == {*LAWS} and min(counts.values()) > 23  # 50 each, less four standard errors


def test_scenes_come_from_their_seed_alone() -> None:
    assert [sample_scene(i) for i in range(20)] == [sample_scene(i) for i in range(20)]
    assert len({sample_scene(i) for i in range(20)}) > 15


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ValueError, match=r"law must be one of balance, .*, arrangement, got 'gravitas'"):
        sample_scene(0, "gravitas")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'held-out'"):
        combinations("balance", "held-out")
    with pytest.raises(ValueError, match=r"prompt kind must be one of physical, .* stated, got 'moral'"):
        prompt_set("moral", "train")


def test_silent_and_stated_prompts_want_the_same_lawful_picture() -> None:
    for name, law in LAWS.items():
        objects = law.combinations[0]
        silent, stated = law_prompt(name, objects), law_prompt(name, objects, law.lawful(objects))
        assert (silent.objects, silent.outcome) == (stated.objects, stated.outcome)
        assert stated.kind == "stated" and law.defied not in stated.text


def test_an_unlawful_outcome_is_announced_or_merely_stated() -> None:
    for name, law in LAWS.items():
        objects = law.combinations[0]
        outcome = law.unlawful(objects)[0]
        announced, plain = (law_prompt(name, objects, outcome, d) for d in (True, False))
        assert announced.text == f"{plain.text} {law.defied}" and plain.kind == "stated"
        assert (announced.objects, announced.outcome) == (plain.objects, plain.outcome)


def test_no_two_prompts_share_a_text() -> None:
    assert len(all_texts()) == len(set(all_texts()))


def test_what_is_trained_on_is_of_the_training_split() -> None:
    """The prompts of RL, and by default the scenes and the near misses; by what they ask for, not by text."""
    train = {(p.law, p.objects, p.graph) for kind in KINDS for p in prompt_set(kind, "train")}
    draw, drawn = random.Random(0), PromptMix(physical=1, unconventional=1, arrangement=1).draw(0, 300, 0)
    asked = [understand(text) for text in drawn[0]]
    asked += [near_miss(p, draw) for p in asked]
    assert {p.kind for p in asked} >= set(KINDS)
    assert {(p.law, p.objects, p.graph) for p in asked} <= train
    scenes = [scene for scene in map(sample_scene, range(300)) if scene.law in LAWS]
    assert {(s.law, s.objects, None) for s in scenes} <= train


def test_a_prompt_that_is_alone_in_its_split_has_no_near_miss() -> None:
    for prompt in prompt_set("arrangement", "test"):
        alone = [p for p in prompt_set("arrangement", "test") if p.task == prompt.task] == [prompt]
        with (
            pytest.raises(ValueError, match=r"'colors' has no other prompt in 'test'")
            if alone
            else nullcontext()
        ):
            near_miss(prompt, random.Random(0), "test")


def test_the_default_mix_is_of_laws_and_a_tenth_of_arrangements() -> None:
    """Of 1,000 prompts, four standard errors."""
    _, families = PromptMix().draw(0, 1_000, 0)
    shares = Counter(family.split("/")[0] for family in families)
    assert abs(shares["physical"] - 450) < 63 and abs(shares["unconventional"] - 450) < 63
    assert abs(shares["arrangement"] - 100) < 38


def test_half_of_the_lawful_near_misses_name_their_outcome_and_half_of_the_scenes_are_lawful() -> None:
    draw, prompt = random.Random(0), prompt_set("unconventional", "train")[0]
    missed = Counter(near_miss(prompt, draw).kind for _ in range(400))
    assert missed["physical"] > 60 and abs(missed["physical"] / missed["stated"] - 1) < 0.6
    scenes = [sample_scene(i, "gravity") for i in range(200)]
    lawful = sum(s.outcome == LAWS["gravity"].lawful(s.objects) for s in scenes)
    assert 72 < lawful < 128
