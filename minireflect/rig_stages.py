"""The stages of RL-RIG, see stages.py:  autoencoder -> diffusion -> checker and judge -> actor -> rlrig"""

import shutil
import time
from pathlib import Path

import torch

from . import figures
from .config import Config
from .evaluate import GraphScore, evaluate_loop, evaluation_graphs, graph_table
from .methods.rig_parts import PARTS, Loop, controls, load_parts, loop_of, trained_controls
from .methods.rlrig import train_actor_grpo, train_editor
from .methods.train_actor import train_actor
from .methods.train_checker import train_checker
from .models.actor import Actor, ActorConfig
from .models.matcher import Matcher, MatcherConfig
from .pipeline import load_module, load_pipeline, save_module
from .rl.checker import Checker, load_checker
from .run import Run, write_text
from .showcase import edit_strip
from .stages import autoencoder, diffusion


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
    pipe, start = load_pipeline(folder), None
    if config.actor.continued:
        start, _ = load_module(folder / "actor.safetensors", Actor, ActorConfig)
    model = train_actor(config.actor, config.seed, pipe.autoencoder, pipe.tokenizer, run, device, start)
    save_module(run.folder / "weights" / "actor.safetensors", model, {})
    figures.training_curve(
        run.metrics("actor"), {"loss": "nats a token"}, run.folder / "figures" / "actor.png"
    )
    run.finish("actor")


def rlrig(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    """Measure the controls, train the Actor and then the editor, measuring after each on the same graphs and noise."""
    weights, pictures = run.folder / "weights", run.folder / "figures"
    warmed_up = (
        "base_actor" if (folder / "base_actor.safetensors").exists() else "actor"
    )  # a finished run has both
    copy_weights(
        folder, weights, {name: name for name in PARTS if name != "actor"} | {warmed_up: "base_actor"}
    )
    judge, clock = load_checker(weights, "judge"), time.time()
    parts = load_parts(weights, actor="base_actor", editor="unet", device=device)
    rows = {}
    first = controls(parts, config.rlrig.loop) if config.rlrig.controls else {}
    for name, loop in first.items():
        rows[name] = measured_loop(run, name, loop, judge, config)
    for name, phase in (("phase 1", train_actor_grpo), ("phase 1 + 2", train_editor)):
        try:
            phase(config.rlrig, config.seed, parts, run)
        finally:  # also when stopped: what was trained is never lost
            save_module(weights / "actor.safetensors", parts.actor, {})
            save_module(weights / "editor.safetensors", parts.editor.unet, {})
        rows[name] = measured_loop(run, name, loop_of(parts, config.rlrig.loop), judge, config)
    last = trained_controls(parts, config.rlrig.loop) if config.rlrig.controls else {}
    for name, loop in last.items():
        rows[name] = measured_loop(run, name, loop, judge, config)
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


RIG_STAGES = {
    "autoencoder": autoencoder, "diffusion": diffusion, "checker": checker_and_judge, "actor": actor, "rlrig": rlrig,
}  # fmt: skip
