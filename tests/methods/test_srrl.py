"""SRRL: ratio 1 before the first update, no graph in reflection, rewards that rise, and runs that go on
exactly.
"""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minireflect.diffusion import reflection
from minireflect.diffusion.ddim import ddim_step
from minireflect.methods import learn as learning
from minireflect.methods.learn import Learner, Replay, UpdateStats, jobs, learn, path_kl, remember
from minireflect.methods.rollout import Rollout, rollout
from minireflect.methods.srrl import SRRLConfig, mended, train_srrl
from minireflect.pipeline import LatentDiffusion
from minireflect.run import Interrupted, Job, Run
from minireflect.streams import rng
from tests.small import TEXTS, brightness, four_texts, nothing, small_pipeline

CONFIG = SRRLConfig(
    objective="ppo",
    iterations=2,
    prompts_per_iteration=4,
    group=4,
    steps=4,
    rounds=1,
    redraw="all",
    updates=2,
    lr=1e-3,
)


def learn_from(
    pipe: LatentDiffusion,
    out: Rollout,
    config: SRRLConfig,
    lr: float | None = None,
    base: LatentDiffusion | None = None,
) -> UpdateStats:
    """One call of `learn` with plain gradient descent at `lr`, or AdamW at the config's, from a base that is
    the untrained policy.
    """
    learner = Learner.of(pipe, config, config.sampler, 64)
    learner.base = (base or small_pipeline()).unet
    if lr is not None:
        learner.optimizer = torch.optim.SGD(pipe.unet.parameters())
        learner.config = replace(config, lr=lr)
    return learn(learner, out, 1.0, rng(0, "update", 0))


def one_iteration(config: SRRLConfig, reward=brightness) -> tuple[LatentDiffusion, Rollout, UpdateStats]:
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, reward, config, 0, 0)
    return pipe, out, learn_from(pipe, out, config)


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


@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("mode", ["select", "blind"])
@pytest.mark.parametrize("w_renoise", [0.0, 0.1])
def test_rounds_branches_and_costs(mode: str, rounds: int, w_renoise: float) -> None:
    config = replace(CONFIG, mode=mode, rounds=rounds, w_renoise=w_renoise, renoise_steps=3)
    out = rollout(small_pipeline(), TEXTS, brightness, config, 0, 0)
    drawn = rounds + 1 if mode == "select" else 1
    assert len(out.rounds) == drawn and out.cost.rewards == drawn * 16
    n, g, s = 4, 4, 4
    back = config.renoise_steps * (2 if w_renoise else 1)  # guided: two evaluations
    reflecting = rounds * n * (back + (0 if mode == "select" else s * 2))  # blind draws too, guided
    assert out.cost.unet == drawn * n * g * s + reflecting
    for round_ in out.rounds:
        assert round_.path.latents.shape == (16, 5, 4, 4, 4) and round_.rewards.shape == (4, 4)
        assert round_.path.latents.dtype == torch.float32


def test_select_renoises_the_picture_that_the_reward_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(eps, x0, *rest):
        seen.append(x0)
        return x0

    monkeypatch.setattr(reflection, "renoise_to", spy)
    out = rollout(small_pipeline(), TEXTS, brightness, CONFIG, 0, 0)
    best = out.rounds[0].rewards.argmax(1)
    final = out.rounds[0].path.latents[:, -1].view(4, 4, 4, 4, 4)
    assert torch.equal(seen[0], final[torch.arange(4), best])
    assert torch.equal(out.rounds[1].x_T, seen[0])  # and the next round starts from what came of it


def test_what_the_reward_refuses_is_drawn_again_from_the_opposite_noise() -> None:
    """The same noise with another sign, or another noise, for the prompts whose best picture is below
    `accept`.
    """
    config = replace(CONFIG, fresh_noise=0.0, wrong="repeat")
    first, again = rollout(small_pipeline(), TEXTS, brightness, config, 0, 0).rounds
    best = first.rewards.amax(1)
    accept = best.sort().values[2].item()  # two are refused, two accepted
    refused = best < accept
    for wrong in ("opposite", "fresh"):
        _, second = rollout(
            small_pipeline(), TEXTS, brightness, replace(config, wrong=wrong, accept=accept), 0, 0
        ).rounds
        assert torch.equal(second.x_T[~refused], again.x_T[~refused])
        if wrong == "opposite":
            assert torch.equal(second.x_T[refused], -again.x_T[refused])
        else:
            alike = torch.cosine_similarity(second.x_T[refused].flatten(1), again.x_T[refused].flatten(1))
            assert alike.abs().max() < 0.5  # 64 numbers: chance gives 0.125


