"""Copy the weights of a finished `train.py all` into the package, in half precision.

python scripts/ship.py runs/all-1 [--only autoencoder text_encoder unet reward]
python scripts/ship.py runs/rlrig-1 --rig [--only ...]      those of a finished `train.py rlrig`, before and after reinforcement
"""

import argparse
from pathlib import Path

import torch

from minireflect.methods.rig_parts import PARTS as RIG_PARTS
from minireflect.models.weights import read_metadata, read_weights, save_weights
from minireflect.pipeline import SHIPPED
from minireflect.rl.checker import RIG

PARTS = ("autoencoder", "text_encoder", "unet", "reward")
RIG_FILES = (*RIG_PARTS, "base_actor", "editor")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--rig", action="store_true", help="RL-RIG's weights")
    parser.add_argument("--only", nargs="+", choices=sorted({*PARTS, *RIG_FILES}))
    args = parser.parse_args()
    target = RIG if args.rig else SHIPPED
    target.mkdir(exist_ok=True)
    for name in args.only or (RIG_FILES if args.rig else PARTS):
        source = args.run / "weights" / f"{name}.safetensors"
        halves = {key: t.to(torch.float16) for key, t in read_weights(source).items()}
        if bad := [key for key, t in halves.items() if not torch.isfinite(t).all()]:
            raise ValueError(f"{source}: {bad[0]} does not fit into half precision")
        save_weights(target / source.name, halves, read_metadata(source))
        print(f"{name}: {sum(t.numel() for t in halves.values()):,} parameters")


if __name__ == "__main__":
    main()
