"""The four networks of RL-RIG from a folder, and the loops that can be made of them: its own, and the controls."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator

from ..models.actor import Actor, ActorConfig
from ..models.unet import UNet, UNetConfig
from ..pipeline import LatentDiffusion, load_module, load_pipeline
from ..rl.checker import RIG, Checker, load_checker
from ..world.graph import SceneGraph
from .edit_loop import (
    Act,
    Look,
    LoopConfig,
    learned_actor,
    redraw,
    reflect_and_edit,
    scripted_actor,
    silent_actor,
)


class Parts(NamedTuple):
    """The four of RL-RIG."""

    diffuser: LatentDiffusion
    editor: LatentDiffusion  # the Inverse Diffuser; the Diffuser's networks, until phase 2 trains its UNet
    checker: Checker
    actor: Actor

    @property
    def act(self) -> Act:
        return learned_actor(self.actor, self.diffuser.tokenizer)


# the files of a folder with RL-RIG's weights
PARTS = ("autoencoder", "text_encoder", "unet", "checker", "judge", "actor")


def load_parts(
    folder: str | Path = RIG, actor: str = "actor", editor: str = "editor", device: torch.device | str = "cpu"
) -> Parts:
    """RL-RIG from a folder with its weights.  Without an editor's there, it is the Diffuser itself.

    A run of train.py also holds what it started from: the Actor "base_actor", and "unet", the Diffuser's and so the first editor's.
    Raises WeightsError when a file is missing or another's.
    """
    folder = Path(folder)
    editor = editor if (folder / f"{editor}.safetensors").exists() else "unet"
    diffuser = load_pipeline(folder).to(device)
    unet, _ = load_module(folder / f"{editor}.safetensors", UNet, UNetConfig)
    policy, _ = load_module(folder / f"{actor}.safetensors", Actor, ActorConfig)
    checker = load_checker(folder, "checker", device)
    return Parts(diffuser, replace(diffuser, unet=unet).to(device), checker, policy.to(device))


Loop = Callable[[list[SceneGraph], Generator], Iterable[Look]]


def loop_of(parts: Parts, config: LoopConfig, act: Act | None = None) -> Loop:
    """The loop as a function of graphs and noise, with the Actor of the parts unless another is given."""
    act = act or parts.act
    return lambda graphs, noise: reflect_and_edit(
        parts.diffuser, parts.editor, parts.checker, act, graphs, config, noise
    )


def redraws(parts: Parts, config: LoopConfig, patient: bool) -> Loop:
    """Best-of-N of the Diffuser or, if `patient`, repeated generation."""
    return lambda graphs, noise: redraw(parts.diffuser, parts.checker, graphs, config, noise, patient)


def most_redraws(config: LoopConfig) -> int:
    """Further pictures that cost at least what the loop's edits can."""
    return math.ceil(config.rounds * config.edit_cost / config.draw_cost)


def controls(parts: Parts, config: LoopConfig) -> dict[str, Loop]:
    """What the trained loop is compared with; N is such that it spends at least what the loop can, or two thirds of it, as most loops end early."""
    n = most_redraws(config)
    best_of = {
        f"best of {k + 1}": redraws(parts, replace(config, rounds=k), False)
        for k in (math.ceil(2 * n / 3), n)
    }
    return {
        "base": loop_of(parts, replace(config, rounds=0)),
        **best_of,
        "repeated generation": redraws(parts, replace(config, rounds=n), True),
        "raw loop, silent": loop_of(parts, config, silent_actor),
        "raw loop, scripted Actor": loop_of(parts, config, scripted_actor),
        "raw loop, warmed-up Actor": loop_of(parts, config),
    }


def trained_controls(parts: Parts, config: LoopConfig) -> dict[str, Loop]:
    """What of the trained loop's gain is the editor's alone: it draws anew from the sentence, or edits and nobody speaks."""
    n = most_redraws(config)
    return {
        "trained editor, repeated generation": redraws(
            parts._replace(diffuser=parts.editor), replace(config, rounds=n), True
        ),
        "trained editor, silent": loop_of(parts, config, silent_actor),
    }
