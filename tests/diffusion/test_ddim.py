"""One step is a density where sigma > 0, and nothing where sigma = 0."""

import pytest
import torch
from torch.distributions import Normal

from minireflect.diffusion.ddim import ddim_step, gaussian_log_prob, renoise_step
from minireflect.diffusion.schedule import Schedule, ScheduleConfig

SHAPE = (3, 2, 5, 7)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed))


def test_inverse_undoes_the_step() -> None:
    x, eps = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    table = Schedule(ScheduleConfig()).table(20)
    for i in range(20):
        down = ddim_step(x, eps, table.abar[i], table.abar_prev[i], torch.tensor(0.0)).x_prev
        up = renoise_step(down, eps, table.abar[i], table.abar_prev[i])
        torch.testing.assert_close(up, x, atol=2e-6, rtol=1e-5)


def step_numbers(i: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table = Schedule(ScheduleConfig()).table(20)
    return table.abar[i], table.abar_prev[i], table.sigma(1.0)[i]


def test_log_prob_is_the_normal_density_summed() -> None:
    step = ddim_step(draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), *step_numbers(), generator=rng())
    want = Normal(step.mean, step.sigma[0]).log_prob(step.x_prev).sum((1, 2, 3))
    assert step.log_prob.shape == (3,) and step.sigma.shape == (3,)
    torch.testing.assert_close(step.log_prob, want, atol=1e-4, rtol=1e-5)


def test_density_integrates_to_one() -> None:
    grid = torch.linspace(-6, 6, 20_001)[:, None, None, None]
    x, eps = torch.full_like(grid, 0.7), torch.full_like(grid, -0.4)
    step = ddim_step(x, eps, *step_numbers(), x_prev=grid)
    assert step.log_prob.double().exp().sum() * 12 / 20_000 == pytest.approx(1, abs=1e-5)


def test_sampler_draws_from_its_density() -> None:
    """Monte Carlo: the entropy is -E[log p], and the shares of a histogram are what the density says."""
    n = 200_000
    abar, abar_prev, sigma = step_numbers()
    step = ddim_step(
        torch.full((n, 1, 1, 1), 0.7), torch.full((n, 1, 1, 1), -0.4), abar, abar_prev, sigma, generator=rng()
    )
    normal = Normal(step.mean.flatten()[0], sigma)
    # std of log p
    assert -step.log_prob.mean() == pytest.approx(float(normal.entropy()), abs=4 * 0.71 / n**0.5)
    edges = normal.mean + sigma * torch.linspace(-2.5, 2.5, 11)
    share = torch.histogram(step.x_prev.flatten(), edges).hist / n
    want = normal.cdf(edges).diff()
    torch.testing.assert_close(share, want, atol=4 * 0.5 / n**0.5, rtol=0)


def test_scoring_what_was_sampled_gives_a_ratio_of_exactly_one() -> None:
    x, eps, numbers = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), step_numbers()
    acted = ddim_step(x, eps, *numbers, generator=rng())
    scored = ddim_step(x, eps, *numbers, x_prev=acted.x_prev)
    assert ((scored.log_prob - acted.log_prob).exp() == 1.0).all() and scored.x_prev.equal(acted.x_prev)
    # as the update passes them
    batched = ddim_step(x, eps, *(v.expand(3) for v in numbers), x_prev=acted.x_prev)
    assert ((batched.log_prob - acted.log_prob).exp() == 1.0).all()


def test_a_batch_of_mixed_steps_equals_the_steps_one_by_one() -> None:
    table = Schedule(ScheduleConfig()).table(10, "linspace")  # its last step has sigma 0
    x, eps, x_prev = (draw(10, 2, 5, 7, seed=s) for s in (1, 2, 3))
    sigma = table.sigma(1.0)
    batch = ddim_step(x, eps, table.abar, table.abar_prev, sigma, x_prev=x_prev)
    for i in range(10):
        one = slice(i, i + 1)
        alone = ddim_step(x[one], eps[one], table.abar[i], table.abar_prev[i], sigma[i], x_prev=x_prev[one])
        torch.testing.assert_close(batch.log_prob[one], alone.log_prob, atol=0, rtol=1e-5)
        torch.testing.assert_close(batch.mean[one], alone.mean)
    assert batch.log_prob[-1] == 0 and (batch.log_prob[:-1] != 0).all()
    with pytest.raises(ValueError, match=r"\(10\).*\(3,\)"):
        ddim_step(x, eps, table.abar[:3], table.abar_prev, sigma, x_prev=x_prev)


