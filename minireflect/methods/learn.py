"""How a UNet learns from the pictures of an iteration: one learner for SRRL and RL-RIG's editor.

An objective is a function (learner, rollout, generator) that takes the optimiser steps of one iteration and
fills in the same statistics.  To add one, write the function and enter it in OBJECTIVES.

    regress   reward-weighted regression on a replay of pictures; the details stay as the base has them
              (Peters & Schaal 2007; RWR in DDPO, Black et al. 2023, arXiv 2305.13301)
              w = r / (sum of the prompt's r + floor)
              L = sum w level_weight(t) |target - eps_theta(x_t, t, c)|^2,
              target = eps, or below t = anchor_below the base's own prediction
    ppo       PPO-clip on the steps of the sampler (SRRL E6 to E8), round by round
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..diffusion.ddim import DDIMStep, ddim_step
from ..diffusion.sample import evaluations
from ..diffusion.schedule import Schedule, level_weight
from ..models.lora import adapters, lora_layers, remove_lora
from ..models.unet import UNet
from ..pipeline import LatentDiffusion, SamplerConfig
from ..ranges import Checked, Count, Positive, Range, Share, Weight
from ..rl import advantage as adv
from ..rl.policy import gaussian_kl, ppo_clip, reduce_log_prob
from ..run import set_lr, take_step
from .rollout import Rollout

WARMUP = 5  # iterations of linear warm-up; without it the first steps destroy the model
WEIGHT_DECAY = 1e-4  # of AdamW
# regress: added to the sum of a prompt's rewards, so that a prompt that always fails counts little
FLOOR = 0.5
MAX_WEIGHT = 20.0  # regress: largest weight of a late noise level, see `level_weight`
TRAINED = 0.5  # ppo: share of the denoising steps that an iteration trains on, chosen anew each time
MIN_SIGMA = 0.1  # ppo: steps with less noise are not trained, see `jobs`
# A float16 gradient below 6e-8 is 0, as are those of a log-probability averaged over 16,384 dimensions.
HALF_SCALE = 2.0**16


@dataclass(frozen=True)
class LearnConfig(Checked):
    # on noised pictures, or on sampler steps
    objective: Literal["regress", "ppo"] = "regress"
    # learning rate of AdamW; 3e-5 for ppo
    lr: Weight = 2e-4
    # last share of the iterations, where lr falls to 0
    cooldown: Share = 0.3
    # optimiser steps per iteration
    updates: Count = 8
    # regress: pictures of an optimiser step
    batch: Count = 64
    # regress: iterations whose pictures are learnt from
    replay: Count = 8
    # regress: below this noise level t imitate the base
    anchor_below: Annotated[int, Range(0, 999)] = 150
    # ppo: added to a group's std of rewards, so that jitter in a solved group teaches nothing
    std_floor: Weight = 0.1
    # ppo: e, on the ratio of mean log-probabilities; at 256 dimensions 1e-2 is 2.6 nats
    clip_range: Positive = 1e-2
    # ppo: weight of the KL to the base, in nats per step and dimension
    kl: Weight = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective == "regress" and self.kl > 0:
            raise ValueError("kl belongs to the objective ppo; the regression has no such term")

    def lr_factor(self, step: int, iterations: int) -> float:
        """Linear warm-up, 1, and a linear fall to 0 at the end."""
        left = (iterations - step) / (self.cooldown * iterations) if self.cooldown else 1.0
        return min(1.0, (step + 1) / WARMUP, left)


class Replay(nn.Module):
    """The latest pictures: what each was sampled for, and how much it counts.  A module, so that a run saves
    it.
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


