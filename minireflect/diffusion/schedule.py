"""The share of signal at every noise level, and the table of steps that samplers, scorers and inverses use.

Papers: DDPM (Ho et al. 2020, arXiv 2006.11239), DDIM (Song et al. 2020, arXiv 2010.02502), v-prediction
(Salimans & Ho 2022).

    beta    = the noise added at each of T training steps
    abar[t] = prod_{s<=t} (1 - beta[s])               # DDPM's alpha-bar; the DDIM paper calls it alpha
    x_t     = sqrt(abar) x_0 + sqrt(1 - abar) noise   # DDPM (4)

A sampler visits only S of the T levels. Which ones, and where each step lands, is the `StepTable`; nothing
else in the project computes `t - T // S`, so what was sampled is what is scored and what is inverted.

Differs from diffusers: alpha-bar is accumulated in float64 before it is stored in float32. The rest is equal
number for number, including one oddity of where a step lands (see `Schedule.table`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ranges import Checked, Count, Natural, expect
from ..streams import sent

BetaSchedule = Literal["scaled_linear", "linear"]
Prediction = Literal["epsilon", "v", "x0"]
Spacing = Literal["leading", "trailing", "linspace"]
# replaces an alpha-bar of 0, at which `to_eps` would divide by 0
NO_SIGNAL = 1e-8


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The noise a network was trained with. The defaults are Stable Diffusion 1.x and SDXL."""

    train_steps: Count = 1000  # T, number of noise levels
    beta_start: float = 0.00085  # variance added at the first level
    beta_end: float = 0.012  # variance added at the last level
    beta_schedule: BetaSchedule = "scaled_linear"  # "scaled_linear" is linear in sqrt(beta)
    prediction: Prediction = "epsilon"  # what the network outputs
    # alpha-bar of the last level is brought to 0, or nearly: its latent has no signal (arXiv 2305.08891)
    zero_snr: bool = False
    # which levels a sampler visits, and where its last step lands: see `Schedule.table`
    spacing: Spacing = "leading"
    offset: Natural = 1
    set_alpha_to_one: bool = False
    # diffusers' Euler sampler, which without step noise is DDIM: a step lands where the next begins, and the
    # start noise of trailing and linspace has the standard deviation sqrt(1 - abar) of its level
    euler: bool = False

    def require(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < {self.beta_start} <= {self.beta_end} < 1")


@dataclass(frozen=True, eq=False)
class StepTable:
    """S steps from noise to image: step i takes a latent at level `t[i]` to level `t_prev[i]`.

    `t_prev` is -1 for a clean image (alpha-bar 1). A slice is a table again: `table[:k]` is the prefix that
    branches share, `table[k:]` what each branch runs alone, or the steps that an edit re-noises and denoises.
    It is on the CPU, so that a comparison of sigma with 0 does not wait for the GPU.
    """

    t: Tensor  # [S] long, descending
    t_prev: Tensor  # [S] long
    abar: Tensor  # [S] float32, alpha-bar at t
    abar_prev: Tensor  # [S] float32, alpha-bar at t_prev

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice) -> "StepTable":
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"a table is sliced as table[i:j], got table[{part!r}]")
        return StepTable(self.t[part], self.t_prev[part], self.abar[part], self.abar_prev[part])

    def __iter__(self) -> Iterator["StepTable"]:
        return (self[i : i + 1] for i in range(len(self)))

    def sigma(self, eta: float) -> Tensor:
        """Standard deviation of the fresh noise of every step, [S].

        Zero means deterministic, a step without a density.

        eta 0 is DDIM (all zero), eta 1 is DDPM's ancestral sampler. At eta 1 the last step may still be zero:
        where it lands on a clean image, or where `t` and `t_prev` share an alpha-bar.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta} is outside [0, 1]")
        abar, abar_prev = self.abar.double(), self.abar_prev.double()
        var = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)  # DDIM (16), squared, eta 1
        return (eta * var.clamp(min=0).sqrt()).float()


class Schedule:
    """Alpha-bar for all T levels, and the conversions that depend on it."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        T, start, end = config.train_steps, config.beta_start, config.beta_end
        if config.beta_schedule == "linear":
            beta = torch.linspace(start, end, T, dtype=torch.float64)
        else:
            beta = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        abar = (1 - beta).cumprod(0)  # DDPM (4)
        if config.zero_snr:
            first, final = abar[0].sqrt(), abar[-1].sqrt()
            abar = ((abar.sqrt() - final) * first / (first - final)) ** 2  # arXiv 2305.08891, algorithm 1
            abar[-1] = NO_SIGNAL
        self.abar = abar.float()

    @property
    def start(self) -> float:
        """Standard deviation of the noise that a sampler starts from."""
        scaled = self.config.euler and self.config.spacing != "leading"
        return (1 - self.abar[-1].item()) ** 0.5 if scaled else 1.0

    def abar_at(self, t: Tensor, like: Tensor) -> Tensor:
        """Alpha-bar of t, shaped to multiply `like`.  Shapes: t () or (b), like (b ...) -> () or (b 1 ...)"""
        abar = sent(sent(self.abar, t.device)[t], like.device)
        return abar.reshape(-1, *[1] * (like.ndim - 1)) if abar.ndim else abar

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """A clean latent brought to level t in one jump.

        Shapes: x0 (b c h w), t (b), noise (b c h w) -> (b c h w)
        """
        abar = self.abar_at(t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise  # DDPM (4)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the network at level t.

        Shapes: x0 (b c h w), noise (b c h w), t (b) -> (b c h w)
        """
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "x0":
            return x0
        abar = self.abar_at(t, x0)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x0  # v, Salimans & Ho

    def to_eps(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's output as predicted noise: the only place that distinguishes prediction types.

        It uses alpha-bar of the label t. In re-noising the latent is one level cleaner than t, and diffusers'
        inverse uses the latent's own level; for "epsilon" nothing is converted and the two agree.
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
        """Choose `steps` of the T levels; the configuration says how, but for a `spacing` that is given.

        leading   multiples of T // steps, plus `offset`: never reaches T - 1 (Stable Diffusion, offset 1)
        trailing  counts down from T - 1: starts at the noisiest level, ends above 0 (`offset` is not used)
        linspace  from T - 1 to 0 inclusive (`offset` is not used)

        The last step lands below level 0. With `set_alpha_to_one` that is a clean image: t_prev -1, alpha-bar
        1, sigma 0 at every eta. Without it (diffusers for Stable Diffusion; ddpo-pytorch by clamping) it is
        level 0: t_prev 0, alpha-bar abar[0], and with leading spacing and offset 1 a small positive sigma
        remains (0.0206 at eta 1, 20 steps).

        diffusers lands step i on `t[i] - T // steps`, which is not `t[i + 1]` for linspace, nor for trailing
        when steps does not divide T: the next evaluation then mislabels its latent by a few levels. It is so
        here too, so that real checkpoints give the same pictures. For leading spacing, the only one that a
        pipeline uses, the two are the same.
        """
        T, offset = self.config.train_steps, self.config.offset
        spacing = expect(spacing or self.config.spacing, Spacing, "spacing")
        if not 1 <= steps <= T:
            raise ValueError(f"steps {steps} is outside 1..{T} (train_steps)")
        if spacing == "leading":
            t = torch.arange(steps).flip(0) * (T // steps) + offset
        elif spacing == "trailing":  # round() takes halves to even, like numpy's
            t = (T - torch.arange(steps, dtype=torch.float64) * (T / steps)).round().long() - 1
        else:  # linspace
            t = torch.linspace(0, T - 1, steps, dtype=torch.float64).round().long().flip(0)
        if t[0] >= T or t[-1] < 0:
            span = f"span t = {t[-1]}..{t[0]}, outside 0..{T - 1}"
            raise ValueError(f"{steps} {spacing} steps with offset {offset} {span}")

        t_prev = torch.cat([t[1:], t.new_tensor([-1])]) if self.config.euler else t - T // steps
        t_prev = torch.where(t_prev < 0, -1 if self.config.set_alpha_to_one else 0, t_prev)
        abar_prev = torch.where(t_prev < 0, 1.0, self.abar[t_prev.clamp(min=0)])
        return StepTable(t, t_prev, self.abar[t], abar_prev)


def level_weight(schedule: Schedule, t: Tensor, cap: float) -> Tensor:
    """The loss weight of the noise prediction at level t: 1 / abar, at most `cap`.

    An error of eps is an error of x_0 times the signal-to-noise ratio, so an unweighted loss has little
    weight at the late levels, which decide where objects are.  1 / abar makes the loss that of v-prediction
    (Salimans & Ho 2022, appendix D).
    Shapes: t (b) -> (b)
    """
    return (1 / sent(schedule.abar, t.device)[t]).clamp(max=cap)
