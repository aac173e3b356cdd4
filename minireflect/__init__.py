"""minireflect: image generators that judge their own pictures, turn them back into noise, and draw again.

from minireflect import load_pipeline, sample_scene, render, caption, inspect
"""

from .checkpoints.ours import load_pipeline
from .diffusion.reflection import reflect
from .diffusion.sample import denoise, renoise
from .pipeline import LatentDiffusion
from .rl.rewards import load_reward
from .streams import rng
from .world.captions import caption
from .world.inspector import inspect
from .world.prompts import sample_scene
from .world.rationales import rationale
from .world.render import render

__version__ = "0.1.0"
__all__ = [
    "LatentDiffusion", "caption", "denoise", "inspect", "load_pipeline", "load_reward", "rationale",
    "reflect", "render", "renoise", "rng", "sample_scene",
]  # fmt: skip
