"""minireflect train COMMAND: options in two passes, the run folder, and the stages of the command."""

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import tyro

from ..checkpoints.files import tensor_shapes
from ..checkpoints.ours import REASON, RIG, weights_folder
from ..checkpoints.parts import weights_file
from ..config import (
    PRESETS,
    Config,
    MethodOptions,
    RunOptions,
    SceneOptions,
    preset,
    read_config,
    record_for,
    stages_of,
    to_dict,
)  # fmt: skip
from ..diffusion.schedule import Schedule, ScheduleConfig
from ..methods.finetune import SAMPLER, SRRL, FinetuneConfig, read_prompts
from ..methods.rollout import SRRLConfig
from ..pipeline import best_device
from ..run import Interrupted, Run, RunError
from ..stages import Task, check, do
from . import TRAINED, unknown
from .options import HELP, help_text

RIG_COMMANDS = ("checker", "actor", "rlrig")
REASON_COMMANDS = ("captioner", "reason-sft", "reason-grpo")
TITLES = {
    "options": "run", "scenes": "run", "method": "run", "mix": "prompts of training, shares", "sampler": "measured pictures",
    "evaluation": "measured pictures", "reasoning": "measured pictures", "world": "captions of training",
    "finetune": "checkpoint", "lora": "checkpoint",
}  # fmt: skip


def main(words: list[str]) -> int:
    command, words = (words[0], words[1:]) if words and not words[0].startswith("-") else ("srrl", words)
    if command not in TRAINED:
        raise ValueError(unknown(command, TRAINED))
    seen = first_pass(words)
    if seen.resume and seen.out is None:
        raise RunError("--resume needs --out RUN: which run is to go on?")
    default = resumed(seen) if seen.resume else chosen(command, seen)
    if any(word in HELP for word in words):
        print(help_for(*default))
        return 0
    try:
        train(*parse(words, *default))
        return 0
    except Interrupted as stop:
        print(f"minireflect train: {stop}", file=sys.stderr)
        return 130


def first_pass(words: list[str]) -> argparse.Namespace:
    """The options that decide the defaults of the others."""
    first = argparse.ArgumentParser(prog="minireflect train", add_help=False, allow_abbrev=False)
    for name in ("--preset", "--device", "--base", "--method", "--scenes"):
        first.add_argument(name)
    first.add_argument("--out", type=Path)
    first.add_argument("--resume", action="store_true")
    return first.parse_known_args(words)[0]


def chosen(command: str, seen: argparse.Namespace) -> tuple[str, RunOptions, Config]:
    """The defaults of a new run: by its preset, its recipe, and whether it is on a published checkpoint."""
    if seen.base is not None and command != "srrl":
        raise ValueError("--base trains a LoRA on a published checkpoint: it goes with the command srrl")
    device = seen.device or best_device()
    name = seen.preset if seen.preset in PRESETS else "gpu" if device.startswith("cuda") else "cpu"
    scenes = seen.scenes if seen.scenes in ("laws", "graphs") else "laws"  # tyro explains an unknown name
    method = seen.method if seen.method in ("srrl", "ddpo", "grpo") else "srrl"
    real = seen.base is not None
    config = preset("cpu" if real and name == "gpu" else name, command, scenes, recipe(method, real))
    if real:
        config = replace(config, sampler=SAMPLER, finetune=replace(config.finetune, base=seen.base))
    return command, RunOptions(preset=name), replace(config, method=method)


def resumed(seen: argparse.Namespace) -> tuple[str, RunOptions, Config]:
    return read_config(seen.out)


def as_record(command: str, options: RunOptions, config: Config) -> object:
    """The record of a command's options, with these values."""
    record = record_for(command, config)
    special = {
        "options": options,
        "scenes": SceneOptions(config.scenes),
        "method": MethodOptions(config.method),
    }
    return record(**{f.name: special.get(f.name, getattr(config, f.name, None)) for f in fields(record)})


