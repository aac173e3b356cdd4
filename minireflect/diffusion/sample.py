"""Guidance, and the two directions of sampling: `denoise` (noise to image) and `renoise` (image to noise).

Papers: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), DDIM (arXiv 2010.02502), SRRL (arXiv
2505.22407), E1 and E4.

    eps_fn = guided(model, cond, uncond, w)            # eps_u + w (eps_c - eps_u)
    x_0    = last(denoise(eps_fn, x_T, table))         # t = 951, 901, ..., 1
    x_T    = last(renoise(eps_fn, x_0, table))         # t = 1, 51, ..., 951

Both directions are Python generators that yield every step.  A caller can collect the steps into a trajectory
(`collect`), keep only the end (`last`), show them as an animation, or stop early.

No autograd graph is kept.  Otherwise K rounds of reflection would hold 40 K network evaluations in memory, as
the released SRRL does.  A `torch.no_grad()` around the loop of a generator would also disable gradients for
the caller between two steps.  Therefore each step is computed inside the context and yielded outside of it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..ranges import Natural, expect
from ..streams import sent
from .ddim import ddim_step, renoise_step
from .schedule import Schedule, StepTable

EpsFn = Callable[[Tensor, Tensor], Tensor]  # x_t (b c h w), t () or (b) long -> eps (b c h w)
# x (b c h w), t (b) long, context (b t d) -> output (b c h w)
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """The result of one step of a sampler."""

    index: int  # row of the table
    t: Tensor  # () long, the timestep that the network was given
    x: Tensor  # (b c h w) the latent after the step
    x0: Tensor  # (b c h w) predicted clean latent
    eps: Tensor  # (b c h w) predicted noise
    log_prob: Tensor  # (b) log-density of x in nats; 0 if the step drew no noise
    mean: Tensor  # (b c h w) of the Gaussian that x is drawn from


class Trajectory(NamedTuple):
    """A sampled path: `latents[:, i]` is the state of step i, and `latents[:, i + 1]` is its action.

    It is stored in float32: rounding to half precision would change the actions after they were scored.
    """

    latents: Tensor  # (b s+1 c h w) float32
    log_probs: Tensor  # (b s) nats
    means: Tensor  # (b s c h w) float32, means of the Gaussians that the actions were drawn from


def guided(model: Model, cond: Tensor, uncond: Tensor, w: float, schedule: Schedule | None = None) -> EpsFn:
    """The noise that the network predicts with classifier-free guidance w, as a function of (x, t).

    w = 1 is the conditional prediction alone and w = 0 the unconditional one; each needs one evaluation.
    Other values evaluate both in one batch of 2 b, with the unconditional half first.  Gradients flow through
    both halves, because the policy is the guided Gaussian.
    schedule: converts the output of the network to noise; None if the output is noise.
    Shapes: cond (b t d), uncond (1 t d) or (b t d); the function maps x (b c h w), t () or (b) -> (b c h w)
    """

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        t = sent(t, x.device).expand(len(x))
        without, given = (v.expand(len(x), *v.shape[1:]) for v in (uncond, cond))  # (b t d) each

        if w in (0, 1):
            output = model(x, t, given if w else without)
        else:
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([without, given]))
            output_u, output_c = both.chunk(2)
            # Guiding v or x_0 is the same as guiding the noise, and more accurate where the signal is weak.
            output = output_u + w * (output_c - output_u)  # SRRL (E1)
        return output if schedule is None else schedule.to_eps(output, x, t)

    return eps_fn


def denoise(
    eps_fn: EpsFn, x: Tensor, table: StepTable, eta: float | Tensor = 0.0, generator: Generator | None = None
) -> Iterator[Step]:
    """Noise to image.

    eta: amount of step noise in [0, 1] (see `StepTable.sigma`), or its standard deviation at every step, [S].
    generator: required if there is step noise.
    Shapes: x (b c h w) at level table.t[0]; every step yields a latent (b c h w) at level table.t_prev
    """
    sigmas = eta if isinstance(eta, Tensor) else table.sigma(eta)
    for i in range(len(table)):
        with torch.no_grad():
            eps = eps_fn(x, table.t[i])
            out = ddim_step(x, eps, table.abar[i], table.abar_prev[i], sigmas[i], generator=generator)
        x = out.x_prev
        yield Step(i, table.t[i], x, out.x0, eps, out.log_prob, out.mean)


def renoise(eps_fn: EpsFn, x0: Tensor, table: StepTable, refine: int = 0) -> Iterator[Step]:
    """Image to noise: the inverse of `denoise` at eta 0, from the last step of the table to the first.

    The exact inverse of a step needs eps(x_t, t) before x_t is known.  DDIM inversion (refine 0) uses
    eps(x_t_prev, t) instead: the latent of the cleaner level with the timestep of the noisier level (E4).
    Its error is O(1/N) for N steps.  Each of `refine` fixed-point iterations reduces the error, at the cost
    of one more network evaluation a step.
    Shapes: x0 (b c h w) at level table.t_prev[-1]; every step yields a latent (b c h w) at level table.t
    """
    x, refine = x0, expect(refine, Natural, "refine")
    for i in reversed(range(len(table))):
        t, abar, abar_prev = table.t[i], table.abar[i], table.abar_prev[i]
        with torch.no_grad():
            guess = x
            for _ in range(1 + refine):
                eps = eps_fn(guess, t)
                guess = renoise_step(x, eps, abar, abar_prev)  # SRRL (E4)
            predicted = (x.float() - (1 - abar_prev).sqrt() * eps.float()) / abar_prev.sqrt()  # DDIM (9)
        x = guess
        yield Step(i, t, x, predicted, eps, x.new_zeros(len(x)), x)  # no noise, hence no density


def last(steps: Iterable[Step]) -> Tensor:
    """Run a sampler to its end.  -> the last latent.  Raises ValueError if there are no steps."""
    final = deque(steps, maxlen=1)
    if not final:
        raise ValueError("no steps: the table is empty")
    return final[0].x


def collect(x_start: Tensor, steps: Iterable[Step]) -> Trajectory:
    """Run a sampler to its end.  -> the path

    Shapes: x_start (b c h w) -> latents (b s+1 c h w), log_probs (b s), means (b s c h w)
    """
    x = x_start.float()
    latents, means, log_probs = [x[:, None]], [x[:, None][:, :0]], [x.new_zeros(len(x), 0)]
    for step in steps:
        latents.append(step.x.float()[:, None])
        means.append(step.mean[:, None])
        log_probs.append(step.log_prob[:, None])
    return Trajectory(torch.cat(latents, 1), torch.cat(log_probs, 1), torch.cat(means, 1))


def evaluations(w: float) -> int:
    """UNet evaluations of one step at guidance w; w = 0 and w = 1 need only one of the two predictions."""
    return 1 if w in (0, 1) else 2
