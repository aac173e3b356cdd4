"""Reflection writes the prompt into the noise and drifts off the prior; what repairs that."""

from collections.abc import Iterator
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
)
from minireflect.diffusion.sample import EpsFn, denoise, guided, last, renoise
from minireflect.diffusion.schedule import Schedule, ScheduleConfig, StepTable

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


def blind(
    x_T: Tensor, config: ReflectionConfig, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """K rounds as the samplers run them.  Yields x_T^k with its x_0^k, and x_T^K at last."""
    for _ in range(config.rounds):
        x_0, following = condition_guided_forward(make_eps, x_T, TABLE, TABLE, config, generator)
        yield x_T, x_0
        x_T = following
    yield x_T, None


def through(w_denoise: float, w_renoise: float, table: StepTable = TABLE) -> Tensor:
    """The next noise of 1,000 samples, one round as published."""
    config = replace(PUBLISHED, w_denoise=w_denoise, w_renoise=w_renoise)
    return condition_guided_forward(make_eps, noise(), table, table, config)[1]


def test_forward_process_is_the_composition() -> None:
    x_T = noise(5)
    (first, x_0), (second, x_1), (third, none) = blind(x_T, replace(PUBLISHED, rounds=2))
    assert first.equal(x_T) and none is None
    assert x_0.equal(last(denoise(make_eps(3.0), x_T, TABLE)))
    assert second.equal(last(renoise(make_eps(0.1), x_0, TABLE)))
    assert x_1.equal(last(denoise(make_eps(3.0), second, TABLE)))
    assert third.equal(last(renoise(make_eps(0.1), x_1, TABLE)))


def test_guidance_gap_moves_the_noise_where_e5_says() -> None:
    x_T = noise()
    moved = through(3.0, 0.1)
    # what inversion without a gap does to the same noise is not the gap's doing
    baseline = through(3.0, 3.0)
    assert along(moved).mean() > along(x_T).mean() + 0.5  # towards the class of the prompt
    # and back
    assert along(through(0.1, 3.0)).mean() < -0.5

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
    rounds = [x_T for x_T, _ in blind(noise(), config, torch.Generator().manual_seed(1))]
    columns = [(along(x).mean(), along(x).std(), across(x), moments(x)[1].mean()) for x in rounds]
    return tuple([float(v) for v in column] for column in zip(*columns))


def test_blind_reflection_drifts_off_the_prior() -> None:
    """papers.md 1.6 #17: the guided mean grows without end, its spread collapses, even the unguided axes
    shrink.
    """
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
    # the unguided shrinkage is inversion error, not guidance: it is there without a gap and goes with finer
    # steps
    no_gap, fine = through(1, 1), through(1, 1, SCHEDULE.table(200))
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

    half = replace(PUBLISHED, strength=0.5)
    assert half.tail(TABLE).t.tolist() == TABLE.t[10:].tolist()
    plain = renoise_to(eps, x0, TABLE, half)
    assert plain.equal(last(renoise(eps, x0, TABLE[10:])))

    whole = renoise_to(eps, x0, TABLE, ReflectionConfig())
    mean, std = moments(whole)
    torch.testing.assert_close(mean, torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(50), atol=1e-5, rtol=0)

    faint = renoise_to(lambda x, t: 1e-3 * noise(50), 0 * x0, TABLE, ReflectionConfig())
    torch.testing.assert_close(moments(faint)[1], torch.ones(50), atol=1e-4, rtol=0)

    partly = renoise_to(eps, x0, TABLE, ReflectionConfig(strength=0.5))
    abar = TABLE.abar[10]
    # the noise in it, not the picture in it
    mean, std = moments((partly - abar.sqrt() * x0) / (1 - abar).sqrt())
    torch.testing.assert_close(std, torch.ones(50), atol=1e-4, rtol=0)

    g = torch.Generator().manual_seed(4)
    fresh = renoise_to(eps, x0, TABLE, replace(PUBLISHED, fresh_noise=1.0), g)
    assert fresh.equal(noise(50, seed=4))  # all new: best-of-N
    mixed = renoise_to(eps, x0, TABLE, replace(PUBLISHED, fresh_noise=0.6), torch.Generator().manual_seed(4))
    torch.testing.assert_close(mixed, 0.8 * last(renoise(eps, x0, TABLE)) + 0.6 * fresh)
    with pytest.raises(ValueError, match=r"fresh_noise 0\.6.*generator"):
        renoise_to(eps, x0, TABLE, replace(PUBLISHED, fresh_noise=0.6))


def test_the_opposite_noise_avoids_a_picture_and_the_same_noise_repeats_it() -> None:
    """Two classes, mirror images of each other: exact eps is odd, so the opposite noise draws the mirrored
    picture.
    """
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
    up, down = (renoise_to(unguided, x0, TABLE, PUBLISHED, sign=s * torch.ones(1000)) for s in (1.0, -1.0))
    torch.testing.assert_close(down, -up)  # also as published, without renormalising
    sign = torch.where(wrong, -1.0, 1.0)
    judged = renoise_to(unguided, x0, TABLE, config, sign=sign)
    assert judged.equal(torch.where(wrong[:, None, None, None], opposite, same))
    right = {
        name: (along(last(denoise(unguided, x, TABLE))) > 0).float().mean()
        for name, x in {"blind": same, "judged": judged, "fresh": noise(seed=1)}.items()
    }
    assert right["judged"] > 0.98 and abs(right["blind"] - 0.5) < 0.1 and abs(right["fresh"] - 0.5) < 0.1
    # in part of the way up, the picture stays and only the noise in it turns over
    half = replace(config, strength=0.5)
    up, down = (renoise_to(unguided, x0, TABLE, half, sign=s * torch.ones(len(x0))) for s in (1.0, -1.0))
    torch.testing.assert_close((up + down) / 2, TABLE.abar[10].sqrt() * x0)


def test_a_partial_strength_costs_its_share_and_none_at_all_changes_nothing() -> None:
    calls: list[int] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t))
        return make_eps(1.0)(x, t)

    x0 = noise(3)
    for strength, expected in ((1.0, 20), (0.29, 6), (0.25, 5), (0.0, 0)):  # 5.8 steps are rounded
        config = ReflectionConfig(w_renoise=1.0, strength=strength)
        calls.clear()
        x = renoise_to(counted, x0, TABLE, config)
        assert len(calls) == expected == config.renoise_cost == len(config.tail(TABLE))
    assert x is x0
    calls.clear()
    renoise_to(counted, x0, TABLE, ReflectionConfig(fresh_noise=1.0), torch.Generator())
    assert not calls and ReflectionConfig(fresh_noise=1.0).renoise_cost == 0


