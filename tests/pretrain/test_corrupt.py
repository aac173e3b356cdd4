"""Corrupted renders: what still counts as showing the scene, and whether labels agree with the inspector."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from minireflect import caption, inspect, load_pipeline, render, rng, sample_scene
from minireflect.pretrain.matcher import corrupt, corrupt_all, distance, still_shows
from minireflect.streams import choices
from minireflect.world.laws import LAWS
from minireflect.world.prompts import draw_prompts, near_miss


def test_a_shifted_camera_still_shows_the_scene_but_another_scene_or_a_blend_does_not() -> None:
    for i, law in enumerate(LAWS):
        scene = replace(sample_scene(i, law), shift=(0, 0))
        true = render(scene)[None]
        for outcome in LAWS[law].unlawful(scene.objects) + [LAWS[law].lawful(scene.objects)]:
            if outcome == scene.outcome:
                continue
            other = render(replace(scene, outcome=outcome))[None]
            for shift in ((0, 0), (2, 0), (-1, 2)):
                assert still_shows(render(replace(scene, shift=shift))[None], true, other)
            assert not still_shows(
                render(replace(scene, shift=(6, 0)))[None], true, other
            )  # no camera is there
            assert not still_shows(other, true, other) and not still_shows(0.5 * (true + other), true, other)
        noisy = true + 0.15 * torch.randn(true.shape, generator=rng(0, "noise"))
        assert still_shows(noisy, true, other) and distance(noisy, true) < 0.1


@pytest.mark.slow
def test_labels_of_corrupted_pictures_agree_with_the_inspector() -> None:
    """`still_shows` compares with the clean render and never calls the inspector, and yet the two agree."""
    draw = choices(0, "spoil")
    prompts = draw_prompts("physical", "train", 128, draw)
    scenes = [p.scene(draw) for p in prompts]
    twins = [replace(near_miss(p, draw).scene(draw), shift=s.shift) for p, s in zip(prompts, scenes)]
    clean, other = (torch.stack([render(s) for s in part]) for part in (scenes, twins))
    texts = [caption(s) for s in scenes]
    corrupted = corrupt(load_pipeline(), clean, other, texts, rng(0, "spoil"))
    assert corrupted.shape == clean.shape and corrupted.abs().max() <= 1
    right = torch.tensor([p.fulfilled_by(inspect(image)) for p, image in zip(prompts, corrupted)])
    shown = still_shows(corrupted, clean, other)
    assert still_shows(clean, clean, other).all() and not still_shows(other, clean, other).any()
    assert (shown == right).float().mean() > 0.9
    assert 0.6 < shown.float().mean() < 0.9  # both labels occur


def test_labels_compare_a_corrupted_picture_with_its_clean_render() -> None:
    """Also on the CPU, where moving a tensor to its own device copies nothing."""
    draw = choices(0, "parts")
    prompts = draw_prompts("physical", "train", 12, draw)
    scenes, texts = [p.scene(draw) for p in prompts], [p.text for p in prompts]
    seen = []

    def label(corrupted: Tensor, clean: Tensor, twins: Tensor) -> Tensor:
        seen.append((corrupted, clean, twins))
        return (corrupted != clean).flatten(1).any(1)

    pipe, stream = load_pipeline(), partial(rng, 0, "test")
    images, changed = corrupt_all(pipe, scenes, scenes[::-1], texts, label, stream)
    corrupted, clean, twins = seen[0]
    assert len(seen) == 1 and torch.equal(corrupted, images)
    assert torch.equal(clean, torch.stack([render(s) for s in scenes]))
    assert torch.equal(twins, clean.flip(0))
    assert 2 < changed.sum() <= 12
    again, _ = corrupt_all(pipe, scenes, scenes[::-1], texts, label, stream)
    assert torch.equal(again, images)
