"""The README's first picture: rounds 0 to 3 on fixed held-out prompts, from the shipped weights.  Nothing is picked.

    python scripts/first_picture.py        writes docs/rounds.png, docs/world.png and what `sample.py --check` compares with

Prompts are the first held-out unconventional one of every law, noise comes from seed 0.
"""

from pathlib import Path

import torch

from minireflect import caption, figures, load_pipeline, render, sample_scene
from minireflect.checkpoints.ours import SHIPPED
from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.pipeline import SamplerConfig
from minireflect.rl.rewards import load_reward
from minireflect.showcase import check_picture, fixed_prompts, rounds_strip, sampled_rounds
from minireflect.world.canvas import write_picture
from minireflect.world.laws import LAWS
from minireflect.world.prompts import law_prompt

DOCS = Path(__file__).parent.parent / "docs"


def world() -> None:
    """Every law, obeyed and broken."""
    rows, labels = [], []
    for i, law in enumerate(LAWS):
        lawful, unlawful = (sample_scene(i, law, lawful=flag) for flag in (True, False))
        rows.append([(render(lawful), "lawful", True), (render(unlawful), "unlawful", False)])
        labels.append(law_prompt(law, unlawful.objects, unlawful.outcome).text)
    figures.strip(rows, labels, ["obeyed", "broken"], DOCS / "world.png")
    print(caption(sample_scene(0, "balance")))


def main() -> None:
    torch.set_grad_enabled(False)
    texts = [p.text for p in fixed_prompts(("unconventional",))]
    pipe, reward, reflection = load_pipeline(), load_reward(), ReflectionConfig(rounds=3)
    rounds = sampled_rounds(pipe, texts, SamplerConfig(), reflection, 0, reward)
    rounds_strip(rounds, reward, texts, DOCS / "rounds.png")
    write_picture(check_picture(load_pipeline()), SHIPPED / "check.png")
    world()


if __name__ == "__main__":
    main()
