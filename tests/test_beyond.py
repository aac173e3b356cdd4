"""Lessons of what no prompt asks for: twins in other colours, things and outcomes of no combination, relations of coloured things."""

import random
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from minireflect.models.reasongen import ReasonGenConfig
from minireflect.pretrain.sft import ReasonTraining, lessons
from minireflect.streams import choices
from minireflect.world.data import WorldConfig, altered, related, training_pair, training_pairs, twin
from minireflect.world.graphs import holds
from minireflect.world.laws import LAWS
from minireflect.world.prompts import combinations, sample_scene, split, tasks, understand
from minireflect.world.rationales import rationale
from minireflect.world.render import canvas, render_pixels
from minireflect.world.scenes import Object, Scene
from tests.small import REASON_WORDS as WORDS
from tests.small import small_reasongen


def pictures(split: str) -> set[bytes]:
    """Of all laws, combinations of a split and outcomes."""
    return {
        canvas(law, objects, outcome).tobytes()
        for law in LAWS for objects in combinations(law, split) for outcome in LAWS[law].possible(objects)
    }  # fmt: skip


def test_twins_differ_in_colours_only_and_are_never_held_out() -> None:
    draw, held_out = choices(0, "twins"), pictures("held-out")
    for i in range(400):
        scene = sample_scene(i)
        other = twin(scene, draw)
        assert [replace(o, color="") for o in other.objects] == [replace(o, color="") for o in scene.objects]
        assert (other.law, other.outcome, other.shift) == (scene.law, scene.outcome, scene.shift)
        assert [bool(o.color) for o in other.objects] == [bool(o.color) for o in scene.objects]
        assert other.law == "arrangement" or canvas(*other.facts).tobytes() not in held_out
        assert render_pixels(other).shape == (64, 64, 3)


def test_altered_pictures_are_of_no_prompt_and_their_words_are_known() -> None:
    draw, asked = choices(0, "altered"), pictures("held-out") | pictures("train")
    outcomes = Counter()
    for _ in range(2_000):
        scene, caption = altered(draw)
        law = LAWS[scene.law]
        assert canvas(*scene.facts).tobytes() not in asked
        assert caption == f"{law.setting(scene.objects)}, {law.result(scene.objects, scene.outcome)}"
        thought = rationale(scene, draw=draw)
        assert {*split(caption), *split(thought)} <= set(WORDS.ids)
        assert len(split(caption)) + 2 <= ReasonGenConfig.prompt
        assert len(split(thought)) + 1 <= ReasonGenConfig.rationale
        outcomes[scene.law, scene.outcome == law.lawful(scene.objects)] += 1
    assert len(outcomes) == 16 and min(outcomes.values()) > 50  # every law, obeyed and broken


def test_related_captions_are_true_and_none_is_held_out() -> None:
    draw = choices(0, "related")
    held_out = {t.words for t in tasks("held-out")}
    assert {t.kind for t in tasks("held-out")} >= {"position", "color attribution"}
    said = Counter()
    for _ in range(3_000):
        scene, _ = training_pair(WorldConfig(arrangements=1.0), draw)
        text = related(scene, draw)
        if len(scene.objects) != 2:
            assert text == ""
        if not text:
            continue
        relation = next(r for r in ("left of", "right of", "above", "below") if r in text)
        first, second = (part.removeprefix("a ") for part in text.split(f" {relation} "))
        orders = [
            (a, b) for a, b in permutations(scene.objects) if (a.words, b.words) == (first, second)
        ]  # both, of two that look the same
        assert any(holds(relation, a.xy, b.xy) for a, b in orders)
        a, b = orders[0]
        assert f"a {a.name} {relation} a {b.name}" not in held_out
        assert f"a {a.words} and a {b.words}" not in held_out
        assert f"a {b.words} and a {a.words}" not in held_out
        assert set(split(text)) <= set(WORDS.ids)
        said[relation, a.name == b.name] += 1
    assert len(said) == 8  # all relations, also of two things of one shape


def test_a_held_out_relation_is_not_said_the_other_way_around_either() -> None:
    task = next(t for t in tasks("held-out") if t.kind == "position")
    at = {"left of": (-20, 0), "right of": (20, 0), "above": (0, -20), "below": (0, 20)}[task.relation]
    a = Object(task.clauses[0].name, "red", xy=(32 + at[0], 32 + at[1]))
    b = Object(task.clauses[1].name, "red", xy=(32, 32))
    for seed in range(20):
        assert related(Scene("arrangement", (a, b), ""), random.Random(seed)) == ""


def test_shares_are_kept_and_the_rest_of_the_world_stays() -> None:
    """Without them the very same pictures as before; with them so many as are wanted."""
    plain = training_pairs(300, WorldConfig(arrangements=0.5), choices(0, "world"))
    again = training_pairs(300, WorldConfig(arrangements=0.5), choices(0, "world"), 0.0, 0.0)
    assert plain[1:] == again[1:]
    _, scenes, _ = training_pairs(400, WorldConfig(arrangements=0.0), choices(0, "world"), altered=0.5)
    known = pictures("train")
    share = sum(canvas(*s.facts).tobytes() not in known for s in scenes) / 400
    assert 0.4 < share < 0.6
    for name in ("altered", "related"):
        with pytest.raises(ValueError, match=f"{name} is 1.5"):
            ReasonTraining(**{name: 1.5})


def test_lessons_take_them() -> None:
    codec, sizes = small_reasongen().codec, ReasonGenConfig(len(WORDS), 16, 4)
    training = ReasonTraining(40, arrangements=0.0, altered=1.0)
    data = lessons(training, WorldConfig(), 0, WORDS, sizes, codec, torch.device("cpu"))
    told = WORDS.decode(data.captions)
    assert len(told) == 40 and all(len(t.split()) > 4 and understand(t) is None for t in told)
