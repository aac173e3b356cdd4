"""minireflect sample PROMPT ...: sample pictures, with the inspector's verdict and the learned reward."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from os.path import isfile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from .. import figures, showcase
from ..checkpoints.lora import load_lora, networks_of
from ..checkpoints.ours import REASON, RIG, SHIPPED, load_pipeline, load_reasongen, weights_folder
from ..diffusion.reflection import ReflectionConfig
from ..disk import check_place, write_text
from ..methods.finetune import CheckpointConfig, FinetuneConfig, load_base
from ..methods.rlrig import LoopConfig, load_parts
from ..models.lora import merge_lora
from ..models.transformer import SamplingConfig, Temperature
from ..pipeline import OPPOSITE, LatentDiffusion, SamplerConfig, chosen_device, note_guidance
from ..ranges import Checked, Count, Finite, Natural, Share, Weight, plain, quote
from ..rl.rewards import load_reward, reward_beside
from ..streams import choices, rng
from ..world.canvas import read_picture, to_pixels, write_picture
from ..world.layout import lay_out
from ..world.prompts import split
from ..world.published import read_benchmark, read_graphs, write_samples
from . import PICTURES, check_effect, read

ABOUT = """\
Sample pictures of prompts. The inspector's verdict and the learned reward are shown under each picture. In
each further round, refused pictures are sampled again from the negative of their noise."""
# options that each way of sampling reads, in addition to ALL
READ = {
    "srrl": {"method", "rounds", "weights", "steps", "guidance", "eta", "blind", "w_denoise", "w_renoise"},
    "rlrig": {"method", "rounds", "weights", "steps", "guidance"},
    "reasongen": {"method", "weights", "guidance", "temperature"},
    "checkpoint": {"rounds", "steps", "guidance", "eta", "blind", "w_denoise", "w_renoise", "lora",
                   "lora_scale", "each", "device", *vars(CheckpointConfig())},
}  # fmt: skip
TABLES = (".jsonl", ".csv", ".json", ".tsv", ".txt")  # endings of files of prompts
ALL = {"prompts", "out", "seed", "check", "checkpoint"}
# defaults that differ from 0 rounds and from SamplerConfig; 7.5 is diffusers' default for Stable Diffusion
DEFAULTS = {"rlrig": {"rounds": LoopConfig.rounds}, "checkpoint": {"guidance": 7.5, "eta": 0.0}}
# largest mean difference of pixels, of 255: above rounding on other processors, below other weights
CHECK_TOLERANCE = 4.0


@dataclass(frozen=True)
class SampleOptions(Checked):
    """The options of `minireflect sample`."""

    # one row each; with --method rlrig scene graphs: triples, a sentence, or a .json of LAION-SG or T2I-R1
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    # which model samples
    method: Literal["srrl", "rlrig", "reasongen"] = "srrl"
    # reflections after the first picture (default: 0; with --method rlrig 3 edits)
    rounds: Natural | None = None
    # run folder of a training (default: the shipped weights)
    weights: Path | None = None
    # picture to write
    out: Path = Path("sample.png")
    # seed of all noise
    seed: int = 0
    # denoising steps (default: 20, or as in the evaluation of the run in --weights)
    steps: Count | None = None
    # guidance of round 0 (default: 1, or as in the evaluation of the run in --weights; with --base 7.5)
    guidance: Weight | None = None
    # step noise, 0 to 1 (default: 1, or as in the evaluation of the run in --weights; with --base 0)
    eta: Share | None = None
    # with --method reasongen: sampling temperature of all tokens; training and evaluation use 0.8
    temperature: Temperature = 0.2
    # sample every picture again without using the reward, as SRRL's code does
    blind: bool = False
    # with --blind: guidance of the pictures that are turned back into noise
    w_denoise: Weight = 3.0
    # with --blind: guidance of re-noising
    w_renoise: Weight = 0.1
    # sample the committed picture again; exit status 1 if it differs
    check: bool = False
    # with --base: a LoRA adapter, of a training with --base, of diffusers, peft or kohya
    lora: Path | None = None
    # with --lora: factor on the change of the weights
    lora_scale: Finite = 1.0
    # with --base and --out FOLDER: pictures per prompt, in the layout that GenEval's scorer reads
    each: Count = 4
    # with --base: where to compute (default: the first that is available)
    device: Literal["cuda", "mps", "cpu"] | None = None
    checkpoint: Annotated[CheckpointConfig, tyro.conf.arg(name="")] = field(default_factory=CheckpointConfig)


def main(words: list[str]) -> int:
    """Run `minireflect sample` with these arguments.  -> exit status"""
    args = read(words, "sample PROMPT ...", ABOUT, SampleOptions())
    if args.check:
        if args != SampleOptions(check=True):
            raise ValueError("--check samples the committed picture again; give it no prompt or other option")
        return check()
    way = args.method if args.checkpoint.base is None else "checkpoint"
    check_arguments(args, way)
    sampler = measured_with(args.weights) if way == "srrl" else SamplerConfig()
    defaults = {"rounds": 0} | asdict(sampler) | DEFAULTS.get(way, {})
    args = replace(args, **{key: value for key, value in defaults.items() if getattr(args, key) is None})
    note_guidance(args.guidance)
    with torch.no_grad():
        said = WAYS[way](args, list(args.prompts))
    for head, lines in zip(*said):
        print("\n".join([plain(head), *(f"  {line}" for line in lines)]))
    print(f"written to {args.out}")
    return 0


def measured_with(weights: Path | None) -> SamplerConfig:
    """The sampler of the evaluation of the run with these weights; the default if they are of no run."""
    from ..config import read_config  # imported late: --help does not need it

    folder = weights_folder(weights)
    run = folder.parent if folder.name == "weights" else folder
    return read_config(run).sampler if (run / "config.json").exists() else SamplerConfig()


def check_arguments(args: SampleOptions, way: str) -> None:
    """Check the options before any weights are loaded.  Raises ValueError."""
    base = args.checkpoint.base
    if not args.prompts:
        raise ValueError('there is no prompt; try: minireflect sample "a tall red candle in still air"')
    files = [text for text in args.prompts if base and (isfile(text) or text.lower().endswith(TABLES))]
    if missing := [file for file in files if not isfile(file)]:
        raise ValueError(f"there is no file of prompts {quote(missing[0])}; check its path")
    if files and (len(args.prompts) > 1 or args.out.suffix):
        raise ValueError(f"{quote(files[0])} is a file of prompts: give it alone, with --out FOLDER")
    if base is None and not all(map(split, args.prompts)):
        raise ValueError("a prompt is empty or contains no words")
    usual = {**vars(SampleOptions()), **vars(CheckpointConfig())}
    given = {name for name, value in {**vars(args), **vars(args.checkpoint)}.items() if value != usual[name]}
    unread, rounds = given - READ[way] - ALL, args.rounds or 0
    named = {name: f"--method {name}" for name in READ} | {"checkpoint": "--base PATH"}
    fitting = [named[name] for name, read in READ.items() if unread <= read]
    scales = {args.guidance, *[args.w_denoise, args.w_renoise][: 2 * rounds]}
    idle = {
        f"here; try {' or '.join(fitting) or 'other methods'}": unread,
        "without --out FOLDER": ["each"] * bool(args.out.suffix),
        "without --lora PATH": ["lora_scale"] * (args.lora is None),
        "without --rounds 1 or more": ["blind", "w_denoise", "w_renoise"] * (not rounds),
        "without --blind": ["w_denoise", "w_renoise"] * (not args.blind and base is None),
        "with guidance 1": ["negative"] * (scales == {1}),
    }
    check_effect(given, idle)
    if args.out.suffix.lower() not in (*PICTURES, ".pdf", ".svg", *([""] if base and args.out.name else [])):
        raise ValueError(f"--out {args.out} must end in .png, .jpg, .pdf or .svg, or with --base be a folder")
    folder = args.out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"there is no folder {folder} in which {args.out.name} can be written")
    if args.out.suffix:
        check_place(args.out)


Said = tuple[list[str], list[list[str]]]  # the printed text: a heading per prompt, and the lines below it


def blind(args: SampleOptions) -> ReflectionConfig:
    """The options of blind reflection."""
    return ReflectionConfig(args.rounds, args.w_denoise, args.w_renoise, args.steps)


def sample_srrl(args: SampleOptions, prompts: list[str]) -> Said:
    """SRRL: one row per prompt, one column per round."""
    reflection = blind(args) if args.blind else replace(OPPOSITE, rounds=args.rounds)
    sampler = SamplerConfig(args.steps, args.guidance, args.eta)
    pipe, reward = load_pipeline(args.weights), load_reward(args.weights)
    pipe.tokenizer(prompts)  # raises on unknown words before anything is sampled
    asked = None if args.blind else reward
    rounds = showcase.sampled_rounds(pipe, prompts, sampler, reflection, args.seed, asked)
    rows = showcase.compare(rounds, reward, prompts, args.out)
    return prompts, [[f"round {k}: {said}" for k, (_, said, _) in enumerate(row)] for row in rows]


def sample_rlrig(args: SampleOptions, prompts: list[str]) -> Said:
    """RL-RIG: one row per scene graph: picture, unmet requirements, edit prompt, next picture."""
    graphs = [graph for prompt in prompts for graph in read_graphs(prompt)]
    for graph in graphs:
        lay_out(graph, choices(args.seed, "layout"))  # raises if no picture can show the graph
    loop = LoopConfig(args.rounds, steps=args.steps, guidance=args.guidance)
    parts = load_parts(weights_folder(args.weights or RIG))
    rows = showcase.edit_strip(parts, graphs, loop, args.seed, args.out)
    found = [[f"{'right' if right else 'wrong'}; {said}" for _, said, right in row] for row in rows]
    lines = [[f"{f'edit {k}' if k else 'round 0'}: {said}" for k, said in enumerate(row)] for row in found]
    return [g.sentence for g in graphs], [[line.replace("\n", "; ") for line in row] for row in lines]


def sample_reasongen(args: SampleOptions, prompts: list[str]) -> Said:
    """ReasonGen-R1: two samples per prompt, each with its rationale, picture and verdict."""
    folder = weights_folder(args.weights or REASON)
    pipe, reward = load_reasongen(folder), reward_beside(folder)
    sampling = SamplingConfig(args.temperature, guidance=args.guidance)
    rows = showcase.rationale_strip(pipe, reward, prompts, sampling, args.seed, args.out)
    return prompts, [[said.replace("\n", "\n    ") for _, said, _ in row] for row in rows]


def sample_checkpoint(args: SampleOptions, prompts: list[str]) -> Said:
    """A published checkpoint: one row per prompt, one column per blind round.

    Without further rounds, an image file contains only the pictures, side by side and at their full size.
    """
    pipe = load_base(FinetuneConfig(**vars(args.checkpoint)), chosen_device(args.device))
    if args.lora:
        load_lora(pipe, args.lora, args.lora_scale)
        for network in networks_of(pipe).values():
            merge_lora(network)
    sampler = SamplerConfig(args.steps, args.guidance, args.eta)
    if not args.out.suffix:
        return export(args, pipe, sampler)
    rounds = showcase.sampled_rounds(pipe, prompts, sampler, blind(args), args.seed)  # (b 3 h w) each
    if len(rounds) == 1 and args.out.suffix.lower() in PICTURES:
        write_picture(np.concatenate(to_pixels(rounds["round 0"]), 1), args.out)  # side by side
    else:
        cells = [[(image.cpu(), "", None) for image in row] for row in zip(*rounds.values())]
        figures.strip(cells, prompts, list(rounds), args.out)
    return [], []


def export(args: SampleOptions, pipe: LatentDiffusion, sampler: SamplerConfig) -> Said:
    """Save the last round of a benchmark's prompts in the folder layout of its scorer, with settings.json."""
    file = args.prompts[0]
    about = read_benchmark(Path(file)) if isfile(file) else [{"prompt": prompt} for prompt in args.prompts]
    for i, task in enumerate(about):
        noise, prompts = rng(args.seed, "export", i), [task["prompt"]] * args.each
        *_, x_0 = pipe.blind_rounds(prompts, pipe.noise(args.each, noise), sampler, blind(args), noise)
        write_samples(args.out, [task], pipe.decode(x_0), first=i)
    write_text(args.out / "settings.json", json.dumps(asdict(args), default=str, indent=2) + "\n")
    return [], []


WAYS = dict(srrl=sample_srrl, rlrig=sample_rlrig, reasongen=sample_reasongen, checkpoint=sample_checkpoint)


def check() -> int:
    """Sample the committed picture again and compare.  -> exit status: 0, or 1 if it differs"""
    expected, found = read_picture(SHIPPED / "check.png"), showcase.check_picture(load_pipeline())
    off = float(np.abs(expected.astype(float) - found).mean())
    print(f"mean difference from the committed picture: {off:.3f} of 255 (at most {CHECK_TOLERANCE})")
    return 0 if off <= CHECK_TOLERANCE else 1