@dataclass
class Learner:
    """A policy and what it needs to learn."""

    pipe: LatentDiffusion  # its UNet is the policy
    base: UNet  # the frozen policy that it started from
    networks: dict[str, nn.Module]  # what a run saves: "unet" or its LoRA adapters, with regress the "replay"
    optimizer: torch.optim.Optimizer
    config: LearnConfig
    sampler: SamplerConfig  # how the branches were sampled; its `steps` are not read
    history: adv.RewardHistory | None = None  # ppo: z-score advantages (E6, E7) in place of the group's

    @staticmethod
    def of(pipe: LatentDiffusion, config: LearnConfig, sampler: SamplerConfig, pictures: int) -> "Learner":
        """Make the UNet trainable, or its LoRA adapters where it has some.  `pictures` is the most that an
        iteration gives.
        """
        base = reference(pipe.unet)
        trained = adapters(pipe.unet) if lora_layers(pipe.unet) else pipe.unet
        networks = {"unet": trained.requires_grad_(True)}
        if config.objective == "regress":
            replay = Replay(config.replay * pictures, pipe.latent_shape, pipe.tokenizer.length)
            networks["replay"] = replay.to(pipe.device)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, weight_decay=WEIGHT_DECAY)
        return Learner(pipe, base, networks, optimizer, config, sampler)

    @property
    def scale(self) -> float:
        """What a loss is multiplied by before its backward pass."""
        return HALF_SCALE if next(self.pipe.unet.parameters()).dtype == torch.float16 else 1.0

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradient, scaled up where the UNet computes in float16."""
        (loss * self.scale).backward()

    def step(self) -> float:
        """Step, the gradient's norm clipped.  -> the norm before.  Raises as `take_step`."""
        for p in self.pipe.unet.parameters() if self.scale != 1 else ():
            if p.grad is not None:
                p.grad /= self.scale
        return take_step(self.optimizer, self.scale != 1)

    def parts(self, n: int) -> list[slice]:
        """`n` pictures in parts of `pipe.micro_batch`, the very parts that `pipe.eps` sampled them in."""
        m = self.pipe.micro_batch or n
        return [slice(i, min(i + m, n)) for i in range(0, n, m)]


def learn(learner: Learner, out: Rollout, lr_factor: float, generator: Generator) -> UpdateStats:
    """Learn from one iteration's rollout.  Raises FloatingPointError on a gradient that is not finite."""
    set_lr(learner.optimizer, learner.config.lr * lr_factor)
    return OBJECTIVES[learner.config.objective](learner, out, generator)


def reference(unet: UNet) -> UNet:
    """A frozen copy.  With LoRA it shares the weights and leaves out the adapters."""
    # copied by reference
    shared = {id(p): p for p in unet.parameters() if not p.requires_grad} if lora_layers(unet) else {}
    return remove_lora(copy.deepcopy(unet, shared)).eval().requires_grad_(False)


def remember(replay: Replay, pipe: LatentDiffusion, out: Rollout) -> None:
    """Put the pictures into the replay; all rounds of a prompt share its weight."""
    group = out.rounds[0].rewards.shape[1]
    # (n k g) 0 where a prompt had no such round
    rewards = torch.zeros(len(out.texts), len(out.rounds), group)
    for k, round_ in enumerate(out.rounds):
        rewards[round_.rows.cpu(), k] = round_.rewards.float().cpu()
    weights = adv.reward_weights(rewards.flatten(1), FLOOR).view_as(rewards)  # (n k g)
    for k, round_ in enumerate(out.rounds):
        ids = pipe.tokenizer(out.texts_of(round_))  # (n*g t)
        replay.add(round_.path.latents[:, -1], ids, weights[round_.rows.cpu(), k].flatten())


