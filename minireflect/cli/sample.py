"""minireflect sample PROMPT ...: draw prompts, and say under each picture what the inspector reads and the learned reward thinks.

Every method imports what it needs when it is asked for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from .options import HELP, help_text

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "a tall red candle in still air"
BASE_GUIDANCE = 7.5  # diffusers' default for Stable Diffusion
SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
# of 255, mean over the picture: other processors round differently, other weights draw differently
CHECK_TOLERANCE = 4.0


@dataclass(frozen=True)
class SampleOptions:
    # what to draw, a row each; with --method rlrig a scene graph: triples, a sentence, or a .json file of LAION-SG
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    # who draws
    method: Literal["srrl", "rlrig", "reasongen"] = "srrl"
    # reflections after the first picture (default: 0; with --method rlrig 3 edits)
    rounds: int | None = None
    # run folder of a training (default: the shipped weights)
    weights: Path | None = None
    # picture to write
    out: Path = Path("sample.png")
    # of all noise
    seed: int = 0
    # denoising steps
    steps: int = 20
    # guidance of round 0 (default: 1; with --base 7.5; with --method reasongen of image tokens, 1)
    guidance: float | None = None
    # of rationale and image tokens, with --method reasongen; trained and measured at 0.8
    temperature: float = 0.2
    # redraw every picture, as SRRL's code does, whatever the reward says
    blind: bool = False
    # with --blind: guidance of drawing again
    w_denoise: float = 3.0
    # with --blind: guidance of re-noising
    w_renoise: float = 0.1
    # draw the committed picture again and compare; exit status 1 when it is off
    check: bool = False
    # Stable Diffusion 1.x, 2.x or SDXL, a diffusers folder or a single file; rounds are blind
    base: Path | None = None
    # with --base: adapter of a training with --base, of diffusers or peft
    lora: Path | None = None
    # with --base: folder with the vocabulary, for single files
    tokenizer: Path | None = None
    # with --base: pixels (default: what it was trained on)
    size: int | None = None
    # with --base: what it predicts, if its files do not say so
    prediction: Literal["epsilon", "v", "x0"] | None = None
    # with --base: step noise, 0 to 1
    eta: float = 0.0
    # with --base (default: bf16 on a GPU, fp32 on a CPU)
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    # cuda, mps or cpu (default: the first that is there)
    device: Literal["cuda", "mps", "cpu"] | None = None


def main(words: list[str]) -> int:
    if any(word in HELP for word in words):
        about = "Draw prompts. Under each picture stand the inspector's verdict and the learned reward; in each further round "
        about += "what the reward refuses is redrawn from the opposite of its noise. The value behind a name is its default."
        print(help_text("minireflect sample PROMPT ... [OPTIONS]", about, SampleOptions(), {}))
        return 0
    args = tyro.cli(SampleOptions, args=words, prog="minireflect sample")
    check_arguments(args)
    import torch

    with torch.no_grad():
        if args.check:
            return check()
        if args.base is not None:
            sample_checkpoint(args)
        else:
            {"srrl": sample_srrl, "rlrig": sample_rlrig, "reasongen": sample_reasongen}[args.method](args)
    print(f"written to {args.out}")
    return 0


def check_arguments(args: SampleOptions) -> None:
    """Bad input is named before anything is loaded."""
    if args.check:
        return
    if not args.prompts:
        raise ValueError(f'there is no prompt; try: minireflect sample "{EXAMPLE}"')
    if args.base is None and any(not p.split() for p in args.prompts):
        raise ValueError("a prompt is empty")
    if args.base is None and (args.lora or args.size or args.tokenizer):
        raise ValueError("--lora, --size and --tokenizer belong to a published checkpoint: give --base PATH")
    if args.method == "reasongen" and (args.rounds or args.steps != SampleOptions.steps):
        raise ValueError(
            "--rounds and --steps belong to diffusion: --method reasongen draws once, token by token"
        )
    if args.out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {args.out} must end in one of {', '.join(SUFFIXES)}")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {args.out.absolute().parent} to write {args.out.name} into")


def sample_srrl(args: SampleOptions) -> None:
    """A prompt a row, a round a column."""
    from ..checkpoints.ours import load_pipeline
    from ..diffusion.reflection import ReflectionConfig
    from ..pipeline import SamplerConfig
    from ..rl.rewards import load_reward
    from ..showcase import rounds_strip, sampled_rounds

    sampler = SamplerConfig(args.steps, 1.0 if args.guidance is None else args.guidance)
    reflection = ReflectionConfig(args.rounds or 0, args.w_denoise, args.w_renoise, args.steps)
    pipe, reward, prompts = load_pipeline(args.weights), load_reward(args.weights), list(args.prompts)
    pipe.tokenizer(prompts)  # unknown words are named before anything is drawn
    pipe.table(args.steps)
    rounds = sampled_rounds(pipe, prompts, sampler, reflection, args.seed, None if args.blind else reward)
    rows = rounds_strip(rounds, reward, prompts, args.out)
    for prompt, row in zip(prompts, rows):
        print(prompt)
        for k, (_, said, _) in enumerate(row):
            print(f"  round {k}: {said}")


def sample_rlrig(args: SampleOptions) -> None:
    """A scene graph a row: the picture, unmet requirements, the edit prompt, the next picture."""
    from ..checkpoints.ours import RIG, weights_folder
    from ..methods.rlrig import LoopConfig, load_parts
    from ..showcase import edit_strip
    from ..streams import choices
    from ..world.graphs import read_graph
    from ..world.layout import lay_out

    graphs = [read_graph(p) for p in args.prompts]
    for graph in graphs:
        lay_out(
            graph, choices(args.seed, "layout")
        )  # what no picture can show is named before anything is drawn
    rounds = LoopConfig.rounds if args.rounds is None else args.rounds
    loop = LoopConfig(
        rounds=rounds, steps=args.steps, guidance=1.0 if args.guidance is None else args.guidance
    )
    parts = load_parts(weights_folder(args.weights or RIG))
    for graph, row in zip(graphs, edit_strip(parts, graphs, loop, args.seed, args.out)):
        print(graph.sentence)
        for k, (_, said, right) in enumerate(row):
            verdict, said = "right" if right else "wrong", said.replace("\n", " ")
            print(f"  {f'edit {k}' if k else 'drawn'}: {verdict}; {said}")


def sample_reasongen(args: SampleOptions) -> None:
    """The rationale as written, the picture and the verdict, of two samples of each prompt."""
    from ..checkpoints.ours import REASON, load_reasongen, weights_folder
    from ..models.reasongen import SamplingConfig
    from ..rl.rewards import judge_of
    from ..showcase import thoughts_strip

    folder = weights_folder(args.weights or REASON)
    pipe, judge = load_reasongen(folder), judge_of(folder)
    guidance = SamplingConfig.guidance if args.guidance is None else args.guidance
    sampling = SamplingConfig(temperature=args.temperature, guidance=guidance)
    rows = thoughts_strip(pipe, judge, list(args.prompts), sampling, args.seed, args.out)
    for prompt, row in zip(args.prompts, rows):
        print(prompt)
        for rationale, said in row:
            print(f"  {rationale}\n    {said}")


def sample_checkpoint(args: SampleOptions) -> None:
    """A prompt a row of a published checkpoint; a column for every blind round."""
    import torch

    from .. import figures
    from ..checkpoints.lora import load_lora
    from ..diffusion.reflection import ReflectionConfig
    from ..methods.finetune import FinetuneConfig, load_base
    from ..models.lora import merge_lora
    from ..pipeline import SamplerConfig, best_device
    from ..showcase import sampled_rounds

    where = FinetuneConfig(
        base=str(args.base), tokenizer=args.tokenizer and str(args.tokenizer), size=args.size,
        prediction=args.prediction, precision=args.precision,
    )  # fmt: skip
    pipe = load_base(where, torch.device(args.device or best_device()))
    if args.lora:
        merge_lora(load_lora(pipe.unet, args.lora))
    sampler = SamplerConfig(args.steps, BASE_GUIDANCE if args.guidance is None else args.guidance, args.eta)
    reflection = ReflectionConfig(args.rounds or 0, args.w_denoise, args.w_renoise, args.steps)
    rounds = list(sampled_rounds(pipe, list(args.prompts), sampler, reflection, args.seed))  # (b 3 h w) each
    if len(rounds) == 1 and args.out.suffix.lower() in (".png", ".jpg", ".jpeg"):
        write_row(rounds[0].cpu(), args.out)
        return
    cells = [[(image.cpu(), "", None) for image in row] for row in zip(*rounds)]
    figures.strip(cells, list(args.prompts), [f"round {k}" for k in range(len(rounds))], args.out)


def write_row(images: "Tensor", path: Path) -> None:
    """Pictures side by side, pixel for pixel.  Shapes: images (b 3 h w) in [-1, 1]"""
    from PIL import Image

    pixels = ((images + 1) * 127.5).round().byte().permute(2, 0, 3, 1).flatten(1, 2)  # (h b*w 3)
    Image.fromarray(pixels.numpy()).save(path)


def check() -> int:
    """Draw the committed picture again."""
    import numpy as np

    from ..checkpoints.ours import SHIPPED, load_pipeline
    from ..showcase import check_picture
    from ..world.canvas import read_picture

    expected, drawn = read_picture(SHIPPED / "check.png"), check_picture(load_pipeline())
    off = float(np.abs(expected.astype(float) - drawn).mean())
    print(f"mean difference from the committed picture: {off:.3f} of 255 (at most {CHECK_TOLERANCE})")
    return 0 if off <= CHECK_TOLERANCE else 1
