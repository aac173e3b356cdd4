"""The learner: ratio 1 before the first update, gradients by hand, a replay that keeps the latest."""

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from minireflect import training
from minireflect.diffusion.ddim import DDIMStep, ddim_step, gaussian_log_prob
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, level_weight
from minireflect.methods import learn as learning
from minireflect.methods.learn import (
    Learner,
    Replay,
    advantages,
    forward_gradient,
    guarded,
    learn,
    levels,
    path_kl,
    pull_to_base,
    regress,
    steps_to_train,
)
from minireflect.methods.rollout import Rollout, rollout
from minireflect.methods.srrl import SRRLConfig
from minireflect.rl.advantage import RewardHistory
from minireflect.streams import rng
from tests.methods.common import CONFIG, REFUSED, learn_from, likes_the_first_and_third, one_iteration, plus
from tests.small import TEXTS, brightness, nothing, shaken, small_pipeline

OTHERS = {
    "advantage": "shrunk", "pull": 0.9, "anchor_below": 600, "batch": 7, "updates": 1, "replay": 1,
    "clip_range": 1e-6, "ratio": "guard", "kl": 50.0, "noise": "window",
}  # fmt: skip


@pytest.mark.parametrize("objective", learning.UNREAD)
def test_an_objective_reads_all_options_but_those_that_are_listed(objective: str) -> None:
    """An option that is read changes what two iterations learn, here from pictures of the untrained model."""
    config = replace(CONFIG, objective=objective, pull=0.3, replay=2, batch=8, group=2)
    base = small_pipeline()

    @functools.cache
    def sampled(noise: str, step: int) -> Rollout:
        return rollout(base, TEXTS[:2], plus, replace(config, noise=noise), 0, step)

    def learnt(config: SRRLConfig) -> Iterator[list[Tensor]]:
        pipe = replace(base, unet=copy.deepcopy(base.unet))
        learner = Learner(pipe, config, config.guidance, 64)
        for step in range(2):
            learn(learner, sampled(config.noise, step), 1.0, rng(0, "update", step))
            yield [p.clone() for p in pipe.unet.parameters()]

    def changes(name: str) -> bool:
        other = copy.copy(config)
        object.__setattr__(other, name, OTHERS[name])  # `require` would refuse some that are not read
        return any(not all(map(torch.equal, *both)) for both in zip(known, learnt(other)))

    known = list(learnt(config))
    assert {name for name in OTHERS if not changes(name)} == {*learning.UNREAD[objective]}


