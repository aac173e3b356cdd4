"""Draw prompts, round by round, with the checker's verdict and the learned reward under each picture.

    python sample.py "a balance with a big red ball on the left pan and a small blue ball on the right pan" --rounds 3 --out strip.png
    python sample.py --check          draw the committed picture again and compare
    python sample.py --method rlrig "red ball on blue box; green cube left of yellow cylinder"
    python sample.py --method reasongen "a tall red candle in still air"
    python sample.py --base PATH [--lora FILE] "a fox riding a bike"          Stable Diffusion, a folder or a file

Round 0 is the picture as drawn.  In every further round what the learned reward calls wrong is turned back into noise, and
drawn anew from the opposite of that noise; `--blind` draws everything again, as SRRL's code does, whatever the reward says.
With `--base` the rounds are blind, as no reward is shipped for real pictures.  With `--method rlrig` a prompt is a scene graph, as triples,
a sentence or a .json file of LAION-SG's; the strip shows picture, unmet requirements, edit prompt, next picture.  With `--method reasongen`
there are no rounds: it shows the rationale as written, the picture and the verdict, of two samples.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import save_image

from minireflect import figures
from minireflect.checkpoints.lora import load_lora
from minireflect.checkpoints.ours import REASON, RIG, SHIPPED, load_pipeline, load_reasongen, weights_folder
from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.methods.finetune import PRECISIONS, FinetuneConfig, load_base
from minireflect.methods.rlrig import LoopConfig, load_parts
from minireflect.models.lora import merge_lora
from minireflect.models.reasongen import SamplingConfig
from minireflect.models.tokenizer import PromptError
from minireflect.pipeline import SamplerConfig, best_device
from minireflect.rl.rewards import judge_of, load_reward
from minireflect.showcase import blind_rounds, check_picture, edit_strip, rounds_strip, thoughts_strip
from minireflect.streams import choices
from minireflect.world.canvas import read_picture
from minireflect.world.graphs import read_graph
from minireflect.world.layout import lay_out
from minireflect.world.prompts import split

BASE_GUIDANCE = 7.5  # diffusers' default for Stable Diffusion
CHECKED = SHIPPED / "check.png"
# of 255, mean over the picture: other processors round differently, other weights draw differently
CHECK_TOLERANCE = 4.0


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="what to draw; several make several rows"
    )
    parser.add_argument(
        "--rounds", type=int, help="reflections after the first picture (default: 0; with --method rlrig 3)"
    )
    parser.add_argument(
        "--method",
        choices=("srrl", "rlrig", "reasongen"),
        default="srrl",
        help="who draws (default: %(default)s)",
    )
    parser.add_argument("--weights", type=Path, help="run folder of train.py (default: the shipped weights)")
    parser.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("sample.png"), help="picture to write (default: sample.png)"
    )
    parser.add_argument("--steps", type=int, help=f"denoising steps (default: {SamplerConfig.steps})")
    parser.add_argument(
        "--guidance",
        type=float,
        help=f"of round 0 (default: {SamplerConfig.guidance}; with --base {BASE_GUIDANCE}; "
        f"with --method reasongen of image tokens, {SamplingConfig.guidance})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.2,  # best for the shipped model, docs/reasongen.md
        help="of words and image tokens, with --method reasongen (default: %(default)s; trained and measured at 0.8)",
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
    real = parser.add_argument_group("real checkpoints")
    real.add_argument(
        "--base", type=Path, help="Stable Diffusion 1.x, 2.x or SDXL: a diffusers folder or a single file"
    )
    real.add_argument("--lora", type=Path, help="adapter of train.py srrl --base, of diffusers or peft")
    real.add_argument("--tokenizer", type=Path, help="folder with the vocabulary, for single files")
    real.add_argument("--size", type=int, help="pixels (default: what the base was trained on)")
    real.add_argument("--prediction", choices=("epsilon", "v", "x0"), help="of a base that does not say it")
    real.add_argument("--eta", type=float, default=0.0, help="step noise, 0 to 1 (default: 0, deterministic)")
    real.add_argument("--precision", choices=tuple(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU")
    real.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    args = parser.parse_args(words)
    if args.method == "reasongen" and (args.rounds is not None or args.steps is not None):
        parser.error(
            "--rounds and --steps belong to diffusion: --method reasongen draws once, token by token"
        )
    if args.guidance is None:
        drawn_in_tokens = args.method == "reasongen"
        usual = SamplingConfig.guidance if drawn_in_tokens else SamplerConfig.guidance
        args.guidance = usual if args.base is None else BASE_GUIDANCE
    if args.steps is None:
        args.steps = SamplerConfig.steps
    if args.rounds is None:
        args.rounds = LoopConfig.rounds if args.method == "rlrig" else 0
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Bad input is named before anything is loaded."""
    if not args.prompts:
        raise PromptError('there is no prompt; try: python sample.py "a tall red candle in still air"')
    if args.base is None and any(not split(p) for p in args.prompts):
        raise PromptError("a prompt is empty")
    if args.base is None and (args.lora or args.size or args.tokenizer):
        raise ValueError("--lora, --size and --tokenizer belong to a real checkpoint: give --base PATH")
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise ValueError(f"--out {args.out} must end in .png, .jpg, .pdf or .svg")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {args.out.absolute().parent} to write {args.out.name} into")


