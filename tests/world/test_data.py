"""The training world: its documented gaps, and pictures and captions that no prompt asks for."""

import random
from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest

from minireflect.models.reasongen import ReasonGenConfig
from minireflect.streams import choices
from minireflect.world import data
from minireflect.world.captions import rationale
from minireflect.world.data import (
    WorldConfig,
    captioned_graphs,
    recolored,
    recombined_pair,
    related_caption,
    training_pair,
    training_pairs,
)
from minireflect.world.graphs import holds
from minireflect.world.laws import LAWS, canvas, render_pixels
from minireflect.world.prompts import combinations, prompt_set, sample_scene, split, understand
from minireflect.world.scenes import SPLITS, Object, Reading, Scene
from tests.small import REASON_WORDS as WORDS


def test_the_training_world_has_the_documented_gaps() -> None:
    draw = random.Random(0)
    pairs = [training_pair(WorldConfig(), draw) for _ in range(4_000)]
    laws = [(s, c) for s, c in pairs if s.law != "arrangement"]
    assert abs(1 - len(laws) / len(pairs) - 0.15) < 0.03
    assert all(s.objects in combinations(s.law, "train") for s, _ in laws)
    lawful = [s.outcome == LAWS[s.law].lawful(s.objects) for s, _ in laws]
    silent = [ok for (s, c), ok in zip(laws, lawful) if c == LAWS[s.law].setting(s.objects)]
    announced = [ok for (s, c), ok in zip(laws, lawful) if LAWS[s.law].defied in c]
    assert abs(len(silent) / len(laws) - 0.4) < 0.03
    assert abs(len(announced) / (len(laws) - len(silent)) - 0.4) < 0.04
    assert abs(sum(silent) / len(silent) - 0.8) < 0.05
    assert abs(1 - sum(announced) / len(announced) - 0.45) < 0.06


def test_what_a_caption_merely_states_is_true_and_half_of_it_breaks_the_law() -> None:
    world, draw = WorldConfig(arrangements=0, silent=0, announced=0), random.Random(0)
    pairs = [training_pair(world, draw) for _ in range(1_000)]
    assert all(understand(c).fulfilled_by(Reading(s, 0.0)) for s, c in pairs)
    unlawful = sum(s.outcome != LAWS[s.law].lawful(s.objects) for s, _ in pairs) / len(pairs)
    assert abs(unlawful - 0.5) < 0.06


def test_a_share_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=r"silent must be in \[0, 1\], got 1.5"):
        WorldConfig(silent=1.5)


def pictures(*splits: str) -> set[bytes]:
    """Of all laws, combinations of these splits and outcomes."""
    return {
        canvas(law, objects, outcome).tobytes()
        for law in LAWS for split in splits
        for objects in combinations(law, split) for outcome in LAWS[law].outcomes
    }  # fmt: skip


def test_recolored_scenes_differ_in_colours_only_and_are_never_held_out() -> None:
    draw, held_out = choices(0, "twins"), pictures(*SPLITS[1:])
    for i in range(400):
        scene = sample_scene(i)
        other = recolored(scene, draw)
        assert [replace(o, color="") for o in other.objects] == [replace(o, color="") for o in scene.objects]
        assert (other.law, other.outcome, other.shift) == (scene.law, scene.outcome, scene.shift)
        assert [bool(o.color) for o in other.objects] == [bool(o.color) for o in scene.objects]
        assert other.law == "arrangement" or canvas(*other.facts).tobytes() not in held_out
        assert render_pixels(other).shape == (64, 64, 3)


def test_recombined_pictures_are_of_no_prompt_and_their_words_are_known() -> None:
    draw, asked = choices(0, "altered"), pictures(*SPLITS)
    outcomes = Counter()
    for _ in range(2_000):
        scene, caption = recombined_pair(draw)
        law = LAWS[scene.law]
        assert canvas(*scene.facts).tobytes() not in asked
        assert caption == f"{law.setting(scene.objects)}, {law.outcomes[scene.outcome]}"
        thought = rationale(scene, rng=draw)
        assert {*split(caption), *split(thought)} <= set(WORDS.ids)
        assert len(split(caption)) + 2 <= ReasonGenConfig.prompt
        assert len(split(thought)) + 1 <= ReasonGenConfig.rationale
        outcomes[scene.law, scene.outcome == law.lawful(scene.objects)] += 1
    assert len(outcomes) == 16 and min(outcomes.values()) > 50  # every law, obeyed and broken


