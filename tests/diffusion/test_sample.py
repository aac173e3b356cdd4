"""Guidance identities, samplers as generators, inversion in the exact world."""

import pytest
import torch
from torch import Tensor

from minireflect.diffusion.ddim import ddim_step
from minireflect.diffusion.exact import GaussianMixture
from minireflect.diffusion.sample import EpsFn, collect, denoise, guided, last, renoise
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, StepTable

SCHEDULE = Schedule(ScheduleConfig())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def world() -> GaussianMixture:
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.5]])
    return GaussianMixture(means, torch.tensor([0.4, 0.6]), torch.ones(2))


def exact_eps(w: float = 1.0) -> EpsFn:
    m = world()
    return guided(m.model(SCHEDULE), m.context(0), m.context(None), w, SCHEDULE)


class Net:
    """A stand-in network that remembers the batch sizes it was called with."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.gain = torch.ones((), requires_grad=True)

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert len(x) == len(t) == len(context)
        self.calls.append(len(x))
        return self.gain * (
            0.1 * x + context.mean((1, 2))[:, None, None, None] + t[:, None, None, None] / 1000
        )


def test_guidance() -> None:
    x, cond, uncond = draw(3, 2, 5, 7), draw(3, 4, 6, seed=1), draw(1, 4, 6, seed=2)
    t = torch.tensor(501)
    net = Net()
    eps_c = guided(net, cond, uncond, 1)(x, t)
    eps_u = guided(net, cond, uncond, 0)(x, t)
    assert net.calls == [3, 3]  # one evaluation each, nothing doubled
    labels = t.expand(3)
    assert eps_c.equal(net(x, labels, cond)) and eps_u.equal(net(x, labels, uncond.expand(3, -1, -1)))
    net.calls.clear()
    eps = guided(net, cond, uncond, 5.0)(x, t)
    assert net.calls == [6]  # one evaluation of a doubled batch
    torch.testing.assert_close(eps, eps_u + 5.0 * (eps_c - eps_u))
    assert guided(net, cond, uncond.expand(3, -1, -1), 5.0)(x, labels).equal(eps)  # (b t d) and (b) labels
    for w in (1 + 1e-6, 1e-6):  # the shortcuts are limits of the formula
        torch.testing.assert_close(
            guided(net, cond, uncond, w)(x, t), eps_c if w > 0.5 else eps_u, atol=1e-5, rtol=0
        )
    grads = [
        torch.autograd.grad(guided(net, c, u, 3.0)(x, t).sum(), net.gain)[0]
        for c, u in ((cond, uncond), (cond, 2 * uncond))
    ]
    assert grads[0] != grads[1]  # the unconditional half is part of the policy


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_guided_converts_the_prediction(prediction: str) -> None:
    m, other = world(), Schedule(ScheduleConfig(prediction=prediction))
    x, t = draw(5, 2, 1, 1), torch.tensor(501)
    got = guided(m.model(other), m.context(0), m.context(None), 3.0, other)(x, t)
    torch.testing.assert_close(got, exact_eps(3.0)(x, t), atol=1e-5, rtol=1e-4)


def test_denoise_yields_what_ddim_step_computes() -> None:
    table, eps_fn, x = SCHEDULE.table(7), exact_eps(), draw(4, 2, 1, 1)
    steps = list(denoise(eps_fn, x, table, eta=1.0, generator=torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    assert [s.index for s in steps] == list(range(7)) and [int(s.t) for s in steps] == table.t.tolist()
    for i, step in enumerate(steps):
        want = ddim_step(
            x,
            eps_fn(x, table.t[i]),
            table.abar[i],
            table.abar_prev[i],
            table.sigma(1.0)[i],
            generator=generator,
        )
        for got, value in ((step.x, want.x_prev), (step.x0, want.x0), (step.log_prob, want.log_prob)):
            assert got.equal(value)
        x = step.x


def test_trajectory_can_be_rescored_exactly() -> None:
    """The first PPO ratio: a rollout, collected, and scored again by the same function."""
    table, eps_fn, x_T = SCHEDULE.table(7), exact_eps(5.0), draw(4, 2, 1, 1)
    tr = collect(x_T, denoise(eps_fn, x_T, table, eta=1.0, generator=torch.Generator().manual_seed(0)))
    assert (
        tr.latents.shape == (4, 8, 2, 1, 1)
        and tr.log_probs.shape == (4, 7)
        and tr.latents.dtype == torch.float32
    )
    assert tr.latents[:, 0].equal(x_T)
    for i in range(7):
        x, x_prev = tr.latents[:, i], tr.latents[:, i + 1]
        again = ddim_step(
            x, eps_fn(x, table.t[i]), table.abar[i], table.abar_prev[i], table.sigma(1.0)[i], x_prev
        )
        assert ((again.log_prob - tr.log_probs[:, i]).exp() == 1.0).all()


def test_eta_zero_is_deterministic_and_branches_share_a_prefix() -> None:
    table, x, eps_fn = SCHEDULE.table(10), draw(4, 2, 1, 1), exact_eps(3.0)
    whole = last(denoise(eps_fn, x, table))
    assert whole.equal(last(denoise(eps_fn, x, table)))
    assert whole.equal(last(denoise(eps_fn, last(denoise(eps_fn, x, table[:6])), table[6:])))
    empty = collect(x, denoise(eps_fn, x, table[:0]))
    assert empty.latents.shape == (4, 1, 2, 1, 1) and empty.log_probs.shape == (4, 0)
    with pytest.raises(ValueError, match="empty"):
        last(denoise(eps_fn, x, table[:0]))


@pytest.mark.parametrize("steps", [7, 20, 30])
def test_renoise_makes_n_moves_for_n(steps: int) -> None:
    table = SCHEDULE.table(steps)
    seen: list[int] = []

    def constant(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t))
        return torch.full_like(x, 0.3)

    x_T = draw(3, 2, 5, 7)
    x_0 = last(denoise(constant, x_T, table))
    down, seen = list(seen), []
    moves = list(renoise(constant, x_0, table))
    assert len(moves) == len(seen) == steps and seen == down[::-1] == table.t.flip(0).tolist()
    assert int(moves[-1].t) == int(table.t[0]) and [m.index for m in moves] == list(range(steps))[::-1]
    torch.testing.assert_close(moves[-1].x, x_T, atol=1e-5, rtol=1e-4)  # constant eps: the inverse is exact


def test_renoising_yields_the_picture_that_its_noise_leads_to() -> None:
    """DDIM (9) at the cleaner level: with one noise for all steps, the picture itself."""
    x_0 = draw(3, 2, 4, 4)
    table = Schedule(ScheduleConfig(set_alpha_to_one=True)).table(10)
    for step in renoise(lambda x, t: torch.full_like(x, 0.3), x_0, table):
        torch.testing.assert_close(step.x0, x_0, atol=1e-4, rtol=1e-4)


def test_renoised_latents_are_at_their_level() -> None:
    """Data of mean 0 and std s: the level of a latent shows in its std, sqrt(abar s^2 + 1 - abar)."""
    s, table = 0.5, SCHEDULE.table(200)
    m = GaussianMixture(torch.zeros(1, 1), torch.tensor([s]), torch.ones(1))
    eps_fn = guided(m.model(SCHEDULE), m.context(0), m.context(None), 1.0, SCHEDULE)
    x_0 = s * draw(5_000, 1, 1, 1)
    for step in renoise(eps_fn, x_0, table):
        abar = table.abar[step.index]
        assert step.x.std() == pytest.approx(float((abar * s**2 + 1 - abar).sqrt()), rel=0.03)


def round_trip(table: StepTable, refine: int = 0) -> float:
    x_T, eps_fn = draw(100, 2, 1, 1), exact_eps(1.0)
    back = last(renoise(eps_fn, last(denoise(eps_fn, x_T, table)), table, refine))
    return float((back - x_T).norm(dim=1).median())


def test_inversion_error_falls_as_one_over_n() -> None:
    errors = [round_trip(SCHEDULE.table(n)) for n in (25, 50, 100, 200)]
    assert all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:])), errors
    assert errors[0] > 0.05


def test_fixed_point_iterations_make_inversion_exact() -> None:
    errors = [round_trip(SCHEDULE.table(50), refine) for refine in (0, 1, 3, 10)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[3] < 2e-5, errors


def test_no_graph_is_kept() -> None:
    net, table, x, cond = Net(), SCHEDULE.table(5), draw(3, 2, 5, 7), draw(3, 4, 6, seed=1)
    eps_fn = guided(net, cond, 0 * cond[:1], 3.0)
    for sampler in (denoise, renoise):
        steps = sampler(eps_fn, x, table)
        for step in steps:
            assert torch.is_grad_enabled()  # the generator does not leak its mode between yields
            assert not any(v.requires_grad for v in step[1:])


def test_global_randomness_is_untouched() -> None:
    before, x = torch.get_rng_state(), draw(3, 2, 1, 1)
    last(denoise(exact_eps(3.0), x, SCHEDULE.table(5), eta=1.0, generator=torch.Generator().manual_seed(0)))
    last(renoise(exact_eps(3.0), x, SCHEDULE.table(5)))
    assert torch.get_rng_state().equal(before)
    with pytest.raises(ValueError, match="generator"):
        last(denoise(exact_eps(3.0), x, SCHEDULE.table(5), eta=1.0))


def test_sampler_reaches_the_data_of_its_class() -> None:
    """Exact eps, many steps: both samplers must arrive at N((1, 0.5), 0.4^2), class 0 of the world."""
    x_T = draw(3_000, 2, 1, 1)
    for eta in (0.0, 1.0):
        x = last(
            denoise(exact_eps(1.0), x_T, SCHEDULE.table(100), eta, torch.Generator().manual_seed(1))
        ).flatten(1)
        torch.testing.assert_close(x.mean(0), torch.tensor([1.0, 0.5]), atol=0.04, rtol=0)
        torch.testing.assert_close(x.std(0), torch.tensor([0.4, 0.4]), atol=0.03, rtol=0)
