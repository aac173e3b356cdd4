"""Train a model that draws, judges its own pictures, turns them back into noise and draws again.

    python train.py                          SRRL from the shipped weights
    python train.py all                      everything from nothing: autoencoder, diffusion, reward, then SRRL
    python train.py autoencoder | diffusion | reward | srrl
    python train.py rlrig                    RL-RIG from the shipped weights: the Actor, then the editor
    python train.py checker | actor          what RL-RIG stands on; with --scenes graphs also autoencoder, diffusion, all
    python train.py srrl --base PATH --reward clip --clip PATH --prompts FILE      LoRA on Stable Diffusion

Every run leaves a folder: config.json, metrics.jsonl, weights, the state to resume from, and figures.
"""

import argparse
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from minireflect import figures
from minireflect.config import PRESETS, RIG_COMMANDS, Command, Config, preset, read_config, to_dict
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.evaluate import (
    GraphScore,
    Score,
    evaluate,
    evaluate_loop,
    evaluation_graphs,
    graph_table,
    table,
)
from minireflect.methods.finetune import SAMPLER, SRRL, FinetuneConfig, finetune, read_prompts
from minireflect.methods.rlrig import (
    PARTS,
    Loop,
    controls,
    load_parts,
    loop_of,
    train_actor_grpo,
    train_editor,
)
from minireflect.methods.srrl import train_srrl
from minireflect.methods.train_actor import train_actor
from minireflect.methods.train_autoencoder import train_autoencoder
from minireflect.methods.train_checker import train_checker
from minireflect.methods.train_diffusion import GRAPH_NETWORKS, LAW_NETWORKS, train_diffusion
from minireflect.methods.train_reward import train_reward
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.models.matcher import Matcher, MatcherConfig
from minireflect.models.tokenizer import Tokenizer
from minireflect.pipeline import (
    LatentDiffusion,
    best_device,
    load_module,
    load_pipeline,
    save_module,
    weights_folder,
)
from minireflect.rl.checker import RIG, Checker, load_checker
from minireflect.rl.rewards import Reward, checker, match_reward
from minireflect.run import Interrupted, Run, RunError, write_text
from minireflect.showcase import before_and_after, edit_strip, fixed_prompts, rounds_strip
from minireflect.streams import choices
from minireflect.world.data import Captioned, captioned_laws
from minireflect.world.edits import captioned_graphs