def test_related_captions_are_true_and_none_is_held_out() -> None:
    draw = choices(0, "related")
    held_out = {p.text for split in SPLITS[1:] for p in prompt_set("arrangement", split)}
    assert {p.task for p in prompt_set("arrangement", "test")} >= {"position", "color attribution"}
    said = Counter()
    for _ in range(3_000):
        scene, _ = training_pair(WorldConfig(arrangements=1.0), draw)
        text = related_caption(scene, draw)
        if len(scene.objects) != 2:
            assert text == ""
        if not text:
            continue
        relation = next(r for r in ("left of", "right of", "above", "below") if r in text)
        first, second = (part.removeprefix("a ") for part in text.split(f" {relation} "))
        orders = [
            (a, b) for a, b in permutations(scene.objects) if (a.words, b.words) == (first, second)
        ]  # both, of two that look the same
        assert any(holds(relation, a, b) for a, b in orders)
        a, b = orders[0]
        assert f"a {a.name} {relation} a {b.name}" not in held_out
        assert f"a {a.words} and a {b.words}" not in held_out
        assert f"a {b.words} and a {a.words}" not in held_out
        assert set(split(text)) <= set(WORDS.ids)
        said[relation, a.name == b.name] += 1
    assert len(said) == 8  # all relations, also of two things of one shape


def test_a_held_out_relation_is_not_said_the_other_way_around_either() -> None:
    graph = next(p.graph for p in prompt_set("arrangement", "test") if p.task == "position")
    ((_, relation, _),) = graph.relations
    at = {"left of": (-20, 0), "right of": (20, 0), "above": (0, -20), "below": (0, 20)}[relation]
    a = Object(graph.entities[0].name, "red", xy=(32 + at[0], 32 + at[1]))
    b = Object(graph.entities[1].name, "red", xy=(32, 32))
    for seed in range(20):
        assert related_caption(Scene("arrangement", (a, b), ""), random.Random(seed)) == ""


def test_shares_are_kept_and_the_rest_of_the_world_stays() -> None:
    """Without them the very same pictures as before; with them so many as are wanted."""
    plain = training_pairs(300, WorldConfig(arrangements=0.5), choices(0, "world"))
    again = training_pairs(300, WorldConfig(arrangements=0.5), choices(0, "world"), 0.0, 0.0)
    assert plain[1:] == again[1:]
    _, scenes, _ = training_pairs(400, WorldConfig(arrangements=0.0), choices(0, "world"), recombined=0.5)
    known = pictures("train")
    share = sum(canvas(*s.facts).tobytes() not in known for s in scenes) / 400
    assert 0.4 < share < 0.6


def test_graphs_are_captioned_and_plain_captions_say_all_places() -> None:
    data = captioned_graphs(60, choices(0, "graphs"))
    assert data.pixels.shape == (60, 64, 64, 3) and len(data.captions) == 60 and 5 < len(data.plain) < 30
    assert all(data.captions[i].startswith("with ") or " with " in data.captions[i] for i in data.plain)
    assert {*split(" ".join(data.captions))} <= set(data.vocabulary)


def test_arrangements_of_the_training_world_are_training_prompts() -> None:
    draw, known = choices(0, "arrangements"), {p.text for p in prompt_set("arrangement", "train")}
    pairs = [training_pair(WorldConfig(arrangements=1.0), draw) for _ in range(300)]
    assert {caption for _, caption in pairs} <= known
    assert all(understand(caption).graph.fulfilled_by(scene.objects) for scene, caption in pairs)


def test_half_of_the_relations_of_training_captions_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(
        data, "training_caption", lambda graph, scene, draw, kept: told.append(kept) or graph.sentence
    )
    captioned_graphs(2, random.Random(0))
    assert told == [0.5, 0.5]
