"""The learner: ratio 1 before the first update, gradients by hand, a replay that keeps the latest."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from minireflect import run as runs
from minireflect.diffusion.ddim import ddim_step
from minireflect.methods import learn as learning
from minireflect.methods.learn import Replay, jobs, path_kl, remember
from minireflect.methods.rollout import rollout
from minireflect.streams import rng
from tests.methods.common import CONFIG, REFUSED, learn_from, likes_the_first_and_third, one_iteration, plus
from tests.small import TEXTS, brightness, nothing, small_pipeline


@pytest.mark.parametrize("mode", ["select", "blind"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_ratio_is_exactly_one(mode: str, guidance: float) -> None:
    _, _, stats = one_iteration(replace(CONFIG, mode=mode, guidance=guidance, updates=1))
    assert stats.first_ratio == 0.0  # |rho - 1|: same function, same batch, same float32 latents
    assert stats.updates == 1 and stats.grad_norm > 0  # and yet its gradient is not 0


def test_the_base_is_at_kl_zero_before_the_update_and_away_from_it_after() -> None:
    _, _, stats = one_iteration(CONFIG)
    assert stats.kl == 0.0
    pipe, out, _ = one_iteration(replace(CONFIG, lr=1e-2))
    again = learn_from(pipe, out, CONFIG, lr=0.0)
    assert again.kl > 0 and again.first_ratio > 0


def test_the_first_ratio_is_one_in_rounds_of_some_prompts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "TRAINED", 1.0)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, likes_the_first_and_third, replace(REFUSED, updates=1), 0, 0)
    stats = learn_from(pipe, out, replace(REFUSED, updates=1), lr=0.0)
    assert stats.first_ratio == 0.0 and stats.grad_norm > 0


def test_refused_rounds_are_learnt_from_with_their_own_prompts() -> None:
    config = replace(CONFIG, objective="regress", rounds=1, redraw="refused", accept=1e9, group=2)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, plus, config, 0, 0)
    kept = torch.tensor([1, 3])
    again = out.rounds[1]
    part = again._replace(
        rows=kept,
        rewards=again.rewards[kept],
        path=again.path._replace(latents=again.path.latents.unflatten(0, (4, 2))[kept].flatten(0, 1)),
    )
    out.rounds[1] = part
    replay = Replay(12, pipe.latent_shape, pipe.tokenizer.length)
    remember(replay, pipe, out)
    first = out.rounds[0].rewards
    total = first.sum(1)
    total[kept] += part.rewards.sum(1)
    expected = torch.cat([(first / (total + learning.FLOOR)[:, None]).flatten(),
                          (part.rewards / (total[kept] + learning.FLOOR)[:, None]).flatten()])  # fmt: skip
    assert torch.allclose(replay.weights, expected)
    assert torch.equal(replay.ids[8:], pipe.tokenizer([TEXTS[1], TEXTS[1], TEXTS[3], TEXTS[3]]))


def test_groups_without_variance_are_not_trained_on() -> None:
    pipe, _, stats = one_iteration(CONFIG, nothing)
    assert stats.updates == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.unet.state_dict().values(), small_pipeline().unet.state_dict().values())
    )


def test_steps_without_noise_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last trailing step to a clean image has sigma 0, no density and no loss."""
    pipe = small_pipeline()
    monkeypatch.setattr(
        type(pipe), "table", lambda self, steps: self.schedule.table(steps, "trailing", set_alpha_to_one=True)
    )
    scored = []
    original = learning.ddim_step
    monkeypatch.setattr(learning, "MIN_SIGMA", 0.0)
    monkeypatch.setattr(learning, "ddim_step", lambda *a: scored.append(float(a[4])) or original(*a))
    out = rollout(pipe, TEXTS, brightness, CONFIG, 0, 0)
    assert out.rounds[0].table.sigma(1.0)[-1] == 0
    stats = learn_from(pipe, out, CONFIG)
    assert min(scored) > 0 and math.isfinite(stats.loss) and stats.updates == 2


