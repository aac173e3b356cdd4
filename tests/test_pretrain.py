"""What the base and the reward learn from: captions that are true, pictures spoilt as a generator spoils them, and their labels."""

from dataclasses import replace

import torch

from minireflect import caption, inspect, load_pipeline, render, rng, sample_scene
from minireflect.methods.spoil import distance, faithful, spoil
from minireflect.streams import choices
from minireflect.world.data import WorldConfig, captioned_laws, training_pairs
from minireflect.world.laws import LAWS
from minireflect.world.prompts import draw_prompts, near_miss, understand


def test_plain_captions_say_what_is_to_be_seen() -> None:
    _, scenes, captions = training_pairs(400, WorldConfig(), choices(0, "plain"))
    data = captioned_laws(400, WorldConfig(), choices(0, "plain"))
    rows = data.plain
    assert data.captions == captions
    assert 100 < len(rows) < 300
    for i in rows:
        meant = understand(captions[i])
        assert meant.task or meant.outcome == scenes[i].outcome
    left = [understand(captions[i]) for i in range(400) if i not in rows]
    assert {p.kind for p in left} == {"physical", "unconventional"}


def test_a_moved_camera_is_faithful_and_neither_another_scene_nor_a_ghost_is() -> None:
    for i, law in enumerate(LAWS):
        scene = replace(sample_scene(i, law), shift=(0, 0))
        true = render(scene)[None]
        for outcome in LAWS[law].unlawful(scene.objects) + [LAWS[law].lawful(scene.objects)]:
            if outcome == scene.outcome:
                continue
            other = render(replace(scene, outcome=outcome))[None]
            for shift in ((0, 0), (2, 0), (-1, 2)):
                assert faithful(render(replace(scene, shift=shift))[None], true, other)
            assert not faithful(render(replace(scene, shift=(6, 0)))[None], true, other)  # no camera is there
            assert not faithful(other, true, other) and not faithful(0.5 * (true + other), true, other)
        noisy = true + 0.15 * torch.randn(true.shape, generator=rng(0, "noise"))
        assert faithful(noisy, true, other) and distance(noisy, true) < 0.1


def test_spoilt_pictures_have_the_label_that_the_inspector_would_give() -> None:
    """`faithful` never asks the inspector; it compares with the scene that was drawn, and the two agree."""
    draw = choices(0, "spoil")
    prompts = draw_prompts("physical", "train", 128, draw)
    scenes = [p.scene(draw) for p in prompts]
    twins = [replace(near_miss(p, draw).scene(draw), shift=s.shift) for p, s in zip(prompts, scenes)]
    clean, other = (torch.stack([render(s) for s in part]) for part in (scenes, twins))
    texts = [caption(s) for s in scenes]
    spoilt = spoil(load_pipeline(), clean, other, texts, rng(0, "spoil"))
    assert spoilt.shape == clean.shape and spoilt.abs().max() <= 1
    right = torch.tensor([p.fulfilled_by(inspect(image)) for p, image in zip(prompts, spoilt)])
    shown = faithful(spoilt, clean, other)
    assert faithful(clean, clean, other).all() and not faithful(other, clean, other).any()
    assert (shown == right).float().mean() > 0.9
    assert 0.6 < shown.float().mean() < 0.9  # both kinds are there to learn from
