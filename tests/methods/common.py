"""What the tests of rollout, learner and loop share."""

from dataclasses import replace

import torch
from torch import Tensor

from minireflect.methods.learn import Learner, UpdateStats, learn
from minireflect.methods.rollout import Rollout, rollout
from minireflect.methods.srrl import SRRLConfig
from minireflect.pipeline import LatentDiffusion
from minireflect.streams import rng
from tests.small import TEXTS, brightness, small_pipeline

CONFIG = SRRLConfig(
    objective="ppo",
    advantage="group",
    pull=0.0,
    iterations=2,
    prompts_per_iteration=4,
    group=4,
    steps=4,
    rounds=1,
    redraw="all",
    updates=2,
    lr=1e-3,
)


def learn_from(
    pipe: LatentDiffusion,
    out: Rollout,
    config: SRRLConfig,
    lr: float | None = None,
    base: LatentDiffusion | None = None,
) -> UpdateStats:
    """One call of `learn` with plain gradient descent at `lr`, or AdamW at the config's, from a base that is
    the untrained policy.
    """
    learner = Learner(pipe, config, config.guidance, 64)
    learner.base = (base or small_pipeline()).unet
    if lr is not None:
        learner.optimizer = torch.optim.SGD(pipe.unet.parameters())
        learner.config = replace(config, lr=lr)
    return learn(learner, out, 1.0, rng(0, "update", 0))


def one_iteration(config: SRRLConfig, reward=brightness) -> tuple[LatentDiffusion, Rollout, UpdateStats]:
    pipe = small_pipeline()
    out = rollout(pipe, TEXTS, reward, config, 0, 0)
    return pipe, out, learn_from(pipe, out, config)


def likes_the_first_and_third(images: Tensor, prompts: list[str]) -> Tensor:
    return brightness(images, prompts) + torch.tensor([5.0 * (p in TEXTS[::2]) for p in prompts])


REFUSED = replace(
    CONFIG, redraw="refused", accept=1.0, rounds=3
)  # the second and fourth prompt, for that judge


def plus(images: Tensor, prompts: list[str]) -> Tensor:
    """A soft step on the mean pixel, with the middle at 0.  Shapes: images (b 3 h w), b prompts -> (b)"""
    return torch.sigmoid(10 * brightness(images, prompts))
