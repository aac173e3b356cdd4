"""How a UNet is updated from what was drawn: the options of both objectives, and one optimiser step.

A step comes in as many parts as memory wants, in the precision that the network computes in.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..diffusion.ddim import DDIMStep, ddim_step
from ..diffusion.sample import evaluations
from ..diffusion.schedule import Schedule, level_weight
from ..pipeline import LatentDiffusion
from ..rl.advantage import (
    RewardHistory,
    advantage_weights,
    group_advantage,
    history_advantage,
    reward_weights,
    select_best_worst,
    zero_variance_groups,
)
from ..rl.policy import gaussian_kl, ppo_clip, reduce_log_prob
from .rollout import Rollout, Round, SRRLConfig, UpdateConfig, UpdateStats

# SRRL's update by default: reward-weighted regression on a replay of pictures, the details anchored to the base.
#
# w = r / (sum of the prompt's r + floor)                    Peters & Schaal 2007; RWR in DDPO (Black et al. 2023, arXiv 2305.13301)
# L = sum w level_weight(t) |target - eps_theta(x_t, t, c)|^2,   target = eps, or below t = anchored the base's own prediction
# SRRL's update as published: PPO-clip on the steps of the sampler (E6 to E8), round by round.

# In float16 a gradient below 6e-8 is 0, and those of a log-probability averaged over 16,384 dimensions are.
HALF_SCALE = 2.0**16


def parts(n: int, pipe: LatentDiffusion) -> list[slice]:
    """`n` pictures in parts of `pipe.micro_batch`, the very parts that `pipe.eps` drew them in."""
    m = pipe.micro_batch or n
    return [slice(i, min(i + m, n)) for i in range(0, n, m)]


def backward(loss: Tensor, network: nn.Module) -> None:
    """Add a part's gradient, scaled up where the network computes in float16."""
    (loss * _scale(network)).backward()


def take_step(
    optimizer: torch.optim.Optimizer, network: nn.Module, config: UpdateConfig, number: int
) -> float:
    """Clip the gradient's norm and step.  -> the norm before.  Raises FloatingPointError if it is not finite."""
    trained = [p for p in network.parameters() if p.grad is not None]
    if (scale := _scale(network)) != 1:
        for p in trained:
            p.grad /= scale
    norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient of update {number} is not finite; lower lr, {config.lr} now (--srrl.lr, --rlrig.editor.lr)"
            + (", or use --precision bf16" if scale != 1 else "")
        )
    optimizer.step()
    return norm.item()


def _scale(network: nn.Module) -> float:
    return HALF_SCALE if next(network.parameters()).dtype == torch.float16 else 1.0


