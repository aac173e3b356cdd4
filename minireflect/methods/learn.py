"""How a UNet learns from the pictures of an iteration: one learner for SRRL and RL-RIG's editor.

An objective reads a rollout and yields the optimiser steps to take, each as the micro-batches that its loss
is a sum of; `learn` does what is the same for all: gradients, clipping, the step, the statistics.  To add an
objective, write one more such function and enter it in OBJECTIVES.

    regress   reward-weighted regression on a replay of pictures, the details anchored to the base:
              Peters & Schaal 2007; RWR in DDPO (Black et al. 2023, arXiv 2305.13301)
              w = r / (sum of the prompt's r + floor)
              L = sum w level_weight(t) |target - eps_theta(x_t, t, c)|^2,
              target = eps, or below t = anchor_below the base's own prediction
    ppo       PPO-clip on the steps of the sampler (SRRL E6 to E8), round by round
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..diffusion.ddim import DDIMStep, ddim_step
from ..diffusion.sample import evaluations
from ..diffusion.schedule import Schedule, level_weight
from ..models.lora import adapters, lora_layers, remove_lora
from ..models.unet import UNet
from ..pipeline import LatentDiffusion, SamplerConfig
from ..rl.advantage import (
    RewardHistory,
    advantage_weights,
    group_advantage,
    history_advantage,
    reward_weights,
    select_best_worst,
    zero_variance_groups,
)
from ..rl.policy import clip_in_nats, gaussian_kl, ppo_clip, reduce_log_prob
from .rollout import Rollout, Round

WARMUP = 5  # iterations of linear warm-up; without it the first steps destroy the model
GRAD_NORM = 1.0  # largest norm of an update's gradient
WEIGHT_DECAY = 1e-4  # of AdamW
FLOOR = 0.5  # regress: added to the sum of a prompt's rewards; a prompt that always fails counts little
MAX_WEIGHT = 20.0  # regress: largest weight of a late noise level, see `level_weight`
TRAINED = 0.5  # ppo: share of the denoising steps that an iteration trains on, chosen anew each time
MIN_SIGMA = 0.1  # ppo: steps with less noise are not trained, see `jobs`
# A float16 gradient below 6e-8 is 0, as that of a log-probability averaged over 16,384 dimensions is.
HALF_SCALE = 2.0**16


@dataclass(frozen=True)
class LearnConfig:
    # on noised pictures, or on sampler steps
    objective: Literal["regress", "ppo"] = "regress"
    # learning rate of AdamW; 3e-5 for ppo
    lr: float = 2e-4
    # last share of the iterations, where lr falls to 0
    cooldown: float = 0.3
    # optimiser steps per iteration
    updates: int = 8
    # regress: pictures of an optimiser step
    batch: int = 64
    # regress: iterations whose pictures are learnt from
    replay: int = 8
    # regress: below this noise level t imitate the base
    anchor_below: int = 150
    # ppo: added to a group's std of rewards, so that jitter in a solved group teaches nothing
    std_floor: float = 0.1
    # ppo: e, on the ratio of mean log-probabilities; at 256 dimensions 1e-2 is 2.6 nats
    clip_range: float = 1e-2
    # ppo: weight of the KL to the base, in nats per step and dimension
    kl: float = 0.0

    def __post_init__(self) -> None:
        if min(self.updates, self.replay, self.batch) < 1:
            raise ValueError(
                f"updates, replay and batch must be at least 1: {self.updates}, {self.replay}, {self.batch}"
            )
        if not 0 <= self.anchor_below < 1000:
            raise ValueError(f"anchor_below is a noise level in [0, 1000), got {self.anchor_below}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown is a share in [0, 1], got {self.cooldown}")
        if self.objective == "regress" and self.kl > 0:
            raise ValueError("kl belongs to the objective ppo; the regression has no such term")
        clip_in_nats(self.clip_range, 1)  # raises on a clip that is not positive

    def lr_factor(self, step: int, iterations: int) -> float:
        """Linear warm-up, 1, and a linear fall to 0 at the end."""
        left = (iterations - step) / (self.cooldown * iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / WARMUP, left)


class Replay(nn.Module):
    """The latest pictures: what each was sampled for, and how much it counts.

    A module, so that a run saves it.
    """

    def __init__(self, size: int, latent_shape: tuple[int, int, int], tokens: int) -> None:
        super().__init__()
        self.register_buffer("latents", torch.zeros(size, *latent_shape))  # (m c h w)
        self.register_buffer("ids", torch.zeros(size, tokens, dtype=torch.long))  # (m t)
        self.register_buffer("weights", torch.zeros(size))  # (m) 0 = not filled yet
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # pictures ever added

    def add(self, latents: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Replace the oldest.  Shapes: latents (b c h w), ids (b t), weights (b)"""
        rows = (self.count.cpu() + torch.arange(len(latents))) % len(self.weights)  # (b)
        self.latents[rows] = latents.to(self.latents)
        self.ids[rows] = ids.to(self.ids)
        self.weights[rows] = weights.to(self.weights)
        self.count += len(latents)

    def draw(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """`n` pictures, each with a chance in proportion to its weight.  -> latents (n c h w), ids (n t)"""
        rows = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        return self.latents[rows.to(self.latents.device)], self.ids[rows.to(self.ids.device)]


@dataclass
class Learner:
    """A policy and what it needs to learn."""

    pipe: LatentDiffusion  # its UNet is the policy
    base: UNet  # the frozen policy that it started from
    # what a run saves: "unet" is trained (with LoRA only the adapters), "replay" is there with regress
    networks: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer
    config: LearnConfig
    sampler: SamplerConfig  # how the branches were sampled; its `steps` are not read
    history: RewardHistory | None = None  # ppo: z-score advantages (E6, E7) in place of the group's

    @staticmethod
    def of(
        pipe: LatentDiffusion, config: LearnConfig, sampler: SamplerConfig, pictures: int,
        history: RewardHistory | None = None,
    ) -> "Learner":  # fmt: skip
        """Make the UNet trainable, or its LoRA adapters where it has some.

        `pictures` is the most that an iteration gives.
        """
        base = reference(pipe.unet)
        trained = adapters(pipe.unet) if lora_layers(pipe.unet) else pipe.unet
        networks = {"unet": trained.requires_grad_(True)}
        if config.objective == "regress":
            replay = Replay(config.replay * pictures, pipe.latent_shape, pipe.tokenizer.length)
            networks["replay"] = replay.to(pipe.device)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY)
        return Learner(pipe, base, networks, optimizer, config, sampler, history)


