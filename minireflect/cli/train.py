"""minireflect train COMMAND: parse the options in two passes, create the run folder, run the stages."""

import argparse
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from .. import parallel
from ..checkpoints import ours
from ..config import CHOICES, Config, options_of, preset, read_config, to_dict
from ..methods.finetune import CLIPS, MEASURED, SAMPLER, FinetuneConfig, parsed
from ..methods.learn import UNREAD
from ..methods.srrl import recipe
from ..pipeline import best_device, chosen_device, note_guidance
from ..run import RewardFailed, Run, RunError, Unfinished, flat
from ..tracking import Tracking
from . import TRAINED, check_effect, lacks_memory, read, refuse, sentence

COSTS = {"smoke": "takes seconds, learns nothing", "gpu": "larger batches and budgets, for a CUDA GPU"}
UNSTARTED = ("all", "autoencoder")  # commands that start from random weights


def main(words: list[str]) -> int:
    """Run `minireflect train` with these arguments.  -> exit status"""
    named, words = (None, words) if not words or words[0].startswith("-") else (words[0], words[1:])
    train(parse(words, defaults(named, words)))
    return 0


def defaults(named: str | None, words: list[str]) -> Config:
    """First pass: the defaults of all options, from the run to resume, or from preset, method and --base."""
    first = argparse.ArgumentParser("minireflect train COMMAND", add_help=False, allow_abbrev=False)
    for name in (*CHOICES, "device", "base", "out"):
        first.add_argument(f"--{name}", nargs="?", const="")
    first.add_argument("--resume", action="store_true")
    first.error = refuse
    seen = first.parse_known_args(words)[0]
    # the second pass refuses values that are not among the choices
    chosen = {name: value for name, value in vars(seen).items() if value in CHOICES.get(name, ())}
    if not seen.out and (seen.resume or seen.out is not None):
        raise RunError("--out needs the folder of a run; --resume needs --out RUN, the run to continue")
    if seen.resume:
        config = read_config(Path(seen.out))
        if named not in (None, config.command):
            raise RunError(f"the run in {seen.out} is a run of {config.command}, not of {named}")
        return config
    command, method, real = named or "srrl", chosen.get("method", "srrl"), seen.base is not None
    if real and command != "srrl":
        raise ValueError("--base trains a LoRA on a published checkpoint; use it with the command srrl")
    name = chosen.get("preset") or ("gpu" if (seen.device or best_device()) == "cuda" else "cpu")
    name = "cpu" if real and name == "gpu" else name  # the recipes of checkpoints are already meant for a GPU
    config = replace(preset(name, command, chosen.get("scenes", "laws"), recipe(method, real)), method=method)
    if real:
        few = replace(config.evaluation, pictures=min(MEASURED, config.evaluation.pictures))
        config = replace(config, sampler=SAMPLER, evaluation=few, finetune=FinetuneConfig(base=seen.base))
    return config


def parse(words: list[str], config: Config) -> Config:
    """Second pass: all options of the command. Paths become absolute, to resume the run from any folder.

    Raises ValueError if an option was changed that has no effect.
    """
    about, usual = f"Train {TRAINED[config.command][0]}.", flat(to_dict(config))
    config = replace(config, **vars(read(words, f"train {config.command}", about, options_of(config))))
    given = {name: value for name, value in flat(to_dict(config)).items() if value != usual.get(name)}
    check_effect(given, idle(config))
    note_guidance(*(value for name, value in given.items() if name.endswith("guidance")))
    paths = {name: getattr(config.finetune, name) for name in ("base", "clip", "prompts", "tokenizer", "vae")}
    there = {name: str(Path(path).resolve()) for name, path in paths.items() if path and Path(path).exists()}
    weights = config.weights and config.weights.absolute()
    return replace(config, weights=weights, finetune=replace(config.finetune, **there))


def idle(config: Config) -> dict[str, list[str]]:
    """The options that have no effect beside the others, by reason; their names are those in config.json."""
    rig, names = "rlrig" in config.stages, {parsed(each)[1] for each in config.finetune.reward}
    srrl = config.srrl
    at, learner = ("rlrig.editor", config.rlrig.editor) if rig else ("srrl", srrl)
    scales = {srrl.guidance, config.sampler.guidance, *[srrl.w_renoise][: srrl.rounds]}
    return {
        f"with objective {learner.objective}": [f"{at}.{name}" for name in UNREAD[learner.objective]],
        "with --mode blind": ["srrl.wrong", "srrl.redraw"] * (srrl.mode == "blind"),
        "with guidance 1": ["finetune.negative"] * (scales == {1} and srrl.mode != "blind"),
        "with random weights at the start": ["weights"] * (config.command in UNSTARTED),
        "with these rewards": ["finetune.clip"] * names.isdisjoint(CLIPS[:2])
        + ["finetune.clip_activation"] * names.isdisjoint(CLIPS),
    }


def train(config: Config) -> None:
    """Create the run folder and run the stages; a start that fails leaves no folder."""
    from ..stages import Task, do  # imported late: --help does not need the training code

    device = parallel.start(chosen_device(config.device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in float32 networks
    label, source = config.method if config.command == "srrl" else config.command, source_of(config)
    folders = (Path("runs") / f"{label}-{n}" for n in count(1))
    folder = config.out or next(free for free in folders if not free.exists())
    run = Run(parallel.own_folder(folder, config.resume), to_dict(config), config.resume)
    cost = COSTS.get(config.preset, f"about {TRAINED[config.command][1]} minutes on two cores")
    several = f"{parallel.world()} processes, " if parallel.world() > 1 else ""
    where = f"{several}{device}, {torch.get_num_threads()} threads"
    print(f"{label} · run folder {folder} · seed {config.seed} · {where}")
    print(f"{config.preset} preset" + ("" if config.real else f": {cost}"))
    clock = time.time()
    try:
        run.tracking = Tracking(config.log, run.folder) if config.log and not parallel.rank() else None
        do(Task(config, run, source or run.folder / "weights", device), *config.stages)
    except KeyboardInterrupt as stop:
        if str(stop) or not any((run.folder / "state").glob("*.safetensors")):
            raise
        raise KeyboardInterrupt(f"stopped; continue the saved run with --resume --out {folder}") from stop
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        bug = isinstance(error, RuntimeError) and not (lacks_memory(error) or isinstance(error, RewardFailed))
        if run.abandon() or bug or isinstance(error, ValueError | BrokenPipeError):
            raise
        if isinstance(error, FloatingPointError):
            hint = "the last good state is kept; try a lower learning rate in another --out"
            raise Unfinished(f"{error}, in {run.at}; {hint}") from error
        said = f"{sentence(error)}, in {run.at}; the saved state is kept, continue with --resume"
        raise Unfinished(f"{said} --out {folder}") from error
    print(f"done in {(time.time() - clock) / 60:.1f} minutes; figures are in {folder / 'figures'}")
    parallel.finish()


def source_of(config: Config) -> Path | None:
    """The folder of the weights to start from; None for random weights or a published checkpoint."""
    if config.real and config.weights is not None:
        raise ValueError("--weights (a run of minireflect) cannot be combined with --base (a checkpoint)")
    if config.real or config.command in UNSTARTED:
        return None
    shipped = {"laws": ours.SHIPPED, "graphs": ours.RIG, "reason": ours.REASON}[config.kind]
    return ours.weights_folder(config.weights or shipped)
