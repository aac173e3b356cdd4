"""minireflect sample PROMPT ...: sample pictures, with the inspector's verdict and the learned reward."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from einops import rearrange

from .. import showcase
from ..checkpoints.lora import load_lora
from ..checkpoints.ours import REASON, RIG, SHIPPED, load_pipeline, load_reasongen, weights_folder
from ..diffusion.reflection import ReflectionConfig
from ..figures import strip
from ..methods.finetune import FinetuneConfig, load_base
from ..methods.rlrig import LoopConfig, load_parts
from ..models.lora import merge_lora
from ..models.reasongen import SamplingConfig
from ..pipeline import OPPOSITE, SamplerConfig, best_device
from ..rl.rewards import load_reward, reward_beside
from ..streams import choices
from ..world.canvas import read_picture, to_pixels, write_picture
from ..world.graphs import read_graph
from ..world.layout import lay_out
from .options import HELP, help_text

EXAMPLE = "a tall red candle in still air"
BASE_GUIDANCE = 7.5  # diffusers' default for Stable Diffusion
PIXELS = (".png", ".jpg", ".jpeg")
# of 255, mean over the picture: other processors round differently, other weights give other pictures
CHECK_TOLERANCE = 4.0


@dataclass(frozen=True)
class SampleOptions:
    # a row each; with --method rlrig scene graphs: triples, a sentence, or LAION-SG's .json
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    # the model
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
    # sample every picture again, whatever the reward says, as SRRL's code does
    blind: bool = False
    # with --blind: guidance of sampling again
    w_denoise: float = 3.0
    # with --blind: guidance of re-noising
    w_renoise: float = 0.1
    # sample the committed picture again; exit status 1 when it is off
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
        about = (
            "Sample pictures of prompts. Under each stand the inspector's verdict and the learned reward; in "
            "each further round what the reward refuses is sampled again, from the opposite of its noise. "
            "Defaults stand behind the names."
        )
        print(help_text("minireflect sample PROMPT ... [OPTIONS]", about, SampleOptions(), {}))
        return 0
    args = tyro.cli(SampleOptions, args=words, prog="minireflect sample")
    if args.check:
        return check()
    check_arguments(args)
    methods = {"srrl": sample_srrl, "rlrig": sample_rlrig, "reasongen": sample_reasongen}
    with torch.no_grad():
        (sample_checkpoint if args.base else methods[args.method])(args, list(args.prompts))
    print(f"written to {args.out}")
    return 0


def check_arguments(args: SampleOptions) -> None:
    """Bad input is named before anything is loaded."""
    if not args.prompts:
        raise ValueError(f'there is no prompt; try: minireflect sample "{EXAMPLE}"')
    if args.base is None and not all(prompt.split() for prompt in args.prompts):
        raise ValueError("a prompt is empty")
    if args.base is None and (args.lora or args.size or args.tokenizer):
        raise ValueError("--lora, --size and --tokenizer belong to a published checkpoint: give --base PATH")
    if args.method == "reasongen" and (args.rounds is not None or args.steps != SampleOptions.steps):
        raise ValueError(
            "--rounds and --steps belong to diffusion: --method reasongen samples once, token by token"
        )
    if args.out.suffix.lower() not in (*PIXELS, ".pdf", ".svg"):
        raise ValueError(f"--out {args.out} must end in .png, .jpg, .pdf or .svg")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {args.out.absolute().parent} to write {args.out.name} into")


def sample_srrl(args: SampleOptions, prompts: list[str]) -> None:
    """A prompt a row, a round a column."""
    sampler = SamplerConfig(args.steps, 1.0 if args.guidance is None else args.guidance)
    reflection = replace(OPPOSITE, rounds=args.rounds or 0)
    if args.blind:
        reflection = ReflectionConfig(args.rounds or 0, args.w_denoise, args.w_renoise, args.steps)
    pipe, reward = load_pipeline(args.weights), load_reward(args.weights)
    pipe.tokenizer(prompts)  # unknown words are named before anything is sampled
    asked = None if args.blind else reward
    rounds = showcase.sampled_rounds(pipe, prompts, sampler, reflection, args.seed, asked)
    rows = showcase.compare(showcase.by_round(rounds), reward, prompts, args.out)
    for prompt, row in zip(prompts, rows):
        print("\n".join([prompt, *(f"  round {k}: {said}" for k, (_, said, _) in enumerate(row))]))


def sample_rlrig(args: SampleOptions, prompts: list[str]) -> None:
    """A scene graph a row: the picture, unmet requirements, the edit prompt, the next picture."""
    graphs = [read_graph(prompt) for prompt in prompts]
    for graph in graphs:
        lay_out(graph, choices(args.seed, "layout"))  # raises on a graph that no picture can show
    rounds = LoopConfig.rounds if args.rounds is None else args.rounds
    loop = LoopConfig(rounds, steps=args.steps, guidance=1.0 if args.guidance is None else args.guidance)
    parts = load_parts(weights_folder(args.weights or RIG))
    for graph, row in zip(graphs, showcase.edit_strip(parts, graphs, loop, args.seed, args.out)):
        print(graph.sentence)
        for k, (_, said, right) in enumerate(row):
            verdict, lines = "right" if right else "wrong", said.replace("\n", " ")
            print(f"  {f'edit {k}' if k else 'drawn'}: {verdict}; {lines}")


def sample_reasongen(args: SampleOptions, prompts: list[str]) -> None:
    """The rationale as written, the picture and the verdict, of two samples of each prompt."""
    folder = weights_folder(args.weights or REASON)
    pipe, reward = load_reasongen(folder), reward_beside(folder)
    sampling = SamplingConfig(args.temperature, guidance=1.0 if args.guidance is None else args.guidance)
    rows = showcase.rationale_strip(pipe, reward, prompts, sampling, args.seed, args.out)
    for prompt, row in zip(prompts, rows):
        print("\n".join([prompt, *("  " + said.replace("\n", "\n    ") for _, said, _ in row)]))


def sample_checkpoint(args: SampleOptions, prompts: list[str]) -> None:
    """A published checkpoint: a prompt a row, a blind round a column; without rounds pixel for pixel."""
    same = {name: getattr(args, name) for name in ("size", "prediction", "precision")}
    where = FinetuneConfig(str(args.base), tokenizer=args.tokenizer and str(args.tokenizer), **same)
    pipe = load_base(where, torch.device(args.device or best_device()))
    if args.lora:
        merge_lora(load_lora(pipe.unet, args.lora))
    sampler = SamplerConfig(args.steps, BASE_GUIDANCE if args.guidance is None else args.guidance, args.eta)
    reflection = ReflectionConfig(args.rounds or 0, args.w_denoise, args.w_renoise, args.steps)
    rounds = list(showcase.sampled_rounds(pipe, prompts, sampler, reflection, args.seed))  # (b 3 h w) each
    if len(rounds) == 1 and args.out.suffix.lower() in PIXELS:
        write_picture(rearrange(to_pixels(rounds[0]), "b h w c -> h (b w) c"), args.out)
        return
    cells = [[(image.cpu(), "", None) for image in row] for row in zip(*rounds)]
    strip(cells, prompts, [f"round {k}" for k in range(len(rounds))], args.out)


def check() -> int:
    """Sample the committed picture again.  -> exit status: 1 when it is off"""
    expected, found = read_picture(SHIPPED / "check.png"), showcase.check_picture(load_pipeline())
    off = float(np.abs(expected.astype(float) - found).mean())
    print(f"mean difference from the committed picture: {off:.3f} of 255 (at most {CHECK_TOLERANCE})")
    return 0 if off <= CHECK_TOLERANCE else 1
