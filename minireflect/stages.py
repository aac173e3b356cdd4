"""What `minireflect train` can train, one function a stage: from the weights in one folder to weights, figures and a table in a run's.

    laws         autoencoder -> diffusion -> reward -> srrl               SRRL, DDPO or GRPO
    graphs       autoencoder -> diffusion -> checker, judge -> actor -> rlrig
    tokens       vq -> captioner -> reason-sft -> reason-grpo             ReasonGen-R1
    checkpoint   lora                                                     SRRL, DDPO or GRPO on Stable Diffusion

A stage that its run has finished is not done again, and a model that its run has measured is not measured again.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from . import figures, showcase
from .checkpoints.ours import (
    load_autoencoder,
    load_codec,
    load_module,
    load_pipeline,
    load_reasongen,
    save_codec,
    save_module,
    save_pipeline,
    save_reasongen,
)
from .config import Config
from .evaluate import Score, Table, evaluate, law_table
from .evaluate_graphs import GraphScore, evaluate_loop, evaluation_graphs
from .evaluate_reason import SAMPLING, ReasonScore, codec_table, evaluate_reason, evaluation_prompts
from .methods.finetune import finetune
from .methods.reasongen import Rewards, train_reason_grpo
from .methods.rlrig import RIG_PARTS, controls, load_parts, loop_of, train_actor_grpo, train_editor
from .methods.srrl import train_srrl
from .models.autoencoder import Autoencoder, AutoencoderConfig
from .models.reasongen import ReasonGenConfig
from .models.tokenizer import Tokenizer
from .models.vq import Codec
from .pipeline import ReasonPipeline
from .pretrain.actor import train_actor
from .pretrain.autoencoder import train_autoencoder
from .pretrain.diffusion import GRAPH_BASE, LAW_BASE, train_diffusion
from .pretrain.matcher import train_captioner, train_checker, train_reward
from .pretrain.sft import make_examples, reason_tokenizer, train_reasongen
from .pretrain.vq import train_vq
from .rl.checker import load_checker
from .rl.rewards import Reward, inspector_reward, load_captioner, load_reward, reward_beside
from .run import Job, Run, write_text
from .streams import choices
from .world.data import Captioned, captioned_graphs, captioned_laws, recolored, training_pairs
from .world.render import render_pixels

BEST_OF = (2, 4)  # without a rationale, two pictures take more tokens than one with a rationale
RECORD = TypeVar("RECORD")


class Task(NamedTuple):
    """One run of a command: its options, its folder, the folder of the weights that it starts from, where it computes."""

    config: Config
    run: Run
    source: Path
    device: torch.device

    @property
    def weights(self) -> Path:
        return self.run.folder / "weights"

    @property
    def job(self) -> Job:
        return Job(self.run, self.config.seed, self.device)

    def figure(self, name: str) -> Path:
        return self.run.folder / "figures" / f"{name}.png"

    def save(self, name: str, network: nn.Module, words: Tokenizer | None = None) -> None:
        """Write a network, and the vocabulary that it reads."""
        about = {} if words is None else {"words": " ".join(words.words)}
        save_module(self.weights / f"{name}.safetensors", network, about)

    def curve(self, name: str, **labels: str) -> None:
        """Plot values of a stage's metrics, each with its label."""
        figures.training_curve(self.run.metrics(name), labels, self.figure(name.replace("-", "_")))

    def report(self, table: Table, last: str = "") -> None:
        """Print a table and keep it in the run folder, there as Markdown; `last` is a line below it."""
        write_text(self.run.folder / "table.md", f"{table.markdown}\n\n{last}".rstrip() + "\n")
        print(f"{table}\n\n{last}".rstrip())

    def hand_on(self, *names: str, **renamed: str) -> None:
        """Copy weight files that a later stage looks for from the source, if they exist there and not yet here."""
        for name, kept in ({n: n for n in names} | renamed).items():
            there, here = self.source / f"{name}.safetensors", self.weights / f"{kept}.safetensors"
            if there.exists() and not here.exists():
                draft = here.with_suffix(".tmp")
                shutil.copyfile(there, draft)
                os.replace(draft, here)

    def measured(self, model: str, record: type[RECORD], measure: Callable[[], RECORD]) -> RECORD:
        """The score of a model, or its scores by kind of prompt: measured now, unless this run has logged them already."""
        for row in self.run.metrics("evaluation"):
            if row["model"] == model and "scores" in row:
                return {kind: record(**values) for kind, values in row["scores"].items()}
            if row["model"] == model:
                return record(**row["score"])
        found = measure()
        by_kind = isinstance(found, dict)
        values = {"scores": {k: vars(s) for k, s in found.items()}} if by_kind else {"score": vars(found)}
        self.run.log("evaluation", 0, model=model, **values)
        return found