def test_almost_noiseless_steps_are_left_out_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change d of eps moves the mean by c d; KL = (c d)^2 / (2 sigma^2), so c / sigma is what a step can
    do.
    """
    table = small_pipeline().schedule.table(10)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    strength = []
    for i, sigma in enumerate(table.sigma(1.0)):
        means = [
            ddim_step(zero, e, table.abar[i], table.abar_prev[i], sigma, x_prev=zero).mean
            for e in (zero, one)
        ]
        strength.append(float((means[1] - means[0]).abs() / sigma))
    assert strength[8] > 8 and sorted(strength)[-2] < 1.4  # the figures in the docstring of `jobs`
    out = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, steps=10), 0, 0)
    everything = [(r.rewards.flatten(), torch.ones(r.rewards.numel(), dtype=torch.bool)) for r in out.rounds]
    monkeypatch.setattr(learning, "TRAINED", 1.0)
    for least, count in ((0.0, 10), (0.1, 8)):
        monkeypatch.setattr(learning, "MIN_SIGMA", least)
        chosen = jobs(out, everything, 2, 1.0, rng(0, "u"))
        assert {i for chunk in chosen for _, i in chunk} == set(range(count))


def test_the_replay_holds_the_latest_pictures_and_draws_them_by_weight() -> None:
    replay = Replay(6, (1, 1, 1), 2)
    for first, weight in ((0, 5.0), (4, 1.0)):  # eight pictures into six places
        latents = torch.arange(first, first + 4.0).view(4, 1, 1, 1)
        replay.add(latents, torch.full((4, 2), first), torch.full((4,), weight))
    latents, ids = replay.draw(10_000, rng(0, "draw"))
    counts = torch.bincount(latents.flatten().long(), minlength=8)
    assert (counts[:2] == 0).all()  # 0 and 1 had to go
    expected = torch.tensor([5.0, 5, 1, 1, 1, 1]) / 14 * 10_000
    assert ((counts[2:] - expected).abs() < 5 * expected.sqrt()).all()
    assert torch.equal(ids[:, 0], torch.where(latents.flatten() < 4, 0, 4))


def test_regression_fits_what_the_reward_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is that of DDPM's loss on the accepted pictures alone, if the reward is 0 or 1 and all
    groups have one.
    """
    config = replace(CONFIG, objective="regress", updates=1, rounds=0, batch=4_000, anchor_below=0)
    monkeypatch.setattr(learning, "FLOOR", 1e-6), monkeypatch.setattr(runs, "MAX_GRAD_NORM", 1e9)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    only_first = torch.zeros(4, 4).index_fill_(1, torch.tensor([0]), 1.0)  # (n g)
    out.rounds[0] = out.rounds[0]._replace(rewards=only_first)
    replay = Replay(16, pipe.latent_shape, pipe.tokenizer.length)
    remember(replay, pipe, out)
    latents, ids = replay.draw(4_000, rng(0, "draw"))
    accepted = out.rounds[0].path.latents[::4, -1]
    assert all((x == accepted).flatten(1).all(1).any() for x in latents[:50])
    share = (ids == pipe.tokenizer([TEXTS[0]])).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)  # every prompt counts the same
    stats = learn_from(pipe, out, config, lr=0.0)
    assert stats.kl == 0.0 and stats.evaluations == 8_000
    got = torch.cat([p.grad.flatten() for p in pipe.unet.parameters()])
    t, noise = torch.arange(1000).repeat_interleave(4), torch.randn(4_000, 4, 4, 4, generator=rng(1, "other"))
    x_0, context = accepted.repeat(1000, 1, 1, 1), pipe.embed(TEXTS).repeat(1000, 1, 1)
    abar = pipe.schedule.abar[t].view(-1, 1, 1, 1)
    error = (pipe.unet(abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, t, context) - noise) ** 2
    pipe.unet.zero_grad()
    ((1 / abar).clamp(max=learning.MAX_WEIGHT) * error).mean().backward()
    want = torch.cat([p.grad.flatten() for p in pipe.unet.parameters()])
    assert torch.cosine_similarity(got, want, dim=0) > 0.97  # two Monte Carlo estimates of one gradient


