"""The base's training: plain captions, importance sampling of noise levels, learning to read, training
further.
"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minireflect import load_pipeline, rng
from minireflect.checkpoints.files import read_weights
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, level_weight
from minireflect.models.clip import TextConfig, TextEncoder
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.models.unet import UNet
from minireflect.pretrain import diffusion as base
from minireflect.pretrain.diffusion import (
    LAW_BASE,
    BaseSizes,
    DiffusionTraining,
    learn_to_read,
    level_chances,
    train_diffusion,
)
from minireflect.run import Job, Run
from minireflect.streams import choices
from minireflect.world.canvas import to_tensor
from minireflect.world.data import WorldConfig, captioned_laws, training_pairs
from minireflect.world.prompts import understand
from tests.small import Stopped, begin_with, small_pipeline, stop


def test_plain_captions_state_the_outcome_that_is_shown() -> None:
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


def test_importance_sampling_of_noise_levels_keeps_the_mean_loss_and_lowers_its_variance() -> None:
    """For any error of a level, the sum of chance x weight x error is the mean of level_weight x error, in
    float64.
    """
    schedule = Schedule(ScheduleConfig())
    error = torch.rand(1000, generator=rng(0, "error")).double()
    wanted = (level_weight(schedule, torch.arange(1000), 20.0).double() * error).mean()
    spreads = []
    for importance in (0.0, 0.5, 0.9):
        chance, weight = (v.double() for v in level_chances(schedule, 20.0, importance))
        assert abs(chance.sum() - 1) < 1e-5
        assert abs((chance * weight * error).sum() / wanted - 1) < 1e-5
        spreads.append((chance * (weight * error) ** 2).sum() - wanted**2)
    assert spreads[0] > spreads[1] > spreads[2]


@pytest.mark.slow
def test_the_text_encoder_learns_to_read_places(tmp_path: Path) -> None:
    """Four captions, four pictures that differ in one place: after 150 steps they are told apart."""
    words = ["red", "left", "right", "top", "bottom"]
    tokenizer = Tokenizer.of(words, 4)
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(len(tokenizer), EOS, 4, width=16, layers=1, heads=2, init_std=1.0))
    latents = torch.zeros(4, 4, 2, 2)
    for i in range(4):
        latents[i, :, i // 2, i % 2] = 1.0
    config = DiffusionTraining(reading_steps=150, batch=16)
    ids, before = tokenizer([f"red {w}" for w in words[1:]]), encoder.token.weight.detach().clone()
    job = Job(run := Run(tmp_path / "run", {}))
    read: list[torch.Tensor] = []
    encoder.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    learn_to_read(config, encoder, latents, ids, torch.arange(4), job)
    losses = [row["loss"] for row in run.metrics("reading")]
    assert losses[0] > 0.1 and losses[-1] < 0.01
    assert not torch.equal(before, encoder.token.weight)
    read.clear()
    config, job = replace(config, reading_steps=2), Job(Run(tmp_path / "plain", {}))
    learn_to_read(config, encoder, latents, ids, torch.tensor([2]), job)
    assert (read[0] == ids[2]).all() and len(read[1].unique(dim=0)) > 1  # plain captions come first


def test_training_starts_from_the_given_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0 a given network stays as it was; the other is a new random one."""
    shipped, data = load_pipeline(), captioned_laws(8, WorldConfig(), choices(0, "start"))
    config, job = DiffusionTraining(steps=1, batch=4, lr=0.0), Job(Run(tmp_path / "run", {}))
    begin_with(monkeypatch, base, tmp_path, unet=shipped.unet)
    pipe = train_diffusion(config, LAW_BASE, data, shipped.autoencoder, job)
    same = [torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), shipped.unet.parameters())]
    assert all(same)
    assert not torch.equal(pipe.text_encoder.token.weight, shipped.text_encoder.token.weight)
    assert math.isfinite(job.run.metrics("diffusion")[0]["loss"])