class Replay(nn.Module):
    """The latest pictures: what each was drawn for, and how much it counts.  A module, so that a run saves it."""

    def __init__(self, size: int, latent_shape: tuple[int, int, int], tokens: int) -> None:
        super().__init__()
        self.register_buffer("latents", torch.zeros(size, *latent_shape))  # (m c h w)
        self.register_buffer("ids", torch.zeros(size, tokens, dtype=torch.long))  # (m t)
        self.register_buffer("weights", torch.zeros(size))  # (m) 0 = not filled yet
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # pictures ever added

    def add(self, latents: Tensor, ids: Tensor, weights: Tensor) -> None:
        """In place of the oldest.  Shapes: latents (b c h w), ids (b t), weights (b)"""
        rows = (self.count.cpu() + torch.arange(len(latents))) % len(self.weights)  # (b)
        self.latents[rows] = latents.to(self.latents)
        self.ids[rows] = ids.to(self.ids)
        self.weights[rows] = weights.to(self.weights)
        self.count += len(latents)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`n` pictures, as often as their weights say.  -> latents (n c h w), ids (n t)"""
        rows = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator)
        return self.latents[rows.to(self.latents.device)], self.ids[rows.to(self.ids.device)]


def remember(replay: Replay, pipe: LatentDiffusion, out: Rollout, config: SRRLConfig) -> None:
    """Put the pictures of the trained rounds into the replay; all rounds of a prompt share its weight."""
    rounds = out.rounds if config.train_rounds == "all" else out.rounds[-1:]
    rewards = torch.zeros(
        len(out.texts), len(rounds), config.group
    )  # (n k g) 0 where a round was not spent on a prompt
    for k, round_ in enumerate(rounds):
        rewards[round_.rows.cpu(), k] = round_.rewards.float().cpu()
    weights = reward_weights(rewards.flatten(1), config.floor).view_as(rewards)  # (n k g)
    for k, round_ in enumerate(rounds):
        ids = pipe.tokenizer(out.texts_of(round_))  # (n*g t)
        replay.add(round_.path.latents[:, -1], ids, weights[round_.rows.cpu(), k].flatten())


def regress(
    pipe: LatentDiffusion,
    base: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    replay: Replay,
    config: SRRLConfig,
    generator: torch.Generator,
) -> UpdateStats:
    """Reward-weighted regression on the replay, `config.updates` optimiser steps of `config.batch` pictures.

    It never asks how a picture was drawn, so what reflection found in a later round teaches the first round as well. What is
    to be seen is decided at high noise; below `config.anchored` the target is the base's prediction in place of the true
    noise, or its own slips would be learnt as style, and pictures of combinations that no prompt asked for fall apart.
    """
    if not replay.weights.any():  # no picture was worth anything yet
        return UpdateStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
    loss_sum = norm_sum = kl = 0.0
    for number in range(config.updates):
        x_0, ids = replay.draw(config.batch, generator)  # (b c h w), (b t)
        t = torch.randint(pipe.schedule.config.train_steps, (len(x_0),), generator=generator).to(pipe.device)
        noise = torch.randn(x_0.shape, generator=generator).to(x_0)  # (b c h w)
        x_t = pipe.schedule.add_noise(x_0, t, noise)
        optimizer.zero_grad(set_to_none=True)
        loss_of_all = 0.0
        for part in parts(len(x_0), pipe):
            with torch.no_grad():
                context = pipe.text_encoder(ids[part])  # (b t d)
                before = replace(pipe, unet=base).eps(context)(1.0)(x_t[part], t[part])  # (b c h w)
            eps = pipe.eps(context)(1.0)(x_t[part], t[part])
            share = len(eps) / len(x_0)
            kl += share * path_kl(pipe.schedule, t[part], (eps - before).detach()) / config.updates
            target = torch.where((t[part] < config.anchored).view(-1, 1, 1, 1), before, noise[part])
            error = ((eps - target) ** 2).flatten(1).mean(1)  # (b) DDPM (14)
            loss = share * (level_weight(pipe.schedule, t[part], config.late) * error).mean()
            backward(loss, pipe.unet)
            loss_of_all += loss.item()
        norm = take_step(optimizer, pipe.unet, config, number)
        loss_sum, norm_sum = loss_sum + loss_of_all, norm_sum + norm
    m = config.updates
    return UpdateStats(loss_sum / m, 0.0, 0.0, 0.0, 0.0, kl, norm_sum / m, m, 2 * m * config.batch)


def path_kl(schedule: Schedule, t: Tensor, change: Tensor) -> float:
    """KL between two ancestral samplers, nats per picture, estimated from the change of eps at random levels t.

    One step of DDPM with variance beta:  KL = beta / (2 alpha (1 - abar)) |change|^2  (DDPM 12); T of them make the path.
    Shapes: t (b), change (b c h w) -> ()
    """
    abar = schedule.abar.to(t.device)
    before = torch.where(t > 0, abar[(t - 1).clamp(min=0)], 1.0)
    alpha = abar[t] / before  # (b)
    step = (1 - alpha) / (2 * alpha * (1 - abar[t])) * (change**2).flatten(1).sum(1)
    return schedule.config.train_steps * step.mean().item()


def advantages(
    out: Rollout, config: SRRLConfig, history: RewardHistory, keys: list[str]
) -> list[tuple[Tensor, Tensor]]:
    """For each round the advantages (n g) and which branches are trained on (n g) bool."""
    result = []
    for k, round_ in enumerate(out.rounds):
        rewards = round_.rewards.cpu()
        if config.train_rounds == "last" and k + 1 < len(out.rounds):
            result.append((torch.zeros_like(rewards), torch.zeros_like(rewards, dtype=torch.bool)))
        elif config.advantage == "group":
            kept = ~zero_variance_groups(rewards)
            result.append((group_advantage(rewards, config.std_floor), kept[:, None].expand_as(rewards)))
        else:
            z = history_advantage(history, [keys[i] for i in round_.rows.tolist()], rewards)
            result.append((advantage_weights(z), select_best_worst(z)))
    if config.advantage == "history":
        for round_ in out.rounds:
            history.add([keys[i] for i in round_.rows.tolist()], round_.rewards.cpu())
    return result


def score(
    pipe: LatentDiffusion,
    unet: torch.nn.Module,
    context: Tensor,
    round_: Round,
    i: int,
    config: SRRLConfig,
    part: slice,
) -> DDIMStep:
    """Step i of a part of a round's branches under a UNet: its mean, and the log-probability of what the branches did.

    The batch is the rollout's, number for number, so that the policy that drew it gives the very log-probabilities
    of the rollout.  Shapes: context (b t d) of the part's branches
    """
    x, x_prev = (round_.path.latents[part, j].to(context.device) for j in (i, i + 1))  # (b c h w)
    eps = replace(pipe, unet=unet).eps(context)(config.guidance)(x, round_.table.t[i])
    table = round_.table
    return ddim_step(x, eps, table.abar[i], table.abar_prev[i], table.sigma(config.eta)[i], x_prev)


def jobs(
    out: Rollout, advantage: list[tuple[Tensor, Tensor]], config: SRRLConfig, generator: torch.Generator
) -> list[list[tuple[int, int]]]:
    """The (round, step) pairs to train on, shuffled, in one list per optimiser step.

    A step without noise (sigma 0) has no density and is left out, and so is a round without anything to learn.
    Steps with hardly any noise are left out too (`min_sigma`).  A change of eps moves a step's mean by c standard
    deviations: over ten steps |c| lies between 0.97 and 1.32, but it is 8.3 at the one before the last (sigma 0.04), whose
    gradient would drown the others' and whose KL would be 64 times theirs.
    """
    pairs = [
        (k, i)
        for k, (round_, (_, kept)) in enumerate(zip(out.rounds, advantage))
        for i, sigma in enumerate(round_.table.sigma(config.eta))
        if sigma > config.min_sigma and kept.any()
    ]
    order = torch.randperm(len(pairs), generator=generator)
    order = order[: math.ceil(config.trained * len(pairs))]
    return [[pairs[j] for j in chunk] for chunk in order.chunk(config.updates)] if len(order) else []


def update(
    pipe: LatentDiffusion,
    base: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    out: Rollout,
    advantage: list[tuple[Tensor, Tensor]],
    config: SRRLConfig,
    generator: torch.Generator,
) -> UpdateStats:
    """PPO-clip on the branches of all rounds (E8), `config.updates` optimiser steps."""
    dims = math.prod(pipe.latent_shape)
    sums = dict.fromkeys(("loss", "high", "low", "kl", "norm"), 0.0)
    log_ratio = first_ratio = 0.0
    trained = kl_count = 0
    chunks = jobs(out, advantage, config, generator)
    for number, chunk in enumerate(chunks):
        optimizer.zero_grad(set_to_none=True)
        samples = sum(int(advantage[k][1].sum()) for k, _ in chunk)  # branches x steps in this optimiser step
        pieces = [(*pair, part) for pair in chunk for part in parts(len(out.rounds[pair[0]].images), pipe)]
        for k, i, part in pieces:
            round_, rows = out.rounds[k], advantage[k][1].flatten()[part].to(pipe.device)  # (b) bool
            if not rows.any():
                continue
            context = out.context_of(round_)[part]  # (b t d)
            now = score(pipe, pipe.unet, context, round_, i, config, part)
            old = round_.path.log_probs[part, i].to(pipe.device)
            new_reduced, old_reduced = (
                reduce_log_prob(v, dims, config.reduction)[rows] for v in (now.log_prob, old)
            )
            stats = ppo_clip(
                new_reduced, old_reduced, advantage[k][0].flatten()[part].to(pipe.device)[rows], config.clip
            )
            share = int(rows.sum()) / samples
            loss = stats.loss * share
            if (
                config.kl > 0 or kl_count == 0
            ):  # for the log alone, one step an iteration is an unbiased sample
                with torch.no_grad():
                    reference = score(pipe, base, context, round_, i, config, part)
                kl = gaussian_kl(now.mean, reference.mean, now.sigma)  # (b) nats
                loss = loss + config.kl * share * reduce_log_prob(kl[rows], dims, config.reduction).mean()
                sums["kl"] += kl.mean().item() * len(round_.table)
                kl_count += 1
            backward(loss, pipe.unet)
            trained += len(now.mean) * evaluations(config.guidance)
            nats = (now.log_prob.detach() - old).abs().max().item()
            log_ratio = max(log_ratio, nats)
            if number == 0:
                first_ratio = max(first_ratio, math.expm1(min(nats, 80.0)))
            for name, value in (("loss", stats.loss), ("high", stats.clip_high), ("low", stats.clip_low)):
                sums[name] += value.item() * share
        sums["norm"] += take_step(optimizer, pipe.unet, config, number)
    m = max(1, len(chunks))
    return UpdateStats(
        sums["loss"] / m, sums["high"] / m, sums["low"] / m, log_ratio, first_ratio,
        sums["kl"] / max(1, kl_count), sums["norm"] / m, len(chunks), trained,
    )  # fmt: skip
