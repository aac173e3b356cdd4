"""Scalars and pictures of a run for TensorBoard or Weights & Biases; metrics.jsonl stays the truth.

    minireflect train srrl --log tensorboard && tensorboard --logdir runs

What each gets is what metrics.jsonl gets, under STAGE/NAME, a list as NAME/0, NAME/1, ...; and pictures.
"""

import os
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

Tracker = Literal["tensorboard", "wandb"]
PICTURES_EVERY, SHOWN = 10, 8  # iterations between two sets of pictures; how many


class Tracking:
    """Where a run's values go besides metrics.jsonl.  Raises ImportError that says what to install."""

    def __init__(self, kind: Tracker, folder: Path) -> None:
        self.writer: Any = None
        self.wandb: Any = None
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder / "tensorboard"))
            else:
                import wandb

                mode = os.environ.get("WANDB_MODE", "offline")
                self.wandb = wandb
                wandb.init(project="minireflect", name=folder.name, dir=str(folder), mode=mode)
        except ImportError as error:
            raise ImportError(f"--log {kind} needs its package: pip install {kind} ({error})") from error

    def scalars(self, stage: str, step: int, values: dict) -> None:
        found = dict(numbers(values, f"{stage}/"))
        if self.wandb:
            self.wandb.log({**found, f"{stage}/step": step})
            return
        for name, value in found.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def pictures(self, stage: str, step: int, images: Tensor) -> None:
        """Shapes: images (b 3 h w) in [-1, 1]"""
        from torchvision.utils import make_grid

        grid = make_grid(((images[:SHOWN].float().cpu() + 1) / 2).clamp(0, 1))  # (3 h' w')
        if self.wandb:
            self.wandb.log({f"{stage}/pictures": self.wandb.Image(grid), f"{stage}/step": step})
        else:
            self.writer.add_image(f"{stage}/pictures", grid, step)


def numbers(values: object, name: str) -> list[tuple[str, float]]:
    """Every number in nested dicts and lists, with its path."""
    if isinstance(values, bool | str) or values is None:
        return []
    if isinstance(values, int | float):
        return [(name, float(values))]
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    return [pair for key, v in inner for pair in numbers(v, f"{name.rstrip('/')}/{key}")]
