"""Sample the pictures of one iteration of SRRL: up to K + 1 rounds of G branches for each prompt.

The file srrl.py describes the method.  There are two modes:

    x_T^0 ~ N(0, I)
    blind:   denoise and re-noise K times without the reward, then sample G branches from x_T^K
    select:  for k in 0 .. K: sample G branches from x_T^k and score them; reflect on the best of each group
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Generator, Tensor
from tyro.conf import Suppress

from ..diffusion.reflection import ReflectionConfig, Wrong, condition_guided_forward, reflect
from ..diffusion.sample import EpsFn, Trajectory, collect, denoise, evaluations, last
from ..diffusion.schedule import StepTable
from ..parallel import spread
from ..pipeline import ACCEPT, OPPOSITE, LatentDiffusion, Reward, scored
from ..ranges import Checked, Count, Finite, Natural, Share, Weight
from ..streams import rng, sent

ETA = 1.0  # step noise of DDPM; a policy needs step noise
WINDOW = 3  # steps that draw noise with noise "window"; Flow-GRPO-Fast has 3 of 10
PRESERVED = 0.8  # eta of noise "preserving", as in the paper on CPS


@dataclass(frozen=True)
class RolloutConfig(Checked):
    """How an iteration samples."""

    # prompts per iteration
    prompts_per_iteration: Count = 64
    # G, branches per prompt and round
    group: Count = 1
    # denoising steps of a picture
    steps: Count = 10
    # guidance w of the branches, in rollout and update
    guidance: Weight = 1.0
    # steps that draw noise
    noise: Literal["all", "window", "preserving"] = "all"
    # whether reflection uses the reward
    mode: Literal["select", "blind"] = "select"
    # K, number of reflections, at most
    rounds: Natural = 3
    # noise of the next round
    wrong: Wrong = OPPOSITE.wrong
    # prompts that have another round
    redraw: Literal["refused", "all"] = OPPOSITE.redraw
    # smallest reward of an accepted picture
    accept: Annotated[Finite, Suppress] = ACCEPT
    # guidance of re-noising; 0.1 in the paper
    w_renoise: Weight = OPPOSITE.w_renoise
    # steps of re-noising
    renoise_steps: Count = OPPOSITE.steps
    # bring re-noised latents back to mean 0, std 1
    renormalise: bool = True
    # amplitude l of new noise; its variance is l^2
    fresh_noise: Share = OPPOSITE.fresh_noise
    # numbers of last steps to train, in turn
    suffixes: tuple[Count, ...] = ()

    def require(self) -> None:
        if any(s > self.steps for s in self.suffixes):
            raise ValueError(f"suffixes {self.suffixes} must lie between 1 and steps = {self.steps}")

    @property
    def reflection(self) -> ReflectionConfig:
        return ReflectionConfig(
            self.rounds, w_renoise=self.w_renoise, steps=self.renoise_steps, renormalise=self.renormalise,
            fresh_noise=self.fresh_noise, wrong=self.wrong, redraw=self.redraw,
        )  # fmt: skip

    def sigmas(self, table: StepTable) -> Tensor:
        """Standard deviation of the noise of every step, [S]; a step with 0 is deterministic.

        all         every step draws noise, as in DDPM
        window      only the first steps draw noise (MixGRPO, arXiv 2507.21802)
        preserving  sigma = sqrt(1 - abar_prev) sin(eta pi / 2), eta 0.8 (CPS, arXiv 2509.05952)
        """
        if self.noise == "preserving":
            return (1 - table.abar_prev).sqrt() * math.sin(PRESERVED * math.pi / 2)
        sigma = table.sigma(ETA)
        return sigma * (torch.arange(len(sigma)) < WINDOW) if self.noise == "window" else sigma

    def shared(self, step: int) -> int:
        """Number of first denoising steps that the branches of a group share in iteration `step`.

        `suffixes` are SRRL's backward-progressive schedule: the branches differ in the last steps only.
        """
        return self.steps - self.suffixes[step % len(self.suffixes)] if self.suffixes else 0


class Round(NamedTuple):
    """One round: g branches of each of n prompts.  The branches differ in s steps, those of `table`."""

    rows: Tensor  # (n) indices of the prompts that have this round, on the CPU
    x_T: Tensor  # start noise, (n c h w), or (n*g c h w) if each branch has its own
    table: StepTable  # the steps in `path`
    sigmas: Tensor  # [s] standard deviation of their noise
    path: Trajectory  # latents (n*g s+1 c h w), log_probs (n*g s)
    images: Tensor  # (n*g 3 h w)
    rewards: Tensor  # (n g), on the CPU


class Cost(NamedTuple):
    """Counts of UNet evaluations (the forward pass of one picture) and reward calls."""

    unet: int = 0  # evaluations in sampling
    trained: int = 0  # evaluations in updates, of the policy (with a backward pass) and of the base
    rewards: int = 0  # reward calls, one per picture

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other)))


def rollout_cost(config: RolloutConfig, prompts: list[int], step: int) -> Cost:
    """The cost of a rollout.

    prompts: the number of prompts in each scored round; in mode "blind", only the last round is scored.
    """
    shared, reflection = config.shared(step), config.reflection
    per_prompt = (shared + config.group * (config.steps - shared)) * evaluations(config.guidance)
    reflected = sum(prompts[1:]) * reflection.reflect_cost
    if config.mode == "blind":
        reflected = prompts[0] * reflection.blind_cost(config.steps)
    return Cost(sum(prompts) * per_prompt + reflected, rewards=sum(prompts) * config.group)


@dataclass
class Rollout:
    """All samples of one iteration."""

    texts: list[str]  # n prompts
    context: Tensor  # (n t d) their embeddings
    rounds: list[Round] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    families: list[str] | None = None  # n keys of the reward history; None for the prompts themselves

    def texts_of(self, round_: Round) -> list[str]:
        """The prompt of every branch of a round."""
        return [self.texts[i] for i in round_.rows.tolist() for _ in range(round_.rewards.shape[1])]

    @property
    def rewards(self) -> Tensor:
        """The rewards of all k rounds.  -> (n k g), NaN where a prompt had no such round"""
        rewards = torch.full((len(self.texts), len(self.rounds), self.rounds[0].rewards.shape[1]), torch.nan)
        for k, round_ in enumerate(self.rounds):
            rewards[round_.rows, k] = round_.rewards.float()
        return rewards

    def by_round(self, values: Tensor) -> list[Tensor]:
        """Split values of all branches by round.  Shapes: values (n k g) -> for each round (n*g)"""
        return [values[r.rows, k].flatten() for k, r in enumerate(self.rounds)]

    def context_of(self, round_: Round) -> Tensor:
        """The prompt embedding of every branch of a round.  -> (n*g t d)"""
        context = self.context[sent(round_.rows, self.context.device)]  # (n t d)
        return context.repeat_interleave(round_.rewards.shape[1], 0)


@torch.no_grad()
def rollout(
    pipe: LatentDiffusion, texts: list[str], reward: Reward, config: RolloutConfig, seed: int, step: int
) -> Rollout:
    """Sample up to K + 1 rounds of G branches for each prompt.

    All noise is from random streams that `seed` and the iteration `step` name.
    """
    out = Rollout(texts, pipe.embed(texts))
    rows = torch.arange(len(texts))  # (n) indices of the round's prompts
    table, back, shared = pipe.table(config.steps), pipe.table(config.renoise_steps), config.shared(step)
    sigmas = config.sigmas(table)
    x_T = pipe.noise(len(texts), rng(seed, "start", step))  # (n c h w)
    if not (config.rounds or config.suffixes) and config.group > 1:  # as in DDPO, one per branch
        x_T = pipe.noise(len(texts) * config.group, rng(seed, "start", step, "all"))
    if config.mode == "blind":
        for k in range(config.rounds):
            eps, noise = pipe.eps(out.context), rng(seed, "reflect", step, k)
            _, x_T = condition_guided_forward(eps, x_T, table, back, config.reflection, noise)

    def renoise_eps(of: Tensor) -> EpsFn:
        return pipe.eps(out.context[sent(rows[of], pipe.device)])(config.w_renoise)

    for k in range(config.rounds + 1 if config.mode == "select" else 1):
        if k:
            value, best = out.rounds[-1].rewards.max(1)  # (n) the best branch of each prompt
            best = sent(best + config.group * torch.arange(len(best)), pipe.device)  # rows of the latents
            x_0, noise = out.rounds[-1].path.latents[best, -1], rng(seed, "reflect", step, k - 1)
            again, x_T = reflect(renoise_eps, x_0, value >= config.accept, back, config.reflection, noise)
            rows = rows[again]
            if not len(rows):
                break
        context, noise = out.context[sent(rows, pipe.device)], rng(seed, "branch", step, k)
        path = branches(pipe, context, x_T, config, shared, noise)
        images = pipe.decode(path.latents[:, -1])  # (n*g 3 h w)
        asked = [texts[i] for i in rows.tolist() for _ in range(config.group)]
        rewards = scored(partial(spread, reward), images, asked).view(len(rows), config.group)
        out.rounds.append(Round(rows, x_T, table[shared:], sigmas[shared:], path, images, rewards))
    out.cost = rollout_cost(config, [len(r.rows) for r in out.rounds], step)
    return out


def branches(
    pipe: LatentDiffusion, context: Tensor, x_T: Tensor, config: RolloutConfig, shared: int, noise: Generator
) -> Trajectory:
    """Sample G branches of each prompt.  The first `shared` steps are sampled once per group.

    Shapes: context (n t d), x_T (n c h w) or (n*g c h w) -> latents (n*g s+1 c h w)
    """
    table, g = pipe.table(config.steps), config.group
    sigmas = config.sigmas(table)
    if shared:
        x_T = last(denoise(pipe.eps(context)(config.guidance), x_T, table[:shared], sigmas[:shared], noise))
    fork = x_T.repeat_interleave(g * len(context) // len(x_T), 0)  # (n*g c h w)
    eps = pipe.eps(context.repeat_interleave(g, 0))(config.guidance)
    return collect(fork, denoise(eps, fork, table[shared:], sigmas[shared:], noise))