@dataclass(frozen=True)
class Arguments:
    """Train a model that draws, judges its own pictures, turns them back into noise and draws again.

    Commands: `srrl` reinforces the shipped weights; `autoencoder`, `diffusion` and `reward` train what it stands on;
    `all` does everything from nothing. `rlrig` is the second system, on scene graphs; `checker` and `actor` train what it
    stands on, and with --scenes graphs so do `autoencoder` and `diffusion`.
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
        folder = run.folder / "weights" if args.command == "all" else source_of(args)
        (LAW_STAGES | RIG_STAGES)[stage](config, run, folder, device)
    print(f"done in {(time.time() - start) / 60:.1f} minutes; look at {run.folder / 'figures'}")


def source_of(args: Arguments) -> Path:
    """The folder with the weights to start from."""
    rig = args.command in RIG_COMMANDS or args.config.scenes == "graphs"
    return weights_folder(RIG if rig and args.weights is None else args.weights)


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
        stages = (config.autoencoder, config.reward, config.checker)
        if config.diffusion.continued != "nothing" or any(stage.continued for stage in stages):
            raise ValueError(
                "--autoencoder.continued, --diffusion.continued and the like go on from what exists; `all` starts from nothing: "
                "use `autoencoder`, `diffusion`, `reward` or `checker`"
            )
        return
    folder = source_of(args)
    if args.command == "autoencoder":
        if config.autoencoder.continued:
            load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    elif args.command == "diffusion" and config.diffusion.continued == "nothing":
        load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    elif args.command == "rlrig":
        load_parts(folder)
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


def captioned(config: Config, stage: str, pictures: int) -> Captioned:
    """What the autoencoder and the base learn from."""
    draw = choices(config.seed, stage, "pictures")
    if config.scenes == "graphs":
        return captioned_graphs(pictures, draw)
    return captioned_laws(pictures, config.world, draw)


def autoencoder(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("autoencoder"):
        return
    network = AutoencoderConfig.flat() if config.scenes == "graphs" else AutoencoderConfig.toy()
    pixels = captioned(config, "autoencoder", config.autoencoder.pictures).pixels
    start = None
    if config.autoencoder.continued:
        start, _ = load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    model = train_autoencoder(config.autoencoder, network, pixels, config.seed, run, device, start)
    save_module(run.folder / "weights" / "autoencoder.safetensors", model, {})
    figures.training_curve(
        run.metrics("autoencoder"), {"mse": "squared error"}, run.folder / "figures" / "autoencoder.png"
    )
    run.finish("autoencoder")


def diffusion(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("diffusion"):
        return
    weights = run.folder / "weights"
    encoder, _ = load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    start = load_pipeline(folder) if config.diffusion.continued != "nothing" else None
    sizes = GRAPH_NETWORKS if config.scenes == "graphs" else LAW_NETWORKS
    data = captioned(config, "diffusion", config.diffusion.pictures)
    pipe = train_diffusion(config.diffusion, sizes, data, config.seed, encoder, run, device, start)
    pipe.save(weights)
    figures.training_curve(
        run.metrics("diffusion"), {"loss": "squared error"}, run.folder / "figures" / "diffusion.png"
    )
    run.finish("diffusion")


def reward(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("reward"):
        return
    pipe = load_pipeline(folder).to(device)
    start = None
    if config.reward.continued:
        start, _ = load_module(folder / "reward.safetensors", Matcher, MatcherConfig)
    model = train_reward(config.reward, config.seed, pipe, run, device, start)
    about = {"words": " ".join(pipe.tokenizer.words)}
    save_module(run.folder / "weights" / "reward.safetensors", model, about)
    figures.training_curve(
        run.metrics("reward"), {"loss": "cross-entropy"}, run.folder / "figures" / "reward.png"
    )
    run.finish("reward")


def srrl(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    """Evaluate the base, reinforce it, evaluate again with the same prompts, noise and sampler."""
    weights, pictures = run.folder / "weights", run.folder / "figures"
    if not (weights / "base_unet.safetensors").exists():
        parts = {
            "autoencoder": "autoencoder",
            "text_encoder": "text_encoder",
            "reward": "reward",
            "unet": "base_unet",
        }
        for source, name in parts.items():
            if folder != weights or name != source:
                shutil.copyfile(folder / f"{source}.safetensors", weights / f"{name}.safetensors")
    base = load_pipeline(weights, unet="base_unet").to(device)
    matcher, about = load_module(weights / "reward.safetensors", Matcher, MatcherConfig)
    judge = match_reward(matcher.to(device), Tokenizer(about["words"].split(), matcher.config.length))
    before = measured(run, "base", base, judge, config)
    pipe = load_pipeline(weights, unet="base_unet").to(device)
    clock = time.time()
    texts = config.prompts.draw(config.seed, config.srrl.prompts)
    try:
        train_srrl(config.srrl, config.seed, pipe, judge, texts, checker, run)
    finally:
        pipe.save(weights, ("unet",))  # also when stopped: what was trained is never lost
    minutes = (time.time() - clock) / 60
    after = measured(run, "SRRL", pipe, judge, config)
    text = table({"base": before, "SRRL": after})
    rows = run.metrics("srrl")
    cost = {k: rows[-1][k] for k in ("updates_total", "reward_calls", "unet_evaluations")}
    summary = f"{text}\n\n{minutes:.1f} minutes · " + " · ".join(
        f"{v:,} {k.replace('_', ' ')}" for k, v in cost.items()
    )
    write_text(run.folder / "table.md", summary + "\n")
    print(summary)
    level = [sum(getattr(s, key) for s in before.values()) / len(before) for key in ("reward", "accuracy")]
    figures.learning_curve(rows, pictures / "reward_and_truth.png", (level[0], level[1]))
    figures.latent_moments(rows, pictures / "latents_by_round.png")
    figures.accuracy_by_law({"base": before, "SRRL": after}, pictures / "accuracy_by_law.png")
    before_and_after(
        {"base": base, "SRRL": pipe}, judge, config.sampler, config.seed, pictures / "before_and_after.png"
    )
    rounds_strip(
        pipe, judge, [p.text for p in fixed_prompts(("unconventional",))], config.sampler,
        replace(config.srrl.reflection, rounds=3, steps=config.sampler.steps), config.seed, pictures / "rounds.png",
        blind=config.srrl.mode == "blind",
    )  # fmt: skip
    run.finish("srrl")


def measured(run: Run, name: str, pipe: LatentDiffusion, judge: Reward, config: Config) -> dict[str, Score]:
    """Evaluate, unless this run has done so before it was interrupted."""
    known = [row for row in run.metrics("evaluation") if row["model"] == name]
    if known:
        return {kind: Score(**values) for kind, values in known[-1]["scores"].items()}
    scores = evaluate(pipe, judge, config.sampler, config.evaluation)
    run.log("evaluation", 0, model=name, scores={kind: vars(s) for kind, s in scores.items()})
    return scores


def checker_and_judge(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    """The Checker, and the judge that is held out: another seed, another size, other pictures."""
    for offset, name in enumerate(("checker", "judge")):
        if run.is_done(name):
            continue
        pipe, start = load_pipeline(folder), None
        if config.checker.continued:
            start, _ = load_module(folder / f"{name}.safetensors", Matcher, MatcherConfig)
        model = train_checker(config.checker, name, config.seed + offset, pipe, run, device, start)
        about = {"words": " ".join(pipe.tokenizer.words)}
        save_module(run.folder / "weights" / f"{name}.safetensors", model, about)
        figures.training_curve(
            run.metrics(name), {"loss": "cross-entropy"}, run.folder / "figures" / f"{name}.png"
        )
        run.finish(name)


def actor(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("actor"):
        return
    pipe = load_pipeline(folder)
    model = train_actor(config.actor, config.seed, pipe.autoencoder, pipe.tokenizer, run, device)
    save_module(run.folder / "weights" / "actor.safetensors", model, {})
    figures.training_curve(
        run.metrics("actor"), {"loss": "nats a token"}, run.folder / "figures" / "actor.png"
    )
    run.finish("actor")


def rlrig(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    """Measure the controls, train the Actor and then the editor, measuring after each on the same graphs and noise."""
    weights, pictures = run.folder / "weights", run.folder / "figures"
    copy_weights(folder, weights, {name: name for name in PARTS} | {"actor": "base_actor"})
    judge, clock = load_checker(weights, "judge"), time.time()
    parts = load_parts(weights, actor="base_actor", editor="unet", device=device)
    rows = {}
    for name, loop in controls(parts, config.rlrig.loop).items():
        rows[name] = measured_loop(run, name, loop, judge, config)
    for name, phase in (("phase 1", train_actor_grpo), ("phase 1 + 2", train_editor)):
        try:
            phase(config.rlrig, config.seed, parts, run)
        finally:  # also when stopped: what was trained is never lost
            save_module(weights / "actor.safetensors", parts.actor, {})
            save_module(weights / "editor.safetensors", parts.editor.unet, {})
        rows[name] = measured_loop(run, name, loop_of(parts, config.rlrig.loop), judge, config)
    summary = f"{graph_table(rows)}\n\n{(time.time() - clock) / 60:.1f} minutes"
    write_text(run.folder / "table.md", summary + "\n")
    print(summary)
    stages = {"phase 1, the Actor": run.metrics("phase-1"), "phase 2, the editor": run.metrics("phase-2")}
    figures.phases(stages, pictures / "phases.png")
    figures.graph_bars(rows, pictures / "scores.png")
    graphs = evaluation_graphs(config.evaluation)[:6]
    edit_strip(parts, graphs, config.rlrig.loop, config.seed, pictures / "edits.png")
    run.finish("rlrig")


def measured_loop(run: Run, name: str, loop: Loop, judge: Checker, config: Config) -> GraphScore:
    """Measure a loop, unless this run has done so before it was interrupted."""
    known = [row for row in run.metrics("evaluation") if row["model"] == name]
    if known:
        return GraphScore(**known[-1]["score"])
    score = evaluate_loop(loop, judge, config.evaluation, name)
    run.log("evaluation", 0, model=name, score=vars(score))
    return score


def copy_weights(source: Path, target: Path, names: dict[str, str]) -> None:
    """Keep beside a run what it started from."""
    for name, kept in names.items():
        there, here = source / f"{name}.safetensors", target / f"{kept}.safetensors"
        if not here.exists() and there != here:
            shutil.copyfile(there, here)


LAW_STAGES = {"autoencoder": autoencoder, "diffusion": diffusion, "reward": reward, "srrl": srrl}
RIG_STAGES = {
    "autoencoder": autoencoder, "diffusion": diffusion, "checker": checker_and_judge, "actor": actor, "rlrig": rlrig,
}  # fmt: skip


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
