"""Prompts: splits, meaning, near misses, and scenes that fulfil them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minireflect.world.captions import caption
from minireflect.world.inspector import inspect
from minireflect.world.laws import LAWS
from minireflect.world.prompts import (
    KINDS,
    TASKS,
    PromptMix,
    all_texts,
    combinations,
    draw_prompts,
    law_prompt,
    near_miss,
    prompt_set,
    sample_scene,
    understand,
)
from minireflect.world.render import render


@pytest.mark.parametrize("name", LAWS)
def test_train_and_held_out_combinations_are_disjoint_and_complete(name: str) -> None:
    train, held_out = combinations(name, "train"), combinations(name, "held-out")
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(LAWS[name].combinations)
    assert 0.15 < len(held_out) / len(LAWS[name].combinations) < 0.3


def test_prompts_of_the_splits_are_disjoint() -> None:
    for kind in KINDS:
        shared = {p.text for p in prompt_set(kind, "train")} & {p.text for p in prompt_set(kind, "held-out")}
        assert shared <= {"a ball", "a block", "a cone"}  # GenEval's single objects: there are only three
    graphs = [
        {p.graph for p in prompt_set("arrangement", s) if p.task != "single object"}
        for s in ("train", "held-out")
    ]
    assert not graphs[0] & graphs[1]


def test_every_task_of_geneval_has_prompts_in_both_splits() -> None:
    for split in ("train", "held-out"):
        prompts = prompt_set("arrangement", split)
        assert list(dict.fromkeys(p.task for p in prompts)) == list(TASKS)
        assert all(p.group == p.task and p.text == p.graph.sentence for p in prompts)


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


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_caption_is_understood_and_fulfilled_by_its_own_picture(seed: int) -> None:
    scene = sample_scene(seed)
    if scene.law != "arrangement":
        prompt = understand(caption(scene))
        assert prompt is not None and prompt.fulfilled_by(inspect(render(scene)))


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
        assert (other.law, other.task) == (prompt.law, prompt.task)
        assert (other.objects, other.outcome, other.graph) != (prompt.objects, prompt.outcome, prompt.graph)


def test_scenes_of_arrangements_fulfil_their_graph() -> None:
    draw = random.Random(0)
    for prompt in draw.sample([p for s in ("train", "held-out") for p in prompt_set("arrangement", s)], 80):
        assert prompt.graph.fulfilled_by(prompt.scene(draw).objects)


def test_the_mix_of_prompts_has_its_shares_and_refuses_impossible_ones() -> None:
    texts, groups = PromptMix(physical=3, unconventional=1, arrangement=0).draw(0, 400, 0)
    assert all(understand(t) is not None for t in texts)
    assert 0.68 < sum(g.startswith("physical/") for g in groups) / 400 < 0.82
    with pytest.raises(ValueError, match="must be at least 0"):
        PromptMix(physical=-0.1)


def test_scenes_come_from_their_seed_alone() -> None:
    assert [sample_scene(i) for i in range(20)] == [sample_scene(i) for i in range(20)]
    assert len({sample_scene(i) for i in range(20)}) > 15


def test_unknown_names_are_explained() -> None:
    with pytest.raises(ValueError, match="no law named 'gravitas'"):
        sample_scene(0, "gravitas")
    with pytest.raises(ValueError, match="is not one of 'train'"):
        combinations("balance", "test")


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
