"""The noise schedule, and the table of steps that sampling, scoring and re-noising share.

Papers: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2020, arXiv 2010.02502), v-prediction
(Salimans & Ho 2022, arXiv 2202.00512).

    beta    = variance of the noise that each of T training steps adds
    abar[t] = prod_{s<=t} (1 - beta[s])               # DDPM's alpha-bar; the DDIM paper calls it alpha
    x_t     = sqrt(abar) x_0 + sqrt(1 - abar) noise   # DDPM (4)

A sampler visits only S of the T levels.  The `StepTable` has these levels and the level to which each step
leads.  No other code computes them, so sampling, scoring and re-noising agree.

Differs from diffusers: alpha-bar is accumulated in float64 before it is stored in float32.  All else is equal
number for number, including the levels to which the steps lead (see `Schedule.table`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ranges import Checked, Count, Natural, Share, expect
from ..streams import sent

Prediction = Literal["epsilon", "v", "x0"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The noise that a network was trained with.  The defaults are those of Stable Diffusion 1.x and SDXL."""

    train_steps: Count = 1000  # T, number of noise levels
    beta_start: float = 0.00085  # variance added at the first level
    beta_end: float = 0.012  # variance added at the last level
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"  # the first is linear in sqrt(beta)
    prediction: Prediction = "epsilon"  # what the network outputs
    # scale alpha-bar so that the last level has (almost) no signal (arXiv 2305.08891)
    zero_snr: bool = False
    # the levels that a sampler visits, and the level to which its last step leads: see `Schedule.table`
    spacing: Spacing = "leading"
    offset: Natural = 1
    set_alpha_to_one: bool = False
    # as in diffusers' Euler sampler, which equals DDIM without step noise: each step leads to the level of
    # the next, and with spacing "trailing" or "linspace" the start noise has std sqrt(1 - abar) of its level
    euler: bool = False

    def require(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < {self.beta_start} <= {self.beta_end} < 1")


@dataclass(frozen=True, eq=False)
class StepTable:
    """S steps from noise to image: step i takes a latent from level `t[i]` to level `t_prev[i]`.

    `t_prev` is -1 for a clean image (alpha-bar 1).  Slices are tables too: for example, the branches of a
    prompt share the steps `table[:k]`, and each runs `table[k:]` alone.  The tensors are on the CPU, so
    that a comparison of sigma with 0 does not wait for the GPU.
    """

    t: Tensor  # [S] long, descending
    t_prev: Tensor  # [S] long
    abar: Tensor  # [S] float32, alpha-bar at t
    abar_prev: Tensor  # [S] float32, alpha-bar at t_prev

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice) -> "StepTable":
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"a table takes slices without a step, table[i:j]; got table[{part!r}]")
        return StepTable(self.t[part], self.t_prev[part], self.abar[part], self.abar_prev[part])

    def sigma(self, eta: float) -> Tensor:
        """Standard deviation of the noise that every step draws, [S].  A step with 0 is deterministic.

        eta 0 is DDIM, where all are 0; eta 1 is DDPM's ancestral sampler.  At any eta, a step has 0 if it
        leads to a clean image, or if `t` and `t_prev` have the same alpha-bar.
        Raises ValueError if eta is outside [0, 1].
        """
        eta = expect(eta, Share, "eta")
        abar, abar_prev = self.abar.double(), self.abar_prev.double()
        var = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)  # DDIM (16), squared, eta 1
        return (eta * var.clamp(min=0).sqrt()).float()


