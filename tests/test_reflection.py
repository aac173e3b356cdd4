"""Reflection writes the prompt into the noise, drifts off the prior while it does so, and what repairs that."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from minireflect.diffusion.exact import GaussianMixture
from minireflect.diffusion.reflection import (
    ReflectionConfig,
    condition_guided_forward,
    moments,
    reflect,
    renoise_to,
    zigzag,
)
from minireflect.diffusion.sample import EpsFn, denoise, guided, last, renoise
from minireflect.diffusion.schedule import Schedule, ScheduleConfig

SCHEDULE = Schedule(ScheduleConfig())
TABLE = SCHEDULE.table(20)
PUBLISHED = ReflectionConfig(renormalise=False)
D = 16
# the direction that tells the two classes apart; its entries sum to 0
AXIS = torch.tensor([1.0, -1.0]).repeat(D // 2) / D**0.5
WORLD = GaussianMixture(torch.stack([2 * AXIS, -2 * AXIS]), torch.tensor([0.3, 0.3]), torch.ones(2))


def make_eps(w: float) -> EpsFn:
    return guided(WORLD.model(SCHEDULE), WORLD.context(0), WORLD.context(None), w, SCHEDULE)


def noise(n: int = 1000, seed: int = 0) -> Tensor:
    return torch.randn(n, D, 1, 1, generator=torch.Generator().manual_seed(seed))


def along(x: Tensor) -> Tensor:
    return x.flatten(1) @ AXIS


def across(x: Tensor) -> float:
    """Spread of the samples in the directions that the prompt says nothing about: 1 on the prior."""
    rest = x.flatten(1) - along(x)[:, None] * AXIS
    return float((rest.var(0).sum() / (D - 1)).sqrt())


def test_forward_process_is_the_composition() -> None:
    x_T = noise(5)
    x0, x_next = condition_guided_forward(make_eps(3.0), make_eps(0.1), x_T, TABLE)
    assert x0.equal(last(denoise(make_eps(3.0), x_T, TABLE)))
    assert x_next.equal(last(renoise(make_eps(0.1), x0, TABLE)))
    rounds = list(reflect(make_eps, x_T, TABLE, ReflectionConfig(rounds=2, renormalise=False)))
    assert [r.k for r in rounds] == [0, 1, 2] and rounds[0].x_T.equal(x_T)
    assert rounds[0].x0.equal(x0) and rounds[1].x_T.equal(x_next)
    again = condition_guided_forward(make_eps(3.0), make_eps(0.1), x_next, TABLE)
    assert rounds[1].x0.equal(again[0]) and rounds[2].x_T.equal(again[1])
    for r in rounds:
        torch.testing.assert_close(r.mean, r.x_T.flatten(1).mean(1))
        torch.testing.assert_close(r.std, r.x_T.flatten(1).std(1, correction=0))


def test_guidance_gap_moves_the_noise_where_e5_says() -> None:
    x_T = noise()
    _, moved = condition_guided_forward(make_eps(3.0), make_eps(0.1), x_T, TABLE)
    # what inversion without a gap does to the same noise is not the gap's doing
    _, baseline = condition_guided_forward(make_eps(3.0), make_eps(3.0), x_T, TABLE)
    assert along(moved).mean() > along(x_T).mean() + 0.5  # towards the class of the prompt
    # and back
    assert along(condition_guided_forward(make_eps(0.1), make_eps(3.0), x_T, TABLE)[1]).mean() < -0.5

    eps_c, eps_u, x, predicted = make_eps(1), make_eps(0), x_T, torch.zeros_like(x_T)
    s, s_prev = ((1 / a - 1).sqrt() for a in (TABLE.abar, TABLE.abar_prev))  # sbar = sqrt((1 - abar) / abar)
    for step in denoise(make_eps(3.0), x_T, TABLE):
        gap = eps_c(x, step.t) - eps_u(x, step.t)
        predicted -= (s[step.index] - s_prev[step.index]) * (3.0 - 0.1) * gap  # (E5)
        x = step.x
    predicted *= TABLE.abar[0].sqrt()  # from xbar = x / sqrt(abar) back to x
    actual = along(moved - baseline)
    assert torch.corrcoef(torch.stack([actual, along(predicted)]))[0, 1] > 0.95
    assert 0.2 < along(predicted).mean() / actual.mean() < 1.5  # first order: the right size within a factor


@cache
def history(**options: float | bool) -> tuple[list[float], list[float], list[float], list[float]]:
    """Guided mean and std, unguided std, per-sample std of the noise, by round."""
    config = ReflectionConfig(rounds=5, **{"renormalise": False, **options})
    rounds = list(reflect(make_eps, noise(), TABLE, config, torch.Generator().manual_seed(1)))
    columns = [(along(r.x_T).mean(), along(r.x_T).std(), across(r.x_T), r.std.mean()) for r in rounds]
    return tuple([float(v) for v in column] for column in zip(*columns))


def test_blind_reflection_drifts_off_the_prior() -> None:
    """papers.md 1.6 #17: the guided mean grows without end, its spread collapses, even the unguided axes shrink."""
    mean, std, unguided, per_sample = history()
    assert (
        abs(mean[0]) < 0.1
        and std[0] == pytest.approx(1, abs=0.05)
        and unguided[0] == pytest.approx(1, abs=0.02)
    )
    assert all(b > a + 0.1 for a, b in zip(mean, mean[1:])) and mean[5] > 2
    assert all(b < 0.8 * a for a, b in zip(std, std[1:])) and std[5] < 0.15
    assert all(b < 0.9 * a for a, b in zip(unguided, unguided[1:]))
    assert per_sample[5] < 0.8
    # the unguided shrinkage is inversion error, not guidance: it is there without a gap and goes with finer steps
    _, no_gap = condition_guided_forward(make_eps(1), make_eps(1), noise(), TABLE)
    _, fine = condition_guided_forward(make_eps(1), make_eps(1), noise(), SCHEDULE.table(200))
    assert across(no_gap) < 0.9 and across(fine) > 0.95