@pytest.mark.parametrize("wrong", ["opposite", "fresh", "repeat"])
@pytest.mark.parametrize("redraw", ["refused", "all"])
def test_reflect_selects_the_rows_and_their_noise(wrong: str, redraw: str) -> None:
    config = ReflectionConfig(w_renoise=1.0, wrong=wrong, redraw=redraw)
    x0, accepted, asked = noise(4), torch.tensor([True, False, True, False]), []

    def eps_of(rows: Tensor) -> EpsFn:
        asked.append(rows.tolist())
        return make_eps(1.0)

    rows, x_T = reflect(eps_of, x0, accepted, TABLE, config, torch.Generator().manual_seed(1))
    assert rows.tolist() == ([1, 3] if redraw == "refused" else [0, 1, 2, 3]) == asked[0]
    own = renoise_to(make_eps(1.0), x0, TABLE, config)  # each row's own noise
    new = torch.randn(x_T.shape, generator=torch.Generator().manual_seed(1))
    for i, x, fresh in zip(rows.tolist(), x_T, new):
        other = {"opposite": -own[i], "fresh": fresh, "repeat": own[i]}[wrong]
        torch.testing.assert_close(x, own[i] if accepted[i] else other)
    none, nothing = reflect(
        eps_of, x0, torch.ones(4, dtype=torch.bool), TABLE, replace(config, redraw="refused")
    )
    assert len(none) == len(nothing) == 0


def test_no_graph_is_kept_and_no_global_randomness_used() -> None:
    gain = torch.ones((), requires_grad=True)

    def trainable(w: float) -> EpsFn:
        return lambda x, t: gain * make_eps(w)(x, t)

    before = torch.get_rng_state()
    x_T = noise(3).requires_grad_()
    config = ReflectionConfig(rounds=2, fresh_noise=0.2)
    outputs = condition_guided_forward(trainable, x_T, TABLE, TABLE, config, torch.Generator().manual_seed(0))
    assert torch.is_grad_enabled() and not any(v.requires_grad for v in outputs)
    _, x = reflect(lambda rows: trainable(0.1), x_T, torch.zeros(3) > 0, TABLE, config, torch.Generator())
    assert not x.requires_grad
    assert torch.get_rng_state().equal(before)


def test_config_names_its_numbers() -> None:
    for name, bad in (("rounds", -1), ("strength", -0.5), ("strength", 1.5), ("fresh_noise", 1.2)):
        with pytest.raises(ValueError, match=f"{name} must .*got {bad}"):
            ReflectionConfig(**{name: bad})


def test_moments_are_those_of_all_dimensions_of_each_sample() -> None:
    """The mean of the squares, not their sum over n - 1: by hand."""
    x = torch.tensor([[1.0, 3.0], [-1.0, -1.0]]).view(2, 2, 1, 1)
    mean, std = moments(x)
    assert mean.tolist() == [2, -1] and std.tolist() == [1, 0]


def test_all_new_noise_is_sdedits_jump_to_its_level() -> None:
    """DDPM (4) at the first of the steps that are denoised again; no network is asked."""
    schedule, generator = Schedule(ScheduleConfig()), torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4, generator=generator)
    table, config = schedule.table(10), ReflectionConfig(steps=10, strength=0.4, fresh_noise=1.0)

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the network was asked")

    found = renoise_to(never, x0, table, config, torch.Generator().manual_seed(1))
    noise, abar = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), schedule.abar[301]
    torch.testing.assert_close(found, abar.sqrt() * x0 + (1 - abar).sqrt() * noise)
    assert config.tail(table).t.tolist() == [301, 201, 101, 1]