def test_below_the_anchor_the_base_is_imitated_whatever_the_reward_says() -> None:
    """Against the base written out: at every level below `anchored` its prediction is the target, so at the
    base the gradient is 0.
    """
    config = replace(CONFIG, objective="regress", updates=1, rounds=0, batch=64, anchor_below=999)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, plus, config, 0, 0)
    at_base = learn_from(pipe, out, config, lr=0.0)
    away = learn_from(pipe, out, config, lr=0.0, base=small_pipeline(seed=1))
    unanchored = learn_from(pipe, out, replace(config, anchor_below=0), lr=0.0)
    assert at_base.grad_norm == 0 < min(away.grad_norm, unanchored.grad_norm)


def test_path_kl_is_that_of_the_ancestral_sampler() -> None:
    """Every level once, against the Gaussians of all DDPM steps written out in float64."""
    schedule = small_pipeline().schedule
    T = schedule.config.train_steps
    change = torch.full((T, 1, 2, 2), 0.1)
    abar = schedule.abar.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / before
    shift = beta / ((1 - beta).sqrt() * (1 - abar).sqrt()) * 0.1  # DDPM (11): what eps does to the mean
    total = (4 * shift**2 / (2 * beta)).sum()
    assert path_kl(schedule, torch.arange(T), change) == pytest.approx(total.item(), rel=1e-3)


def test_statistics_that_an_objective_does_not_have_are_none() -> None:
    _, _, stats = one_iteration(replace(CONFIG, objective="regress"), plus)
    assert stats.clip_high is stats.clip_low is stats.log_ratio is stats.first_ratio is None
    assert stats.updates == 2 and stats.loss > 0 and stats.grad_norm > 0
    assert None not in one_iteration(CONFIG)[2]


def test_ppos_kl_pulls_to_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that `kl` adds is that of torch's KL between the steps' Gaussians, per dimension."""
    monkeypatch.setattr(learning, "TRAINED", 1.0), monkeypatch.setattr(runs, "MAX_GRAD_NORM", 1e9)
    config, base = replace(CONFIG, rounds=0, steps=3, updates=1), small_pipeline(seed=1)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    gradients = []
    for kl in (0.0, 0.5):
        learn_from(pipe, out, replace(config, kl=kl), lr=0.0, base=base)
        gradients.append(torch.cat([p.grad.flatten() for p in pipe.unet.parameters()]))
    (round_,), total = out.rounds, 0.0
    table, context = round_.table, pipe.embed([text for text in TEXTS for _ in range(4)])
    trained = [i for i, sigma in enumerate(table.sigma(1.0)) if sigma > learning.MIN_SIGMA]
    for i in trained:
        x, a, b, sigma = round_.path.latents[:, i], table.abar[i], table.abar_prev[i], table.sigma(1.0)[i]
        eps = [p.unet(x, table.t[i].expand(len(x)), context) for p in (pipe, base)]
        x_0 = [(x - (1 - a).sqrt() * e) / a.sqrt() for e in eps]
        mean = [b.sqrt() * z + (1 - b - sigma**2).sqrt() * e for z, e in zip(x_0, eps)]  # DDIM (12)
        total = total + kl_divergence(Normal(mean[0], sigma), Normal(mean[1], sigma)).mean() / len(trained)
    pipe.unet.zero_grad()
    (0.5 * total).backward()
    wanted = torch.cat([p.grad.flatten() for p in pipe.unet.parameters()])
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    """Five iterations up; the last 0.3 of 60, 18 of them, linearly down to a last step of 1 / 18."""
    factors = [CONFIG.lr_factor(step, 60) for step in range(60)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1]) and factors[42] == 1
    assert factors[43:] == pytest.approx([k / 18 for k in range(17, 0, -1)])
    assert replace(CONFIG, cooldown=0.0).lr_factor(59, 60) == 1
