"""The exact world is exact: eps is the score, the posterior mean is the mean of the posterior."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from minireflect.diffusion.exact import NULL, GaussianMixture
from minireflect.diffusion.schedule import Schedule, ScheduleConfig


def world(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    means = torch.tensor([[1.5, 0.0, -1.0], [-1.0, 2.0, 0.5], [0.0, -1.0, 1.0]], dtype=dtype)
    return GaussianMixture(
        means, torch.tensor([0.3, 0.6, 1.1], dtype=dtype), torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    )


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


ABAR = torch.tensor([0.99, 0.7, 0.3, 0.05, 0.005], dtype=torch.float64)


@pytest.mark.parametrize("cls", [None, 0, 1, torch.tensor([NULL, 0, 1, 1, 0])])
def test_eps_is_the_score(cls: int | torch.Tensor | None) -> None:
    x = (2 * draw(5, 3)).requires_grad_()
    mixture = world()
    (score,) = torch.autograd.grad(mixture.log_prob(x, ABAR, cls).sum(), x)
    torch.testing.assert_close(
        mixture.eps(x, ABAR, cls), -(1 - ABAR[:, None]).sqrt() * score, atol=1e-10, rtol=1e-10
    )


@pytest.mark.parametrize("cls", [None, 1])
def test_posterior_mean_component_by_component(cls: int | None) -> None:
    """E[x_0 | x] = sum_k p(k | x) (mean_k + shrink_k (x - sqrt(abar) mean_k)), Gaussian by Gaussian."""
    mixture, x, abar = world(), 2 * draw(5, 3), ABAR[:, None]
    var = abar * mixture.stds**2 + 1 - abar  # (5 k)
    centred = x[:, None] - abar[..., None].sqrt() * mixture.means  # (5 k d)
    allowed = torch.ones(3, dtype=torch.bool) if cls is None else torch.arange(3) == cls
    log_joint = mixture.weights.log() - 0.5 * (centred**2).sum(-1) / var - 1.5 * var.log()
    p = log_joint.masked_fill(~allowed, -math.inf).softmax(-1)
    shrink = abar.sqrt() * mixture.stds**2 / var  # how much of the surprise is signal
    want = (p[..., None] * (mixture.means + shrink[..., None] * centred)).sum(1)
    torch.testing.assert_close(mixture.posterior_mean(x, ABAR, cls), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("cls", [None, 1])
def test_posterior_mean_by_monte_carlo(cls: int | None) -> None:
    """E[x0 | x] = E[x0 N(x; sqrt(abar) x0, 1 - abar)] / E[N(...)], with x0 from the sampler."""
    mixture, abar = world(), torch.tensor(0.3, dtype=torch.float64)
    x = torch.tensor([[0.3, 0.8, -0.2]], dtype=torch.float64)
    x0 = mixture.sample(400_000, torch.Generator().manual_seed(0), cls)
    weight = (-((x - abar.sqrt() * x0) ** 2).sum(1) / (2 * (1 - abar))).softmax(0)
    estimate = (weight[:, None] * x0).sum(0)
    error = (weight[:, None] ** 2 * (x0 - estimate) ** 2).sum(0).sqrt()
    assert (
        (mixture.posterior_mean(x, abar, cls)[0] - estimate).abs() < 4 * error
    ).all() and error.max() < 0.01


def test_log_prob_equals_torch_distributions() -> None:
    m, x, abar = world(), 2 * draw(7, 3), torch.tensor(0.6, dtype=torch.float64)
    parts = Independent(Normal(abar.sqrt() * m.means, (abar * m.stds**2 + 1 - abar).sqrt()[:, None]), 1)
    want = MixtureSameFamily(Categorical(m.weights), parts).log_prob(x)
    torch.testing.assert_close(m.log_prob(x, abar), want)


def test_noised_samples_follow_the_noised_density() -> None:
    """Monte Carlo entropy of one component: the sampler, the condition and the density are of one mind."""
    m, abar = world(), torch.tensor(0.6, dtype=torch.float64)
    one = GaussianMixture(m.means[:1], m.stds[:1], m.weights[:1])
    x0 = m.sample(100_000, torch.Generator().manual_seed(1), cls=0)
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * draw(100_000, 3, seed=2)
    var = abar * m.stds[0] ** 2 + 1 - abar
    entropy = 1.5 * float((2 * math.pi * math.e * var).log())
    assert -m.log_prob(x, abar, 0).mean() == pytest.approx(entropy, abs=4 * (1.5 / 1e5) ** 0.5)
    assert m.log_prob(x, abar, 0).equal(one.log_prob(x, abar))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_model_has_the_signature_of_a_network(prediction: str) -> None:
    m, schedule = world(torch.float32), Schedule(ScheduleConfig(prediction=prediction))
    model, x, t = m.model(schedule), draw(3, 3, dtype=torch.float32), torch.tensor([1, 500, 951])
    context = torch.cat([m.context(0), m.context(None), m.context(1)])
    assert context.shape == (3, 1, 1)
    want = m.eps(x, schedule.abar[t], torch.tensor([0, NULL, 1]))
    for shaped in (x, x[:, :, None, None]):
        out = model(shaped, t, context)
        assert out.shape == shaped.shape
        eps = schedule.to_eps(out, shaped, t)
        torch.testing.assert_close(eps.view(3, 3), want, atol=2e-4, rtol=1e-4)  # x0 at t = 1 divides by 0.04


def test_bad_worlds_are_refused() -> None:
    means, one = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match=r"stds must be \[2\].*\(3,\)"):
        GaussianMixture(means, torch.ones(3), one)
    with pytest.raises(ValueError, match="positive"):
        GaussianMixture(means, 0 * one, one)
    with pytest.raises(ValueError, match=r"no component \[7\]"):
        world().eps(draw(2, 3), torch.tensor(0.5), 7)