def test_renormalising_repairs_the_scale_and_fresh_noise_the_diversity() -> None:
    _, std, unguided, _ = history()
    _, std_n, unguided_n, per_sample = history(renormalise=True)
    assert per_sample[1:] == pytest.approx([1] * 5, abs=1e-4)
    assert unguided_n[5] > 1.5 * unguided[5]
    mean_f, std_f, unguided_f, _ = history(fresh_noise=0.7)
    # new noise keeps the spread that rescaling cannot bring back
    assert std_f[5] > 0.7 and unguided_f[5] > 0.75
    assert std[5] < std_n[5] < 0.2
    assert mean_f[5] - mean_f[4] < 0.1  # and the drift comes to rest


def test_renoise_to_options() -> None:
    x0 = last(denoise(make_eps(3.0), noise(50), TABLE))
    eps = make_eps(0.1)
    assert renoise_to(eps, x0, TABLE, PUBLISHED).equal(last(renoise(eps, x0, TABLE)))

    half = replace(PUBLISHED, level=0.5)
    assert half.tail(TABLE).t.tolist() == TABLE.t[10:].tolist()
    plain = renoise_to(eps, x0, TABLE, half)
    assert plain.equal(last(renoise(eps, x0, TABLE[10:])))

    whole = renoise_to(eps, x0, TABLE, ReflectionConfig())
    mean, std = moments(whole)
    torch.testing.assert_close(mean, torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(50), atol=1e-5, rtol=0)

    partly = renoise_to(eps, x0, TABLE, ReflectionConfig(level=0.5))
    abar = TABLE.abar[10]
    # the noise in it, not the picture in it
    mean, std = moments((partly - abar.sqrt() * x0) / (1 - abar).sqrt())
    torch.testing.assert_close(std, torch.ones(50), atol=1e-4, rtol=0)

    g = torch.Generator().manual_seed(4)
    fresh = renoise_to(eps, x0, TABLE, replace(PUBLISHED, fresh_noise=1.0), g)
    assert fresh.equal(noise(50, seed=4))  # all new: best-of-N
    mixed = renoise_to(eps, x0, TABLE, replace(PUBLISHED, fresh_noise=0.6), torch.Generator().manual_seed(4))
    torch.testing.assert_close(mixed, 0.8 * last(renoise(eps, x0, TABLE)) + 0.6 * fresh)
    with pytest.raises(ValueError, match=r"fresh_noise 0\.6 .*generator"):
        renoise_to(eps, x0, TABLE, replace(PUBLISHED, fresh_noise=0.6))


