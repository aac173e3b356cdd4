"""`train.py COMMAND`, but its networks begin with the weights of another run: how the shipped files were
trained in several legs.

    python scripts/shipped.py --start RUN [--networks unet] diffusion --weights RUN --steps 3200 --out
    runs/leg-2

Of an autoencoder only the decoder goes on. Then `scripts/ship.py RUN` rounds the weights to half precision
and copies them into the package. minireflect/pretrained/README.md lists the commands of every file; those of
one leg need this script only for the second.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from reports import described
from torch import nn

from minireflect import stages
from minireflect.__main__ import main as command_line
from minireflect.checkpoints.ours import load_autoencoder, load_module, load_pipeline
from minireflect.models.clip import Matcher
from minireflect.models.transformer import Actor


def start_of(command: str, folder: Path, networks: list[str], name: str) -> nn.Module | dict[str, nn.Module]:
    """What a training loop takes as its `start`; `name` is checker or judge."""
    if command == "autoencoder":
        return load_autoencoder(folder)
    if command == "diffusion":
        pipe = load_pipeline(folder)
        return {network: getattr(pipe, network) for network in networks}
    if command == "actor":
        return load_module(folder / "actor.safetensors", Actor)[0]
    return load_module(folder / f"{name}.safetensors", Matcher)[0]


def started(loop: Callable, command: str, folder: Path, networks: list[str]) -> Callable:
    """A training loop of `minireflect.stages` that begins with the networks of a folder."""

    def go_on(*args: object) -> object:
        name = args[1] if command == "checker" else command  # train_checker(config, name, ...)
        return loop(*args, start=start_of(command, folder, networks, name))

    return go_on


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("--start", type=Path, required=True, help="folder with weights")
    both = ["unet", "text_encoder"]
    about = "of the diffusion model; the others begin at random (default: both)"
    parser.add_argument("--networks", nargs="+", choices=both, default=both, help=about)
    parser.add_argument("command", choices=("autoencoder", "diffusion", "reward", "checker", "actor"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of train.py COMMAND")
    args = parser.parse_args()
    loop = f"train_{args.command}"
    setattr(stages, loop, started(getattr(stages, loop), args.command, args.start, args.networks))
    return command_line(["train", args.command, *args.options])


if __name__ == "__main__":
    sys.exit(main())
