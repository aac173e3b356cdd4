"""A promised cost is the number of counted UNet calls, and all entry points reflect alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.methods.rlrig import LoopConfig, edit
from minireflect.methods.rollout import RolloutConfig, rollout, rollout_cost
from minireflect.pipeline import OPPOSITE, LatentDiffusion, SamplerConfig
from minireflect.showcase import sampled_rounds
from minireflect.streams import rng
from tests.small import TEXTS, brightness, small_pipeline

N = len(TEXTS)


class Zeros(nn.Module):
    """Predicts no noise: what is counted depends on the number of its calls alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.weight * x


def idle_pipeline() -> LatentDiffusion:
    return replace(small_pipeline(), unet=Zeros())


@contextmanager
def counted(pipe: LatentDiffusion) -> Iterator[list[int]]:
    """The batch size of every call of the UNet: their sum is what was evaluated."""
    calls: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


def refuses(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.zeros(len(images))


def accepts_the_first(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.tensor([float(p == TEXTS[0]) for p in prompts])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_generate_costs_what_it_promises(rounds: int, guidance: float) -> None:
    pipe, sampler = idle_pipeline(), SamplerConfig(3, guidance)
    blind, opposite = ReflectionConfig(rounds=rounds, steps=3), replace(OPPOSITE, rounds=rounds)
    with counted(pipe) as calls:
        pipe.generate(TEXTS, 3, guidance, rounds=rounds)
    assert sum(calls) == N * (blind.blind_cost(3) + sampler.cost)
    for reward, redrawn in ((refuses, [rounds] * N), (accepts_the_first, [0] + [rounds] * (N - 1))):
        with counted(pipe) as calls:
            pipe.generate(TEXTS, 3, guidance, rounds=rounds, reward=reward)
        assert sum(calls) == sum(sampler.cost + k * (opposite.reflect_cost + sampler.cost) for k in redrawn)


def test_a_blind_round_of_twenty_steps_costs_a_hundred_evaluations() -> None:
    assert ReflectionConfig(rounds=1).blind_cost(20) + SamplerConfig().cost == 100


@pytest.mark.parametrize("suffixes", [(), (1, 3)])
@pytest.mark.parametrize("wrong", ["opposite", "fresh", "repeat"])
@pytest.mark.parametrize("redraw", ["refused", "all"])
@pytest.mark.parametrize("mode", ["select", "blind"])
def test_a_rollout_costs_what_it_promises(
    mode: str, redraw: str, wrong: str, suffixes: tuple[int, ...]
) -> None:
    config = RolloutConfig(
        group=2, steps=4, guidance=3.0, mode=mode, rounds=2, redraw=redraw, wrong=wrong, w_renoise=0.1,
        renoise_steps=3, suffixes=suffixes,
    )  # fmt: skip
    pipe = idle_pipeline()
    with counted(pipe) as calls:
        out = rollout(pipe, TEXTS, accepts_the_first, config, 0, 1)
    each = [N] if mode == "blind" else [N, N, N] if redraw == "all" else [N, N - 1, N - 1]
    assert [len(r.rows) for r in out.rounds] == each
    assert out.cost == rollout_cost(config, each, 1) and sum(calls) == out.cost.unet
    assert out.cost.rewards == sum(len(r.images) for r in out.rounds)


@pytest.mark.parametrize("fresh_noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t_star", [0.0, 0.7, 1.0])  # 0.7 of four steps are three
def test_an_edit_costs_what_it_promises(t_star: float, fresh_noise: float) -> None:
    pipe, config = idle_pipeline(), LoopConfig(t_star=t_star, steps=4, fresh_noise=fresh_noise)
    x0 = pipe.noise(N, rng(0, "x"))
    with counted(pipe) as calls:
        edit(pipe, x0, TEXTS, config, rng(0, "edit"))
    assert sum(calls) == N * config.edit_cost


def test_all_entry_points_reflect_alike() -> None:
    """The same noise gives the same picture in generate, `minireflect sample` and SRRL's rollout."""
    pipe, sampler = small_pipeline(), SamplerConfig(3)
    blind = ReflectionConfig(rounds=2, steps=3)
    *_, strip = sampled_rounds(pipe, TEXTS, sampler, blind, 7).values()
    assert torch.equal(strip, pipe.generate(TEXTS, 3, rounds=2, generator=rng(7, "sample")))
    *_, strip = sampled_rounds(pipe, TEXTS, sampler, replace(OPPOSITE, rounds=2), 7, brightness).values()
    assert torch.equal(
        strip, pipe.generate(TEXTS, 3, rounds=2, generator=rng(7, "sample"), reward=brightness)
    )
    # a rollout names its streams otherwise: compare the noise that its branches start from
    config = RolloutConfig(steps=3, mode="blind", rounds=2, w_renoise=0.1, renoise_steps=3, fresh_noise=0.0)
    round_ = rollout(pipe, TEXTS, refuses, config, 0, 0).rounds[0]
    x_T = pipe.noise(N, rng(0, "start", 0))
    *_, last = pipe.blind_rounds(TEXTS, x_T, replace(sampler, eta=0.0), blind, rng(0))
    assert torch.equal(last, pipe_from(pipe, round_.x_T))


def pipe_from(pipe: LatentDiffusion, x_T: Tensor) -> Tensor:
    """The clean latents that these start latents lead to without step noise."""
    *_, x_0 = pipe.blind_rounds(TEXTS, x_T, SamplerConfig(3, eta=0.0), ReflectionConfig(rounds=0), rng(0))
    return x_0
