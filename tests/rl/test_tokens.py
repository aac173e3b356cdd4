"""The GRPO step on tokens, and the controller that holds an entropy at a target."""

import math

import pytest
import torch

from minireflect import rng
from minireflect.parallel import MAX
from minireflect.rl import tokens
from minireflect.rl.tokens import (
    AdaptiveEntropy,
    TokenBatch,
    TokenConfig,
    entropy_of,
    token_kl,
    token_step,
    token_weights,
)


def policy(rows: int = 2, tokens: int = 3) -> torch.Tensor:
    """Log-probabilities that are parameters themselves: what a step does to each token can be read off."""
    return torch.randn(rows, tokens, generator=rng(0, "policy")).sub(3).requires_grad_()


def test_one_step_makes_tokens_of_better_samples_likelier_and_leaves_unchosen_ones_alone() -> None:
    now = policy()
    before = now.detach().clone()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    batch = TokenBatch(before, before, torch.tensor([1.0, -1.0]), token_weights(mask))
    stats = token_step(now, batch, torch.optim.SGD([now], lr=0.1), clip=0.2, beta=0.5)
    moved = now.detach() - before
    assert (moved[0, :2] > 0).all() and moved[1, 0] < 0 and (moved[~mask] == 0).all()
    assert stats.ratio_error == stats.kl == stats.clip_high == stats.clip_low == 0
    assert stats.loss == stats.total == 0  # both sequences weigh the same, their advantages cancel
    torch.testing.assert_close(now.grad[mask], -torch.tensor([0.25, 0.25, -0.5]))  # w A rho, of norm below 1


def test_a_step_forgets_the_gradient_of_the_step_before() -> None:
    now = policy(1, 2)
    now.grad = torch.full((1, 2), 9.0)
    batch = TokenBatch(now.detach(), now.detach(), torch.tensor([1.0]), torch.full((1, 2), 0.5))
    token_step(now, batch, torch.optim.SGD([now], lr=0.0), 0.2, 0.0)
    torch.testing.assert_close(now.grad, torch.full((1, 2), -0.5))


def test_a_token_beyond_the_clip_has_no_gradient() -> None:
    now = policy(1, 2)
    before = now.detach().clone()
    old = before - torch.tensor([[1.0, 0.0]])  # the first token has become e times likelier
    batch = TokenBatch(old, before, torch.tensor([1.0]), torch.full((1, 2), 0.5))
    stats = token_step(now, batch, torch.optim.SGD([now], lr=0.1), clip=0.2, beta=0.0)
    assert now.grad[0, 0] == 0 and now.grad[0, 1] < 0
    assert stats.clip_high == 0.5 and stats.ratio_error == pytest.approx(math.e - 1, rel=1e-5)


def test_shares_are_of_the_tokens_that_count() -> None:
    """Of two tokens in the loss one is beyond the clip; the third, which is not chosen, counts nowhere."""
    now = policy(1, 3)
    before = now.detach().clone()
    old = before - torch.tensor([[1.0, 0.0, 5.0]])
    batch = TokenBatch(old, before, torch.tensor([1.0]), torch.tensor([[0.5, 0.5, 0.0]]))
    stats = token_step(now, batch, torch.optim.SGD([now], lr=0.1), clip=0.2, beta=0.0)
    assert stats.clip_high == 0.5 and stats.clip_low == 0
    assert stats.ratio_error == pytest.approx(math.e - 1, rel=1e-5)


def test_the_kl_pulls_back_to_the_reference_and_more_terms_are_added() -> None:
    now = policy(1, 2)
    before = now.detach().clone()
    batch = TokenBatch(before, before - 1, torch.tensor([0.0]), torch.full((1, 2), 0.5))
    stats = token_step(now, batch, torch.optim.SGD([now], lr=0.1), 0.2, 2.0, (now * 0).sum() + 3)
    assert (now.detach() < before).all()
    assert stats.kl == pytest.approx(math.exp(-1), rel=1e-5)  # r - 1 - log r at log r = -1
    assert stats.total == pytest.approx(2 * stats.kl + 3)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    now = policy(1, 2)
    batch = TokenBatch(now.detach(), now.detach(), torch.tensor([1.0]), torch.full((1, 2), 0.5))
    steep = (now - now.detach()).sum().sqrt()  # 0, with an infinite slope
    with pytest.raises(FloatingPointError, match=r"lower the learning rate, 1\.00e-01 now"):
        token_step(now, batch, torch.optim.SGD([now], lr=0.1), 0.2, 0.0, steep)