def likes_the_first_and_third(images: Tensor, prompts: list[str]) -> Tensor:
    return brightness(images, prompts) + torch.tensor([5.0 * (p in TEXTS[::2]) for p in prompts])


REFUSED = replace(
    CONFIG, redraw="refused", accept=1.0, rounds=3
)  # the second and fourth prompt, for that judge


def test_accepted_prompts_are_not_drawn_again() -> None:
    """Round by round only what was refused goes on, with its own prompt and picture, and only that is paid
    for.
    """
    config = replace(REFUSED, fresh_noise=0.0)
    asked = []

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(prompts)
        pleased = 10 * (len(asked) == 3)  # by the third round: there is no fourth
        return likes_the_first_and_third(images, prompts) + pleased

    out = rollout(small_pipeline(), TEXTS, judge, config, 0, 0)
    assert [r.rows.tolist() for r in out.rounds] == [[0, 1, 2, 3], [1, 3], [1, 3]]
    assert asked[1] == [TEXTS[i] for i in (1, 3) for _ in range(4)] == out.texts_of(out.rounds[1])
    assert torch.equal(out.context_of(out.rounds[1]), out.context[[1, 3]].repeat_interleave(4, 0))
    assert out.cost.rewards == 8 * 4 and out.cost.unet == 8 * 4 * 4 + 4 * config.renoise_steps
    everybody = replace(config, rounds=1, redraw="all")
    alone = rollout(small_pipeline(), TEXTS, likes_the_first_and_third, everybody, 0, 0).rounds[1]
    assert torch.allclose(out.rounds[1].x_T, alone.x_T[[1, 3]], atol=1e-5)  # nobody is mistaken for another


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


def test_mended_counts_only_what_was_refused() -> None:
    out = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, group=2), 0, 0)
    before = out.rounds[0]._replace(rewards=torch.tensor([[0.1, 0.2], [0.1, 0.9], [0.4, 0.3], [0.0, 0.0]]))
    after = out.rounds[1]._replace(rewards=torch.tensor([[0.0, 0.6], [0.0, 0.0], [0.1, 0.1], [0.5, 0.0]]))
    assert mended(before, after, 0.5) == pytest.approx(2 / 3)
    few = torch.tensor([0, 2, 3])  # the accepted prompt was not drawn again
    assert mended(before, after._replace(rows=few, rewards=after.rewards[few]), 0.5) == pytest.approx(2 / 3)
    assert mended(before._replace(rewards=before.rewards + 1), after, 0.5) is None


def test_rollout_keeps_no_graph_even_when_the_policy_is_trainable() -> None:
    pipe = small_pipeline()
    pipe.unet.requires_grad_(True)
    for mode in ("select", "blind"):
        out = rollout(pipe, TEXTS, brightness, replace(CONFIG, mode=mode), 0, 0)
        assert not any(
            t.requires_grad for r in out.rounds for t in (r.x_T, r.path.latents, r.path.log_probs, r.images)
        )


