"""Signs and units of the policy gradient."""

import pytest
import torch

from minireflect.diffusion.ddim import ddim_step
from minireflect.rl.policy import gaussian_kl, ppo_clip


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_loss_is_the_pessimistic_maximum() -> None:
    """All four corners of PPO (7) by hand, clip 0.2: ratios 1.5 and 0.5, advantages 2 and -2."""
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0])
    log_prob = ratio.log().requires_grad_()
    stats = ppo_clip(log_prob, torch.zeros(4), advantage, 0.2)
    want = torch.tensor([-2 * 1.2, -2 * 0.5, 2 * 1.5, 2 * 0.8])  # clipped, not clipped, not clipped, clipped
    assert stats.loss.item() == pytest.approx(want.mean().item(), rel=1e-6)
    stats.loss.backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0, -2 * 0.5, 2 * 1.5, 0.0]) / 4)
    assert stats.clip_high == 0.25 and stats.clip_low == 0.25
    assert stats.log_ratio_max == pytest.approx(0.6931, abs=1e-4)
    assert not any(v.requires_grad for v in stats[1:])


def test_first_ratio_is_one_and_its_gradient_is_not_zero() -> None:
    old, advantage = draw(5), draw(5, seed=1)
    log_prob = old.clone().requires_grad_()
    stats = ppo_clip(log_prob, old, advantage, 1e-4)
    assert stats.log_ratio_max == 0
    assert stats.clip_high == 0 and stats.clip_low == 0
    stats.loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantage / 5)  # plain REINFORCE


def test_a_step_raises_the_better_sample() -> None:
    """Through ddim_step: one gradient step on eps makes the rewarded action likelier, the punished one less
    likely.
    """
    x, abar, abar_prev, sigma = draw(2, 1, 3, 5), torch.tensor(0.3), torch.tensor(0.5), torch.tensor(0.4)
    eps = draw(2, 1, 3, 5, seed=1).requires_grad_()
    acted = ddim_step(x, eps.detach(), abar, abar_prev, sigma, generator=torch.Generator().manual_seed(2))
    step = ddim_step(x, eps, abar, abar_prev, sigma, x_prev=acted.x_prev)
    ppo_clip(step.log_prob, acted.log_prob, torch.tensor([1.0, -1.0]), 0.2).loss.backward()
    after = ddim_step(x, eps.detach() - 1e-3 * eps.grad, abar, abar_prev, sigma, x_prev=acted.x_prev)
    assert after.log_prob[0] > acted.log_prob[0] and after.log_prob[1] < acted.log_prob[1]


def test_ratios_beyond_exp_stay_finite() -> None:
    log_prob = torch.tensor([2000.0, -2000.0, 2000.0, -2000.0], requires_grad=True)
    stats = ppo_clip(log_prob, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.1)
    stats.loss.backward()
    assert all(v.isfinite() for v in stats) and log_prob.grad.isfinite().all() and stats.log_ratio_max == 2000


def test_old_log_prob_and_advantage_are_constants() -> None:
    inputs = [draw(3, seed=s).requires_grad_() for s in range(3)]
    ppo_clip(*inputs, 0.2).loss.backward()
    assert inputs[0].grad is not None and inputs[1].grad is None and inputs[2].grad is None
    with pytest.raises(
        ValueError, match=r"\(3,\), \(3, 1\)"
    ):  # would broadcast to (3, 3) and train on nonsense
        ppo_clip(draw(3), draw(3, 1), draw(3), 0.2)


@pytest.mark.parametrize("dims", [1, 256])
def test_a_clip_of_the_mean_times_the_dimensions_is_a_clip_in_nats(dims: int) -> None:
    for factor, share in ((0.99, 0.0), (1.01, 1.0)):
        nats = torch.tensor([factor * 1e-3 * dims])
        assert ppo_clip(nats / dims, torch.zeros(1), torch.ones(1), 1e-3).clip_high == share


def test_mean_reduction_clips_one_side() -> None:
    """GRPO-Guard's remark: E[log-ratio] is -KL, so with many dimensions ratios sink and only the low tail is
    clipped.
    """
    shares = {}
    for dims in (64, 16_384):
        noise = draw(500, dims, seed=dims)
        # the mean moved by 0.02 sigma in every dimension
        log_ratio = -0.5 * ((noise - 0.02) ** 2 - noise**2).sum(1)
        # away from the action, hence -KL on average
        log_ratio = (log_ratio - 0.02**2 * dims) / dims
        tails = [ppo_clip(log_ratio, torch.zeros(500), torch.full((500,), a), 1e-4) for a in (1.0, -1.0)]
        shares[dims] = (float(tails[0].clip_high), float(tails[1].clip_low))
        assert tails[0].clip_low == 0 and tails[1].clip_high == 0
    assert shares[16_384][0] < 0.1 and shares[16_384][1] > 0.6 and shares[64][0] > 0.35


@pytest.mark.parametrize("per_sample", [False, True])
def test_kl_by_monte_carlo(per_sample: bool) -> None:
    mean, ref = draw(2, 1, 3, 5, seed=1), draw(2, 1, 3, 5, seed=2)
    sigma = torch.tensor([1.3, 2.1]) if per_sample else torch.tensor(1.3)
    kl = gaussian_kl(mean, ref, sigma)
    assert kl.shape == (2,)
    s = sigma.expand(2)[:, None, None, None]
    n = 100_000
    x = mean + s * draw(n, 2, 1, 3, 5, seed=3)
    log_ratio = (((x - ref) ** 2 - (x - mean) ** 2) / (2 * s**2)).flatten(2).sum(2)
    assert ((log_ratio.mean(0) - kl).abs() < 4 * log_ratio.std(0) / n**0.5).all()
    normal, other = (torch.distributions.Normal(m, s) for m in (mean, ref))
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(normal, other).flatten(1).sum(1))


def test_kl_of_a_step_without_density_is_zero() -> None:
    mean = draw(2, 1, 3, 5).requires_grad_()
    kl = gaussian_kl(mean, torch.zeros(2, 1, 3, 5), torch.tensor([0.0, 1.0]))
    kl.sum().backward()
    assert kl[0] == 0 and kl[1] > 0 and mean.grad.isfinite().all()
