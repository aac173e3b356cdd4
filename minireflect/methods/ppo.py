"""SRRL's update as published: PPO-clip on the steps of the sampler (E6 to E8), round by round."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..diffusion.ddim import DDIMStep, ddim_step
from ..pipeline import LatentDiffusion
from ..rl.advantage import (
    RewardHistory,
    advantage_weights,
    group_advantage,
    history_advantage,
    select_best_worst,
    zero_variance_groups,
)
from ..rl.policy import gaussian_kl, ppo_clip, reduce_log_prob
from .rollout import Rollout, Round, SRRLConfig, UpdateStats, evaluations
from .step import backward, parts, take_step


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