def test_drawing_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rollout(small_pipeline_keeping_state(), TEXTS, brightness, CONFIG, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def small_pipeline_keeping_state():
    state = torch.get_rng_state()
    pipe = small_pipeline()
    torch.set_rng_state(state)
    return pipe


def test_branches_share_their_prefix_and_part_after_it() -> None:
    config = replace(CONFIG, suffixes=(1, 3), rounds=0)
    for step, suffix in ((0, 1), (1, 3), (2, 1)):
        round_ = rollout(small_pipeline(), TEXTS, brightness, config, 0, step).rounds[0]
        assert len(round_.table) == suffix and round_.path.latents.shape[1] == suffix + 1
        groups = round_.path.latents.view(4, 4, suffix + 1, 4, 4, 4)
        assert torch.equal(groups[:, 0, 0], groups[:, 3, 0]) and not torch.equal(
            groups[:, 0, -1], groups[:, 3, -1]
        )


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


@pytest.mark.parametrize("mode", ["select", "blind"])
@pytest.mark.parametrize("advantage", ["group", "history"])
def test_the_reward_rises_with_ppo(tmp_path: Path, mode: str, advantage: str) -> None:
    config = replace(CONFIG, iterations=25, group=8, mode=mode, advantage=advantage, lr=3e-3, clip_range=0.1)
    run = Run(tmp_path / "run", {})
    train_srrl(config, small_pipeline(), brightness, four_texts, nothing, Job(run))
    assert rises([row["reward"] for row in run.metrics("srrl")])


def rises(rewards: list[float]) -> bool:
    """The last five stand above the first five by more than twice their spread."""
    spread = torch.tensor(rewards[:5]).std().item()
    return sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 2 * spread


class Gaussian(torch.nn.Module):
    """The exact noise prediction for latents from N(mu, 1), of which mu is learnt: a policy whose optimum is
    known.
    """

    def __init__(self, schedule) -> None:
        super().__init__()
        self.abar = schedule.abar
        self.mu = torch.nn.Parameter(torch.zeros(4, 4, 4))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        abar = self.abar[t].expand(len(x)).view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * self.mu)


def plus(images: Tensor, prompts: list[str]) -> Tensor:
    """A soft step on the mean pixel, with the middle at 0.  Shapes: images (b 3 h w), b prompts -> (b)"""
    return torch.sigmoid(10 * brightness(images, prompts))


@pytest.mark.parametrize("mode", ["select", "blind"])
def test_the_reward_rises_with_regression(tmp_path: Path, mode: str) -> None:
    config = replace(
        CONFIG, objective="regress", iterations=25, group=16, mode=mode, lr=0.03, updates=8, replay=4,
        anchor_below=0,
    )  # fmt: skip
    pipe = small_pipeline()
    pipe = replace(pipe, unet=Gaussian(pipe.schedule))
    pipe.decode = lambda x: x[:, :3]  # the latents' first channels are the picture
    run = Run(tmp_path / "run", {})
    train_srrl(config, pipe, plus, four_texts, nothing, Job(run))
    assert rises([row["reward"] for row in run.metrics("srrl")])
    mu = pipe.unet.mu.detach()
    assert mu[:3].mean() > max(0.1, mu[3].mean())  # what is seen moves up, what is not seen need not


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
    monkeypatch.setattr(learning, "FLOOR", 1e-6), monkeypatch.setattr(learning, "GRAD_NORM", 1e9)
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


@pytest.mark.parametrize("objective", ["ppo", "regress"])
def test_two_steps_resumed_for_two_equal_four_bit_for_bit(tmp_path: Path, objective: str) -> None:
    config = replace(CONFIG, iterations=4, objective=objective, advantage="history", replay=3)
    reward = plus if objective == "regress" else brightness  # the regression asks for a probability
    whole = Run(tmp_path / "whole", {})
    expected, cost = train_srrl(config, small_pipeline(), reward, four_texts, nothing, Job(whole))

    part = Run(tmp_path / "part", {})

    def stop_at_two(step: int) -> tuple[list[str], list[str]]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does: this step is finished and saved
        return four_texts(step)

    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train_srrl(config, small_pipeline(), reward, stop_at_two, nothing, Job(part))
    again = Run(tmp_path / "part", {}, resume=True)
    resumed, cost_again = train_srrl(config, small_pipeline(), reward, four_texts, nothing, Job(again))
    for (name, a), b in zip(expected.unet.state_dict().items(), resumed.unet.state_dict().values()):
        assert torch.equal(a, b), name
    assert cost == cost_again
    assert whole.metrics("srrl") == again.metrics("srrl")


def test_bad_configurations_are_refused_with_the_numbers() -> None:
    for field, value, message in (
        ("group", 1, "group is 1; ppo compares"),
        ("rounds", -1, "rounds must be at least 0"),
        ("suffixes", (9,), "between 1 and steps = 4"),
        ("clip_range", 0.0, "clip"),
        ("fresh_noise", 1.5, "fresh_noise"),
        ("anchor_below", 1000, "anchor_below"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **{field: value})
    with pytest.raises(ValueError, match="kl belongs to"):
        replace(CONFIG, objective="regress", kl=0.1)
