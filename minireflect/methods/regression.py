"""SRRL's update by default: reward-weighted regression on a replay of pictures, the details anchored to the base.

w = r / (sum of the prompt's r + floor)                    Peters & Schaal 2007; RWR in DDPO (Black et al. 2023, arXiv 2305.13301)
L = sum w level_weight(t) |target - eps_theta(x_t, t, c)|^2,   target = eps, or below t = anchored the base's own prediction
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..diffusion.schedule import Schedule
from ..pipeline import LatentDiffusion
from ..rl.advantage import reward_weights
from .rollout import Rollout, SRRLConfig, UpdateStats
from .step import backward, parts, take_step
from .train_diffusion import level_weight


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
