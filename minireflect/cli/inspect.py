"""minireflect inspect PATH ...: what is in a file, read strictly, so that whatever does not fit is named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .options import read

PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class InspectOptions:
    # checkpoints, CLIPs, LoRAs (a folder or a single file), weight files of ours, or pictures of 64 x 64
    # pixels
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()


def main(words: list[str]) -> int:
    about = "Say what is in a file: the family of a checkpoint, or what the inspector reads in a picture."
    paths = read(words, "inspect PATH ...", about, InspectOptions()).paths
    if not paths:
        raise ValueError("there is no path; try: minireflect inspect checkpoint.safetensors")
    for path in paths:
        print(picture(path) if path.suffix.lower() in PICTURES else checkpoint(path))
    return 0


def checkpoint(path: Path) -> str:
    from ..checkpoints.ours import describe

    return describe(path)


def picture(path: Path) -> str:
    """What the inspector reads in a picture, or in each of several side by side."""
    from ..world.canvas import read_picture, to_tensor
    from ..world.captions import caption
    from ..world.inspector import inspect_all

    pixels = read_picture(path)  # (h w 3)
    height, width = pixels.shape[:2]
    if height != 64 or width % 64:
        raise ValueError(
            f"{path} is {width} x {height} pixels; the inspector reads 64 x 64, or a row of them"
        )
    row = to_tensor(pixels.reshape(64, -1, 64, 3).swapaxes(0, 1))  # (n 3 64 64)
    read = [caption(r.scene) if r.scene else f"unreadable: {r.why}" for r in inspect_all(row)]
    if len(read) == 1:
        return f"{path}: {read[0]}"
    return "\n".join([f"{path}: {len(read)} pictures", *(f"  {r}" for r in read)])
