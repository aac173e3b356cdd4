"""Training of the autoencoder and of its vector-quantised companion: errors fall, latents get a std of 1,
codes are used; a decoder can be trained further.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from minireflect.checkpoints.ours import load_module, load_pipeline, save_module
from minireflect.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Codec,
    Quantiser,
    VQAutoencoder,
    VQConfig,
)
from minireflect.pretrain import autoencoders
from minireflect.pretrain.autoencoders import (
    AutoencoderTraining,
    VQTraining,
    encode_all,
    patch_weights,
    perplexity,
    train_autoencoder,
    train_vq,
)
from minireflect.run import Job, Run
from minireflect.streams import choices, rng
from minireflect.world.canvas import to_tensor
from minireflect.world.data import WorldConfig, recolored, training_pairs
from minireflect.world.laws import render_pixels
from tests.small import begin_with

TINY = AutoencoderConfig(channels=(8, 8, 8, 8), res_blocks=1, groups=4)


@pytest.mark.slow
def test_the_error_falls_and_latents_have_a_std_of_1(tmp_path: Path) -> None:
    pixels, _, _ = training_pairs(16, WorldConfig(), choices(0, "pictures"))
    config, job = AutoencoderTraining(steps=60, batch=4, lr=4e-3), Job(Run(tmp_path / "run", {}))
    model = train_autoencoder(config, TINY, pixels, job)
    rows = job.run.metrics("autoencoder")
    assert len(rows) == 60 and rows[-1]["mse"] < 0.3 * rows[0]["mse"]
    assert model.encode(to_tensor(pixels)).std().item() == pytest.approx(1, abs=1e-4)


def test_from_a_start_only_the_decoder_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, _, _ = training_pairs(8, WorldConfig(), choices(0, "pictures"))
    torch.manual_seed(5)
    start = Autoencoder(AutoencoderConfig(channels=(8, 8, 8, 8), res_blocks=1, groups=4, scaling_factor=0.5))
    config, job = AutoencoderTraining(steps=2, batch=4, noise=0.5), Job(Run(tmp_path / "run", {}))
    begin_with(monkeypatch, autoencoders, tmp_path, autoencoder=start)
    model = train_autoencoder(config, TINY, pixels, job)
    images = to_tensor(pixels)
    torch.testing.assert_close(model.encode(images), start.encode(images), atol=1e-5, rtol=0)
    assert model.config == start.config
    before, after = start.decoder.state_dict(), model.decoder.state_dict()
    assert not all(torch.equal(before[key], after[key]) for key in before)


def test_encoding_in_parts_keeps_the_order() -> None:
    pixels = np.arange(600, dtype=np.uint8).repeat(12).reshape(600, 2, 2, 3)
    whole = encode_all(lambda x: x.mean((1, 2, 3)), pixels, torch.device("cpu"))
    torch.testing.assert_close(whole, torch.from_numpy(pixels[:, 0, 0, 0].astype(np.float32) / 127.5 - 1))


def test_patches_with_objects_weigh_more_and_the_mean_weight_is_1() -> None:
    """A pixel that differs marks its patch, in either picture; the smallest differences mark none."""
    images = torch.full((2, 3, 16, 24), 0.9)
    images[0, 1, 9, 17] = 0.2
    images[1, :, :8, :8] += 0.04
    weight = patch_weights(images, torch.full_like(images, 0.9), 5.0)
    assert weight.shape == (2, 1, 2, 3) and weight.mean().item() == pytest.approx(1)
    assert (weight / weight[0, 0, 0, 0]).flatten().tolist() == pytest.approx([1] * 5 + [5] + [1] * 6)
    torch.testing.assert_close(patch_weights(torch.full_like(images, 0.9), images, 5.0), weight)


def test_perplexity_is_the_size_of_an_evenly_used_codebook() -> None:
    assert perplexity(torch.tensor([5.0, 5, 5, 5, 0, 0])) == pytest.approx(4)
    assert perplexity(torch.tensor([7.0, 0, 0])) == pytest.approx(1)


@pytest.mark.slow
def test_training_lowers_the_error_and_the_codec_comes_back_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoders, "REVIVALS", 6)
    pixels, scenes, _ = training_pairs(8, WorldConfig(), choices(0, "vq"))
    twins = np.stack([render_pixels(recolored(s, choices(0, "twins"))) for s in scenes])
    run = Run(tmp_path / "run", {})
    config = VQTraining(steps=60, batch=4, lr=2e-3, forms=32, colors=16)
    autoencoder = load_pipeline().autoencoder
    model = train_vq(config, pixels, twins, autoencoder, Job(run))
    rows = run.metrics("vq")
    assert sum(r["latents"] for r in rows[-10:]) < 0.7 * sum(r["latents"] for r in rows[:10])
    looks = [r for r in rows if "forms_used" in r]
    assert len(looks) == 6
    for name, k in (("forms", 32), ("colors", 16)):
        assert all(0 < r[f"{name}_used"] <= 1 and 1 <= r[f"{name}_perplexity"] <= k for r in looks)
    save_module(tmp_path / "vq.safetensors", model, {})
    again, _ = load_module(tmp_path / "vq.safetensors", VQAutoencoder)
    images = to_tensor(pixels[:2])
    one, two = Codec(autoencoder, model), Codec(autoencoder, again)
    ids = one.codes(images)
    assert ids.shape == (2, 64) and torch.equal(two.codes(images), ids)
    assert torch.equal(ids.view(2, 8, 8), model.encode(images))  # row by row
    torch.testing.assert_close(two.pictures(ids), one.pictures(ids))
    assert one.pictures(ids).shape == images.shape and one.pictures(ids).abs().max() <= 1
    with pytest.raises(ValueError, match=r"image tokens must be in \[0, 512\), got "):
        one.pictures(ids + 512)
    with pytest.raises(ValueError, match="not a multiple of groups"):
        VQConfig(width=30)
    with pytest.raises(ValueError, match="colors must be at least 2, got 1"):
        VQConfig(colors=1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch": 7}, "batch must be even, as each picture comes with its twin, got 7"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 1}, "batch must be even"),
        ({"pictures": 1}, "pictures must be at least 2, got 1"),
    ],
)
def test_a_batch_without_twins_is_refused(bad: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQTraining(**bad)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_autoencoders_loss_is_error_and_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: float
) -> None:
    """At a learning rate of 0, on one picture: absolute and squared error of a sample, and torch's KL."""
    pixels, _, _ = training_pairs(1, WorldConfig(), choices(0, "pictures"))
    torch.manual_seed(5)
    start = Autoencoder(replace(TINY, scaling_factor=0.25))
    with torch.no_grad():
        start.quant_conv.bias[4:] = -2.0
    config = AutoencoderTraining(steps=1, batch=3, lr=0.0, kl=0.1, noise=noise)
    begin_with(monkeypatch, autoencoders, tmp_path, autoencoder=start)
    train_autoencoder(config, TINY, pixels, job := Job(Run(tmp_path / "run", {})))
    images = to_tensor(pixels.repeat(3, 0))
    mean, logvar = start.moments(images)
    chance = rng(0, "autoencoder", "noise", 0)
    drawn = torch.randn(mean.shape, generator=chance)
    added = noise / 0.25 * torch.rand(3, 1, 1, 1, generator=chance)  # in units of the latents' std
    z = mean + (logvar.exp() + added**2).sqrt() * drawn
    error = start.decoder(start.post_quant_conv(z)) - images
    kl = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()
    (row,) = job.run.metrics("autoencoder")
    assert row["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert row["mse"] == pytest.approx((error**2).mean().item(), rel=1e-4)
    wanted = error.abs().mean() + (error**2).mean() + 0.1 * kl
    assert row["loss"] == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(("looks", "moves"), [(120, [1, 1, 2, 2]), (2, [2, 2])])
def test_the_codebooks_loss_and_when_entries_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: int, moves: list[int]
) -> None:
    """Weighted error of latents from a picture's colours and its twin's forms, and both codebooks' losses;
    counts since the last look, of which there are `looks` or one a step; entries move in the first half.
    """
    monkeypatch.setattr(autoencoders, "REVIVALS", looks)
    seen, moved, revive, forward = [], [], Quantiser.revive, VQAutoencoder.forward
    used: list[torch.Tensor] = []
    watched = lambda self, *x: seen.append((*x, *forward(self, *x))) or seen[-1][2:]  # noqa: E731
    monkeypatch.setattr(VQAutoencoder, "forward", watched)

    def watched_revive(self: Quantiser, z: torch.Tensor, counts: torch.Tensor, *more: object) -> int:
        moved.append(len(seen)), used.append(counts.clone())
        return revive(self, z, counts, *more)

    monkeypatch.setattr(Quantiser, "revive", watched_revive)
    pixels, scenes, _ = training_pairs(3, WorldConfig(), choices(0, "vq"))
    twins = np.stack([render_pixels(recolored(s, choices(0, "twins"))) for s in scenes])
    config = VQTraining(steps=4, batch=2, lr=0.0, forms=32, colors=16)
    autoencoder = load_pipeline().autoencoder
    train_vq(config, pixels, twins, autoencoder, job := Job(Run(tmp_path / "run", {})))
    for (images, twin, out, form, color), row in zip(seen, job.run.metrics("vq")):
        assert torch.equal(images, twin.flip(0)) and not torch.equal(images, twin)
        error = (out - autoencoder.encode(images)) ** 2
        differ = torch.nn.functional.max_pool2d((images - twin).abs().amax(1, keepdim=True), 8) > 0.1
        weight = (1 + 4.0 * differ) / (1 + 4.0 * differ).mean()
        wanted = (weight * error).mean() + form.loss + color.loss
        assert row["loss"] == pytest.approx(wanted.item(), rel=1e-4)
        assert row["latents"] == pytest.approx(error.mean().item(), rel=1e-4)
    every = max(1, 4 // looks)
    for last in range(every, 5, every):
        ids = torch.cat([form.ids for *_, form, _ in seen[last - every : last]])
        assert job.run.metrics("vq")[last - 1]["forms_used"] == pytest.approx(len(ids.unique()) / 32)
        if last in moved:
            assert torch.equal(used[2 * (last // every - 1)], ids.flatten().bincount(minlength=32).float())
    assert moved == moves


def test_without_a_gradient_weights_decay_by_a_ten_thousandth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW multiplies by 1 - lr decay.  The encoder of latents that the decoder does not see does not learn;
    nor do entries that are chosen for no patch.
    """
    pixels, _, _ = training_pairs(2, WorldConfig(), choices(0, "pictures"))
    torch.manual_seed(5)
    start = Autoencoder(TINY)
    torch.nn.init.zeros_(start.post_quant_conv.weight)
    monkeypatch.setattr(autoencoders, "Autoencoder", lambda _: copy.deepcopy(start))
    job = Job(Run(tmp_path / "run", {}))
    model = train_autoencoder(AutoencoderTraining(steps=1, batch=2, lr=0.5, kl=0.0), TINY, pixels, job)
    after = model.encoder.state_dict()
    for name, before in start.encoder.state_dict().items():
        torch.testing.assert_close(after[name], before * (1 - 0.5e-4), rtol=1e-6, atol=0)
    books = VQAutoencoder(VQConfig(forms=512, colors=256))
    begin_with(monkeypatch, autoencoders, tmp_path, vq=books)
    monkeypatch.setattr(Quantiser, "revive", lambda *_: 0)
    autoencoder = load_pipeline().autoencoder
    trained = train_vq(VQTraining(steps=1, batch=2, lr=0.5), pixels, pixels, autoencoder, job)
    ratio = (trained.forms.words.weight / books.forms.words.weight).flatten()
    assert ((ratio - (1 - 0.5e-4)).abs() < 1e-6).float().mean() > 0.5