def test_every_sequence_has_the_same_weight() -> None:
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert torch.equal(token_weights(mask), torch.tensor([[0.5, 0, 0, 0], [0.125] * 4]))


def test_the_token_kl_is_unbiased() -> None:
    """Against the exact KL of two categorical distributions: four standard errors of 100,000 samples."""
    p, q = (torch.randn(6, generator=rng(i, "kl")).log_softmax(0) for i in range(2))
    exact = (p.exp() * (p - q)).sum()
    draws = torch.multinomial(p.exp(), 100_000, replacement=True, generator=rng(2, "kl"))
    k3 = token_kl(p[draws], q[draws])
    assert (k3 >= 0).all()
    assert abs(k3.mean() - exact) < 4 * k3.std() / 100_000**0.5


def test_entropy_equals_torchs_and_impossible_tokens_contribute_nothing() -> None:
    logits = torch.randn(5, 9, generator=rng(0, "h"))
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy_of(logits.log_softmax(-1)), wanted)
    log_prob = torch.tensor([0.5, 0.5, 0.0]).log()
    assert entropy_of(log_prob).item() == pytest.approx(math.log(2))
    logits = torch.tensor([1.0, 0.5, -200.0, -torch.inf]).requires_grad_()  # of which the third underflows
    entropy_of(logits.log_softmax(-1)).backward()
    two = logits.detach()[:2].clone().requires_grad_()
    torch.distributions.Categorical(logits=two).entropy().backward()
    torch.testing.assert_close(logits.grad, torch.cat([two.grad, torch.zeros(2)]))


@pytest.mark.parametrize("start", [0.2, 1.9])
def test_the_controller_moves_the_entropy_to_its_target_from_both_sides(start: float) -> None:
    """A policy over eight tokens that only minimises alpha H; its entropy begins below or above the target of
    1.2 nats.
    """
    sharp = torch.tensor(6.0 if start < 1 else 0.8)
    logits = (sharp * torch.linspace(0, 1, 8) ** 2).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.2)
    control = AdaptiveEntropy(target=1.2, bound=0.2, lr=5e-3)
    history = []
    for _ in range(2000):
        h = entropy_of(logits.log_softmax(-1))
        optimizer.zero_grad()
        (control.alpha * h).backward()
        optimizer.step()
        control.step(h.item())
        history.append(h.item())
    assert (history[0] < 1.0) is (start < 1)  # it oscillates around the target: an integral controller
    assert (
        abs(sum(history[-1000:]) / 1000 - 1.2) < 0.15
        and max(history[-1500:]) < 1.9
        and min(history[-1500:]) > 0.5
    )


def test_alpha_and_not_psi_has_the_bound() -> None:
    control = AdaptiveEntropy(target=1.0, bound=2.0, lr=0.1)
    assert max(control.step(3.0) for _ in range(30)) == pytest.approx(2.0)


def test_alpha_does_not_stick_at_its_bound() -> None:
    control = AdaptiveEntropy(target=1.0, bound=5e-3, lr=1e-3)
    for _ in range(400):
        control.step(3.0)
    assert control.alpha == pytest.approx(5e-3, rel=1e-3)
    steps = 0
    while control.alpha > 0 and steps < 200:
        control.step(0.5)
        steps += 1
    assert steps < 60 and control.alpha <= 0


