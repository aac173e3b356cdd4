"""Train a model that draws, judges its own pictures, turns them back into noise and draws again.

    python train.py                          SRRL from the shipped weights
    python train.py all                      everything from nothing: autoencoder, diffusion, reward, then SRRL
    python train.py autoencoder | diffusion | reward | srrl
    python train.py rlrig                    RL-RIG from the shipped weights; all --scenes graphs from nothing
    python train.py checker | actor          what it stands on
    python train.py vq | captioner | reason-sft | reason-grpo      ReasonGen-R1, a stage at a time
    python train.py srrl --base PATH --reward clip --clip PATH --prompts FILE      LoRA on Stable Diffusion

Every run leaves a folder: config.json, metrics.jsonl, weights, the state to resume from, and figures.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minireflect.checkpoints.ours import (
    REASON,
    RIG,
    load_autoencoder,
    load_codec,
    load_module,
    load_pipeline,
    load_reasongen,
    weights_folder,
)
from minireflect.config import (
    PRESETS,
    REASON_COMMANDS,
    RIG_COMMANDS,
    Command,
    Config,
    preset,
    read_config,
    to_dict,
)
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.methods.finetune import SAMPLER, SRRL, FinetuneConfig, finetune, read_prompts
from minireflect.methods.rlrig import load_parts
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.models.matcher import Matcher, MatcherConfig
from minireflect.pipeline import best_device
from minireflect.run import Interrupted, Run, RunError
from minireflect.stages import LAW_STAGES, REASON_STAGES, RIG_STAGES


@dataclass(frozen=True)
class Arguments:
    """Train a model that draws, judges its own pictures, turns them back into noise and draws again.

    Commands: `srrl` reinforces the shipped weights; `autoencoder`, `diffusion` and `reward` train what it stands on;
    `all` does everything from nothing. `rlrig` is the second system, on scene graphs; `checker` and `actor` train what it
    stands on, and with --scenes graphs so do `autoencoder` and `diffusion`. `vq`, `captioner`, `reason-sft` and `reason-grpo`
    are the stages of the third.
    """

    command: Annotated[Command, tyro.conf.Positional] = "srrl"  # what to train
    preset: Literal["smoke", "cpu", "gpu"] | None = None  # budget; by the device when not given
    out: Path | None = None  # run folder; the first free runs/COMMAND-N when not given
    resume: bool = False  # go on with the run in --out, as it was configured
    weights: Path | None = None  # run folder to start from; the shipped weights when not given
    device: Literal["cuda", "mps", "cpu"] | None = None  # the first of them that is there when not given
    finetune: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse(words: list[str]) -> Arguments:
    """Two passes: the preset, the base or the run to resume decides the defaults, then every field is an option (tyro)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset"), first.add_argument("--out", type=Path), first.add_argument("--device")
    first.add_argument("--resume", action="store_true"), first.add_argument("--base")
    first.add_argument("--scenes", default="laws")
    seen, _ = first.parse_known_args(words)
    device = seen.device or best_device()
    name = seen.preset or ("cpu" if device == "cpu" else "gpu")
    scenes = "graphs" if seen.scenes == "graphs" else "laws"  # tyro explains an unknown name
    config = preset(name if name in PRESETS else "cpu", scenes)
    if seen.base is not None:
        config = replace(config, srrl=SRRL, sampler=SAMPLER)
    default = Arguments(config=config)
    if seen.resume:
        if seen.out is None:
            raise RunError("--resume needs --out RUN: which run is to go on?")
        command, weights, finetuned, config = read_config(seen.out)
        default = Arguments(command=command, weights=weights, finetune=finetuned, config=config)
    args = tyro.cli(Arguments, args=words, default=default, prog="train.py")
    there = {
        k: v
        for k in ("base", "clip", "prompts", "tokenizer")
        if (v := getattr(args.finetune, k)) and Path(v).exists()
    }
    finetuned = replace(args.finetune, **{k: str(Path(v).resolve()) for k, v in there.items()})
    weights = args.weights and args.weights.resolve()
    return replace(args, device=device, preset=name, weights=weights, finetune=finetuned)


def free_folder(command: str) -> Path:
    """The first of runs/COMMAND-1, -2, ... that does not exist yet."""
    n = 1
    while (folder := Path("runs") / f"{command}-{n}").exists():
        n += 1
    return folder


