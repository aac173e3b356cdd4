"""PPO's gradient is the forward-process gradient plus noise: shown in worlds whose best network is a formula.

A step of the sampler is  x_prev = mean(x_t, eps) + sigma n,  where the mean depends on eps with coefficient c
(DDIM 12). If (x_0, x_t) are distributed as in the forward process, with noise n_true,

    E[n | x_t, x_0] = (c / sigma) (n_true - eps)

so PPO's score, averaged over the noise that does not reach the picture, is the gradient of `forward_gradient`
with weight (c / sigma)^2 / 2.  The share of n that x_0 remembers, (c / sigma)^2 E|n_true - eps|^2 / D, is the
ratio of the two variances.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from minireflect.diffusion.exact import GaussianMixture
from minireflect.diffusion.sample import collect, denoise
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, StepTable
from minireflect.methods import learn as learning
from minireflect.methods.learn import LearnConfig, Learner, forward_gradient, score_step
from minireflect.methods.rollout import Rollout, Round
from minireflect.pipeline import LatentDiffusion
from minireflect.rl.policy import ppo_clip
from minireflect.streams import rng

N, STEPS, SHAPE = 20_000, 200, (1, 2, 2)
D, MEAN, STD = math.prod(SHAPE), 0.4, 0.7
SCHEDULE = Schedule(ScheduleConfig())
ONE = GaussianMixture(torch.full((1, D), MEAN), torch.tensor([STD]), torch.ones(1))
TWO = GaussianMixture(
    torch.tensor([[1.0, 0.5, 0.0, -0.5], [-1.0, 0.0, 0.5, 0.5]]),
    torch.tensor([0.4, 0.6]),
    torch.tensor([1.0, 2.0]),
)
TRIED = [100, 140, 170]  # steps, of 200


class Network(nn.Module):
    """eps of a mixture + theta_0 + theta_1 x; every sample has a theta, and so a gradient of its own."""

    def __init__(self, world: GaussianMixture) -> None:
        super().__init__()
        self.world, self.theta = world, nn.Parameter(torch.zeros(N, 2, D))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        flat = x.flatten(1)
        eps = self.world.eps(flat, SCHEDULE.abar[t]) + self.theta[:, 0] + self.theta[:, 1] * flat
        return eps.view(x.shape)


class Line(NamedTuple):
    """A step as numbers, by hand: x_prev = a x + (...) + sigma n, its mean has eps times c."""

    a: float
    c: float
    sigma: float


def by_hand(abar: float, abar_prev: float) -> Line:
    """DDIM (12) and (16) at eta 1, for the Gaussian ONE, where eps is a line in x."""
    sigma = math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
    of_x = math.sqrt(abar_prev / abar)
    c = math.sqrt(1 - abar_prev - sigma**2) - of_x * math.sqrt(1 - abar)
    slope = math.sqrt(1 - abar) / (abar * STD**2 + 1 - abar)  # of eps
    return Line(of_x + c * slope, c, sigma)


def lines(steps: int) -> tuple[StepTable, list[Line]]:
    table = SCHEDULE.table(steps)
    return table, [by_hand(*pair) for pair in zip(table.abar.tolist(), table.abar_prev.tolist())]


def reach(chain: list[Line], i: int) -> tuple[float, float]:
    """How x_0 depends on the noise n of step i, and the variance that the later noise adds."""
    factor, later = 1.0, 0.0
    for line in reversed(chain[i + 1 :]):
        later += (factor * line.sigma) ** 2
        factor *= line.a
    return factor * chain[i].sigma, later


def remembered(steps: int, part: float) -> tuple[Tensor, Tensor]:
    """How E[n | x_t, x_0] depends on x_0 and on x_t, and the share of n that it has, at a part of the way:
    in the sampler's chain, where all is jointly Gaussian, and by the theory.  -> (3) each
    """
    table, chain = lines(steps)
    i = int(part * steps)
    of_noise, later = reach(chain, i)
    of_x0 = of_noise / (of_noise**2 + later)
    in_chain = [of_x0, -of_x0 * of_noise / chain[i].sigma * chain[i].a, of_x0 * of_noise]
    abar, ratio = table.abar[i].item(), chain[i].c / chain[i].sigma
    v = abar * STD**2 + 1 - abar
    of_x = ratio * (1 - (1 - abar) / v) / math.sqrt(1 - abar)  # of n_true - eps
    share = ratio**2 * abar * STD**2 / v  # Var(n_true | x_t) = abar std^2 / v
    return torch.tensor(in_chain), torch.tensor([-ratio * math.sqrt(abar / (1 - abar)), of_x, share])


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_what_the_picture_remembers_of_a_step_s_noise(part: float) -> None:
    """A sampler of S steps is off by O(1 / S): twice the error of 500 steps is that of 250."""
    (coarse, as_coarse), (fine, as_fine) = remembered(250, part), remembered(500, part)
    assert torch.allclose(fine, as_fine, rtol=0.05, atol=0)
    assert torch.allclose(2 * fine / as_fine - coarse / as_coarse, torch.ones(3), atol=0.012)


@pytest.fixture(scope="module", params=["one", "two"])
def sampled(request: pytest.FixtureRequest) -> tuple[Learner, Rollout]:
    """N pictures of the exact policy in 200 steps, with the product's sampler."""
    world = {"one": ONE, "two": TWO}[request.param]
    pipe = LatentDiffusion(
        lambda texts: torch.zeros(len(texts), 1),
        lambda ids, skip: ids[..., None],
        Network(world),
        None,
        SCHEDULE,
    )
    learner = Learner(pipe, LearnConfig("ppo", anchor_below=0), 1.0, N)
    table, context = SCHEDULE.table(STEPS), torch.zeros(N, 1, 1)
    x_T, noise = torch.randn(N, *SHAPE, generator=rng(0, "start")), rng(0, "steps")
    path = collect(x_T, denoise(pipe.eps(context)(1.0), x_T, table, 1.0, noise))
    one = torch.zeros(N, 1)
    rounds = [Round(torch.arange(N), x_T, table, table.sigma(1.0), path, x_T, one)]
    return learner, Rollout([""] * N, context, rounds)


