"""The noise schedule, its table of steps, one step and its inverse equal diffusers'."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from minireflect.diffusion.ddim import ddim_step, renoise_step
from minireflect.diffusion.schedule import Schedule, ScheduleConfig

SPACINGS = ["leading", "trailing", "linspace"]
STEPS = [1, 7, 10, 20, 30, 50]
SHAPE = (3, 2, 5, 7)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed))


def reference(
    spacing: str, to_one: bool = False, offset: int = 1, schedule: str = "scaled_linear"
) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=schedule,
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=offset,
        timestep_spacing=spacing,
    )


@pytest.mark.parametrize("name", ["scaled_linear", "linear"])
def test_abar_equals_diffusers(name: str) -> None:
    ours = Schedule(ScheduleConfig(beta_schedule=name)).abar
    theirs = reference("leading", schedule=name).alphas_cumprod
    assert ours.dtype == torch.float32 and ours.shape == (1000,)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)  # they accumulate in float32, we in float64


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
def test_table_equals_diffusers(steps: int, spacing: str, to_one: bool) -> None:
    ref = reference(spacing, to_one)
    ref.set_timesteps(steps)
    table = Schedule(ScheduleConfig(set_alpha_to_one=to_one)).table(steps, spacing)
    assert len(table) == steps and table.t.tolist() == ref.timesteps.tolist()
    # how DDIMScheduler.step finds the other end of a step
    prev = ref.timesteps - 1000 // steps
    assert table.t_prev.tolist() == [p if p >= 0 else (-1 if to_one else 0) for p in prev.tolist()]
    abar_prev = torch.where(prev >= 0, ref.alphas_cumprod[prev.clamp(min=0)], ref.final_alpha_cumprod)
    torch.testing.assert_close(table.abar, ref.alphas_cumprod[ref.timesteps], rtol=2e-5, atol=0)
    torch.testing.assert_close(table.abar_prev, abar_prev, rtol=2e-5, atol=0)
    var = torch.stack([ref._get_variance(t, p) for t, p in zip(ref.timesteps, prev)])
    torch.testing.assert_close(table.sigma(1.0), var.clamp(min=0).sqrt(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table.sigma(0.3), 0.3 * table.sigma(1.0))
    assert (table.sigma(0.0) == 0).all()


def test_v_and_noise_equal_diffusers() -> None:
    schedule, ref = Schedule(ScheduleConfig(prediction="v")), reference("leading")
    g = torch.Generator().manual_seed(1)
    x0, noise, t = (
        torch.randn(2, 3, 5, 7, generator=g),
        torch.randn(2, 3, 5, 7, generator=g),
        torch.tensor([20, 900]),
    )
    torch.testing.assert_close(
        schedule.add_noise(x0, t, noise), ref.add_noise(x0, noise, t), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        schedule.target(x0, noise, t), ref.get_velocity(x0, noise, t), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [7, 10, 20, 30, 50])
def test_every_step_equals_diffusers(steps: int, spacing: str, eta: float, to_one: bool) -> None:
    ref = DDIMScheduler(**SD, set_alpha_to_one=to_one, steps_offset=1, timestep_spacing=spacing)
    ref.set_timesteps(steps)
    schedule = Schedule(ScheduleConfig(set_alpha_to_one=to_one))
    schedule.abar = ref.alphas_cumprod  # float32 products: their rounding is test_schedule's business
    table = schedule.table(steps, spacing)
    sigma = table.sigma(eta)
    x, eps = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    noise = torch.randn(SHAPE, generator=rng(3))
    for i in range(steps):
        if spacing == "linspace" and int(table.t[i]) == 0:
            # abar == abar_prev: the variance is 0 up to rounding, and theirs may be sqrt(-1e-9)
            eta_ref = 0.0
        else:
            eta_ref = eta
        want = ref.step(eps, int(table.t[i]), x, eta=eta_ref, variance_noise=noise if eta_ref else None)
        got = ddim_step(x, eps, table.abar[i], table.abar_prev[i], sigma[i], generator=rng(3))
        torch.testing.assert_close(got.x_prev, want.prev_sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.x0, want.pred_original_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # DDIMInverseScheduler has no linspace
@pytest.mark.parametrize("steps", [7, 10, 20, 30, 50])
def test_inverse_equals_diffusers(steps: int, spacing: str) -> None:
    ref = DDIMInverseScheduler(**SD, set_alpha_to_one=False, steps_offset=1, timestep_spacing=spacing)
    ref.set_timesteps(steps)
    table = Schedule(ScheduleConfig()).table(steps, spacing)
    assert ref.timesteps.tolist() == table.t.flip(0).tolist()
    x, eps = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    for i in range(steps):
        want = ref.step(eps, int(table.t[i]), x).prev_sample
        got = renoise_step(x, eps, table.abar[i], table.abar_prev[i])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
