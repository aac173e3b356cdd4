"""Run `train.py COMMAND` with networks that start from the weights of another run.

    python scripts/shipped.py --start RUN [--networks unet] diffusion --weights RUN --steps 3200 --out LEG

Some shipped files were trained in several legs; each leg after the first needs this script.  Of an
autoencoder, only the decoder is trained further.  minireflect/pretrained/README.md lists the commands for
each file.  scripts/ship.py then copies the weights into the package.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from reports import described
from torch import nn

from minireflect.__main__ import main as command_line
from minireflect.checkpoints.files import read_weights
from minireflect.checkpoints.ours import load_autoencoder
from minireflect.pretrain import autoencoders, diffusion, matcher, sft
from minireflect.run import Job, Networks
from minireflect.training import Step, Training


def begin_with(folder: Path, names: set[str], optimise: Callable) -> Callable:
    """A version of `optimise` in which the networks of these names start from the weights in a folder."""

    def go_on(name: str, config: Training, networks: Networks, job: Job, **how: float) -> Iterator[Step]:
        groups = [net if isinstance(net, nn.ModuleDict) else {n: net} for n, net in networks.items()]
        parts = [pair for group in groups for pair in group.items() if pair[0] in names]
        for part, network in parts:
            network.load_state_dict(read_weights(folder / f"{part}.safetensors"))
            if part == "autoencoder":
                network.config = load_autoencoder(folder).config
                network.encoder.requires_grad_(False), network.quant_conv.requires_grad_(False)
        names.difference_update(part for part, _ in parts)  # a second loop continues from the first
        return optimise(name, config, networks, job, **how)

    return go_on


def main() -> int:
    parser = described(__doc__)
    parser.add_argument("--start", type=Path, required=True, help="folder with weights")
    both = ["unet", "text_encoder"]
    about = "networks that start from these weights; the other starts at random (default: both)"
    parser.add_argument("--networks", nargs="+", choices=both, default=both, help=about)
    parser.add_argument("command", choices=("autoencoder", "diffusion", "reward", "checker", "actor"))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py COMMAND")
    args = parser.parse_args()
    several = {"diffusion": args.networks, "checker": ["checker", "judge"]}
    names = {*several.get(args.command, [args.command])}
    for module in (autoencoders, diffusion, matcher, sft):
        module.optimise = begin_with(args.start, names, module.optimise)
    return command_line(["train", args.command, *args.options])


if __name__ == "__main__":
    sys.exit(main())