def parse(
    words: list[str], command: str, options: RunOptions, config: Config
) -> tuple[str, RunOptions, Config]:
    """Every field of the command's records is an option (tyro); the defaults are those given."""
    default = as_record(command, options, config)
    read = tyro.cli(type(default), args=words, default=default, prog=f"minireflect train {command}")
    records = {
        f.name: getattr(read, f.name) for f in fields(read) if f.name not in ("options", "scenes", "method")
    }
    options = replace(read.options, weights=read.options.weights and read.options.weights.resolve())
    scenes = read.scenes.scenes if hasattr(read, "scenes") else config.scenes
    method = read.method.method if hasattr(read, "method") else config.method
    config = replace(config, seed=options.seed, scenes=scenes, method=method, **records)
    paths = ("base", "clip", "prompts", "tokenizer")
    there = {
        n: str(Path(v).resolve()) for n in paths if (v := getattr(config.finetune, n)) and Path(v).exists()
    }
    return command, options, replace(config, finetune=replace(config.finetune, **there))


def help_for(command: str, options: RunOptions, config: Config) -> str:
    what = TRAINED[command][0]
    about = f"{what[0].upper()}{what[1:]}. The value behind a name is its default."
    return help_text(
        f"minireflect train {command} [OPTIONS]", about, as_record(command, options, config), TITLES
    )


def train(command: str, options: RunOptions, config: Config) -> None:
    """Check what the command starts from, make the run folder, do the stages."""
    device, label = (
        torch.device(options.device or best_device()),
        config.method if command == "srrl" else command,
    )
    source = check_first(command, options, config, device)
    run = Run(options.out or free_folder(label), to_dict(command, options, config), options.resume)
    minutes = {
        "cpu": f"about {TRAINED[command][1]} minutes on two cores",
        "smoke": "seconds; it learns nothing",
    }
    cost = "" if config.finetune.base else f" ({minutes.get(options.preset, 'for a CUDA GPU')})"
    threads = (
        f"{torch.get_num_threads()} threads"
        if device.type == "cpu"
        else torch.cuda.get_device_name()
        if device.type == "cuda"
        else ""
    )
    print(
        f"{label} · run folder {run.folder} · {options.preset} preset{cost} · {device} {threads} · seed {config.seed}"
    )
    clock = time.time()
    do(
        Task(config, run, run.folder / "weights" if source is None else source, device),
        *stages_of(command, config),
    )
    print(f"done in {(time.time() - clock) / 60:.1f} minutes; look at {run.folder / 'figures'}")


def free_folder(label: str) -> Path:
    """The first of runs/LABEL-1, -2, ... that does not exist yet."""
    n = 1
    while (folder := Path("runs") / f"{label}-{n}").exists():
        n += 1
    return folder


def check_first(command: str, options: RunOptions, config: Config, device: torch.device) -> Path | None:
    """Fail on what is missing, broken or out of range before a run folder exists.  -> the folder of the weights to start from, None for nothing"""
    schedule = Schedule(ScheduleConfig())
    for steps in (config.srrl.steps, config.sampler.steps, config.rlrig.loop.steps):
        schedule.table(steps)
    if config.finetune.base is not None:
        if options.weights is not None:
            raise ValueError("--weights is a run of ours: it does not go with --base, a published checkpoint")
        check_base(config.finetune)
        return None
    if command in ("all", "autoencoder"):
        return None
    graphs = command in RIG_COMMANDS or config.scenes == "graphs"
    shipped = RIG if graphs else REASON if command in REASON_COMMANDS else None
    source = weights_folder(options.weights or shipped)
    check(command, source)
    return source


def check_base(config: FinetuneConfig) -> None:
    """What can be said of a published checkpoint, a CLIP and a prompt file without reading their tensors."""
    if not Path(config.base).exists():
        raise ValueError(
            f"there is no checkpoint {config.base}; --base takes a diffusers folder or a single file"
        )
    if config.reward == "clip" and config.clip is None:
        raise ValueError("--reward clip needs --clip PATH; without one there is --reward incompressibility")
    if config.reward == "clip":
        path = Path(config.clip)
        if not path.exists():
            raise ValueError(f"there is no CLIP {path}; --clip takes a folder or a single file")
        tensor_shapes(weights_file(path) if path.is_dir() else path)
    read_prompts(config.prompts)


def recipe(method: str, checkpoint: bool) -> SRRLConfig:
    start = SRRL if checkpoint else SRRLConfig()
    if method == "ddpo":
        return replace(
            start,
            rounds=0,
            objective="ppo",
            group=4,
            prompts=8 if checkpoint else 21,
            lr=1e-4 if checkpoint else 3e-5,
            updates=2,
        )
    if method == "grpo":
        return replace(
            start,
            rounds=0,
            objective="ppo",
            group=4,
            prompts=8 if checkpoint else 21,
            lr=1e-4 if checkpoint else 3e-5,
            updates=2,
        )
    return start