def test_sigma_zero_has_no_density_and_no_nan() -> None:
    x, eps = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2).requires_grad_()
    zero = torch.tensor(0.0)
    step = ddim_step(x, eps, step_numbers()[0], step_numbers()[1], zero)  # draws nothing, needs no generator
    assert step.x_prev.equal(step.mean) and (step.log_prob == 0).all()
    scored = ddim_step(
        x, eps, step_numbers()[0], step_numbers()[1], torch.tensor([0.0, 0.1, 0.0]), x_prev=draw(*SHAPE)
    )
    assert (scored.log_prob[[0, 2]] == 0).all() and scored.log_prob[1] != 0
    scored.log_prob.sum().backward()
    assert eps.grad.isfinite().all() and (eps.grad[[0, 2]] == 0).all() and (eps.grad[1] != 0).all()
    assert (gaussian_log_prob(x, x, zero) == 0).all()
    drawn = ddim_step(x, eps, *step_numbers()[:2], torch.tensor([0.0, 0.1, 0.0]), generator=rng())
    still = (drawn.x_prev == drawn.mean).flatten(1)
    assert still[[0, 2]].all() and not still[1].any()


def test_rounding_under_the_root_is_clamped() -> None:
    """All the variance is new noise, and rounding adds a little: 1 - abar_prev - sigma^2 is -1e-7."""
    abar_prev = torch.tensor(0.9)
    sigma = (1 - abar_prev).sqrt() + 2e-7
    assert 1 - abar_prev - sigma**2 < 0
    step = ddim_step(
        draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), torch.tensor(0.5), abar_prev, sigma, generator=rng()
    )
    assert all(v.isfinite().all() for v in step)


def test_noise_is_the_generators_and_the_global_stream_is_untouched() -> None:
    x, eps, numbers = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), step_numbers()
    before = torch.get_rng_state()
    a = ddim_step(x, eps, *numbers, generator=rng(5))
    b = ddim_step(x, eps, *numbers, generator=rng(5))
    c = ddim_step(x, eps, *numbers, generator=rng(6))
    assert a.x_prev.equal(b.x_prev) and not a.x_prev.equal(c.x_prev)
    noise = torch.randn(SHAPE, generator=rng(5))  # one call for the whole batch
    torch.testing.assert_close(a.x_prev, a.mean + numbers[2] * noise, atol=0, rtol=0)
    assert torch.get_rng_state().equal(before)
    with pytest.raises(ValueError, match="generator"):
        ddim_step(x, eps, *numbers)
    g = rng(7)
    state = g.get_state()
    ddim_step(x, eps, *numbers, x_prev=a.x_prev, generator=g)  # scoring draws nothing
    assert g.get_state().equal(state)


def test_half_precision_latents_are_computed_in_float32() -> None:
    step = ddim_step(draw(*SHAPE).half(), draw(*SHAPE, seed=2).half(), *step_numbers(), generator=rng())
    again = ddim_step(draw(*SHAPE), draw(*SHAPE, seed=2), *step_numbers(), x_prev=draw(*SHAPE).half())
    assert all(v.dtype == torch.float32 for v in (*step, *again))


def test_gradient_of_the_log_prob_is_the_score_function() -> None:
    """d log N / d mean = (x_prev - mean) / sigma^2, also when the step drew x_prev itself."""
    x, numbers = draw(*SHAPE, seed=1), step_numbers()
    eps = draw(*SHAPE, seed=2).requires_grad_()
    step = ddim_step(x, eps, *numbers, generator=rng())
    (grad,) = torch.autograd.grad(step.log_prob.sum(), step.mean)
    torch.testing.assert_close(grad, ((step.x_prev - step.mean) / numbers[2] ** 2).detach())


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_without_signal_the_predicted_picture_is_that_of_the_network(prediction: str) -> None:
    """At alpha-bar 1e-8 an error of the noise counts 10,000 times: noise and picture agree in float64."""
    schedule = Schedule(ScheduleConfig(prediction=prediction, zero_snr=True))
    x, output, t = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2), torch.tensor(999)
    eps, zero = schedule.to_eps(output, x, t), torch.tensor(0.0)
    found = ddim_step(x, eps, schedule.abar[999], schedule.abar[949], zero)
    wanted = output if prediction == "x0" else 1e-4 * x - (1 - 1e-8) ** 0.5 * output
    torch.testing.assert_close(found.x0, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("i", [0, 7, 18])
def test_the_mean_is_that_of_ddims_equation_12(i: int) -> None:
    """In float64, with step noise; what is left of the old noise and the new one have a level's variance."""
    table = Schedule(ScheduleConfig()).table(20)
    a, b, sigma = table.abar[i], table.abar_prev[i], table.sigma(1.0)[i]
    x0, eps = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    step = ddim_step(a.sqrt() * x0 + (1 - a).sqrt() * eps, eps, a, b, sigma, x_prev=x0)
    of_x0, of_eps = b.double().sqrt(), (1 - b.double() - sigma.double() ** 2).sqrt()
    torch.testing.assert_close(step.mean, (of_x0 * x0 + of_eps * eps).float(), atol=2e-5, rtol=0)
    torch.testing.assert_close(step.x0, x0, atol=2e-5, rtol=0)
    assert (of_eps**2 + sigma**2).item() == pytest.approx(1 - b.item(), abs=1e-6)
