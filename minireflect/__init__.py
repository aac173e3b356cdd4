"""minireflect: image generators that score their own pictures, turn them back into noise, and sample again.

    from minireflect import load_pipeline, sample_scene, render, caption, inspect

A name is imported when it is first used, so that `minireflect --help` does not import torch.
"""

from importlib import import_module

__version__ = "0.2.0"
HOMES = {
    "LatentDiffusion": "pipeline", "caption": "world.captions", "denoise": "diffusion.sample",
    "inspect": "world.inspector", "load_pipeline": "checkpoints.ours", "load_reward": "rl.rewards",
    "rationale": "world.captions", "reflect": "diffusion.reflection", "render": "world.laws",
    "renoise": "diffusion.sample", "rng": "streams", "sample_scene": "world.prompts",
}  # fmt: skip
__all__ = sorted(HOMES)


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'minireflect' has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