@pytest.mark.parametrize(("ema", "decay"), [(base.EMA, 0.1), (0.05, 0.05)])  # short at the first step
def test_one_step_of_the_base_against_its_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float, decay: float
) -> None:
    """With one picture the noise of each sample is known: the loss is DDPM's, weighted, and the result is
    EMA old + (1 - EMA) new.
    """
    monkeypatch.setattr(base, "EMA", ema), monkeypatch.setattr(base, "MAX_WEIGHT", 5.0)
    seen: list[tuple] = []
    for name, kind in (("unet", UNet), ("text", TextEncoder)):
        forward = kind.forward
        watch = lambda self, *x, f=forward, n=name: seen.append((n, x, y := f(self, *x))) or y  # noqa: E731
        monkeypatch.setattr(kind, "forward", watch)
    pipe, data = small_pipeline(), captioned_laws(1, WorldConfig(), choices(0, "start"))
    config = DiffusionTraining(steps=1, batch=100, lr=1e-2, plain=0.0)
    job, sizes = Job(Run(tmp_path / "run", {})), BaseSizes(pipe.unet.config, 16, 32)
    before = [p.clone() for p in pipe.unet.parameters()]
    begin_with(monkeypatch, base, tmp_path, unet=pipe.unet)
    made = train_diffusion(config, sizes, data, pipe.autoencoder, job)
    (_, (ids,), words), (_, (x_t, t, context), out) = seen
    empty = (ids == made.tokenizer([""])).all(1)
    assert (ids[~empty] == made.tokenizer(data.captions)).all() and torch.equal(context, words)
    x_0, abar = pipe.autoencoder.encode(to_tensor(data.pixels)), made.schedule.abar[t].view(-1, 1, 1, 1)
    noise = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    assert abs(noise.std() - 1) < 0.02 and abs(t.float().mean() - 499.5) < 115
    loss = ((1 / abar).clamp(max=5.0) * (out - noise) ** 2).mean()
    assert job.run.metrics("diffusion")[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    raw = read_weights(tmp_path / "run" / "state" / "diffusion.safetensors")
    for old, (name, new) in zip(before, made.unet.named_parameters()):
        torch.testing.assert_close(new, decay * old + (1 - decay) * raw[f"raw/unet.{name}"])


def test_both_averaged_networks_are_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, data = small_pipeline(), captioned_laws(2, WorldConfig(), choices(0, "start"))
    config, job = DiffusionTraining(steps=2, batch=2, lr=1e-2), Job(Run(tmp_path / "run", {}))
    made = train_diffusion(config, BaseSizes(pipe.unet.config, 16, 32), data, pipe.autoencoder, job)
    saved = read_weights(tmp_path / "run" / "state" / "diffusion.safetensors")
    for name in ("text_encoder", "unet"):
        for key, value in getattr(made, name).state_dict().items():
            assert torch.equal(value, saved[f"averaged/{name}.{key}"])
    assert not torch.equal(
        saved["averaged/text_encoder.token.weight"], saved["raw/text_encoder.token.weight"]
    )


def test_plain_captions_come_first_and_a_tenth_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of two steps: the first sees plain captions only, the second others too."""
    read: list[torch.Tensor] = []
    forward = TextEncoder.forward
    few = lambda self, ids: read.append(ids) or (stop() if len(read) == 2 else forward(self, ids))  # noqa: E731
    monkeypatch.setattr(TextEncoder, "forward", few)
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, context: x * context.mean())
    pipe, data = small_pipeline(), captioned_laws(12, WorldConfig(), choices(0, "start"))
    config, job = DiffusionTraining(steps=2, batch=2_000, plain=0.5), Job(Run(tmp_path / "run", {}))
    with pytest.raises(Stopped):
        train_diffusion(config, BaseSizes(pipe.unet.config, 16, 32), data, pipe.autoencoder, job)
    tokenizer = Tokenizer.of(data.vocabulary, 32)
    sets = [data.captions[i] for i in data.plain], data.captions
    plain, every = (set(tokenizer.decode(tokenizer([*captions, ""]))) for captions in sets)
    assert [set(tokenizer.decode(ids)) for ids in read] == [plain, every] and plain < every
    for ids in read:
        assert 146 < (ids == tokenizer([""])).all(1).sum() < 254  # four standard errors about 200


def test_late_steps_average_over_two_hundred_and_levels_weigh_twenty_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late in a training the average keeps 0.995 of itself; of an output of 1 and a target of 0, the loss is
    the mean weight of the levels; text encoders begin with embeddings of std 1.
    """
    told: dict[str, object] = {}

    def one_step(name: str, config: DiffusionTraining, networks: dict, job: Job, decay: float) -> list:
        told.update(networks, decay=decay)
        return [(50_000, rng(0, "late"), lambda loss: told.update(loss=loss))]

    def moved(self: UNet, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        told.update(t=t, old=told["raw"]["unet"].conv_in.bias.detach().clone())
        told["raw"]["unet"].conv_in.bias.data += 1
        return torch.ones_like(x)

    monkeypatch.setattr(base, "optimise", one_step)
    monkeypatch.setattr(UNet, "forward", moved)
    monkeypatch.setattr(Schedule, "target", lambda self, x0, noise, t: torch.zeros_like(x0))
    pipe, data = small_pipeline(), captioned_laws(1, WorldConfig(), choices(0, "start"))
    config, job = DiffusionTraining(steps=1, batch=100), Job(Run(tmp_path / "run", {}))
    made = train_diffusion(config, BaseSizes(pipe.unet.config, 16, 32), data, pipe.autoencoder, job)
    torch.testing.assert_close(made.unet.conv_in.bias, told["old"] + 0.005)
    wanted = (1 / made.schedule.abar[told["t"]]).clamp(max=20).mean()
    torch.testing.assert_close(told["loss"], wanted)
    assert told["decay"] == 1e-4 and 0.95 < made.text_encoder.token.weight.std() < 1.05


def test_few_pictures_may_have_no_plain_caption(tmp_path: Path) -> None:
    pipe, data = small_pipeline(), captioned_laws(2, WorldConfig(), choices(0, "start"))
    config, job = DiffusionTraining(steps=1, batch=2, plain=1.0), Job(Run(tmp_path / "run", {}))
    data = data._replace(plain=[])
    train_diffusion(config, BaseSizes(pipe.unet.config, 16, 32), data, pipe.autoencoder, job)
    assert job.run.metrics("diffusion")[0]["loss"] > 0


def test_reading_comes_first_with_its_own_rate_and_levels_are_drawn_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple] = []
    monkeypatch.setattr(base, "level_chances", lambda *given: told.append(given[1:]) or stop())
    monkeypatch.setattr(base, "optimise", lambda name, config, *_, **__: told.append((name, config)) or [])
    pipe, data = small_pipeline(), captioned_laws(2, WorldConfig(), choices(0, "start"))
    config, job = DiffusionTraining(reading_steps=7, importance=0.6), Job(Run(tmp_path / "run", {}))
    with pytest.raises(Stopped):
        train_diffusion(config, BaseSizes(pipe.unet.config, 16, 32), data, pipe.autoencoder, job)
    assert told == [("reading", replace(config, steps=7, lr=base.READING_LR)), (base.MAX_WEIGHT, 0.6)]
    assert config.lr != base.READING_LR == 2e-3
