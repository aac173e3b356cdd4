"""Log the metrics of a run to TensorBoard or Weights & Biases too. metrics.jsonl remains the complete record.

    minireflect train srrl --log tensorboard && tensorboard --logdir runs

Every number of metrics.jsonl is logged as STAGE/NAME, the numbers of a list as NAME/0, NAME/1, ...; in
addition, sampled pictures are logged.
"""

import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Tracker = Literal["tensorboard", "wandb"]
PICTURES_EVERY, SHOWN = 10, 8  # iterations between two sets of pictures; pictures in a set


class Tracking:
    """A writer for TensorBoard or Weights & Biases.

    Raises ImportError, which names the package to install, if it is missing.
    """

    def __init__(self, kind: Tracker, folder: Path) -> None:
        self.kind = kind
        try:
            if kind == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.to = SummaryWriter(str(folder / "tensorboard"))
            else:
                import wandb

                how = {"name": folder.name, "mode": os.environ.get("WANDB_MODE", "offline")}
                self.to = wandb.init(project="minireflect", dir=str(folder), **how)
        except ImportError as error:
            raise ImportError(f"--log {kind} needs its package: pip install {kind} ({error})") from error

    def scalars(self, stage: str, step: int, values: dict) -> None:
        """Log all numbers in `values`."""
        found = dict(numbers(values, stage))
        if self.kind == "wandb":
            return self.to.log({**found, f"{stage}/step": step})
        for name, value in found.items():
            self.to.add_scalar(name, value, step)
        self.to.flush()

    def pictures(self, stage: str, step: int, images: Tensor) -> None:
        """Log the first pictures side by side.  Shapes: images (b 3 h w) in [-1, 1]"""
        row = torch.cat([*((images[:SHOWN].float().cpu() + 1) / 2).clamp(0, 1)], 2)  # (3 h b*w)
        if self.kind == "tensorboard":
            return self.to.add_image(f"{stage}/pictures", row, step)
        from wandb import Image

        self.to.log({f"{stage}/pictures": Image(row.permute(1, 2, 0).numpy()), f"{stage}/step": step})


def numbers(values: object, name: str) -> list[tuple[str, float]]:
    """Every number in nested dicts and lists, with its path, such as "srrl/reward_by_round/0"."""
    if isinstance(values, dict | list | tuple):
        inner = values.items() if isinstance(values, dict) else enumerate(values)
        return [pair for key, value in inner for pair in numbers(value, f"{name}/{key}")]
    return [(name, float(values))] if isinstance(values, int | float) else []
