"""The shapes that docstrings promise: each is parsed, and its function called at sizes that all differ."""

import inspect
import itertools
import re
from collections.abc import Callable

import pytest
import torch

from minireflect.diffusion import ddim, reflection, schedule
from minireflect.models import blocks, clip, transformer
from minireflect.pretrain import corrupt
from minireflect.pretrain import diffusion as train_diffusion
from minireflect.pretrain import matcher as train_matcher
from minireflect.rl import advantage, policy, tokens
from tests.small import small_pipeline

SIZES = {"b": 3, "n": 5, "g": 7, "t": 11, "t2": 13, "c": 4, "h": 16, "w": 24, "d": 32, "v": 40}
WHOLE = {"t", "ids"}  # arguments that are whole numbers
TABLE = schedule.Schedule(schedule.ScheduleConfig())
PIPE = small_pipeline()
AE, NET = PIPE.autoencoder.config, PIPE.unet.config

# name: (function, sizes of its own, arguments that are no tensors)
FUNCTIONS: dict[str, tuple[Callable, dict[str, int], dict]] = {
    "per_sample": (ddim.per_sample, {}, {}),
    "ddim_step": (ddim.ddim_step, {}, {"generator": torch.Generator()}),
    "gaussian_log_prob": (ddim.gaussian_log_prob, {}, {}),
    "renoise_step": (ddim.renoise_step, {}, {}),
    "moments": (reflection.moments, {}, {}),
    "add_noise": (TABLE.add_noise, {}, {}),
    "target": (TABLE.target, {}, {}),
    "to_eps": (TABLE.to_eps, {}, {}),
    "ppo_clip": (policy.ppo_clip, {}, {"clip": 0.1}),
    "gaussian_kl": (policy.gaussian_kl, {}, {}),
    "group_advantage": (advantage.group_advantage, {}, {}),
    "reward_weights": (advantage.reward_weights, {}, {"floor": 0.5}),
    "zero_variance_groups": (advantage.zero_variance_groups, {}, {}),
    "level_weight": (train_diffusion.level_weight, {}, {"schedule": TABLE, "cap": 5.0}),
    "Reader": (train_diffusion.Reader(4, 6, 32).forward, {"h": 6, "w": 6}, {}),
    "token_weights": (tokens.token_weights, {}, {}),
    "token_kl": (tokens.token_kl, {}, {}),
    "rotate": (transformer.rotate, {}, {}),
    "RMSNorm": (transformer.RMSNorm(32).forward, {}, {}),
    "block_error": (corrupt.block_error, {}, {}),
    "caption_loss": (train_matcher.caption_loss, {}, {}),
    "distance": (corrupt.distance, {}, {}),
    "still_shows": (corrupt.still_shows, {}, {}),
    "Downsample": (blocks.Downsample(4).forward, {}, {}),
    "Upsample": (blocks.Upsample(4).forward, {}, {}),
    "ResBlock": (blocks.ResBlock(4, 8, 2, 1e-5, 6).forward, {"e": 6, "c2": 8}, {}),
    "Attention": (blocks.Attention(32, 4, context_width=10).forward, {"d2": 10}, {}),
    "CrossBlock": (clip.CrossBlock(32, 4, fused=True).forward, {"b": 6, "p": 3}, {}),
    "ConvStem": (clip.ConvStem((8,), 32).forward, {"p": 4}, {}),
    "UNet": (PIPE.unet.forward, {"h": 8, "w": 8, "d": NET.context_width, "c": NET.in_channels}, {}),
    "Autoencoder.moments": (PIPE.autoencoder.moments, {"f": AE.factor, "z": AE.latent_channels}, {}),
}


def shapes_of(text: str) -> list[tuple[str, ...]]:
    """'(b c h/2 w)' as its words; what stands in other words is left out."""
    return [tuple(text.split()) for text in re.findall(r"\(([^()]*)\)", text)]


def promise(function: Callable) -> str:
    """The docstring from "Shapes:" to the end of its paragraph or sentence, on one line."""
    paragraph = re.search(r"Shapes: (.*?)(?:\n\n|\Z)", inspect.getdoc(function), re.S).group(1)
    return re.search(r".*->[^.]*", " ".join(paragraph.split())).group()


def contract(function: Callable) -> tuple[dict[str, list[tuple[str, ...]]], list[tuple[str, ...]]]:
    """The docstring's line: every argument with the shapes it may have, and the shapes that come back."""
    line = promise(function)
    before, after = line.split("->")
    arguments = re.findall(r"(\w+) ((?:\([^()]*\))(?: or \([^()]*\))*)", before)
    return {name: shapes_of(shapes) for name, shapes in arguments}, shapes_of(after)


def size(word: str, sizes: dict[str, int]) -> int:
    word = re.sub(r"^(\d+)([a-z])", r"\1*\2", word).replace("/", "//")
    return eval(word, {"__builtins__": {}}, sizes)  # our own docstrings


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_promised_shapes_hold(name: str) -> None:
    function, own, constants = FUNCTIONS[name]
    sizes = {**SIZES, **own}
    takes, gives = contract(function)
    assert takes and gives
    for choice in itertools.product(*takes.values()):
        tensors = {}
        for argument, shape in zip(takes, choice):
            real = [size(word, sizes) for word in shape]
            tensors[argument] = (
                torch.randint(2, 30, real) if argument in WHOLE else torch.rand(real) * 0.8 + 0.1
            )
        if "abar_prev" in tensors:  # a level below has less noise, and sigma no more than that level holds
            tensors["abar_prev"], tensors["abar"] = tensors["abar_prev"] * 0.1 + 0.85, tensors["abar"] * 0.5
        if name == "ddim_step":
            tensors["sigma"] = tensors["sigma"] * 0.1
        out = function(**tensors, **constants)
        named = dict(zip(getattr(out, "_fields", ()), out if isinstance(out, tuple) else ()))
        promised = re.findall(r"(\w+) \(([^()]*)\)", promise(function).split("->")[-1]) if named else []
        pairs = [(named[field], words.split()) for field, words in promised if field in named]
        if not named:
            pairs = list(zip(out if isinstance(out, tuple) else (out,), gives))
        assert pairs
        for tensor, words in pairs:
            assert tuple(tensor.shape) == tuple(size(word, sizes) for word in words), (name, words, choice)
