"""The table of steps, and exact conversions between prediction types."""

import pytest
import torch

from minireflect.diffusion.schedule import Schedule, ScheduleConfig

SPACINGS = ["leading", "trailing", "linspace"]


def test_stored_lists() -> None:
    """Known by heart, so that the tables hold without diffusers too."""
    schedule = Schedule(ScheduleConfig())
    assert schedule.table(20).t.tolist() == list(range(951, 0, -50))
    assert schedule.table(20).t_prev.tolist() == [*range(901, 0, -50), 0]
    # 1000 / 30 is not whole: t_prev from the table
    assert schedule.table(30).t.tolist() == list(range(958, 0, -33))
    trailing = ScheduleConfig(spacing="trailing", euler=True, set_alpha_to_one=True)
    for table in (schedule.table(4, "trailing"), Schedule(trailing).table(4)):
        assert table.t.tolist() == [999, 749, 499, 249]
    assert table.t_prev.tolist() == [749, 499, 249, -1] and table.abar_prev[-1] == 1
    thirds = Schedule(trailing).table(3)  # a third of 1000 is no whole number of levels
    assert thirds.t.tolist() == [999, 666, 332] and thirds.t_prev.tolist() == [666, 332, -1]
    assert schedule.table(4, "linspace").t.tolist() == [999, 666, 333, 0]
    sigma = schedule.table(20).sigma(1.0)
    want = {951: 0.644, 501: 0.429, 101: 0.167, 51: 0.0406, 1: 0.0206}  # ddpo-pytorch's sampler, measured
    got = {t: s for t, s in zip(schedule.table(20).t.tolist(), sigma.tolist())}
    assert all(abs(got[t] - s) < 5e-4 for t, s in want.items())


def test_last_step() -> None:
    schedule = Schedule(ScheduleConfig())
    assert schedule.table(20).sigma(1.0)[-1] == pytest.approx(0.0206, abs=1e-4)
    assert Schedule(ScheduleConfig(offset=0)).table(20).sigma(1.0)[-1] == 0  # t and t_prev are both level 0
    assert schedule.table(20, "linspace").sigma(1.0)[-1] == 0
    clean = Schedule(ScheduleConfig(set_alpha_to_one=True)).table(20, "trailing")
    assert clean.t_prev[-1] == -1 and clean.abar_prev[-1] == 1 and clean.sigma(1.0)[-1] == 0


def test_variance_is_never_negative() -> None:
    schedule = Schedule(ScheduleConfig())
    for steps in (*range(1, 60), 250, 500, 999):
        for spacing in SPACINGS:
            table = schedule.table(steps, spacing)
            sigma = table.sigma(1.0)
            assert not sigma.isnan().any() and (1 - table.abar_prev - sigma**2 > -1e-6).all()


def test_slices_are_tables() -> None:
    table = Schedule(ScheduleConfig()).table(20)
    prefix, suffix = table[:15], table[15:]
    assert len(prefix) == 15 and len(suffix) == 5 and len(table[3:3]) == 0
    assert torch.cat([prefix.t, suffix.t]).equal(table.t)
    assert torch.cat([prefix.sigma(1.0), suffix.sigma(1.0)]).equal(table.sigma(1.0))
    assert prefix.abar_prev[-1] == suffix.abar[0]
    with pytest.raises(TypeError, match="table"):
        table[3]
    with pytest.raises(TypeError, match="table"):
        table[::2]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_every_prediction_gives_back_the_noise(prediction: str) -> None:
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(3, 2, 5, 7, generator=g), torch.randn(3, 2, 5, 7, generator=g)
    t = torch.tensor([0, 500, 999])
    x = schedule.add_noise(x0, t, noise)
    eps = schedule.to_eps(schedule.target(x0, noise, t), x, t)
    # x0 at t = 0 divides by sqrt(1 - abar) = 0.03
    torch.testing.assert_close(eps, noise, atol=2e-5, rtol=1e-4)
    one = schedule.to_eps(schedule.target(x0, noise, t)[1:2], x[1:2], torch.tensor(500))  # a 0-d label
    torch.testing.assert_close(one, eps[1:2])


def test_wrong_numbers_are_named() -> None:
    schedule = Schedule(ScheduleConfig())
    for steps in (0, -3, 1001):
        with pytest.raises(ValueError, match=f"steps {steps} .*1000"):
            schedule.table(steps)
    with pytest.raises(ValueError, match=r"1000\.\.|\.\.1000"):
        schedule.table(1000)  # would ask for level 1000 of 0..999
    with pytest.raises(ValueError, match="karras"):
        schedule.table(20, "karras")
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1\.5"):
        schedule.table(20).sigma(1.5)
    for bad in (
        {"train_steps": 0},
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_end": 1.0},
        {"beta_schedule": "cosine"},
        {"prediction": "score"},
    ):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            ScheduleConfig(**bad)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_only_eulers_samplers_that_begin_at_the_last_level_start_below_unit_noise(spacing: str) -> None:
    levels = Schedule(ScheduleConfig()).abar
    euler = Schedule(ScheduleConfig(euler=True, spacing=spacing)).start
    assert euler == pytest.approx(1 if spacing == "leading" else (1 - levels[-1].item()) ** 0.5, abs=1e-9)
    assert Schedule(ScheduleConfig(spacing=spacing)).start == 1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_sigma_is_proportional_to_eta(eta: float) -> None:
    """DDIM (16), in float64 from the squared cumulative product of a schedule."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    now, before = abar[751], abar[701]
    wanted = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    table = Schedule(ScheduleConfig()).table(20)
    assert table.t[4] == 751 and table.sigma(eta)[4].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_schedule_of_zero_terminal_snr_ends_in_noise() -> None:
    """What is left of the picture at the last level, sqrt(abar), is a ten-thousandth.  The first level stays,
    and those between are moved in proportion (arXiv 2305.08891, section 3.1).
    """
    schedule = Schedule(ScheduleConfig(zero_snr=True))
    assert schedule.abar[-1].sqrt().item() == pytest.approx(1e-4)
    before, after = Schedule(ScheduleConfig()).abar.sqrt(), schedule.abar.sqrt()
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-6)
    share = (before[500] - before[-1]) / (before[0] - before[-1])
    assert (after[500] / after[0]).item() == pytest.approx(share.item(), rel=1e-4)
