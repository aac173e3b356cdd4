"""Make the pictures of the README and notebook 1, and the reference picture of `sample --check`.

    python scripts/first_picture.py

It writes docs/rounds.png, docs/reflection.gif, docs/world.png and minireflect/pretrained/check.png.

The pictures are not selected by hand: the prompts are the first unconventional test prompt of each law, the
noise has seed 0, and the weights are the shipped ones.
"""

from dataclasses import replace
from pathlib import Path

import torch
from reports import ROOT, described

from minireflect import figures, load_pipeline, render, sample_scene
from minireflect.checkpoints.ours import SHIPPED
from minireflect.pipeline import OPPOSITE, SamplerConfig
from minireflect.rl.rewards import load_reward
from minireflect.showcase import animation, check_picture, compare, fixed_prompts, sampled_rounds
from minireflect.world.canvas import write_picture
from minireflect.world.captions import caption
from minireflect.world.laws import LAWS


def world(path: Path) -> None:
    """A picture of each law, obeyed and broken, with its own caption and therefore without a verdict."""
    rows = []
    for i, law in enumerate(LAWS):
        scenes = [sample_scene(i, law, lawful=lawful) for lawful in (True, False)]
        rows.append([(render(scene), caption(scene), None) for scene in scenes])
    figures.strip(rows, list(LAWS), ["obeyed", "broken"], path, abreast=4)


def main() -> None:
    described(__doc__).parse_args()
    torch.set_grad_enabled(False)
    texts = [p.text for p in fixed_prompts(("unconventional",))]
    pipe, reward, reflection = load_pipeline(), load_reward(), replace(OPPOSITE, rounds=3)
    rounds = sampled_rounds(pipe, texts, SamplerConfig(), reflection, 0, reward)
    compare(rounds, reward, texts, ROOT / "docs" / "rounds.png")
    animation(pipe, reward, texts[:4], 0, ROOT / "docs" / "reflection.gif")
    write_picture(check_picture(pipe), SHIPPED / "check.png")
    world(ROOT / "docs" / "world.png")


if __name__ == "__main__":
    main()
