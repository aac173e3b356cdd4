"""Guidance, and the two directions of sampling: `denoise` (noise to image) and `renoise` (image to noise).

Papers: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); DDIM (arXiv 2010.02502); SRRL
(arXiv 2505.22407), E1 and E4.

    eps_fn = guided(model, cond, uncond, w)            # eps_u + w (eps_c - eps_u)
    x_0    = last(denoise(eps_fn, x_T, table))         # t = 951, 901, ..., 1
    x_T    = last(renoise(eps_fn, x_0, table))         # t = 1, 51, ..., 951

Both directions are generators that yield every step. Collecting them is a trajectory, drawing them an
animation, stopping early an edit.

No autograd graph is kept: a reflection of K rounds would otherwise hold 40 K network evaluations in memory
(the released SRRL does). A `torch.no_grad()` around a generator's body would leak its mode into the caller at
every `yield`; so each step is computed inside the context, and yielded outside it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..ranges import Natural, checked, quote
from ..streams import Floats, sent
from .ddim import ddim_step, renoise_step
from .schedule import Schedule, StepTable

EpsFn = Callable[[Tensor, Tensor], Tensor]  # x_t (b c h w), t () or (b) long -> eps (b c h w)


# x (b c h w), t (b) long, context (b t d) -> output (b c h w)
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """The result of one step of a sampler."""

    index: int  # row of the table
    t: Tensor  # () long, the timestep label shown to the network
    x: Tensor  # (b c h w) the latent after the step
    x0: Tensor  # (b c h w) predicted clean latent
    eps: Tensor  # (b c h w) predicted noise
    log_prob: Tensor  # (b) nats, of x; 0 where the step drew no noise
    mean: Tensor  # (b c h w) of the Gaussian that x is drawn from


class Trajectory(NamedTuple):
    """A sampled path as data. `latents[:, i]` is the state of step i, `latents[:, i + 1]` its action.

    Stored in float32, because rounding to half precision would change the action that was scored.
    """

    latents: Tensor  # (b s+1 c h w) float32
    log_probs: Tensor  # (b s) nats
    means: Tensor  # (b s c h w) float32, of the Gaussians that the actions were drawn from


def guided(model: Model, cond: Tensor, uncond: Tensor, w: float, schedule: Schedule | None = None) -> EpsFn:
    """Classifier-free guidance as a function of (x, t).

    w = 1 is the conditional network alone and w = 0 the unconditional one: one evaluation each. Any other w
    evaluates both in one batch of 2 b, unconditional half first. Where gradients are enabled they flow
    through both halves: the policy is the guided Gaussian. `schedule` converts the network's prediction type
    to noise; without it the output is taken as noise.
    Shapes: cond (b t d), uncond (1 t d) or (b t d); the result maps x (b c h w), t () or (b) -> (b c h w)
    """

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        t = sent(t, x.device).expand(len(x))
        without, given = (v.expand(len(x), *v.shape[1:]) for v in (uncond, cond))  # (b t d) each

        if w in (0, 1):
            output = model(x, t, given if w else without)
        else:
            both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([without, given]))
            output_u, output_c = both.chunk(2)
            # Guidance of v or x_0 equals guidance of the noise, and is exact where little signal is left.
            output = output_u + w * (output_c - output_u)  # SRRL (E1)
        return output if schedule is None else schedule.to_eps(output, x, t)

    return eps_fn


@checked
def denoise(
    eps_fn: EpsFn, x: Floats, table: StepTable, eta: float | Floats = 0.0, generator: Generator | None = None
) -> Iterator[Step]:
    """Noise to image, one network evaluation a step. `generator` is needed where there is step noise: `eta`,
    or its standard deviation at every step [S].

    Shapes: x (b c h w) at level table.t[0]; every step yields a latent (b c h w) at level table.t_prev
    """
    sigmas = eta if isinstance(eta, Tensor) else table.sigma(eta)
    if sigmas.shape != table.t.shape or not (sigmas >= 0).all():
        raise ValueError(f"eta must be one deviation of at least 0 for each of {len(table)} steps, got {eta}")
    for i in range(len(table)):
        with torch.no_grad():
            eps = noise_in(x, table.t[i], eps_fn)
            out = ddim_step(x, eps, table.abar[i], table.abar_prev[i], sigmas[i], generator=generator)
        x = out.x_prev
        yield Step(i, table.t[i], x, out.x0, eps, out.log_prob, out.mean)


@checked
def renoise(eps_fn: EpsFn, x0: Floats, table: StepTable, refine: Natural = 0) -> Iterator[Step]:
    """Image to noise: the steps of `denoise` at eta 0, undone from the last to the first, N moves for N
    steps.

    The exact inverse needs eps(x_t, t) before x_t is known. Plain inversion (refine 0) uses eps(x_t_prev, t):
    the latent one level cleaner under the label of the level it is going to (E4), an error of O(1/N). Each of
    `refine` rounds solves the implicit equation one fixed-point iteration further, at one more evaluation a
    step.
    Shapes: x0 (b c h w) at level table.t_prev[-1]; every step yields a latent (b c h w) at level table.t
    """
    x = x0
    for i in reversed(range(len(table))):
        t, abar, abar_prev = table.t[i], table.abar[i], table.abar_prev[i]
        with torch.no_grad():
            guess = x
            for _ in range(1 + refine):
                eps = noise_in(guess, t, eps_fn)
                guess = renoise_step(x, eps, abar, abar_prev)  # SRRL (E4)
            predicted = (x.float() - (1 - abar_prev).sqrt() * eps.float()) / abar_prev.sqrt()  # DDIM (9)
        x = guess
        yield Step(i, t, x, predicted, eps, x.new_zeros(len(x)), x)  # no noise, hence no density


def noise_in(x: Tensor, t: Tensor, eps_fn: EpsFn) -> Tensor:
    """The predicted noise.  Raises ValueError when its shape is not that of the latents.

    Shapes: x (b c h w), t () -> (b c h w)
    """
    if getattr(eps := eps_fn(x, t), "shape", None) != x.shape:
        raise ValueError(f"eps_fn must give noise of shape {tuple(x.shape)}, got {quote(eps)}")
    return eps


def last(steps: Iterable[Step]) -> Tensor:
    """Run a sampler to its end and keep the latent only."""
    final = deque(steps, maxlen=1)
    if not final:
        raise ValueError("no steps: the table is empty")
    return final[0].x


def collect(x_start: Tensor, steps: Iterable[Step]) -> Trajectory:
    """Run a sampler to its end and keep the path.

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
    """UNet evaluations of one sample at guidance w: 0 and 1 need one of the two predictions."""
    return 1 if w in (0, 1) else 2
