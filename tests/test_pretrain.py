"""What the base and the reward learn from: captions that are true, pictures spoilt as a generator spoils them, and their labels."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from minireflect import caption, inspect, load_pipeline, render, rng, sample_scene
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, level_weight
from minireflect.models.clip import TextConfig, TextEncoder
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.pretrain.corrupt import distance, faithful, spoil
from minireflect.pretrain.diffusion import DiffusionTraining, learn_to_read, level_chances
from minireflect.pretrain.matcher import JointSpace
from minireflect.run import Run
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


def test_levels_drawn_by_weight_have_the_same_mean_loss() -> None:
    """For any error of a level: sum of chance x weight x error is the mean of level_weight x error, in float64."""
    schedule = Schedule(ScheduleConfig())
    error = torch.rand(1000, generator=rng(0, "error")).double()
    wanted = (level_weight(schedule, torch.arange(1000), 20.0).double() * error).mean()
    spreads = []
    for levels in (0.0, 0.5, 0.9):
        chance, weight = (v.double() for v in level_chances(schedule, 20.0, levels))
        assert abs(chance.sum() - 1) < 1e-5
        assert abs((chance * weight * error).sum() / wanted - 1) < 1e-5
        spreads.append((chance * (weight * error) ** 2).sum() - wanted**2)
    assert spreads[0] > spreads[1] > spreads[2]


def test_the_text_encoder_learns_to_read_places(tmp_path: Path) -> None:
    """Four captions, four pictures that differ in one place: after 150 steps they are told apart."""
    words = ["red", "left", "right", "top", "bottom"]
    tokenizer = Tokenizer.of(words, 4)
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(len(tokenizer), EOS, 4, width=16, layers=1, heads=2, init_std=1.0))
    latents = torch.zeros(4, 4, 2, 2)
    for i in range(4):
        latents[i, :, i // 2, i % 2] = 1.0
    config = DiffusionTraining(reading=150, batch=16)
    ids, before = tokenizer([f"red {w}" for w in words[1:]]), encoder.token.weight.detach().clone()
    learn_to_read(config, encoder, latents, ids, torch.arange(4), 0, run := Run(tmp_path / "run", {}))
    losses = [row["loss"] for row in run.metrics("reading")]
    assert losses[0] > 0.1 and losses[-1] < 0.01
    assert not torch.equal(before, encoder.token.weight)
    learn_to_read(replace(config, reading=0), encoder, latents, ids, torch.arange(4), 0, run)  # nothing to do


def test_the_contrastive_loss_is_that_of_clip() -> None:
    """Figure 3 of its paper: cross-entropy with the own sentence, and with the own picture.  A sentence that two pictures share is right for both: the target is spread over them."""
    joint = JointSpace(8).eval()
    image, text = torch.randn(2, 5, 8, generator=rng(0, "joint"))
    ids = torch.arange(10).view(5, 2)
    unit = F.normalize(joint.image(image), dim=-1), F.normalize(joint.text(text), dim=-1)
    logits = joint.logit_scale.exp() * unit[1] @ unit[0].T
    torch.testing.assert_close(
        joint.loss(image, text, ids),
        0.5 * (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))),
    )
    ids[1] = ids[0]
    log_prob = [(logits if d else logits.T).log_softmax(-1) for d in (0, 1)]
    each = [-torch.cat([p[:2, :2].mean(1), p.diagonal()[2:]]).mean() for p in log_prob]
    torch.testing.assert_close(joint.loss(image, text, ids), sum(each) / 2)