class Schedule:
    """Alpha-bar for all T levels, and the conversions that depend on it."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        T, start, end = config.train_steps, config.beta_start, config.beta_end
        power = 1 if config.beta_schedule == "linear" else 2
        beta = torch.linspace(start ** (1 / power), end ** (1 / power), T, dtype=torch.float64) ** power
        abar = (1 - beta).cumprod(0)  # DDPM (4)
        if config.zero_snr:
            first, final = abar[0].sqrt(), abar[-1].sqrt()
            abar = ((abar.sqrt() - final) * first / (first - final)) ** 2  # arXiv 2305.08891, algorithm 1
            abar[-1] = 1e-8  # not 0, as DDIM (9) divides by it
        self.abar = abar.float()

    @property
    def start(self) -> float:
        """Standard deviation of a sampler's start noise."""
        scaled = self.config.euler and self.config.spacing != "leading"
        return (1 - self.abar[-1].item()) ** 0.5 if scaled else 1.0

    def abar_at(self, t: Tensor, like: Tensor) -> Tensor:
        """Alpha-bar at t, shaped to multiply `like`.  Shapes: t () or (b), like (b ...) -> () or (b 1 ...)"""
        abar = sent(sent(self.abar, t.device)[t], like.device)
        return abar.reshape(-1, *[1] * (like.ndim - 1)) if abar.ndim else abar

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Add noise to a clean latent, up to level t.

        Shapes: x0 (b c h w), t (b), noise (b c h w) -> (b c h w)
        """
        abar = self.abar_at(t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise  # DDPM (4)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The training target of the network at level t.

        Shapes: x0 (b c h w), noise (b c h w), t (b) -> (b c h w)
        """
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return x0
        abar = self.abar_at(t, x0)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0  # v, Salimans & Ho

    def to_eps(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output to noise, according to the prediction type.

        The conversion uses alpha-bar at t.  In re-noising, the latent x is at a cleaner level than t.  The
        inverse sampler of diffusers converts with the level of x instead; for "epsilon" the two agree.
        Shapes: output (b c h w), x (b c h w), t () or (b) -> (b c h w)
        """
        if self.config.prediction == "epsilon":
            return output
        abar = self.abar_at(t, x)
        if self.config.zero_snr and x.device.type != "mps":  # mps has no float64
            abar, output, x = abar.double(), output.double(), x.double()
        if self.config.prediction == "x0":
            return (x - abar.sqrt() * output) / (1 - abar).sqrt()  # DDPM (4) solved for the noise
        return abar.sqrt() * output + (1 - abar).sqrt() * x  # v and x solved for the noise

    def table(self, steps: int, spacing: Spacing | None = None) -> StepTable:
        """Choose `steps` of the T levels.  `spacing` replaces that of the configuration.

        leading   multiples of T // steps, plus `offset`; does not reach T - 1 (Stable Diffusion has offset 1)
        trailing  equal steps down from T - 1; ends above 0; `offset` is not used
        linspace  from T - 1 to 0, both included; `offset` is not used

        The last step would lead below level 0.  With `set_alpha_to_one` it leads to a clean image: t_prev -1,
        alpha-bar 1, sigma 0 at every eta.  Without it (as diffusers configures Stable Diffusion) it leads to
        level 0: t_prev 0, alpha-bar abar[0].  Then its sigma is small but positive with leading spacing and
        offset 1 (0.0206 at eta 1, 20 steps).

        As in diffusers' DDIM, step i leads to `t[i] - T // steps`.  For linspace, and for trailing if `steps`
        does not divide T, this is not `t[i + 1]`, so the network gets a timestep that is a few levels off.
        With `euler`, step i leads to `t[i + 1]`.
        Raises ValueError if there is no such spacing, or if the levels are outside 0..T-1.
        """
        T, offset = self.config.train_steps, self.config.offset
        spacing = expect(spacing or self.config.spacing, Spacing, "spacing")
        if not 1 <= (steps := expect(steps, int, "steps")) <= T:
            raise ValueError(f"steps {steps} is outside 1..{T} (train_steps)")
        if spacing == "leading":
            t = torch.arange(steps).flip(0) * (T // steps) + offset
        elif spacing == "trailing":  # round() takes halves to even, like numpy's
            t = (T - torch.arange(steps, dtype=torch.float64) * (T / steps)).round().long() - 1
        else:  # linspace
            t = torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long().flip(0)
        if t[0] >= T:  # with leading spacing only
            raise ValueError(f"{steps} steps, offset {offset}, span t = {t[-1]}..{t[0]}, outside 0..{T - 1}")

        t_prev = torch.cat([t[1:], t.new_tensor([-1])]) if self.config.euler else t - T // steps
        t_prev = torch.where(t_prev < 0, -1 if self.config.set_alpha_to_one else 0, t_prev)
        abar_prev = torch.where(t_prev < 0, 1.0, self.abar[t_prev.clamp(min=0)])
        return StepTable(t, t_prev, self.abar[t], abar_prev)


def level_weight(schedule: Schedule, t: Tensor, cap: float) -> Tensor:
    """The weight of the noise-prediction loss at level t: 1 / abar, at most `cap`.

    The squared error of eps is that of x_0 times the signal-to-noise ratio.  An unweighted loss therefore
    gives little weight to noisy levels, which decide where objects are.  The weight 1 / abar makes it the
    loss of v-prediction (Salimans & Ho 2022, appendix D).
    Shapes: t (b) -> (b)
    """
    return (1 / sent(schedule.abar, t.device)[t]).clamp(max=cap)