def reference(unet: UNet) -> UNet:
    """A frozen copy.  With LoRA it shares the weights and leaves out the adapters."""
    if not lora_layers(unet):
        return copy.deepcopy(unet).eval().requires_grad_(False)
    shared = {id(p): p for p in unet.parameters() if not p.requires_grad}  # copied by reference
    return remove_lora(copy.deepcopy(unet, shared)).eval().requires_grad_(False)


class Part(NamedTuple):
    """A micro-batch of an optimiser step: its loss, to be differentiated at once, and what to report."""

    loss: Tensor  # () its share of the optimiser step's loss
    evaluations: int  # of the UNet, of the policy and of a base that is imitated
    sums: dict[str, float]  # its share of the statistics that are means over an optimiser step
    kl: tuple[float, float] | None  # nats per picture from the base, and the weight of this measurement
    log_ratio: float | None = None  # largest |log rho|, nats of the whole latent


class UpdateStats(NamedTuple):
    """What an iteration's updates did; None is what the objective does not have."""

    loss: float
    kl: float  # nats per picture from the base, in closed form
    grad_norm: float  # mean over the updates, before clipping
    updates: int  # optimiser steps taken
    evaluations: int  # of the UNet, with a backward pass or of the base that is imitated
    clip_high: float | None = None  # share of samples stopped by the upper clip
    clip_low: float | None = None  # share stopped by the lower
    log_ratio: float | None = None  # the largest seen, nats of the whole latent
    first_ratio: float | None = None  # largest |rho - 1| before the first update: 0, or something is wrong


