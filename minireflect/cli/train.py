"""minireflect train COMMAND: its options in two passes, the run folder, and the stages of the command."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro

from ..checkpoints.files import tensor_shapes
from ..checkpoints.ours import REASON, RIG, weights_folder
from ..checkpoints.parts import weights_file
from ..config import PRESETS, REASON_COMMANDS, Config, options_of, preset, read_config, stages_of, to_dict
from ..diffusion.schedule import Schedule, ScheduleConfig
from ..methods.finetune import SAMPLER, FinetuneConfig, read_prompts
from ..methods.srrl import recipe
from ..pipeline import best_device
from ..run import Interrupted, Run, RunError
from .commands import TRAINED
from .options import HELP, HELP_ALL, help_text

RIG_COMMANDS = ("checker", "actor", "rlrig")
COSTS = {"smoke": "seconds; it learns nothing", "gpu": "larger batches and budgets, for a CUDA GPU"}
TITLES = {
    "options": "run",
    "mix": "prompts in training",
    "sampler": "measured",
    "evaluation": "measured",
    "finetune": "checkpoint",
}


def main(words: list[str]) -> int:
    named = words[0] if words and not words[0].startswith("-") else None
    words = words[1:] if named else words
    command, config = defaults(named, words)
    if any(word in HELP for word in words):
        what = TRAINED[command][0]
        about = f"{what[0].upper()}{what[1:]}. Defaults stand behind the names; --help-all explains all."
        usage = f"minireflect train {command} [OPTIONS]"
        print(help_text(usage, about, options_of(command, config), TITLES, HELP_ALL in words))
        return 0
    try:
        train(command, parse(words, command, config))
        return 0
    except Interrupted as stop:
        print(f"minireflect train: {stop}", file=sys.stderr)
        return 130


def defaults(named: str | None, words: list[str]) -> tuple[str, Config]:
    """First pass: the run to resume, or preset, recipe and checkpoint, decide the defaults of all options."""
    usage = "minireflect train COMMAND [OPTIONS]"
    first = argparse.ArgumentParser(prog="minireflect train", usage=usage, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS)
    first.add_argument("--scenes", choices=("laws", "graphs"), default="laws")
    first.add_argument("--method", choices=("srrl", "ddpo", "grpo"), default="srrl")
    for name in ("--device", "--base", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    seen = first.parse_known_args(words)[0]
    if seen.resume and seen.out is None:
        raise RunError("--resume needs --out RUN: which run is to go on?")
    if seen.resume:
        command, config = read_config(Path(seen.out))
        if named not in (None, command):
            raise RunError(f"the run in {seen.out} is one of {command}, not of {named}")
        return command, config
    command = named or "srrl"
    real = seen.base is not None
    if real and command != "srrl":
        raise ValueError("--base trains a LoRA on a published checkpoint: it goes with the command srrl")
    name = seen.preset or ("gpu" if (seen.device or best_device()) == "cuda" else "cpu")
    config = preset(
        "cpu" if real and name == "gpu" else name, command, seen.scenes, recipe(seen.method, real)
    )
    if real:
        config = replace(config, sampler=SAMPLER, finetune=replace(config.finetune, base=seen.base))
    return command, replace(config, method=seen.method)


def parse(words: list[str], command: str, config: Config) -> Config:
    """Second pass: every option of the command.  Paths become absolute: a run is resumed from anywhere."""
    default = options_of(command, config)
    config = replace(
        config,
        **vars(tyro.cli(type(default), args=words, default=default, prog=f"minireflect train {command}")),
    )
    given = {name: getattr(config.finetune, name) for name in ("base", "clip", "prompts", "tokenizer")}
    there = {name: str(Path(path).resolve()) for name, path in given.items() if path and Path(path).exists()}
    weights = config.weights and config.weights.resolve()
    return replace(config, weights=weights, finetune=replace(config.finetune, **there))


def train(command: str, config: Config) -> None:
    """Check what the command starts from, make the run folder, do the stages."""
    from ..stages import Task, check, do  # with all that trains, measures and plots

    device = torch.device(config.device or best_device())
    label = config.method if command == "srrl" else command
    source = source_of(command, config)
    if source is not None:
        check(command, config, source)
    run = Run(config.out or free_folder(label), to_dict(command, config), config.resume)
    cost = COSTS.get(config.preset, f"about {TRAINED[command][1]} minutes on two cores")
    where = f"{device}, {torch.get_num_threads()} threads"
    print(f"{label} · run folder {run.folder} · seed {config.seed} · {where}")
    print(f"{config.preset} preset" + ("" if config.finetune.base else f": {cost}"))
    clock = time.time()
    do(Task(config, run, source or run.folder / "weights", device), *stages_of(command, config))
    print(f"done in {(time.time() - clock) / 60:.1f} minutes; look at {run.folder / 'figures'}")


def free_folder(label: str) -> Path:
    """The first of runs/LABEL-1, -2, ... that does not exist yet."""
    n = 1
    while (folder := Path("runs") / f"{label}-{n}").exists():
        n += 1
    return folder


def source_of(command: str, config: Config) -> Path | None:
    """The folder of the weights to start from; None where it is nothing, or a published checkpoint.

    Raises ValueError on what is missing or out of range.
    """
    schedule = Schedule(ScheduleConfig())
    for steps in (config.srrl.steps, config.sampler.steps, config.rlrig.loop.steps):
        schedule.table(steps)
    if config.finetune.base is not None:
        if config.weights is not None:
            raise ValueError("--weights is a run of ours: it does not go with --base, a published checkpoint")
        check_base(config.finetune)
        return None
    if command in ("all", "autoencoder"):
        return None
    graphs = command in RIG_COMMANDS or config.scenes == "graphs"
    return weights_folder(
        config.weights or (RIG if graphs else REASON if command in REASON_COMMANDS else None)
    )


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