def draw_real(args: argparse.Namespace) -> None:
    """A prompt a row; a column for every blind round."""
    device = torch.device(args.device or best_device())
    where = FinetuneConfig(
        base=str(args.base), tokenizer=args.tokenizer and str(args.tokenizer), size=args.size,
        prediction=args.prediction, precision=args.precision,
    )  # fmt: skip
    pipe = load_base(where, device)
    if args.lora:
        merge_lora(load_lora(pipe.unet, args.lora))
    sampler = SamplerConfig(args.steps, args.guidance, args.eta)
    reflection = ReflectionConfig(args.rounds, args.w_denoise, args.w_renoise, args.steps)
    heads = [f"round {k}" for k in range(args.rounds + 1)]
    rounds = list(blind_rounds(pipe, args.prompts, sampler, reflection, args.seed))  # (b 3 h w) each
    if len(rounds) == 1 and args.out.suffix.lower() in (".png", ".jpg", ".jpeg"):
        save_image((rounds[0].cpu() + 1) / 2, args.out)  # pixel for pixel, eight in a row
    else:
        cells = [[(image.cpu(), "", None) for image in row] for row in zip(*rounds)]
        figures.strip(cells, args.prompts, heads, args.out)
    print(f"written to {args.out}")


def draw_rig(args: argparse.Namespace) -> None:
    graphs = [read_graph(p) for p in args.prompts]
    for graph in graphs:
        lay_out(
            graph, choices(args.seed, "layout")
        )  # what no picture can show is named before anything is drawn
    loop = LoopConfig(rounds=args.rounds, steps=args.steps, guidance=args.guidance)
    parts = load_parts(weights_folder(RIG if args.weights is None else args.weights))
    for graph, row in zip(graphs, edit_strip(parts, graphs, loop, args.seed, args.out)):
        print(graph.sentence)
        for k, (_, said, right) in enumerate(row):
            print(
                f"  {'drawn' if k == 0 else f'edit {k}'}: {'right' if right else 'wrong'}; "
                + said.replace("\n", " ")
            )
    print(f"written to {args.out}")


def draw_reason(args: argparse.Namespace) -> None:
    folder = weights_folder(REASON if args.weights is None else args.weights)
    painter, judge = load_reasongen(folder), judge_of(folder)
    sampling = SamplingConfig(temperature=args.temperature, guidance=args.guidance)
    rows = thoughts_strip(painter, judge, args.prompts, sampling, args.seed, args.out)
    for prompt, row in zip(args.prompts, rows):
        print(prompt)
        for thought, said in row:
            print(f"  {thought}\n    {said}")
    print(f"written to {args.out}")


def draw(args: argparse.Namespace) -> None:
    check_arguments(args)
    if args.method == "reasongen":
        draw_reason(args)
        return
    if args.method == "rlrig":
        draw_rig(args)
        return
    if args.base is not None:
        draw_real(args)
        return
    sampler = SamplerConfig(args.steps, args.guidance)
    reflection = ReflectionConfig(args.rounds, args.w_denoise, args.w_renoise, args.steps)
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
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