def gradients(
    learner: Learner, out: Rollout, i: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Of PPO and of the forward process at the level of step i, sample by sample.  -> (n 2 d) each

    The advantage is 1 or -1: is the picture's first number above the mean?
    """
    path, table, theta = out.rounds[0].path, out.rounds[0].table, learner.pipe.unet.theta
    x_0 = path.latents[:, -1]
    A = torch.where(x_0.flatten(1)[:, 0] > x_0.flatten(1)[:, 0].mean(), 1.0, -1.0)
    now = score_step(learner, out, 0, i, slice(0, N), learner.pipe.unet)
    log_ratio = (now.log_prob - path.log_probs[:, i]) / D
    (of_ppo,) = torch.autograd.grad(ppo_clip(log_ratio, torch.zeros(N), A, 0.2).loss, theta)
    c, sigma = coefficient(table, i)
    weight = torch.full((N,), (c / sigma) ** 2 / 2)
    monkeypatch.setattr(learning, "levels", lambda *_: (table.t[i].expand(N), weight))
    learner.pipe.unet.zero_grad(set_to_none=True)
    forward_gradient(learner, x_0, torch.zeros(N, 1), A, 0.0, rng(0, "noise", i))
    return of_ppo * N * D, theta.grad * N * D


def coefficient(table: StepTable, i: int) -> tuple[float, float]:
    """c and sigma of step i."""
    return by_hand(table.abar[i].item(), table.abar_prev[i].item())[1:]


@pytest.mark.parametrize("i", TRIED)
def test_the_two_gradients_agree_in_expectation(
    sampled: tuple[Learner, Rollout], i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_ppo, forward = gradients(*sampled, i, monkeypatch)
    error = ((of_ppo.var(0) + forward.var(0)) / N).sqrt()  # (2 d)
    off = (of_ppo.mean(0) - forward.mean(0)).abs()
    assert (off < 4 * error + 0.05 * forward.mean(0).abs()).all(), off / error
    assert forward[:, 0, 0].mean().abs() > 4 * error[0, 0]  # there is something to agree about


@pytest.mark.parametrize("i", TRIED)
def test_their_variances_differ_by_the_share_of_remembered_noise(
    sampled: tuple[Learner, Rollout], i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_ppo, forward = (g[:, 0] for g in gradients(*sampled, i, monkeypatch))  # of theta_0, (n d)
    learner, out = sampled
    table, world = out.rounds[0].table, learner.base.world
    c, sigma = coefficient(table, i)
    x_0 = world.sample(N, rng(1, "world"))  # not the sampler's
    abar, n = table.abar[i], torch.randn(N, D, generator=rng(1, "noise"))
    missed = n - world.eps(abar.sqrt() * x_0 + (1 - abar).sqrt() * n, abar)
    share = (c / sigma) ** 2 * (missed**2).mean()
    assert 0.001 < share < 0.5
    assert (forward**2).mean() / (of_ppo**2).mean() == pytest.approx(share.item(), rel=0.05)
    signal = of_ppo.mean(0).square().sum()
    noise = [(g**2).sum(1).mean() - signal for g in (of_ppo, forward)]
    expected = (share * (c / sigma) ** 2 * D - signal) / ((c / sigma) ** 2 * D - signal)
    assert noise[1] / noise[0] == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("sampled", ["one"], indirect=True)
@pytest.mark.parametrize("i", TRIED)
def test_ppo_s_gradient_is_that_of_the_gaussian_chain(
    sampled: tuple[Learner, Rollout], i: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_0 and a step's noise are jointly Gaussian: E[sign(x_0 - mean) n] = correlation * sqrt(2 / pi)."""
    of_ppo = gradients(*sampled, i, monkeypatch)[0][:, 0]  # of theta_0, (n d)
    chain = lines(STEPS)[1]
    first, later = reach(chain, 0)
    variance = first**2 + later + (first / chain[0].sigma * chain[0].a) ** 2  # of x_0
    correlation = reach(chain, i)[0] / math.sqrt(variance)
    expected = torch.tensor([-chain[i].c / chain[i].sigma * correlation * math.sqrt(2 / math.pi), 0, 0, 0])
    error = of_ppo.std(0) / math.sqrt(N)
    assert ((of_ppo.mean(0) - expected).abs() < 4 * error).all()
    assert expected[0] > 4 * error[0]