@pytest.mark.parametrize("mode", ["select", "blind"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_ratio_is_exactly_one(mode: str, guidance: float) -> None:
    _, _, stats = one_iteration(replace(CONFIG, mode=mode, guidance=guidance, updates=1))
    assert stats.first_ratio == 0.0  # |rho - 1|: same function, same batch, same float32 latents
    assert stats.updates == 1 and stats.grad_norm > 0  # and yet its gradient is not 0


def test_the_base_is_at_kl_zero_before_the_update_and_away_from_it_after() -> None:
    _, _, stats = one_iteration(replace(CONFIG, updates=1))
    assert stats.kl == 0.0
    pipe, out, stats = one_iteration(replace(CONFIG, lr=1e-2))
    assert stats.first_ratio == 0 < stats.log_ratio  # before the first of two updates, and the largest
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
    learner = Learner(pipe, config, config.guidance, 16)
    regress(learner, out, rng(0, "update"))
    replay = learner.networks["replay"]
    first = out.rounds[0].rewards
    total = first.sum(1)
    total[kept] += part.rewards.sum(1)
    expected = torch.cat([(first / (total + 0.5)[:, None]).flatten(),
                          (part.rewards / (total[kept] + 0.5)[:, None]).flatten()])  # fmt: skip
    assert torch.allclose(replay.values[:12], expected)
    assert torch.equal(replay.ids[8:12], pipe.tokenizer([TEXTS[1], TEXTS[1], TEXTS[3], TEXTS[3]]))


def test_groups_without_variance_are_not_trained_on() -> None:
    pipe, out, stats = one_iteration(CONFIG, nothing)
    assert stats.updates == 0
    for objective in ("grpo", "regress"):  # all advantages, or all weights, are 0
        assert learn_from(pipe, out, replace(CONFIG, objective=objective))[:5] == (0, 0, 0, 0, 0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(pipe.unet.state_dict().values(), small_pipeline().unet.state_dict().values())
    )


def test_steps_without_noise_are_never_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last trailing step to a clean image has sigma 0, no density and no loss."""
    pipe = small_pipeline()
    schedule = Schedule(ScheduleConfig(set_alpha_to_one=True))
    monkeypatch.setattr(type(pipe), "table", lambda self, steps: schedule.table(steps, "trailing"))
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
    assert strength[8] > 8 and sorted(strength)[-2] < 1.4  # the figures in the docstring of `steps_to_train`
    out = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, steps=10), 0, 0)
    everything = [torch.ones(r.rewards.numel()) for r in out.rounds]
    usual, other = (
        [pair for chunk in steps_to_train(out, everything, 2, rng(seed, "u")) for pair in chunk]
        for seed in (0, 1)
    )
    assert {*usual} != {*other}
    assert len(usual) == 8 and max(i for _, i in usual) < 8  # half of eight steps in each of two rounds
    monkeypatch.setattr(learning, "TRAINED", 1.0)
    for least, count in ((0.0, 10), (0.1, 8)):
        monkeypatch.setattr(learning, "MIN_SIGMA", least)
        chosen = steps_to_train(out, everything, 2, rng(0, "u"))
        assert {i for chunk in chosen for _, i in chunk} == set(range(count))
    everything[0] = 0 * everything[0]  # nothing to learn from the first of two rounds: half of the second's
    monkeypatch.setattr(learning, "TRAINED", 0.5)
    chosen = [pair for chunk in steps_to_train(out, everything, 2, rng(0, "u")) for pair in chunk]
    assert len(set(chosen)) == len(chosen) == 4 and {k for k, _ in chosen} == {1}
    monkeypatch.setattr(learning, "TRAINED", 0.01)
    assert [len(chunk) for chunk in steps_to_train(out, everything, 2, rng(0, "u"))] == [1]


def test_the_replay_holds_the_pictures_of_the_latest_iterations() -> None:
    """Whatever an iteration gave: with few or many pictures, those of the last two are there."""
    replay = Replay(2, 6, (1, 1, 1), 2, torch.device("cpu"))
    kept: list[set[int]] = []
    for first, n in ((0, 6), (6, 2), (8, 1), (9, 4), (13, 6), (19, 6)):
        latents = torch.arange(first, first + float(n)).view(n, 1, 1, 1)
        replay.add(latents, torch.full((n, 2), first), torch.ones(n))
        kept.append({int(v) for v in replay.latents[replay.values != 0].flatten()})
    spans = ((0, 6), (0, 8), (6, 9), (8, 13), (9, 19), (13, 25))
    assert kept == [set(range(*span)) for span in spans]
    assert all((replay.ids[i] == (13 if replay.latents[i] < 19 else 19)).all() for i in range(12))


@pytest.mark.slow
def test_regression_fits_what_the_reward_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is that of DDPM's loss on the accepted pictures alone, if the reward is 0 or 1 and all
    groups have one.
    """
    config = replace(CONFIG, objective="regress", updates=1, rounds=0, batch=4_000, anchor_below=0)
    monkeypatch.setattr(learning, "FLOOR", 1e-6), monkeypatch.setattr(training, "MAX_GRAD_NORM", 1e9)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    only_first = torch.zeros(4, 4).index_fill_(1, torch.tensor([0]), 1.0)  # (n g)
    out.rounds[0] = out.rounds[0]._replace(rewards=only_first)
    learner = Learner(pipe, config, config.guidance, 16)
    regress(learner, out, rng(0, "update"))
    replay = learner.networks["replay"]
    rows = torch.multinomial(replay.values, 4_000, replacement=True, generator=rng(0, "draw"))
    latents, ids = replay.latents[rows], replay.ids[rows]
    pipe = small_pipeline()
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


def test_below_the_anchor_the_base_is_imitated_whatever_the_reward_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the base written out: at every level below `anchored` its prediction is the target, so at the
    base the gradient is 0.
    """
    config = replace(CONFIG, objective="regress", updates=1, rounds=0, batch=64, anchor_below=999)
    monkeypatch.setattr(learning, "ANCHORED", 1.0)
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
    assert path_kl(schedule, torch.arange(T), change).mean().item() == pytest.approx(total.item(), rel=1e-3)


def test_statistics_that_an_objective_does_not_have_are_none() -> None:
    _, _, stats = one_iteration(replace(CONFIG, objective="regress"), plus)
    assert stats.clip_high is stats.clip_low is stats.log_ratio is stats.first_ratio is None
    assert stats.updates == 2 and math.isfinite(stats.loss) and stats.grad_norm > 0
    assert None not in one_iteration(CONFIG)[2]


def test_levels_are_an_unbiased_stratified_draw_of_the_weighted_loss() -> None:
    """The mean of any function of t under `levels` is that of the weighted function over uniform levels."""
    schedule = small_pipeline().schedule
    every = torch.arange(1000)
    weight = level_weight(schedule, every, learning.MAX_WEIGHT)
    for below in (0, 150):
        t, share = levels(schedule, 20_000, below, rng(0, "levels"))
        for f in (lambda t: t.float(), lambda t: (t < 150).float(), lambda t: torch.cos(t / 50)):
            assert (share * f(t)).mean() == pytest.approx(
                (weight * f(every)).mean().item(), rel=0.01, abs=0.02
            )
        assert below == 0 or (t < below).float().mean() == pytest.approx(0.2, abs=1e-3)
    chance = (1 / schedule.abar.double()).clamp(max=20)  # of 40, one in each fortieth of the weight
    reached = torch.cat([torch.zeros(1), (chance / chance.sum()).cumsum(0)])
    t = levels(schedule, 40, 0, rng(0, "strata"))[0].sort().values
    part = torch.arange(40) / 40
    assert (reached[t] <= part + 1 / 40 + 1e-6).all() and (reached[t + 1] >= part - 1e-6).all()


def test_the_forward_gradient_against_the_loss_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With A of both signs, micro-batches, and levels on both sides of the anchor."""
    pipe, base = small_pipeline(), small_pipeline(seed=1).unet
    pipe.micro_batch = 3
    learner = Learner(pipe, replace(CONFIG, objective="grpo"), CONFIG.guidance, 16)
    learner.base = base
    t, share = torch.tensor([700, 20, 400, 900, 149, 150, 999, 5]), torch.rand(8, generator=rng(0, "share"))
    monkeypatch.setattr(learning, "levels", lambda *a: (t, share))
    x_0, A = torch.randn(8, *pipe.latent_shape, generator=rng(0, "x")), torch.linspace(-1, 1, 8)
    ids = pipe.tokenizer(TEXTS * 2)
    loss, kl = forward_gradient(learner, x_0, ids, A, 0.3, rng(0, "noise"))
    got = [p.grad.clone() for p in pipe.unet.parameters()]
    n = torch.randn(x_0.shape, generator=rng(0, "noise"))
    abar = pipe.schedule.abar[t].view(-1, 1, 1, 1)
    x_t, context = abar.sqrt() * x_0 + (1 - abar).sqrt() * n, pipe.text_encoder(ids)
    pipe.unet.zero_grad()
    before = base(x_t, t, context).detach()
    d = pipe.unet(x_t, t, context) - before
    high = t >= 150
    each = torch.where(high, 2 * A, 0.0).view(-1, 1, 1, 1) * d * (before - n)
    each = each + torch.where(high, 0.3, 1.0).view(-1, 1, 1, 1) * d**2
    wanted = (share * each.mean((1, 2, 3))).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    uniform = share * abar.flatten().clamp(min=1 / 20)  # the weight of a level is 1 / abar, at most 20
    assert kl.item() == pytest.approx((uniform * path_kl(pipe.schedule, t, d)).mean().item(), rel=1e-4)
    for g, p in zip(got, pipe.unet.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-5)


def test_the_family_of_forward_objectives() -> None:
    """NFT's two weighted errors are the signed advantage and the pull, up to a constant; regression is A = 1,
    b = 1 (papers of DiffusionNFT; DDPM 14)."""
    eps_base, n, d = (torch.randn(50, generator=rng(0, k), dtype=torch.float64) for k in "abd")
    r, b = 0.8, 0.3
    g = eps_base - n

    def nft(d: Tensor) -> Tensor:
        return r * ((g + b * d) ** 2).mean() + (1 - r) * ((g - b * d) ** 2).mean()

    def ours(A: float, b: float) -> Tensor:
        return (2 * A * d * g + b * d**2).mean()

    assert (nft(d) - nft(0 * d)).item() == pytest.approx((b * ours(2 * r - 1, b)).item())
    assert (((g + d) ** 2).mean() - (g**2).mean()).item() == pytest.approx(ours(1, 1).item())


def test_a_refused_picture_is_compared_with_the_one_that_mended_it() -> None:
    """The group is all rounds of a prompt, under both estimates of its mean."""
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, replace(CONFIG, rounds=1, redraw="all", group=1), 0, 0)
    rows = torch.tensor([1, 3])
    out.rounds[0] = out.rounds[0]._replace(rewards=torch.tensor([[1.0], [0.0], [0.9], [0.2]]))
    out.rounds[1] = out.rounds[1]._replace(rows=rows, rewards=torch.tensor([[1.0], [0.2]]))
    first, second = advantages(out, replace(CONFIG, advantage="shrunk"), None)
    assert first.tolist() == pytest.approx([2 * (1 - 1.5 / 2), 2 * (0 - 1.5 / 3), 2 * (0.9 - 1.4 / 2), -0.2])
    assert second.tolist() == pytest.approx([2 * (1 - 0.5), 2 * (0.2 - 0.3)])
    first, second = advantages(out, replace(CONFIG, advantage="group"), None)
    z = 0.5 / (0.5**0.5 + 0.1)
    assert first.tolist() == pytest.approx([0, -z, 0, 0]) and second.tolist() == pytest.approx([z, 0])


def test_the_history_compares_a_prompt_with_what_its_family_got_before() -> None:
    """Two rounds of two families: each round against this round and the iterations before, in float64; the
    best is kept above half a deviation, the worst below minus half, and z is clipped at 5.
    """
    out = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, redraw="all", group=2), 0, 0)
    out.families = ["a", "b", "a", "b"]
    now = torch.tensor([[[1.0, 0.0], [90.0, 0.2], [0.4, 0.5], [0.3, 0.3]], [[0.0, 0.9]] * 4])  # (k n g)
    out.rounds = [r._replace(rewards=v) for r, v in zip(out.rounds, now)]
    history = RewardHistory()
    history.add(["a"], torch.tensor([0.2])), history.add(["b"], torch.full((1, 43), 0.1))
    found = advantages(out, replace(CONFIG, advantage="history"), history)
    for v, A in zip(now.double(), found):
        for rows, past in (([0, 2], [0.2]), ([1, 3], [0.1] * 43)):
            pool = torch.cat([v[rows].flatten(), torch.tensor(past, dtype=torch.float64)])
            for i in rows:
                z = (v[i] - pool.mean()) / (pool.std() + 1e-4)
                kept = [
                    (j == z.argmax() and z[j] >= 0.5) or (j == z.argmin() and z[j] < -0.5) for j in (0, 1)
                ]
                wanted = (z.clamp(-5, 5) * torch.tensor(kept)).float()
                torch.testing.assert_close(A.view(4, 2)[i], wanted, rtol=1e-4, atol=1e-5)
    assert found[0].max() == 5 and (found[0] == 0).any()
    assert history.past("a") == pytest.approx([0.2, 1, 0, 0.4, 0.5, 0, 0.9, 0, 0.9])


