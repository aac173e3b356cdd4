"""Copy the weights of a finished run into the package, in half precision.

    python scripts/ship.py runs/all-1 [--only autoencoder text_encoder unet reward]
    python scripts/ship.py runs/rlrig-1 --system rlrig [--only ...]
    python scripts/ship.py runs/reason-grpo-1 --system reasongen [--only ...]

The runs are those of `train.py all`, `train.py rlrig` and `train.py reason-grpo`.  The last two also have the
weights from which they started, and these are copied too.
"""

from pathlib import Path

import torch
from reports import described

from minireflect.checkpoints.files import read_metadata, read_weights, save_weights
from minireflect.checkpoints.ours import REASON, RIG, SHIPPED
from minireflect.methods.rlrig import RIG_PARTS

SYSTEMS = {  # name: (folder in the package, names of the files)
    "srrl": (SHIPPED, ("autoencoder", "text_encoder", "unet", "reward")),
    "rlrig": (RIG, (*RIG_PARTS, "base_actor", "editor")),
    "reasongen": (REASON, ("vq", "base_reasongen", "reasongen")),  # it uses the autoencoder of srrl
}


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--system", choices=SYSTEMS, default="srrl", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=sorted({n for _, ns in SYSTEMS.values() for n in ns}))
    args = parser.parse_args()
    target, names = SYSTEMS[args.system]
    target.mkdir(exist_ok=True)
    for name in args.only or names:
        source = args.run / "weights" / f"{name}.safetensors"
        halves = {key: t.to(torch.float16) for key, t in read_weights(source).items()}
        if bad := [key for key, t in halves.items() if not torch.isfinite(t).all()]:
            raise ValueError(f"{source}: {bad[0]} overflows in half precision")
        save_weights(target / source.name, halves, read_metadata(source))
        print(f"{name}: {sum(t.numel() for t in halves.values()):,} parameters")


if __name__ == "__main__":
    main()