# The optimiser steps of an iteration, each as its parts. One part is differentiated before the next is made.
Objective = Callable[[Learner, Rollout, Generator], Iterator[Iterator[Part]]]


def learn(learner: Learner, out: Rollout, lr_factor: float, generator: Generator) -> UpdateStats:
    """Learn from one iteration's rollout.  Raises FloatingPointError on a gradient that is not finite."""
    config, unet, optimizer = learner.config, learner.pipe.unet, learner.optimizer
    for group in optimizer.param_groups:
        group["lr"] = config.lr * lr_factor
    sums: dict[str, float] = {"loss": 0.0}
    kl = weight = norms = 0.0
    updates = spent = 0
    ratios: list[list[float]] = []  # of every optimiser step
    for parts in OBJECTIVES[config.objective](learner, out, generator):
        optimizer.zero_grad(set_to_none=True)
        ratios.append([])
        for part in parts:
            backward(part.loss, unet)
            spent += part.evaluations
            for name, value in part.sums.items():
                sums[name] = sums.get(name, 0.0) + value
            if part.kl is not None:
                kl, weight = kl + part.kl[0] * part.kl[1], weight + part.kl[1]
            if part.log_ratio is not None:
                ratios[-1].append(part.log_ratio)
        norms += take_step(optimizer, unet, config, updates)
        updates += 1
    means = {name: value / max(1, updates) for name, value in sums.items()}
    if any(ratios):
        means["log_ratio"] = max(max(r, default=0.0) for r in ratios)
        means["first_ratio"] = math.expm1(min(max(ratios[0]), 80.0))
    kl, norm = kl / weight if weight else 0.0, norms / max(1, updates)
    return UpdateStats(kl=kl, grad_norm=norm, updates=updates, evaluations=spent, **means)


def micro_batches(n: int, pipe: LatentDiffusion) -> list[slice]:
    """`n` pictures in parts of `pipe.micro_batch`, the very parts that `pipe.eps` sampled them in."""
    m = pipe.micro_batch or n
    return [slice(i, min(i + m, n)) for i in range(0, n, m)]


def backward(loss: Tensor, network: nn.Module) -> None:
    """Add a part's gradient, scaled up where the network computes in float16."""
    (loss * _scale(network)).backward()


def take_step(
    optimizer: torch.optim.Optimizer, network: nn.Module, config: LearnConfig, number: int
) -> float:
    """Clip the gradient's norm and step.

    -> the norm before.  Raises FloatingPointError if it is not finite.
    """
    trained = [p for p in network.parameters() if p.grad is not None]
    if (scale := _scale(network)) != 1:
        for p in trained:
            p.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(trained, GRAD_NORM)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient of update {number} is not finite; lower lr, {config.lr} now"
            + (", or use --precision bf16" if scale != 1 else "")
        )
    optimizer.step()
    return norm.item()


def _scale(network: nn.Module) -> float:
    return HALF_SCALE if next(network.parameters()).dtype == torch.float16 else 1.0


def remember(replay: Replay, pipe: LatentDiffusion, out: Rollout) -> None:
    """Put the pictures into the replay; all rounds of a prompt share its weight."""
    group = out.rounds[0].rewards.shape[1]
    rewards = torch.zeros(len(out.texts), len(out.rounds), group)  # (n k g) 0 where there was no such round
    for k, round_ in enumerate(out.rounds):
        rewards[round_.rows.cpu(), k] = round_.rewards.float().cpu()
    weights = reward_weights(rewards.flatten(1), FLOOR).view_as(rewards)  # (n k g)
    for k, round_ in enumerate(out.rounds):
        ids = pipe.tokenizer(out.texts_of(round_))  # (n*g t)
        replay.add(round_.path.latents[:, -1], ids, weights[round_.rows.cpu(), k].flatten())