def test_guarded_ratio_is_the_noise_times_the_shift_of_the_mean() -> None:
    """GRPO-Guard's n D in float64; the plain log-ratio has the mean -D^2 / (2 sigma^2)."""
    sigma, D = torch.tensor(0.3), 0.05
    old, noise = (torch.randn(2, 500, 1, 1, generator=rng(0, k)) for k in "ab")
    x = old + sigma * noise
    step = DDIMStep(x, old + D, sigma.expand(2), x, gaussian_log_prob(x, old + D, sigma))
    plain = step.log_prob - gaussian_log_prob(x, old, sigma)
    wanted = (noise * D / sigma - D**2 / (2 * sigma**2)).sum((1, 2, 3))
    torch.testing.assert_close(plain, wanted, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(guarded(plain, step, old), (noise * D).sum((1, 2, 3)), rtol=1e-3, atol=1e-2)
    stats = one_iteration(replace(CONFIG, ratio="guard", updates=1))[2]
    assert stats.first_ratio == 0.0 and stats.grad_norm > 0


@pytest.mark.parametrize("noise", ["window", "preserving"])
def test_the_noise_of_the_steps(noise: str) -> None:
    """A window trains its steps alone; preserved coefficients keep the noise of every level at 1 - abar."""
    config = replace(CONFIG, noise=noise, steps=8, updates=1)
    table = small_pipeline().table(8)
    sigmas = config.sigmas(table)
    if noise == "window":
        assert (sigmas > 0).tolist() == [True] * 3 + [False] * 5
    else:
        share = sigmas**2 / (1 - table.abar_prev)  # the other 0.1 is the old noise: DDIM (12)
        torch.testing.assert_close(share, torch.full((8,), math.sin(0.4 * math.pi) ** 2))
    stats = one_iteration(config)[2]
    assert stats.first_ratio == 0.0 and stats.grad_norm > 0


def test_pull_and_anchor_are_the_same_for_ppo() -> None:
    """Without advantages ppo's gradient is that of the pull alone, 0 at the base and not 0 away from it."""
    config = replace(CONFIG, pull=0.3, updates=1, kl=0.0)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    learner = Learner(pipe, config, config.guidance, 64)
    assert pull_to_base(learner, out, rng(0, "u")) == 0
    assert all(p.grad is None or not p.grad.any() for p in pipe.unet.parameters())
    learner.base = small_pipeline(seed=1).unet
    assert pull_to_base(learner, out, rng(0, "u")) > 0
    assert any(p.grad.any() for p in pipe.unet.parameters())
    pipe.unet.zero_grad()
    learner.config = replace(config, pull=0.0)
    assert pull_to_base(learner, out, rng(0, "u")) > 0  # reported, and not followed
    assert not any(p.grad is not None and p.grad.any() for p in pipe.unet.parameters())


def test_ppo_adds_the_pull_to_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pull` adds to the gradient of a step is the gradient of the pull alone, from the same noise."""
    monkeypatch.setattr(training, "MAX_GRAD_NORM", 1e9)
    config, base = replace(CONFIG, rounds=0, updates=1), small_pipeline(seed=1)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    gradients = []
    for pull in (0.0, 0.3):
        learn_from(pipe, out, replace(config, pull=pull), lr=0.0, base=base)
        gradients.append(torch.cat([p.grad.flatten() for p in pipe.unet.parameters()]))
    learner = Learner(pipe, replace(config, pull=0.3), config.guidance, 64)
    learner.base = base.unet
    pipe.unet.zero_grad()
    chance = rng(0, "update", 0)
    steps_to_train(out, [torch.ones(16)], 1, chance)  # chosen before the noise is drawn
    pull_to_base(learner, out, chance)
    wanted = torch.cat([p.grad.flatten() for p in pipe.unet.parameters()])
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())


def test_ppo_pulls_on_the_pictures_of_all_rounds_with_their_own_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, zero, pipe = [], torch.zeros(()), small_pipeline()
    monkeypatch.setattr(learning, "forward_gradient", lambda *a: told.append(a) or (zero, zero))
    out = rollout(pipe, TEXTS, brightness, CONFIG, 0, 0)
    learner = Learner(pipe, replace(CONFIG, pull=0.3, batch=400), CONFIG.guidance, 64)
    pull_to_base(learner, out, rng(0, "pull"))
    ((_, x_0, ids, A, b, _),) = told
    every = torch.cat([r.path.latents[:, -1] for r in out.rounds])  # (2*4*4 c h w)
    alike = (x_0[:, None] == every).flatten(2).all(2)  # (400 32)
    assert alike.any(0).all() and (alike.sum(1) == 1).all()
    assert torch.equal(ids, pipe.tokenizer([TEXTS[i % 16 // 4] for i in alike.float().argmax(1).tolist()]))
    assert b == 0.3 and not A.any()


@pytest.mark.parametrize("rewards", [None, [[1.0, 0, 0, 0], [0.5] * 4, [0, 1, 2, 3], [1, 1, 1, 0]]])
def test_ppos_kl_pulls_to_the_base(
    rewards: list[list[float]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient that `kl` adds is that of torch's KL between the steps' Gaussians, per dimension.  It is a
    mean over the branches that are taught: a group of equal rewards has no KL term either.
    """
    monkeypatch.setattr(learning, "TRAINED", 1.0), monkeypatch.setattr(training, "MAX_GRAD_NORM", 1e9)
    config, base = replace(CONFIG, rounds=0, steps=4, updates=1), small_pipeline(seed=1)
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    if rewards:
        out.rounds[0] = out.rounds[0]._replace(rewards=torch.tensor(rewards))
    taught = [i for i in range(16) if not rewards or i // 4 != 1]
    gradients = []
    for kl in (0.0, 0.5):
        stats = learn_from(pipe, out, replace(config, kl=kl), lr=0.0, base=base)
        gradients.append(torch.cat([p.grad.flatten() for p in pipe.unet.parameters()]))
    (round_,), total = out.rounds, 0.0
    table, context = round_.table, pipe.embed([text for text in TEXTS for _ in range(4)])
    trained = [i for i, sigma in enumerate(table.sigma(1.0)) if sigma > learning.MIN_SIGMA]
    assert len(trained) > 1  # each has its weight in the mean
    assert stats.evaluations == 2 * 16 * len(trained) + 2 * config.batch  # of the policy and of the base
    for i in trained:
        x, a, b, sigma = round_.path.latents[:, i], table.abar[i], table.abar_prev[i], table.sigma(1.0)[i]
        eps = [p.unet(x, table.t[i].expand(len(x)), context) for p in (pipe, base)]
        x_0 = [(x - (1 - a).sqrt() * e) / a.sqrt() for e in eps]
        mean = [b.sqrt() * z + (1 - b - sigma**2).sqrt() * e for z, e in zip(x_0, eps)]  # DDIM (12)
        kl = kl_divergence(Normal(mean[0], sigma), Normal(mean[1], sigma))  # (n*g c h w)
        total = total + kl[taught].mean() / len(trained)
    pipe.unet.zero_grad()
    (0.5 * total).backward()
    wanted = torch.cat([p.grad.flatten() for p in pipe.unet.parameters()])
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max())


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    """Three iterations up; the last 0.3 of 60, 18 of them, linearly down to a last step of 1 / 18."""
    factors = [CONFIG.lr_factor(step, 60) for step in range(60)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and factors[42] == 1
    assert factors[43:] == pytest.approx([k / 18 for k in range(17, 0, -1)])
    assert replace(CONFIG, cooldown=0.0).lr_factor(59, 60) == 1


@pytest.mark.parametrize("objective", ["grpo", "regress", "ppo"])
def test_learning_moves_the_policy_and_not_its_base_at_the_rate_it_is_told(objective: str) -> None:
    config, pipe = replace(CONFIG, objective=objective, rounds=0, lr=1e-2), small_pipeline()
    out = rollout(pipe, TEXTS, plus, config, 0, 0)
    learner = Learner(pipe, config, config.guidance, 16)
    learn(learner, out, 0.25, rng(0, "update"))
    assert {group["lr"] for group in learner.optimizer.param_groups} == {0.25e-2}
    first = small_pipeline().unet.parameters()
    triples = list(zip(learner.base.parameters(), pipe.unet.parameters(), first))
    assert all(torch.equal(base, p) for base, _, p in triples)
    assert not any(torch.equal(now, p) for _, now, p in triples if p.ndim > 1)


def test_the_learner_decays_weights_a_little() -> None:
    learner = Learner(small_pipeline(), CONFIG, CONFIG.guidance, 16)
    assert {group["weight_decay"] for group in learner.optimizer.param_groups} == {1e-4}


@pytest.mark.parametrize("objective", ["grpo", "regress", "ppo"])
def test_no_gradient_is_left_over_from_before(objective: str) -> None:
    config = replace(CONFIG, objective=objective, rounds=0, updates=1)
    out, gradients = rollout(small_pipeline(), TEXTS, plus, config, 0, 0), []
    for left in (0.0, 9.0):
        pipe = small_pipeline()
        for p in pipe.unet.parameters():
            p.grad = torch.full_like(p, left)
        learn_from(pipe, out, config, lr=0.0)
        gradients.append(torch.cat([p.grad.flatten() for p in pipe.unet.parameters()]))
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_prompts_are_learnt_from_as_they_were_sampled(objective: str) -> None:
    """With `clip_skip`: the UNet reads the same embedding in the update as in the rollout."""
    config, pipe, seen = replace(CONFIG, objective=objective, rounds=0, pull=0.3), small_pipeline(), []
    pipe.clip_skip = 1
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.extend(args[2]))
    learn_from(pipe, out, config)
    known = pipe.embed(TEXTS)
    assert seen and all(any(torch.allclose(c, k, atol=1e-5) for k in known) for c in seen)


@pytest.mark.parametrize(
    ("objective", "share", "A", "b"),
    [
        ("grpo", [*[1] * 8, *[0] * 4, *[1] * 4], [1, *[-0.6] * 3, *[0.2] * 4, *[0] * 4, *[-0.16] * 4], 0.3),
        (
            "regress",
            [1 / 1.5, 0, 0, 0, *[1 / 4.5] * 4, 0.52 / 2.52, *[0.5 / 2.52] * 3, *[1 / 9] * 4],
            [1] * 16,
            1,
        ),
    ],
)
def test_what_the_forward_objectives_draw_and_teach(
    objective: str, share: list[float], A: list[float], b: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpo draws every picture whose advantage is worth it alike, and clips advantages at 1; the regression
    draws by r / (sum r + 1/2), and has advantage and pull of 1.  All by hand.
    """
    config = replace(
        CONFIG, objective=objective, advantage="shrunk", rounds=0, pull=0.3, updates=1, batch=2_000
    )
    pipe, told = small_pipeline(), []
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    rewards = [[1.0, 0, 0, 0], [1.0] * 4, [0.52, 0.5, 0.5, 0.5], [0.1] * 4]
    out.rounds[0] = out.rounds[0]._replace(rewards=torch.tensor(rewards))
    zero = torch.zeros(())
    monkeypatch.setattr(learning, "forward_gradient", lambda *a: told.append(a) or (zero, zero))
    monkeypatch.setattr(Learner, "step", lambda self: zero)
    stats = learn_from(pipe, out, config)
    ((_, x_0, ids, taught, pull, _),) = told
    alike = (x_0[:, None] == out.rounds[0].path.latents[None, :, -1]).flatten(2).all(2)  # (m n*g) bool
    wanted = torch.tensor(share) / sum(share)
    off = alike.float().mean(0) - wanted
    assert (off.abs() < 4 * (wanted * (1 - wanted) / 2_000).sqrt() + 1e-9).all() and pull == b
    torch.testing.assert_close(taught, torch.tensor(A, dtype=torch.float)[alike.float().argmax(1)])
    assert torch.equal(ids, pipe.tokenizer(TEXTS)[alike.float().argmax(1) // 4])
    assert (stats.updates, stats.evaluations) == (1, 4_000)  # of the policy and of the base


class Constant(torch.nn.Module):
    """Predicts the same noise for everything."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = torch.nn.Parameter(torch.tensor(eps))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.eps.expand(x.shape)


@pytest.mark.parametrize("below", [0, 150])
def test_the_logged_kl_is_the_mean_over_uniform_levels(below: int) -> None:
    """However the levels are drawn: of 20,000 pictures, against every level once."""
    pipe = replace(small_pipeline(), unet=Constant(0.3))
    config = replace(CONFIG, objective="grpo", anchor_below=below, rounds=0)
    learner = Learner(pipe, config, config.guidance, 16)
    learner.base = Constant(0.2)
    x_0, ids = torch.zeros(20_000, 1, 2, 2), torch.zeros(20_000, 1, dtype=torch.long)
    _, kl = forward_gradient(learner, x_0, ids, torch.zeros(20_000), 0.3, rng(0, "kl"))
    every = path_kl(pipe.schedule, torch.arange(1000), torch.full((1000, 1, 2, 2), 0.1))
    assert kl.item() == pytest.approx(every.mean().item(), rel=0.01)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_the_gradient_of_ppo_against_the_loss_written_out(
    ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away from the sampling policy, where some ratios are clipped, with guidance, in micro-batches of unlike
    numbers, and with a group that teaches nothing: one mean over all branches and steps that are taught.
    """
    monkeypatch.setattr(learning, "TRAINED", 1.0), monkeypatch.setattr(training, "MAX_GRAD_NORM", 1e9)
    config = replace(CONFIG, ratio=ratio, rounds=0, steps=3, updates=1, guidance=3.0, clip_range=3e-4)
    pipe = small_pipeline()
    pipe.micro_batch = 3
    out = rollout(pipe, TEXTS, brightness, config, 0, 0)
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.5] * 4, [0, 1, 2, 3], [1, 1, 1, 0]])
    (round_,) = out.rounds = [out.rounds[0]._replace(rewards=rewards)]
    torch.manual_seed(0)
    shaken(pipe.unet, 2e-3)
    stats = learn_from(pipe, out, config, lr=0.0)
    got = [p.grad.clone() for p in pipe.unet.parameters()]

    A = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 0.1)).flatten()
    cond, null = pipe.embed([text for text in TEXTS for _ in range(4)]), pipe.embed([""])
    losses, highs, lows, nats = [], [], [], []
    for i, sigma in enumerate(round_.table.sigma(1.0)):
        if sigma <= learning.MIN_SIGMA:
            continue
        x, x_prev, old = round_.path.latents[:, i], round_.path.latents[:, i + 1], round_.path.means[:, i]
        a, b, t = round_.table.abar[i], round_.table.abar_prev[i], round_.table.t[i].expand(16)
        of_cond, of_null = pipe.unet(x, t, cond), pipe.unet(x, t, null.expand(16, -1, -1))
        eps = of_null + 3 * (of_cond - of_null)
        mean = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - sigma**2).sqrt() * eps  # DDIM (12)
        log_ratio = Normal(mean, sigma).log_prob(x_prev) - Normal(old, sigma).log_prob(x_prev)
        if ratio == "guard":
            log_ratio = (x_prev - old) / sigma * (mean - old)  # its noise times the shift of the mean
        nats.append(log_ratio.sum((1, 2, 3)).abs().max().item())
        rho = log_ratio.mean((1, 2, 3)).exp()
        losses.append(torch.maximum(-A * rho, -A * rho.clamp(1 - 3e-4, 1 + 3e-4)))
        highs.append((rho > 1 + 3e-4) & (A > 0)), lows.append((rho < 1 - 3e-4) & (A < 0))
    loss, high, low = (torch.stack(v)[:, A != 0].float().mean() for v in (losses, highs, lows))
    pipe.unet.zero_grad()
    loss.backward()
    for g, p in zip(got, pipe.unet.parameters()):
        torch.testing.assert_close(g, p.grad, rtol=2e-3, atol=1e-4 * p.grad.abs().max().item() + 1e-7)
    assert stats.loss == pytest.approx(loss.item(), abs=1e-6) and min(high, low) > 0
    assert (stats.clip_high, stats.clip_low) == pytest.approx((high.item(), low.item()))
    assert stats.log_ratio == pytest.approx(max(nats), rel=1e-3)
    assert stats.first_ratio == pytest.approx(math.expm1(max(nats)), rel=1e-3)
    steps = 16 * len(losses)
    assert stats.evaluations == 2 * steps + 2 * config.batch  # with guidance, and the pictures of the KL


class Half(torch.nn.Module):
    """One trained weight in float32 beside a frozen one in float16, as LoRA on a float16 base."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.zeros((), dtype=torch.float16), requires_grad=False)
        self.eps = torch.nn.Parameter(torch.tensor(0.5))


def test_a_gradient_that_float16_cannot_hold_arrives_unscaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is 1e-8, a sixth of float16's smallest number; the step and its norm are those of it.  One
    that is too large, also of a fused optimiser, is reported with a hint.
    """
    pipe = replace(small_pipeline(), unet=Half())
    learner = Learner(pipe, CONFIG, CONFIG.guidance, 16)
    learner.optimizer = torch.optim.SGD([pipe.unet.eps], lr=1e6)
    learner.backward(1e-8 * pipe.unet.eps.half().float())
    assert learner.step().item() == pytest.approx(1e-8, rel=1e-3)
    assert pipe.unet.eps.item() == pytest.approx(0.5 - 0.01, rel=1e-5)
    learner.backward(torch.inf * pipe.unet.eps)
    with pytest.raises(FloatingPointError, match="use --precision bf16 instead of fp16"):
        learner.step()
    large = learning.UpdateStats(0.0, 0.0, math.inf, 1, 1)
    monkeypatch.setattr(learning, "OBJECTIVES", {CONFIG.objective: lambda *_: large})
    with pytest.raises(FloatingPointError, match="use --precision bf16 instead of fp16"):
        learn(learner, None, 1.0, rng(0))


@pytest.mark.parametrize("objective", ["grpo", "regress", "ppo"])
def test_an_iteration_reports_the_means_of_its_updates(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two updates, with KLs of 2 and 6 and gradients of norm 5 and 9."""
    config = replace(CONFIG, objective=objective, rounds=0, updates=2, batch=10, advantage="shrunk")
    losses, kls, norms = (iter(map(torch.tensor, pair)) for pair in ((1.0, 3.0), (2.0, 6.0), (5.0, 9.0)))
    monkeypatch.setattr(learning, "forward_gradient", lambda *_: (next(losses), next(kls)))
    (
        monkeypatch.setattr(Learner, "step", lambda self: next(norms)),
        monkeypatch.setattr(learning, "TRAINED", 1),
    )
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, plus, config, 0, 0)
    stats = learn_from(pipe, out, config)
    steps = 2 * 16 if objective == "ppo" else 0  # two of four steps have noise
    assert (stats.kl, stats.grad_norm, stats.updates, stats.evaluations) == (4, 7, 2, steps + 2 * 2 * 10)
    (A,) = advantages(out, config, None)
    assert stats.loss == pytest.approx(-A.mean().item() if objective == "ppo" else 2)  # where rho is 1
