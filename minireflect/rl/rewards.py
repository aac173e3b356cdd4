"""Rewards: reward(images, prompts) -> one number a picture.

    match_reward     learned; the probability that the sentence holds for the picture.  What RL climbs, and can fool.
    checker          exact; 1 where the inspector reads what the prompt asks for, else 0.  The witness: never trained on,
                     and a reward only where a study wants to see the ceiling.

Shapes: images (b 3 h w) in [-1, 1], b prompts -> (b)
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..models.matcher import Matcher, MatcherConfig
from ..models.tokenizer import Tokenizer
from ..pipeline import load_module, weights_folder
from ..world.inspector import inspect_all
from ..world.prompts import Prompt, understand

Reward = Callable[[Tensor, list[str]], Tensor]


def match_reward(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Reward:
    """The learned reward: the matcher's probability, in [0, 1]."""

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts).to(images.device)
        parts = [matcher(x, y) for x, y in zip(images.split(batch), ids.split(batch))]
        return torch.sigmoid(torch.cat(parts).float())

    return reward


def load_reward(path: str | Path | None = None) -> Reward:
    """The learned reward of a run, or the shipped one; it brings its own vocabulary."""
    matcher, about = load_module(weights_folder(path) / "reward.safetensors", Matcher, MatcherConfig)
    return match_reward(matcher, Tokenizer(about["words"].split(), matcher.config.length))


def checker(images: Tensor, prompts: list[str]) -> Tensor:
    """The exact verdict.  Raises ValueError for a prompt whose meaning the world does not know."""
    meant = [understand(p) for p in prompts]
    if None in meant:
        raise ValueError(f"the checker cannot tell what fulfils {prompts[meant.index(None)]!r}")
    return verdicts(images, meant)


def verdicts(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """1 where the inspector's reading fulfils the prompt, else 0.  Shapes: images (b 3 64 64), b prompts -> (b)"""
    readings = inspect_all(images)
    return torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, readings)])