def test_the_controllers_adam_equals_torchs() -> None:
    control, psi = (
        AdaptiveEntropy(target=1.0, bound=1e3, lr=1e-2),
        torch.nn.Parameter(torch.zeros((), dtype=torch.float64)),
    )
    adam = torch.optim.Adam([psi], lr=1e-2, maximize=True)
    for h in (2.0, 1.5, 0.3, 0.9, 1.1, 4.0):
        adam.zero_grad()
        (torch.sinh(psi) * (h - 1.0)).backward()
        adam.step(), control.step(h)
        assert control.alpha == pytest.approx(math.sinh(psi.item()), rel=1e-4)


@pytest.mark.parametrize("what", ["old", "reference", "more"])
def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing(what: str) -> None:
    now, bad = policy(1, 2), torch.tensor([[torch.nan, 0.0]])
    before = now.detach().clone()
    batch = TokenBatch(before, before, torch.tensor([1.0]), torch.full((1, 2), 0.5))
    batch, more = (batch, [bad.sum()]) if what == "more" else (batch._replace(**{what: bad}), [])
    with pytest.raises(FloatingPointError, match="a gradient is not finite"):
        token_step(now, batch, torch.optim.AdamW([now]), 0.2, 2.0, *more)
    assert torch.equal(now.detach(), before)


def test_adams_epsilon_is_outside_of_the_root() -> None:
    """The first step is lr g / (|g| + 1e-8), whatever the size of g: here 1e-6, from psi = 0."""
    control = AdaptiveEntropy(target=0.0, bound=1.0, lr=0.1)
    control.step(1e-6)
    assert control.psi.item() == pytest.approx(0.1 / 1.01, rel=1e-4)


def test_the_kl_term_has_the_weights_of_the_tokens() -> None:
    """The gradient and the statistic of beta sum w (r - 1 - log r), with A = 0 and unlike weights."""
    now = torch.nn.Parameter(torch.tensor([[-1.0, -2.0], [-0.5, -3.0]]))
    ref, w = torch.tensor([[-1.5, -1.0], [-0.6, -9.0]]), torch.tensor([[0.5, 0.3], [0.2, 0.0]])
    batch = TokenBatch(now.detach().clone(), ref, torch.zeros(2), w)
    optimizer = torch.optim.SGD([now], lr=0.0)
    stats = token_step(now, batch, optimizer, 0.2, 0.1)
    log_r = (ref - now.detach()).double()
    assert stats.kl == pytest.approx((w * (log_r.exp() - 1 - log_r)).sum().item(), rel=1e-5)
    torch.testing.assert_close(now.grad, (0.1 * w * (1 - log_r.exp())).float())


def test_the_clip_is_the_best_of_ppos_paper() -> None:
    assert TokenConfig().clip_range == 0.2  # arXiv 1707.06347, table 1


def test_a_norm_that_is_not_finite_is_an_error_also_of_a_fused_optimiser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It skips the step and does not raise."""
    monkeypatch.setattr(tokens, "take_step", lambda optimizer: torch.tensor(math.inf))
    now = policy()
    batch = TokenBatch(now.detach(), now.detach(), torch.zeros(2), torch.full((2, 3), 1 / 6))
    with pytest.raises(FloatingPointError, match="a gradient is not finite"):
        token_step(now, batch, torch.optim.SGD([now], lr=0.0), 0.2, 0.0)


def test_the_ratio_error_is_the_largest_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "total", lambda x, of=None: x + 0.25 if of is MAX else x)
    now = policy()
    same = now.detach().clone()
    batch = TokenBatch(same, same, torch.zeros(2), token_weights(torch.ones(2, 3, dtype=torch.bool)))
    assert token_step(now, batch, torch.optim.SGD([now], lr=0.0), 0.2, 0.0).ratio_error == 0.25


def test_the_reference_of_the_kl_has_no_gradient() -> None:
    now, reference = policy(), policy().detach().add(0.5).requires_grad_()
    token_kl(now, reference).sum().backward()
    torch.testing.assert_close(now.grad, torch.full_like(now, 1 - math.exp(0.5)))
    assert reference.grad is None