def test_the_opposite_noise_avoids_a_picture_and_the_same_noise_repeats_it() -> None:
    """Two classes, mirror images of each other: exact eps is odd, so the opposite noise draws the mirrored picture."""
    config = ReflectionConfig()
    unguided = make_eps(0.0)
    x0 = last(denoise(unguided, noise(), TABLE))
    wrong = along(x0) < 0  # the prompt asks for class 0, whose mean lies on the positive side
    assert 0.4 < wrong.float().mean() < 0.6
    same, opposite = (
        renoise_to(unguided, x0, TABLE, config, sign=s * torch.ones(len(x0))) for s in (1.0, -1.0)
    )
    torch.testing.assert_close(opposite, -same)
    assert same.equal(renoise_to(unguided, x0, TABLE, config))
    sign = torch.where(wrong, -1.0, 1.0)
    judged = renoise_to(unguided, x0, TABLE, config, sign=sign)
    assert judged.equal(torch.where(wrong[:, None, None, None], opposite, same))
    right = {
        name: (along(last(denoise(unguided, x, TABLE))) > 0).float().mean()
        for name, x in {"blind": same, "judged": judged, "fresh": noise(seed=1)}.items()
    }
    assert right["judged"] > 0.98 and abs(right["blind"] - 0.5) < 0.1 and abs(right["fresh"] - 0.5) < 0.1
    # in part of the way up, the picture stays and only the noise in it turns over
    half = replace(config, level=0.5)
    up, down = (renoise_to(unguided, x0, TABLE, half, sign=s * torch.ones(len(x0))) for s in (1.0, -1.0))
    torch.testing.assert_close((up + down) / 2, TABLE.abar[10].sqrt() * x0)


def test_a_partial_level_costs_partial_rounds() -> None:
    calls: list[int] = []

    def counted(w: float) -> EpsFn:
        return lambda x, t: (calls.append(int(t)), make_eps(w)(x, t))[1]

    rounds = reflect(counted, noise(3), TABLE, ReflectionConfig(rounds=2, level=0.25))
    for k, expected in enumerate((20, 10, 10)):  # then 5 up and 5 down
        calls.clear()
        assert next(rounds).k == k and len(calls) == expected
    assert max(calls) == int(TABLE.t[15])


def test_zigzag() -> None:
    x_T = noise(5)
    moves = list(zigzag(make_eps, x_T, TABLE, 3.0, 0.1))
    assert len(moves) == 3 * 20 - 2
    assert [m.index for m in moves] == [i for i in range(19) for _ in range(3)] + [19]
    x = last(denoise(make_eps(3.0), x_T, TABLE[:1]))
    x = last(renoise(make_eps(0.1), x, TABLE[:1]))
    assert moves[1].x.equal(x)  # up again at the level it came from
    assert moves[2].x.equal(last(denoise(make_eps(3.0), x, TABLE[:1])))
    straight = last(denoise(make_eps(3.0), noise(), TABLE))
    assert along(last(zigzag(make_eps, noise(), TABLE, 3.0, 0.1))).mean() > along(straight).mean()


def test_no_graph_is_kept_and_no_global_randomness_used() -> None:
    gain = torch.ones((), requires_grad=True)

    def trainable(w: float) -> EpsFn:
        return lambda x, t: gain * make_eps(w)(x, t)

    before = torch.get_rng_state()
    x_T = noise(3).requires_grad_()
    config = ReflectionConfig(rounds=2, fresh_noise=0.2)
    for r in reflect(trainable, x_T, TABLE, config, torch.Generator().manual_seed(0)):
        assert torch.is_grad_enabled() and not any(v.requires_grad for v in (r.x_T, r.x0, r.mean, r.std))
    outputs = condition_guided_forward(trainable(3.0), trainable(0.1), x_T, TABLE)
    assert not any(v.requires_grad for v in outputs)
    assert not last(zigzag(trainable, x_T, TABLE, 3.0, 0.1)).requires_grad
    assert torch.get_rng_state().equal(before)


def test_config_names_its_numbers() -> None:
    for name, bad in (
        ("rounds", -1),
        ("steps", 0),
        ("level", 0.0),
        ("level", 1.5),
        ("level", 0.01),
        ("fresh_noise", 1.2),
    ):
        with pytest.raises(ValueError, match=f"{name} {bad}"):
            ReflectionConfig(**{name: bad})
    with pytest.raises(ValueError, match=r"20 steps.*says 7"):
        next(reflect(make_eps, noise(2), TABLE, ReflectionConfig(steps=7)))