def train(args: Arguments) -> None:
    config, base = args.config, args.finetune.base
    start, device = time.time(), torch.device(args.device)
    check_first(args)
    asked = {"command": args.command, "weights": args.weights and str(args.weights), **to_dict(config)}
    if base is not None:
        asked |= {"finetune": to_dict(args.finetune)}
    run = Run(args.out or free_folder(args.command), asked, args.resume)
    print(
        f"run folder {run.folder} · {args.preset} preset · {device} · {torch.get_num_threads()} threads · seed {config.seed}"
    )
    if base is not None:
        finetune(args.finetune, config.srrl, config.sampler, config.seed, run, device)
        print(f"done in {(time.time() - start) / 60:.1f} minutes; look at {run.folder / 'figures'}")
        return
    everything = RIG_STAGES if config.scenes == "graphs" else LAW_STAGES
    for stage in everything if args.command == "all" else [args.command]:
        folder = run.folder / "weights" if begins_from_nothing(args) else source_of(args)
        (LAW_STAGES | RIG_STAGES | REASON_STAGES)[stage](config, run, folder, device)
    print(f"done in {(time.time() - start) / 60:.1f} minutes; look at {run.folder / 'figures'}")


def begins_from_nothing(args: Arguments) -> bool:
    if args.command == "autoencoder":
        return not (args.config.autoencoder.continued or args.config.autoencoder.taught)
    return args.command == "all"


def source_of(args: Arguments) -> Path:
    """The folder with the weights to start from."""
    rig = args.command in RIG_COMMANDS or args.config.scenes == "graphs"
    tokens = args.command in REASON_COMMANDS and (args.command != "vq" or args.config.vq.continued)
    shipped = RIG if rig else REASON if tokens else None
    return weights_folder(args.weights or shipped)


def check_first(args: Arguments) -> None:
    """Fail on missing or broken weights, or steps that the schedule does not have, before a run folder is made."""
    schedule = Schedule(ScheduleConfig())
    for steps in (args.config.srrl.steps, args.config.sampler.steps, args.config.rlrig.loop.steps):
        schedule.table(steps, args.config.sampler.spacing)
    if args.finetune.base is not None:
        check_base(args)
        return
    config = args.config
    if args.command == "all":
        stages = (config.autoencoder, config.reward, config.checker, config.actor)
        going_on = [stage.continued for stage in stages] + [config.autoencoder.taught]
        if config.diffusion.continued != "nothing" or any(going_on):
            raise ValueError(
                "--autoencoder.continued, --diffusion.continued and the like go on from what exists; `all` starts from nothing: "
                "use `autoencoder`, `diffusion`, `reward` or `checker`"
            )
    if begins_from_nothing(args) or args.command == "captioner":  # takes along what weights there are
        return
    folder = source_of(args)
    if args.command == "autoencoder" or (
        args.command == "diffusion" and config.diffusion.continued == "nothing"
    ):
        load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    elif args.command == "rlrig":
        load_parts(folder)
    elif args.command == "reason-grpo" or (args.command == "reason-sft" and config.sft.continued):
        load_reasongen(folder)
    elif args.command == "reason-sft" or (args.command == "vq" and config.vq.continued):
        load_codec(folder)
    elif args.command == "vq":
        load_autoencoder(folder)
    else:
        load_pipeline(folder)
    if args.command == "srrl" or (args.command == "reward" and config.reward.continued):
        load_module(folder / "reward.safetensors", Matcher, MatcherConfig)


def check_base(args: Arguments) -> None:
    """The same for a real checkpoint; its tensors are read when the run begins."""
    if args.command != "srrl" or args.weights is not None:
        raise ValueError(
            "--base takes LoRA to a real checkpoint: it goes with the command srrl, and not with --weights"
        )
    if not Path(args.finetune.base).exists():
        raise ValueError(
            f"there is no checkpoint {args.finetune.base}; --base takes a diffusers folder or a single file"
        )
    if args.finetune.reward == "clip" and args.finetune.clip is None:
        raise ValueError("--reward clip needs --clip PATH; without one there is --reward incompressibility")
    read_prompts(args.finetune.prompts)


def main() -> int:
    try:
        train(parse(sys.argv[1:]))
        return 0
    except Interrupted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("train.py: stopped between two stages; what was saved can be resumed", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