def regress(learner: Learner, out: Rollout, generator: Generator) -> UpdateStats:
    """Reward-weighted regression on the replay, `updates` optimiser steps of `batch` pictures.

    It does not ask how a picture was sampled, so what reflection found in a later round teaches the first
    round as well. High noise levels decide what is seen. Below `anchor_below` the target is the base's
    prediction in place of the true noise: otherwise the model learns its own small defects as style, and
    unusual combinations fall apart.
    """
    config, pipe, replay = learner.config, learner.pipe, learner.networks["replay"]
    remember(replay, pipe, out)
    updates = config.updates if replay.weights.any() else 0
    losses = kl = norms = 0.0
    for _ in range(updates):
        x_0, ids = replay.draw(config.batch, generator)  # (b c h w), (b s)
        t = torch.randint(pipe.schedule.config.train_steps, (len(x_0),), generator=generator).to(pipe.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)  # (b c h w)
        x_t = pipe.schedule.add_noise(x_0, t, noise)
        learner.optimizer.zero_grad(set_to_none=True)
        for part in learner.parts(len(x_0)):
            with torch.no_grad():
                context = pipe.text_encoder(ids[part])  # (b s d)
                before = replace(pipe, unet=learner.base).eps(context)(1.0)(x_t[part], t[part])  # (b c h w)
            eps = pipe.eps(context)(1.0)(x_t[part], t[part])
            anchored = (t[part] < config.anchor_below).view(-1, 1, 1, 1)
            target = torch.where(anchored, before, noise[part])
            error = ((eps - target) ** 2).flatten(1).mean(1)  # (b) DDPM (14)
            share = len(eps) / len(x_0)
            loss = share * (level_weight(pipe.schedule, t[part], MAX_WEIGHT) * error).mean()
            learner.backward(loss)
            losses += loss.item()
            kl += share * path_kl(pipe.schedule, t[part], (eps - before).detach())
        norms += learner.step()
    n = max(1, updates)
    return UpdateStats(losses / n, kl / n, norms / n, updates, 2 * updates * config.batch)


def path_kl(schedule: Schedule, t: Tensor, change: Tensor) -> float:
    """KL between two ancestral samplers, nats per picture, estimated from the change of eps at random levels
    t.

    One step of DDPM with variance beta:  KL = beta / (2 alpha (1 - abar)) |change|^2  (DDPM 12); T of them
    make the path.
    Shapes: t (b), change (b c h w) -> ()
    """
    abar = schedule.abar.to(t.device)
    before = torch.where(t > 0, abar[(t - 1).clamp(min=0)], 1.0)
    alpha = abar[t] / before  # (b)
    step = (1 - alpha) / (2 * alpha * (1 - abar[t])) * (change**2).flatten(1).sum(1)
    return schedule.config.train_steps * step.mean().item()


Advantages = list[tuple[Tensor, Tensor]]  # by round: A (n*g) and which branches are trained on (n*g) bool


def advantages(out: Rollout, config: LearnConfig, history: adv.RewardHistory | None) -> Advantages:
    """For each round: GRPO's advantages, or with a history the z-scores of E6 to E8, each round against its
    own group.
    """
    result = []
    keys = [[(out.families or out.texts)[i] for i in r.rows.tolist()] for r in out.rounds]
    for round_, row_keys in zip(out.rounds, keys):
        rewards = round_.rewards.cpu()
        if history is None:
            A = adv.group_advantage(rewards, config.std_floor)
            kept = ~adv.zero_variance_groups(rewards)[:, None]
        else:
            z = adv.history_advantage(history, row_keys, rewards)
            A, kept = adv.advantage_weights(z), adv.select_best_worst(z)
        result.append((A.flatten(), kept.expand_as(rewards).flatten()))
    for round_, row_keys in zip(out.rounds, keys) if history is not None else ():
        history.add(row_keys, round_.rewards.cpu())
    return result


Pairs = list[tuple[int, int]]  # round k, denoising step i


def jobs(out: Rollout, advantage: Advantages, updates: int, eta: float, generator: Generator) -> list[Pairs]:
    """The (round, step) pairs to train on, shuffled, in one list per optimiser step.

    A step without noise (sigma 0) has no density and is left out, and so is a round without anything to
    learn. Steps with hardly any noise are left out too (MIN_SIGMA).  A change of eps moves a step's mean by c
    standard deviations: over ten steps |c| lies between 0.97 and 1.32, but it is 8.3 at the one before the
    last (sigma 0.04), whose gradient would drown the others' and whose KL would be 64 times theirs.
    """
    trained = [(k, out.rounds[k].table.sigma(eta)) for k, (_, kept) in enumerate(advantage) if kept.any()]
    pairs = [(k, i) for k, sigmas in trained for i, sigma in enumerate(sigmas) if sigma > MIN_SIGMA]
    order = torch.randperm(len(pairs), generator=generator)[: math.ceil(TRAINED * len(pairs))]
    return [[pairs[j] for j in chunk] for chunk in order.chunk(updates)] if len(order) else []