def regress(learner: Learner, out: Rollout, generator: Generator) -> Iterator[Iterator[Part]]:
    """Reward-weighted regression on the replay, `updates` optimiser steps of `batch` pictures.

    It does not ask how a picture was sampled, so what reflection found in a later round teaches the first
    round as well. High noise levels decide what is seen. Below `anchor_below` the target is the base's
    prediction in place of the true noise: otherwise the model learns its own small defects as style, and
    unusual combinations fall apart.
    """
    config, pipe, replay = learner.config, learner.pipe, learner.networks["replay"]
    remember(replay, pipe, out)
    for _ in range(config.updates if replay.weights.any() else 0):
        x_0, ids = replay.draw(config.batch, generator)  # (b c h w), (b t)
        t = torch.randint(pipe.schedule.config.train_steps, (len(x_0),), generator=generator).to(pipe.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)  # (b c h w)
        yield regress_parts(learner, x_0, ids, t, noise)


def regress_parts(learner: Learner, x_0: Tensor, ids: Tensor, t: Tensor, noise: Tensor) -> Iterator[Part]:
    """Shapes: x_0 (b c h w), ids (b s), t (b), noise (b c h w)"""
    pipe = learner.pipe
    x_t = pipe.schedule.add_noise(x_0, t, noise)
    for part in micro_batches(len(x_0), pipe):
        with torch.no_grad():
            context = pipe.text_encoder(ids[part])  # (b s d)
            before = replace(pipe, unet=learner.base).eps(context)(1.0)(x_t[part], t[part])  # (b c h w)
        eps = pipe.eps(context)(1.0)(x_t[part], t[part])
        share = len(eps) / len(x_0)
        target = torch.where((t[part] < learner.config.anchor_below).view(-1, 1, 1, 1), before, noise[part])
        error = ((eps - target) ** 2).flatten(1).mean(1)  # (b) DDPM (14)
        loss = share * (level_weight(pipe.schedule, t[part], MAX_WEIGHT) * error).mean()
        kl = path_kl(pipe.schedule, t[part], (eps - before).detach())
        yield Part(loss, 2 * len(eps), {"loss": loss.item()}, (kl, share))


def path_kl(schedule: Schedule, t: Tensor, change: Tensor) -> float:
    """KL between two ancestral samplers, nats per picture, from the change of eps at random levels t.

    One step of DDPM with variance beta:  KL = beta / (2 alpha (1 - abar)) |change|^2  (DDPM 12); T of them
    make the path.
    Shapes: t (b), change (b c h w) -> ()
    """
    abar = schedule.abar.to(t.device)
    before = torch.where(t > 0, abar[(t - 1).clamp(min=0)], 1.0)
    alpha = abar[t] / before  # (b)
    step = (1 - alpha) / (2 * alpha * (1 - abar[t])) * (change**2).flatten(1).sum(1)
    return schedule.config.train_steps * step.mean().item()


Advantage = tuple[Tensor, Tensor]  # A (n*g) and which branches are trained on (n*g) bool


def advantages(out: Rollout, config: LearnConfig, history: RewardHistory | None) -> list[Advantage]:
    """For each round GRPO's advantages within its groups, or with a history the z-scores of E6 to E8."""
    result = []
    keys = [[(out.families or out.texts)[i] for i in r.rows.tolist()] for r in out.rounds]
    for round_, row_keys in zip(out.rounds, keys):
        rewards = round_.rewards.cpu()
        if history is None:
            A, kept = group_advantage(rewards, config.std_floor), ~zero_variance_groups(rewards)[:, None]
        else:
            z = history_advantage(history, row_keys, rewards)
            A, kept = advantage_weights(z), select_best_worst(z)
        result.append((A.flatten(), kept.expand_as(rewards).flatten()))
    if history is not None:
        for round_, row_keys in zip(out.rounds, keys):
            history.add(row_keys, round_.rewards.cpu())
    return result


Pair = tuple[int, int]  # round k, denoising step i


