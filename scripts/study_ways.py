"""The ways of drawing that the study compares, each with what it costs: UNet evaluations and reward calls,
counted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minireflect import rng
from minireflect.config import preset
from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.diffusion.sample import evaluations
from minireflect.evaluate import EvaluationConfig, score
from minireflect.methods.rollout import RolloutConfig, rollout
from minireflect.pipeline import OPPOSITE, LatentDiffusion
from minireflect.rl.rewards import Reward
from minireflect.streams import choices
from minireflect.world.prompts import draw_prompts

KINDS = ("physical", "unconventional")
SAMPLER = preset("cpu").sampler


class Drawn(NamedTuple):
    images: Tensor  # (b 3 h w)
    unet: int  # evaluations for all b
    rewards: int  # reward calls for all b


Way = Callable[[LatentDiffusion, Reward, list[str], int, int], Drawn]  # pipe, judge, texts, seed, batch


def plain(steps: int) -> Way:
    """One picture, no look at any reward."""

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        noise = rng(seed, "plain", batch)
        images = pipe.generate(texts, steps, SAMPLER.guidance, SAMPLER.eta, generator=noise)
        return Drawn(images, len(texts) * steps * evaluations(SAMPLER.guidance), 0)

    return way


def searched(**options: object) -> Way:
    """The picture of all branches and rounds that the reward likes best: best-of-N at K = 0, reflection with
    selection else.
    """
    config = RolloutConfig(steps=SAMPLER.steps, guidance=SAMPLER.guidance, **options)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        out = rollout(pipe, texts, judge, config, seed, batch)
        rewards = torch.cat([r.rewards for r in out.rounds], 1)  # (b k*g)
        images = torch.stack([r.images.unflatten(0, (len(texts), -1)) for r in out.rounds], 1).flatten(1, 2)
        best = images[torch.arange(len(texts)), rewards.argmax(1)]  # (b 3 h w)
        return Drawn(best, out.cost.unet, out.cost.rewards)

    return way


def blind(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
    """One blind reflection, the guidance gap as published, the noise brought back to the prior."""
    how, noise = (SAMPLER.steps, SAMPLER.guidance, SAMPLER.eta), rng(seed, "plain", batch)
    images = pipe.generate(texts, *how, rounds=1, generator=noise)
    cost = ReflectionConfig(rounds=1, steps=SAMPLER.steps).blind_cost(SAMPLER.steps) + SAMPLER.cost
    return Drawn(images, len(texts) * cost, 0)


def while_wrong(redraw: ReflectionConfig, rounds: int = 3) -> Way:
    """What the reward refuses is drawn again, `rounds` times at most."""
    redraw = replace(redraw, rounds=rounds)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        asked = []

        def counted(images: Tensor, prompts: list[str]) -> Tensor:
            asked.append(len(images))
            return judge(images, prompts)

        noise = rng(seed, "plain", batch)
        x_T = pipe.noise(len(texts), noise)
        *_, images = pipe.selected_rounds(texts, counted, x_T, SAMPLER, redraw, noise)
        again = sum(asked[1:])
        cost = len(texts) * SAMPLER.cost + again * (redraw.renoise_cost + SAMPLER.cost)
        return Drawn(images, cost, sum(asked))

    return way


WAYS: dict[str, Way] = {"one picture": plain(SAMPLER.steps), "reflect while wrong": while_wrong(OPPOSITE)}
MORE_WAYS: dict[str, Way] = {  # of the base alone
    "new noise while wrong": while_wrong(replace(OPPOSITE, fresh_noise=1.0)),
    "reflect, blind": blind,
    "twice the steps": plain(2 * SAMPLER.steps),
    "best of 2": searched(rounds=0, group=2),
    "best of 4": searched(rounds=0, group=4),
}


def diversity(pipe: LatentDiffusion, images: Tensor, texts: list[str]) -> float:
    """Mean distance of two pictures of one prompt, root mean square over the autoencoder's latents."""
    z = pipe.autoencoder.encode(images).flatten(1)  # (n d)
    groups = [[i for i, t in enumerate(texts) if t == text] for text in dict.fromkeys(texts)]
    spread = [torch.pdist(z[g]).mean().item() for g in groups if len(g) > 1]
    return float(np.mean(spread)) / z.shape[1] ** 0.5 if spread else float("nan")


@torch.no_grad()
def measure(pipe: LatentDiffusion, judge: Reward, way: Way, seed: int, pictures: int) -> dict:
    """Accuracy, reward and cost of one way of drawing from one model; a row of the results."""
    config, row = EvaluationConfig(pictures=pictures), {"unet": 0, "rewards": 0}
    for kind in KINDS:
        prompts = draw_prompts(kind, config.split, pictures, choices(config.seed, "evaluate", kind))
        texts = [p.text for p in prompts]
        parts = {i: texts[i : i + config.batch] for i in range(0, pictures, config.batch)}
        drawn = [way(pipe, judge, part, 2_000 + seed, i) for i, part in parts.items()]
        images = torch.cat([d.images for d in drawn])
        values = torch.cat([judge(d.images, part) for d, part in zip(drawn, parts.values())])
        row[kind] = score(images, prompts, values) | {"diversity": diversity(pipe, images, texts)}
        for cost in ("unet", "rewards"):  # per picture
            row[cost] += sum(getattr(d, cost) for d in drawn) / (pictures * len(KINDS))
    return row