def scored(learner: Learner, out: Rollout, k: int, i: int, part: slice, unet: UNet) -> DDIMStep:
    """Step i of the branches `part` of round k, as a UNet scores it.

    The batch is the rollout's, number for number, so that the policy that sampled it gives the very
    log-probabilities of the rollout.
    """
    round_, sampler = out.rounds[k], learner.sampler
    table, context = round_.table, out.context_of(round_)[part]  # (b t d)
    x, x_prev = (round_.path.latents[part, j].to(context.device) for j in (i, i + 1))  # (b c h w)
    eps = replace(learner.pipe, unet=unet).eps(context)(sampler.guidance)(x, table.t[i])
    return ddim_step(x, eps, table.abar[i], table.abar_prev[i], table.sigma(sampler.eta)[i], x_prev)


def ppo(learner: Learner, out: Rollout, generator: Generator) -> UpdateStats:
    """PPO-clip on the branches of all rounds (E8), `updates` optimiser steps; the mean log-probability is
    SRRL's (E3).
    """
    pipe, config = learner.pipe, learner.config
    advantage = advantages(out, config, learner.history)
    chunks = jobs(out, advantage, config.updates, learner.sampler.eta, generator)
    sums = dict.fromkeys(("loss", "clip_high", "clip_low", "grad_norm"), 0.0)
    kls, ratios, before_update, spent = [], [], [], 0
    for chunk in chunks:
        samples = sum(int(advantage[k][1].sum()) for k, _ in chunk)  # branches x steps in this optimiser step
        learner.optimizer.zero_grad(set_to_none=True)
        pieces = [(k, i, part) for k, i in chunk for part in learner.parts(len(advantage[k][0]))]
        for k, i, part in pieces:
            A, rows = (v[part].to(pipe.device) for v in advantage[k])  # (b), (b) bool
            if not rows.any():
                continue
            piece = learner, out, k, i, part
            now, old = scored(*piece, pipe.unet), out.rounds[k].path.log_probs[part, i].to(pipe.device)
            new_nats, old_nats = mean_of(now.log_prob, pipe)[rows], mean_of(old, pipe)[rows]
            stats, share = ppo_clip(new_nats, old_nats, A[rows], config.clip_range), int(rows.sum()) / samples
            loss = stats.loss * share
            if config.kl > 0 or not kls:  # the KL is reported from the first part even where it is not used
                with torch.no_grad():
                    mean = scored(*piece, learner.base).mean
                kl = gaussian_kl(now.mean, mean, now.sigma)  # (b)
                loss = loss + config.kl * share * mean_of(kl, pipe)[rows].mean()
                kls.append(kl.mean().item() * len(out.rounds[k].table))
            learner.backward(loss)
            spent += len(A) * evaluations(learner.sampler.guidance)
            ratios.append((now.log_prob.detach() - old).abs().max().item())
            for name in ("loss", "clip_high", "clip_low"):
                sums[name] += getattr(stats, name).item() * share
        before_update = before_update or ratios.copy()
        sums["grad_norm"] += learner.step()
    n, largest = max(1, len(chunks)), max(ratios, default=0.0)
    first = math.expm1(min(max(before_update, default=0.0), 80.0))
    means = {name: value / n for name, value in sums.items()} | {"kl": sum(kls) / max(1, len(kls))}
    return UpdateStats(**means, updates=len(chunks), evaluations=spent, log_ratio=largest, first_ratio=first)


def mean_of(nats: Tensor, pipe: LatentDiffusion) -> Tensor:
    """Nats of a latent as nats a dimension.  Shapes: nats (b) -> (b)"""
    return reduce_log_prob(nats, math.prod(pipe.latent_shape), "mean")


OBJECTIVES: dict[str, Callable[[Learner, Rollout, Generator], UpdateStats]] = {"regress": regress, "ppo": ppo}