def jobs(
    out: Rollout, advantage: list[Advantage], updates: int, eta: float, generator: Generator
) -> list[list[Pair]]:
    """The (round, step) pairs to train on, shuffled, in one list per optimiser step.

    A step without noise (sigma 0) has no density and is left out, and so is a round without anything to
    learn. Steps with hardly any noise are left out too (MIN_SIGMA).  A change of eps moves a step's mean by c
    standard deviations: over ten steps |c| lies between 0.97 and 1.32, but it is 8.3 at the one before the
    last (sigma 0.04), whose gradient would drown the others' and whose KL would be 64 times theirs.
    """
    pairs = [
        (k, i)
        for k, (round_, (_, kept)) in enumerate(zip(out.rounds, advantage))
        for i, sigma in enumerate(round_.table.sigma(eta))
        if sigma > MIN_SIGMA and kept.any()
    ]
    order = torch.randperm(len(pairs), generator=generator)
    order = order[: math.ceil(TRAINED * len(pairs))]
    return [[pairs[j] for j in chunk] for chunk in order.chunk(updates)] if len(order) else []


def score(learner: Learner, unet: nn.Module, context: Tensor, round_: Round, i: int, part: slice) -> DDIMStep:
    """Step i of a part of a round's branches under a UNet: mean and log-probability of what was done.

    The batch is the rollout's, number for number, so that the policy that sampled it gives the very
    log-probabilities of the rollout.  Shapes: context (b t d) of the part's branches
    """
    x, x_prev = (round_.path.latents[part, j].to(context.device) for j in (i, i + 1))  # (b c h w)
    eps = replace(learner.pipe, unet=unet).eps(context)(learner.sampler.guidance)(x, round_.table.t[i])
    table = round_.table
    return ddim_step(x, eps, table.abar[i], table.abar_prev[i], table.sigma(learner.sampler.eta)[i], x_prev)


def ppo(learner: Learner, out: Rollout, generator: Generator) -> Iterator[Iterator[Part]]:
    """PPO-clip on the branches of all rounds (E8), `updates` optimiser steps."""
    config = learner.config
    advantage = advantages(out, config, learner.history)
    for n, chunk in enumerate(jobs(out, advantage, config.updates, learner.sampler.eta, generator)):
        yield ppo_parts(learner, out, advantage, chunk, log_kl=n == 0)


def ppo_parts(
    learner: Learner, out: Rollout, advantage: list[Advantage], chunk: list[Pair], log_kl: bool
) -> Iterator[Part]:
    """The loss of an optimiser step.

    `log_kl`: measure the KL once for the log, as an unbiased sample, if the loss has none.
    """
    pipe, config, guidance = learner.pipe, learner.config, learner.sampler.guidance
    dims = math.prod(pipe.latent_shape)
    samples = sum(int(advantage[k][1].sum()) for k, _ in chunk)  # branches x steps in this optimiser step
    pieces = [(*pair, part) for pair in chunk for part in micro_batches(len(advantage[pair[0]][0]), pipe)]
    for k, i, part in pieces:
        round_ = out.rounds[k]
        A, rows = (v[part].to(pipe.device) for v in advantage[k])  # (b), (b) bool
        if not rows.any():
            continue
        context = out.context_of(round_)[part]  # (b t d)
        now = score(learner, pipe.unet, context, round_, i, part)
        old = round_.path.log_probs[part, i].to(pipe.device)
        new_mean, old_mean = (reduce_log_prob(v, dims, "mean") for v in (now.log_prob, old))  # SRRL (E3)
        stats = ppo_clip(new_mean[rows], old_mean[rows], A[rows], config.clip_range)
        share = int(rows.sum()) / samples
        loss, measured = stats.loss * share, None
        if config.kl > 0 or log_kl:
            log_kl = False
            with torch.no_grad():
                before = score(learner, learner.base, context, round_, i, part)
            kl = gaussian_kl(now.mean, before.mean, now.sigma)  # (b) nats
            loss = loss + config.kl * share * reduce_log_prob(kl[rows], dims, "mean").mean()
            measured = (kl.mean().item() * len(round_.table), 1.0)
        shares = {"loss": stats.loss, "clip_high": stats.clip_high, "clip_low": stats.clip_low}
        yield Part(
            loss, len(A) * evaluations(guidance), {name: v.item() * share for name, v in shares.items()},
            measured, (now.log_prob.detach() - old).abs().max().item(),
        )  # fmt: skip


OBJECTIVES: dict[str, Objective] = {"regress": regress, "ppo": ppo}
