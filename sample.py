"""Draw prompts, round by round, with the checker's verdict and the learned reward under each picture.

    python sample.py "a balance with a big red ball on the left pan and a small blue ball on the right pan" --rounds 3 --out strip.png
    python sample.py --check          draw the committed picture again and compare

Round 0 is the picture as drawn.  In every further round what the learned reward calls wrong is turned back into noise, and
drawn anew from the opposite of that noise; `--blind` draws everything again, as SRRL's code does, whatever the reward says.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.models.tokenizer import PromptError, split
from minireflect.pipeline import SHIPPED, SamplerConfig, load_pipeline
from minireflect.rl.rewards import load_reward
from minireflect.showcase import check_picture, rounds_strip
from minireflect.world.render import read_picture

CHECKED = SHIPPED / "check.png"
CHECK_TOLERANCE = (
    4.0  # of 255, mean over the picture: other processors round differently, other weights draw differently
)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="what to draw; several make several rows"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help="reflections after the first picture (default: 0)"
    )
    parser.add_argument("--weights", type=Path, help="run folder of train.py (default: the shipped weights)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("sample.png"), help="picture to write (default: sample.png)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=SamplerConfig.steps,
        help=f"denoising steps (default: {SamplerConfig.steps})",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=SamplerConfig.guidance,
        help=f"of round 0 (default: {SamplerConfig.guidance})",
    )
    parser.add_argument(
        "--w-denoise",
        type=float,
        default=ReflectionConfig.w_denoise,
        help="guidance when drawing again, with --blind (default: %(default)s)",
    )
    parser.add_argument(
        "--w-renoise",
        type=float,
        default=ReflectionConfig.w_renoise,
        help="guidance when re-noising, with --blind (default: %(default)s)",
    )
    parser.add_argument("--blind", action="store_true", help="reflect with no look at the reward")
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed picture; exit 1 when it is off"
    )
    return parser.parse_args(words)


def draw(args: argparse.Namespace) -> None:
    if not args.prompts:
        raise PromptError('there is no prompt; try: python sample.py "a tall red candle in still air"')
    if any(not split(p) for p in args.prompts):
        raise PromptError("a prompt is empty")
    sampler = SamplerConfig(args.steps, args.guidance)
    reflection = ReflectionConfig(args.rounds, args.w_denoise, args.w_renoise, args.steps)
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise ValueError(f"--out {args.out} must end in .png, .jpg, .pdf or .svg")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {args.out.absolute().parent} to write {args.out.name} into")
    pipe, reward = load_pipeline(args.weights), load_reward(args.weights)
    pipe.tokenizer(args.prompts)  # unknown words are named before anything is drawn
    pipe.table(args.steps)
    rows = rounds_strip(pipe, reward, args.prompts, sampler, reflection, args.seed, args.out, args.blind)
    for prompt, row in zip(args.prompts, rows):
        print(prompt)
        for k, (_, said, _) in enumerate(row):
            print(f"  round {k}: {said}")
    print(f"written to {args.out}")


def check() -> int:
    expected, drawn = read_picture(CHECKED), check_picture(load_pipeline())
    off = float(np.abs(expected.astype(float) - drawn).mean())
    print(f"mean difference from the committed picture: {off:.3f} of 255 (at most {CHECK_TOLERANCE})")
    return 0 if off <= CHECK_TOLERANCE else 1


def main() -> int:
    args = parse(sys.argv[1:])
    try:
        if args.check:
            return check()
        draw(args)
        return 0
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
