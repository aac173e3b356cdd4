"""A data distribution with an exact denoiser: a mixture of Gaussians remains one when noise is added.

Tests and notebooks use it to check claims about samplers, inversion and reflection without the error of a
trained network.  It follows the analytic examples of EDM (Karras et al. 2022, arXiv 2206.00364).

    p_0(x)    = sum_k weight_k N(x; mean_k, std_k^2 I)
    p_abar(x) = sum_k weight_k N(x; sqrt(abar) mean_k, v_k I),        v_k = abar std_k^2 + 1 - abar
    eps(x)    = -sqrt(1 - abar) grad log p_abar(x)
              = sqrt(1 - abar) sum_k p(k | x) (x - sqrt(abar) mean_k) / v_k
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .schedule import Schedule

NULL = -1  # the `cls` of "no condition"


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of k isotropic Gaussians in d dimensions.

    The condition `cls` of the methods is the index of a component, or a tensor with one index per sample.  It
    restricts the mixture to that component; None or -1 is unconditional.  Results have the precision of x.
    """

    means: Tensor  # [k, d]
    stds: Tensor  # [k]
    weights: Tensor  # [k], need not sum to 1

    def __post_init__(self) -> None:
        for name, value in {"stds": self.stds, "weights": self.weights}.items():
            if value.shape != self.means.shape[:1]:
                raise ValueError(f"{name} must be [{len(self.means)}], as means, got {tuple(value.shape)}")
        if not (self.stds > 0).all() or not (self.weights > 0).all():
            raise ValueError("stds and weights must be positive")

    def _log_joint(self, x: Tensor, abar: Tensor, cls: int | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes: x (b d), abar () or (b) -> log p(k, x) (b k), centred x (b k d), variance (b k)"""
        means, stds, weights = (v.to(x) for v in (self.means, self.stds, self.weights))
        abar = abar.to(x).expand(len(x))[:, None]
        centred = x[:, None] - abar[..., None].sqrt() * means
        var = abar * stds**2 + 1 - abar
        log_gauss = -0.5 * (centred**2).sum(-1) / var - 0.5 * x.shape[1] * (2 * torch.pi * var).log()
        log_weight = weights.log().expand(len(x), -1).masked_fill(~self._allowed(cls, x), -torch.inf)
        return log_gauss + log_weight.log_softmax(-1), centred, var

    def _allowed(self, cls: int | Tensor | None, x: Tensor) -> Tensor:
        """The components that `cls` allows.  Shapes: cls () or (b), x (b d) -> (b k) bool"""
        cls = torch.as_tensor(NULL if cls is None else cls, device=x.device).long().expand(len(x))[:, None]
        allowed = (cls == NULL) | (cls == torch.arange(len(self.means), device=x.device))
        if not allowed.any(1).all():
            raise ValueError(f"there is no component {cls[~allowed.any(1)].flatten().unique().tolist()}")
        return allowed

    def log_prob(self, x: Tensor, abar: Tensor, cls: int | Tensor | None = None) -> Tensor:
        """Log-density of the noised mixture in nats.  Shapes: x (b d), abar () or (b) -> (b)"""
        return self._log_joint(x, abar, cls)[0].logsumexp(-1)

    def eps(self, x: Tensor, abar: Tensor, cls: int | Tensor | None = None) -> Tensor:
        """The noise that an ideal network predicts.  Shapes: x (b d), abar () or (b) -> (b d)"""
        log_joint, centred, var = self._log_joint(x, abar, cls)
        pull = (log_joint.softmax(-1)[..., None] * centred / var[..., None]).sum(1)  # minus the score
        return (1 - abar.to(x).expand(len(x))[:, None]).sqrt() * pull

    def posterior_mean(self, x: Tensor, abar: Tensor, cls: int | Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], by Tweedie's formula.  Shapes: x (b d), abar () or (b) -> (b d)"""
        column = abar.to(x).expand(len(x))[:, None]
        return (x - (1 - column).sqrt() * self.eps(x, abar, cls)) / column.sqrt()

    def sample(self, n: int, generator: Generator, cls: int | None = None) -> Tensor:
        """Draw n points without noise.  Shapes: -> (n d)"""
        weights = self.weights * self._allowed(cls, self.means[:1]).squeeze(0)
        k = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * noise

    def context(self, cls: int | None) -> Tensor:
        """`cls` as the context that `model` takes.  -> (1 1 1)"""
        return torch.full((1, 1, 1), float(NULL if cls is None else cls))

    def model(self, schedule: Schedule) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function with the interface of a network, which outputs the schedule's prediction type.

        Shapes: the function maps x (b d) or (b d 1 1), t (b), context (b 1 1) -> like x
        """

        def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            flat, cls = x.flatten(1), context.flatten(1)[:, 0].round()
            abar = schedule.abar.to(t.device)[t]
            output = self.eps(flat, abar, cls)
            if schedule.config.prediction != "epsilon":  # saves the posterior mean in the usual case
                output = schedule.target(self.posterior_mean(flat, abar, cls), output, t)
            return output.view(x.shape)

        return model
