"""Corrupted renders: what still counts as showing the scene, and whether labels agree with the inspector."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minireflect import caption, inspect, load_pipeline, render, rng, sample_scene
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, StepTable
from minireflect.pretrain import corrupt as corrupting
from minireflect.pretrain.corrupt import (
    Chance,
    block_error,
    corrupt,
    corrupt_all,
    distance,
    dull,
    guess,
    mix,
    still_shows,
)
from minireflect.pretrain.matcher import visible
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


def test_every_batch_of_pictures_is_corrupted_by_its_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    told, scene = [], sample_scene(0)
    monkeypatch.setattr(corrupting, "corrupt", lambda pipe, clean, twins, texts, chance: clean)
    pipe = SimpleNamespace(device=torch.device("cpu"))
    corrupt_all(pipe, [scene] * 130, [scene] * 130, ["x"] * 130, lambda x, *_: x[:, 0, 0, 0], told.append)
    assert told == [0, 128]


@pytest.mark.parametrize(("error", "shows"), [(0.2, True), (0.3, False)])
def test_a_block_that_is_a_quarter_off_shows_nothing(error: float, shows: bool) -> None:
    """In [0, 1], the mean of 4x4 pixels of one colour; for the scene as for its objects."""
    scene = replace(sample_scene(0, "gravity"), shift=(0, 0))
    clean, twin = render(scene)[None], render(sample_scene(1, "balance"))[None]
    image = clean.clone()
    image[0, 2, 40:44, 8:12] -= 2 * error  # of the blue alone
    assert block_error(image, clean)[0, 10, 2].item() == pytest.approx(error, abs=1e-5)
    assert still_shows(image, clean, twin).item() is shows
    assert visible(block_error(image, clean)[0], replace(scene, objects=())) == [shows]


def test_a_guess_is_what_the_noise_says_x_0_is() -> None:
    """Of a network that knows the noise the guess is the picture itself; it is not told the prompt."""
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=rng(0, "guess"))
    told: list[str] = []
    knows = lambda texts: told.extend(texts) or (lambda w: lambda x, t: noise)  # noqa: E731
    pipe = SimpleNamespace(schedule=Schedule(ScheduleConfig()), eps=knows)
    torch.testing.assert_close(guess(pipe, z, noise, torch.tensor([850, 900, 989])), z, atol=1e-4, rtol=0)
    assert told == [""] * 3


def test_ghosts_are_blends_or_halves_of_two_pictures_and_dull_ones_are_a_little_darker() -> None:
    """Two others in three are twins, here ones; the third is a neighbour, here zeros as z itself."""
    z, chance = torch.zeros(400, 4, 8, 8), Chance(rng(0, "mix"), torch.zeros(400, 1))
    blended = (torch.arange(400) % 2 == 0).view(-1, 1, 1, 1)
    ghosts = mix(z, z + 1, blended, chance)[torch.arange(400) % 2 == 0].flatten(1)
    halves = mix(z, z + 1, ~blended, chance)[torch.arange(400) % 2 == 0].flatten(1)
    for found in (ghosts, halves):
        assert 0.53 < found.any(1).float().mean() < 0.8  # four standard errors
    shares = ghosts[ghosts.any(1)]
    assert (shares == shares[:, :1]).all() and 0.3 <= shares.min() < 0.35 and 0.65 < shares.max() <= 0.7
    assert set(halves[halves.any(1)].mean(1).tolist()) == {0.5} and set(halves.unique().tolist()) == {0, 1}
    white = torch.ones(400, 3, 64, 64)
    dim = (dull(white, ~blended.logical_or(~blended), chance).mean((1, 2, 3)) + 1) / 2
    assert 0.87 < dim.min() < 0.9 and 0.98 < dim.max() < 1.01
    spread = dull(white, blended.logical_or(~blended), chance).std((1, 2, 3))
    assert spread.min() < 0.01 and 0.14 < spread.max() < 0.152


def test_one_picture_in_six_stays_clean_and_every_way_changes_the_others() -> None:
    """With an autoencoder that makes constant pictures a little darker, and a network that predicts no noise;
    a picture is 0.5 everywhere, its twin -0.5.
    """
    images = torch.full((60, 3, 64, 64), 0.5)
    schedule = Schedule(ScheduleConfig())
    pipe = SimpleNamespace(
        autoencoder=SimpleNamespace(encode=lambda x: x[:, :1, ::8, ::8].expand(-1, 4, -1, -1).clone()),
        decode=lambda z: torch.nn.functional.interpolate(z[:, :3], scale_factor=8) - 0.01,
        eps=lambda texts: lambda w: lambda x, t: torch.zeros_like(x),
        table=schedule.table,
        schedule=schedule,
    )
    found = corrupt(pipe, images, -images, ["x"] * 60, rng(0, "kinds"))
    chance = Chance(rng(0, "kinds"), images)
    kind, way = (chance.integers(n).flatten() for n in (6, 3))
    encoded = pipe.decode(pipe.autoencoder.encode(images))
    same, plain = ((found == x).flatten(1).all(1) for x in (images, encoded))
    assert torch.equal(same, kind == 0) and 3 < same.sum() < 20
    for rows in (kind == 1, kind == 2, kind == 3, kind == 5, (kind == 4) & (way == 0)):
        assert rows.any() and not plain[rows].any()
    rows = (kind == 4) & (way > 0)
    assert rows.any() and not plain[rows].all()  # a neighbour is as the picture itself
    noise = (found - encoded)[kind == 1].flatten(1).std(1)
    assert noise.max() < 0.32  # of latents whose std is 1


def test_guesses_are_from_high_levels_and_up_to_eight_steps_are_drawn_again_with_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels, tables, etas = [], set(), set()
    monkeypatch.setattr(corrupting, "guess", lambda pipe, z, noise, t: levels.extend(t.tolist()) or z)

    def denoised(eps: object, x: Tensor, table: StepTable, eta: float, chance: torch.Generator) -> list:
        tables.add(len(table)), etas.add(eta)
        assert table.t_prev[-1] == 0  # the last steps
        return [SimpleNamespace(x=x)]

    monkeypatch.setattr(corrupting, "denoise", denoised)
    schedule, images = Schedule(ScheduleConfig()), torch.zeros(60, 3, 8, 8)
    pipe = SimpleNamespace(
        autoencoder=SimpleNamespace(encode=lambda x: torch.zeros(60, 4, 1, 1)),
        decode=lambda z: images, eps=lambda texts: lambda w: None, table=schedule.table, schedule=schedule,
    )  # fmt: skip
    for seed in range(60):
        corrupt(pipe, images, images, ["x"] * 60, rng(seed, "kinds"))
    assert tables == {1, 2, 3, 4, 5, 6, 7, 8} and etas == {1.0}
    assert 850 <= min(levels) < 860 and 980 < max(levels) < 990


@pytest.mark.parametrize(("share", "shows"), [(0.4, True), (0.46, True), (0.485, False), (0.5, False)])
def test_nearly_halfway_to_the_twin_shows_neither(share: float, shows: bool) -> None:
    """The error must be less than 0.9 times that against the twin: a share below 0.9 / 1.9 = 0.474."""
    clean, twin = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.6)
    assert still_shows(clean + share * twin, clean, twin).item() is shows