# ------------------------------------------------------------------------------------------------ laws: SRRL, DDPO, GRPO
def captioned(config: Config, stage: str, pictures: int) -> Captioned:
    """The pictures and captions that the autoencoder and the diffusion model are trained on."""
    draw = choices(config.seed, stage, "pictures")
    if config.scenes == "graphs":
        return captioned_graphs(pictures, draw)
    return captioned_laws(pictures, config.world, draw)


def autoencoder(task: Task) -> None:
    config = task.config
    sizes = AutoencoderConfig.flat() if config.scenes == "graphs" else AutoencoderConfig.toy()
    pixels = captioned(config, "autoencoder", config.autoencoder.pictures).pixels
    model = train_autoencoder(config.autoencoder, sizes, pixels, task.job)
    task.save("autoencoder", model)
    task.curve("autoencoder", mse="squared error")


def diffusion(task: Task) -> None:
    config = task.config
    encoder, _ = load_module(task.source / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    sizes = GRAPH_BASE if config.scenes == "graphs" else LAW_BASE
    data = captioned(config, "diffusion", config.diffusion.pictures)
    pipe = train_diffusion(config.diffusion, sizes, data, encoder, task.job)
    save_pipeline(pipe, task.weights)
    task.curve("diffusion", loss="squared error")


def reward(task: Task) -> None:
    pipe = load_pipeline(task.source).to(task.device)
    model = train_reward(task.config.reward, pipe, task.job)
    task.save("reward", model, pipe.tokenizer)
    task.hand_on("autoencoder", "text_encoder", "unet")
    task.curve("reward", loss="cross-entropy")


def srrl(task: Task) -> None:
    """Measure the base, reinforce it, measure again with the same prompts, noise and sampler."""
    config, run, method = task.config, task.run, task.config.method.upper()
    task.hand_on("autoencoder", "text_encoder", "reward", unet="base_unet")
    base, pipe = (load_pipeline(task.weights, unet="base_unet").to(task.device) for _ in range(2))
    judge = load_reward(task.weights, task.device)
    before = task.measured("base", Score, lambda: evaluate(base, judge, config.sampler, config.evaluation))
    clock, texts = time.time(), config.mix.draw(config.seed, config.srrl.prompts_per_iteration)
    try:
        train_srrl(config.srrl, pipe, judge, texts, inspector_reward, Job(run, config.seed, task.device))
    finally:
        save_pipeline(pipe, task.weights, ("unet",))  # also when stopped: what was trained is never lost
    minutes = (time.time() - clock) / 60
    after = task.measured(method, Score, lambda: evaluate(pipe, judge, config.sampler, config.evaluation))
    rows, columns = run.metrics("srrl"), {"base": before, method: after}
    task.report(law_table(columns), f"{minutes:.1f} minutes · {cost_of(rows)}")
    level = [sum(getattr(s, key) for s in before.values()) / len(before) for key in ("reward", "accuracy")]
    figures.learning_curve(rows, task.figure("reward_and_truth"), (level[0], level[1]))
    figures.latent_moments(rows, task.figure("latents_by_round"))
    figures.accuracy_by_law(columns, task.figure("accuracy_by_law"))
    models = {"base": base, method: pipe}
    showcase.before_and_after(models, judge, config.sampler, config.seed, task.figure("before_and_after"))
    shown = [p.text for p in showcase.fixed_prompts(("unconventional",))]
    reflection = replace(config.srrl.reflection, rounds=3)
    asked = None if config.srrl.mode == "blind" else judge
    rounds = showcase.sampled_rounds(pipe, shown, config.sampler, reflection, config.seed, asked)
    showcase.rounds_strip(rounds, judge, shown, task.figure("rounds"))


def cost_of(rows: list[dict]) -> str:
    """What a run of SRRL took, by the last line of its metrics."""
    keys = ("updates_total", "reward_calls", "unet_evaluations")
    return " · ".join(f"{rows[-1][key]:,} {key.replace('_', ' ')}" for key in keys)


def lora(task: Task) -> None:
    """The same on a published checkpoint."""
    config = task.config
    finetune(config.finetune, config.srrl, config.sampler, config.seed, task.run, task.device)


# ------------------------------------------------------------------------------------------------------- graphs: RL-RIG
def question_answerer(name: str, offset: int) -> Callable[[Task], None]:
    """The stage of the Checker, or of the held-out judge: the same task with another seed, size and pictures."""

    def stage(task: Task) -> None:
        pipe, job = load_pipeline(task.source), task.job._replace(seed=task.config.seed + offset)
        model = train_checker(task.config.checker, name, pipe, job)
        task.save(name, model, pipe.tokenizer)
        task.hand_on("autoencoder", "text_encoder", "unet")
        task.curve(name, loss="cross-entropy")

    return stage


def actor(task: Task) -> None:
    pipe = load_pipeline(task.source)
    model = train_actor(task.config.actor, pipe.autoencoder, pipe.tokenizer, task.job)
    task.save("actor", model)
    task.hand_on("autoencoder", "text_encoder", "unet", "checker", "judge")
    task.curve("actor", loss="nats a token")


def rlrig(task: Task) -> None:
    """Measure the controls, train the Actor and then the editor, measuring after each on the same graphs and noise."""
    config, run, weights, source = task.config, task.run, task.weights, task.source
    first = (
        "base_actor" if (source / "base_actor.safetensors").exists() else "actor"
    )  # a finished run has both
    task.hand_on(*(part for part in RIG_PARTS if part != "actor"), **{first: "base_actor"})
    judge, clock, rows = load_checker(weights, "judge"), time.time(), {}
    parts = load_parts(weights, actor="base_actor", editor="unet", device=task.device)

    def measure(loops: dict) -> None:
        for name, loop in loops.items():
            score = lambda: evaluate_loop(loop, judge, config.evaluation, name)  # noqa: B023, E731  called at once
            rows[name] = task.measured(name, GraphScore, score)

    if config.rlrig.controls:
        measure(controls(parts, config.rlrig.loop))
    for name, phase in (("phase 1", train_actor_grpo), ("phase 1 + 2", train_editor)):
        try:
            phase(config.rlrig, parts, task.job)
        finally:  # also when stopped: what was trained is never lost
            task.save("actor", parts.actor)
            task.save("editor", parts.editor.unet)
        measure({name: loop_of(parts, config.rlrig.loop)})
    table = Table("held-out graphs", {name: vars(score) for name, score in rows.items()})
    task.report(table, f"{(time.time() - clock) / 60:.1f} minutes")
    stages = {"phase 1, the Actor": run.metrics("phase-1"), "phase 2, the editor": run.metrics("phase-2")}
    figures.phases(stages, task.figure("phases"))
    figures.graph_bars(rows, task.figure("scores"))
    graphs = evaluation_graphs(config.evaluation)[:6]
    showcase.edit_strip(parts, graphs, config.rlrig.loop, config.seed, task.figure("edits"))


# ------------------------------------------------------------------------------------------------- tokens: ReasonGen-R1
def vq(task: Task) -> None:
    config, source = task.config, load_autoencoder(task.source)
    draw = choices(config.seed, "vq", "pictures")
    pixels, scenes, _ = training_pairs(config.vq.pictures // 2, config.world, draw)
    twins = np.stack([render_pixels(recolored(scene, draw)) for scene in scenes])
    codec = Codec(source, train_vq(config.vq, pixels, twins, source, task.job))
    save_codec(task.weights, codec)
    task.report(codec_table(codec, config.evaluation))
    task.curve("vq", latents="squared error of the latents")


def captioner(task: Task) -> None:
    """Train the reader of rationales; `scripts/measure.py captioner` measures it."""
    config, tokenizer = task.config, reason_tokenizer(ReasonGenConfig.prompt)
    model = train_captioner(config.captioner, config.world, tokenizer, task.job)
    task.save("captioner", model, tokenizer)
    task.hand_on("autoencoder", "vq")
    task.curve("captioner", loss="nats a word")


def reason_sft(task: Task) -> None:
    config = task.config
    start = load_reasongen(task.source) if config.sft.continued else None
    pipe = train_reasongen(config.sft, config.world, load_codec(task.source), task.job, start)
    save_reasongen(task.weights, "reasongen", pipe)
    task.hand_on("captioner")
    task.curve("reason-sft", text="nats a word", image="nats an image token")
    judge = reward_beside(task.source, task.device)
    task.report(Table("held-out prompts", {"SFT": measured_pictures(task, "SFT", pipe, judge).row}))
    show_rationales(task, pipe, judge)


def reason_grpo(task: Task) -> None:
    """Measure, reinforce, measure again with the same prompts and noise."""
    config, weights, clock = task.config, task.weights, time.time()
    judge = reward_beside(task.source, task.device)
    if not (weights / "base_reasongen.safetensors").exists():
        save_reasongen(weights, "base_reasongen", load_reasongen(task.source))
    pipe, reader = load_reasongen(weights, "base_reasongen", task.device), None
    if config.grpo.read_rationales and pipe.writes_rationale:
        task.hand_on("captioner")
        if not (weights / "captioner.safetensors").exists():
            do(task, "captioner")
        reader = load_captioner(weights, task.device)
    rows = {"SFT": measured_pictures(task, "SFT", pipe, judge)}
    for n in BEST_OF if config.grpo.controls else ():
        rows[f"SFT, best of {n}"] = measured_pictures(task, f"SFT, best of {n}", pipe, judge, n)

    def prompts(n: int, step: int, number: int) -> list[str]:
        return config.mix.draw(config.seed, n)(step * config.grpo.max_resamples + number)[0]

    known = None
    if config.grpo.recall:
        wanted = replace(config.grpo.examples, rationales="true" if pipe.writes_rationale else "none")
        known = make_examples(wanted, config.world, pipe, task.job)
    try:
        train_reason_grpo(config.grpo, pipe, Rewards(judge, reader), prompts, known, task.job)
    finally:  # also when stopped: what was trained is never lost
        save_reasongen(weights, "reasongen", pipe)
    rows["SFT + GRPO"] = measured_pictures(task, "SFT + GRPO", pipe, judge)
    table = Table("held-out prompts", {name: score.row for name, score in rows.items()})
    task.report(table, f"{(time.time() - clock) / 60:.1f} minutes")
    targets = {"text": config.grpo.text_entropy, "image": config.grpo.image_entropy}
    figures.reason_curves(task.run.metrics("reason-grpo"), targets, task.figure("reason_grpo"))
    show_rationales(task, pipe, judge)


def measured_pictures(
    task: Task, name: str, pipe: ReasonPipeline, judge: Reward, best_of: int = 1
) -> ReasonScore:
    config = task.config.evaluation
    score = lambda: evaluate_reason(pipe, judge, config, name, best_of=best_of)  # noqa: E731
    return task.measured(name, ReasonScore, score)


def show_rationales(task: Task, pipe: ReasonPipeline, judge: Reward) -> None:
    """A figure of the first prompts of each kind, nothing picked."""
    config = task.config
    texts = [p.text for p in evaluation_prompts(replace(config.evaluation, pictures=3))]
    showcase.thoughts_strip(pipe, judge, texts, SAMPLING, config.seed, task.figure("thoughts"))


STAGES: dict[str, Callable[[Task], None]] = {
    "autoencoder": autoencoder, "diffusion": diffusion, "reward": reward, "srrl": srrl, "lora": lora,
    "checker": question_answerer("checker", 0), "judge": question_answerer("judge", 1), "actor": actor, "rlrig": rlrig,
    "vq": vq, "captioner": captioner, "reason-sft": reason_sft, "reason-grpo": reason_grpo,
}  # fmt: skip
NEEDS: dict[str, tuple[Callable[[Path], object], ...]] = {  # what loads the weights that a command starts from
    "diffusion": (lambda folder: load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig),),
    "reward": (load_pipeline,), "srrl": (load_pipeline, load_reward),
    "checker": (load_pipeline,), "actor": (load_pipeline,), "rlrig": (load_parts, lambda folder: load_checker(folder, "judge")),
    "vq": (load_autoencoder,), "reason-sft": (load_codec,), "reason-grpo": (load_reasongen,),
}  # fmt: skip


def check(command: str, source: Path) -> None:
    """Load what a command starts from, so that a missing or broken file is named before a run folder exists.  Raises WeightsError."""
    for load in NEEDS.get(command, ()):
        load(source)


def do(task: Task, *names: str) -> None:
    """Do the stages that the run has not finished."""
    for name in names:
        if not task.run.is_done(name):
            STAGES[name](task)
            task.run.finish(name)
