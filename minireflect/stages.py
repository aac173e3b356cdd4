"""The stages of `minireflect train`. A stage reads weights and writes weights, figures and a table.

    laws         autoencoder -> diffusion -> reward -> srrl               SRRL, DDPO or GRPO
    graphs       autoencoder -> diffusion -> checker, judge -> actor -> rlrig
    tokens       vq -> captioner -> reason-sft -> reason-grpo             ReasonGen-R1
    checkpoint   lora                                                     SRRL, DDPO, GRPO on Stable Diffusion

In a resumed run, finished stages are skipped, and models that were evaluated are not evaluated again.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from . import figures, report, showcase
from .checkpoints import ours
from .config import Config
from .disk import replacing, write_text
from .evaluate import Score, Table, evaluate, evaluate_rewards, law_bars, law_table
from .evaluate_graphs import evaluate_loop, evaluation_graphs, loop_bars
from .evaluate_reason import SAMPLING, codec_table, evaluate_reason, evaluation_prompts, table_row
from .methods import rlrig as rig
from .methods.finetune import chosen_reward, finetune, load_base, read_prompts
from .methods.reasongen import Rewards, train_reason_grpo
from .methods.srrl import train_srrl
from .models.autoencoder import FLAT_AUTOENCODER, TOY_AUTOENCODER, Autoencoder, Codec
from .models.lora import lora_layers
from .models.tokenizer import Tokenizer
from .pipeline import ReasonPipeline
from .pretrain.autoencoders import train_autoencoder, train_vq
from .pretrain.diffusion import GRAPH_BASE, LAW_BASE, train_diffusion
from .pretrain.matcher import train_captioner, train_checker, train_reward
from .pretrain.sft import make_examples, reason_tokenizer, train_actor, train_reasongen
from .rl.rewards import Reward, inspector_reward, load_captioner, load_checker, load_reward, reward_beside
from .run import Job, Run, keeping
from .streams import choices
from .world.data import Captioned, captioned_graphs, captioned_laws, recolored, training_pairs
from .world.laws import render_pixels
from .world.prompts import all_texts

BEST_OF = (2, 4)  # controls: two pictures without rationale take more tokens than one with a rationale


class Task(NamedTuple):
    """A run of a command."""

    config: Config
    run: Run
    source: Path  # folder of the weights to start from
    device: torch.device

    @property
    def weights(self) -> Path:
        """The folder of the run's weights."""
        return self.run.folder / "weights"

    @property
    def job(self) -> Job:
        """The arguments of the training loops."""
        return Job(self.run, self.config.seed, self.device)

    def figure(self, name: str) -> Path:
        """The path of a figure of the run."""
        return self.run.folder / "figures" / f"{name}.png"

    def save(self, name: str, network: torch.nn.Module, words: Tokenizer | None = None) -> None:
        """Save a network, and its vocabulary if it reads text."""
        about = {} if words is None else {"words": " ".join(words.words)}
        ours.save_module(self.weights / f"{name}.safetensors", network, about)

    def finish(self, name: str, *kept: str, **labels: str) -> None:
        """Finish a stage: copy the weights `kept`, and plot the metrics in `labels` with their labels."""
        self.hand_on(*kept)
        lines = [figures.Line(label, "step", key, span=25) for key, label in labels.items()]
        panel = figures.Panel(f"{name}: training", "step", ", ".join(labels.values()), lines, log=True)
        self.plot(name.replace("-", "_"), self.run.metrics(name), panel)

    def plot(self, name: str, rows: list[dict], *panels: figures.Panel) -> None:
        """Plot panels with the metrics in `rows`."""
        figures.curves(self.figure(name), *(figures.of_run(panel, rows) for panel in panels))

    def report(self, table: Table, last: str = "") -> None:
        """Print a table and save it as table.md; `last` is a line below it."""
        write_text(self.run.folder / "table.md", f"{table.markdown}\n\n{last}".rstrip() + "\n")
        print(f"{table}\n\n{last}".rstrip())

    def hand_on(self, *names: str, **renamed: str) -> None:
        """Copy weights from the source folder to the run, if they exist there and not yet in the run.

        `renamed` copies the file of the first name to the second name.
        """
        for name, kept in ({n: n for n in names} | renamed).items():
            there, here = self.source / f"{name}.safetensors", self.weights / f"{kept}.safetensors"
            if there.exists() and not here.exists():
                with replacing(here) as copy:
                    copy.write(there.read_bytes())

    def scores(self) -> dict[str, Score]:
        """The logged scores of each evaluated model; for SRRL, by kind of prompts."""
        return {r["model"]: r.get("scores") or r["score"] for r in self.run.metrics("evaluation")}

    def measured(self, model: str, measure: Callable[..., Score], *args: object) -> Score:
        """The logged scores of a model; if there are none, the result of `measure(*args)`, now logged."""
        if model not in self.scores():
            found = measure(*args)
            by_kind = all(isinstance(value, dict) for value in found.values())
            self.run.log("evaluation", 0, model=model, **{"scores" if by_kind else "score": found})
        return self.scores()[model]


# ------------------------------------------------------------ laws: SRRL, DDPO, GRPO
def captioned(config: Config, stage: str, pictures: int) -> Captioned:
    """The training data of the autoencoder and the diffusion model: pictures with captions."""
    draw = choices(config.seed, stage, "pictures")
    graphs = config.scenes == "graphs"
    return captioned_graphs(pictures, draw) if graphs else captioned_laws(pictures, config.world, draw)


def autoencoder(task: Task) -> None:
    """Train the autoencoder."""
    config = task.config
    sizes = FLAT_AUTOENCODER if config.scenes == "graphs" else TOY_AUTOENCODER
    pixels = captioned(config, "autoencoder", config.autoencoder.pictures).pixels
    task.save("autoencoder", train_autoencoder(config.autoencoder, sizes, pixels, task.job))
    task.finish("autoencoder", mse="squared error")


def diffusion(task: Task) -> None:
    """Train the base, text encoder and UNet, on the latents of the autoencoder."""
    config = task.config
    encoder, _ = ours.load_module(task.source / "autoencoder.safetensors", Autoencoder)
    sizes = GRAPH_BASE if config.scenes == "graphs" else LAW_BASE
    data = captioned(config, "diffusion", config.diffusion.pictures)
    ours.save_pipeline(train_diffusion(config.diffusion, sizes, data, encoder, task.job), task.weights)
    task.finish("diffusion", loss="squared error")


def reward(task: Task) -> None:
    """Train the learned reward, on pictures corrupted with autoencoder and base."""
    pipe = ours.load_pipeline(task.source).to(task.device)
    task.save("reward", train_reward(task.config.reward, pipe, task.job), pipe.tokenizer)
    task.finish("reward", *ours.PARTS, loss="cross-entropy")


def srrl(task: Task) -> None:
    """Evaluate the base, train it, and evaluate again with the same prompts, noise and sampler."""
    config, run, method = task.config, task.run, task.config.method.upper()
    # check the files and the vocabulary before anything is copied
    load_reward(task.source)
    ours.load_pipeline(task.source).tokenizer(all_texts())
    task.hand_on("autoencoder", "text_encoder", "reward", unet="base_unet")
    base, pipe = (ours.load_pipeline(task.weights, unet="base_unet").to(task.device) for _ in range(2))
    reward, how = load_reward(task.weights, task.device), (config.sampler, config.evaluation)
    pipe.table(config.srrl.steps)  # raises if the schedule has fewer steps
    before = task.measured("base", evaluate, base, reward, *how)
    clock, texts = time.time(), partial(config.mix.draw, config.seed, config.srrl.prompts_per_iteration)
    shown = [p.text for p in showcase.fixed_prompts(("unconventional",))]
    with keeping(partial(ours.save_pipeline, pipe, task.weights, ("unet",))):
        watch = showcase.album(pipe, reward, shown[:4], config.srrl, task.job)
        train_srrl(config.srrl, pipe, reward, texts, inspector_reward, task.job._replace(watch=watch))
    minutes = (time.time() - clock) / 60
    after = task.measured(method, evaluate, pipe, reward, *how)
    rows, columns = run.metrics("srrl"), {"base": before, method: after}
    task.report(law_table(columns), f"{minutes:.1f} minutes · {cost_of(rows)}")
    level = [sum(s[key] for s in before.values()) / len(before) for key in ("reward", "accuracy")]
    names, colors = ("reward", "right"), (figures.REWARD, figures.TRUTH)
    levels = [(f"{n}: test prompts, before", v, color) for n, v, color in zip(names, level, colors)]
    task.plot("reward_and_truth", rows, figures.LEARNING._replace(levels=levels))
    task.plot("latents_by_round", rows, *figures.LATENTS)
    words = "right by the inspector, share; lines: 95 % intervals"
    figures.bars(task.figure("accuracy_by_law"), words, law_bars(columns))
    texts = [p.text for p in showcase.fixed_prompts()]
    pictures = showcase.same_noise({"base": base, method: pipe}, texts, config.sampler, config.seed)
    showcase.compare(pictures, reward, texts, task.figure("before_and_after"))
    reflection = replace(config.srrl.reflection, rounds=3)
    asked = None if config.srrl.mode == "blind" else reward
    rounds = showcase.sampled_rounds(pipe, shown, config.sampler, reflection, config.seed, asked)
    showcase.compare(rounds, reward, shown, task.figure("rounds"))


def cost_of(rows: list[dict]) -> str:
    """The cost of a run of SRRL as text."""
    return " · ".join(f"{value:,} {name}" for name, value in report.cost(rows).items())


def lora(task: Task) -> None:
    """Train a LoRA on a published checkpoint; evaluate the reward and statistics that it does not measure."""
    config, method = task.config.finetune, task.config.method.upper()
    prompts, reward = read_prompts(config.prompts), chosen_reward(config, task.device)
    pipe, batches = load_base(config, task.device), replace(task.config.evaluation, batch=config.micro_batch)
    srrl, several = task.config.srrl, hasattr(reward, "plain")
    if several and srrl.group == 1:
        raise ValueError("several rewards are normalised in a group: --group 1 leaves nothing to compare")
    if srrl.objective == "regress" and (several or config.reward == ("compressibility",)):
        raise ValueError("--objective regress takes one reward without a weight, which is never negative")
    pipe.table(srrl.steps)  # raises if the schedule has fewer steps
    shown = [prompts[i % len(prompts)] for i in range(batches.pictures)]
    images, plain = {}, getattr(reward, "plain", reward)  # of several rewards the sum as it is, to be shown

    def measure(name: str) -> None:
        images[name], score = evaluate_rewards(pipe, plain, shown, task.config.sampler, batches)
        task.measured(name, lambda: score)

    measure("base")
    clock = time.time()
    watch = showcase.album(pipe, plain, [*dict.fromkeys(prompts)][:2], srrl, task.job)
    finetune(config, srrl, pipe, reward, task.job._replace(watch=watch))
    hours = (time.time() - clock) / 3600
    measure(method)
    rows = task.run.metrics("srrl")
    sampled = sum(sum(row["pictures_by_round"]) for row in rows)
    cost = f"{60 * hours:.1f} minutes · {cost_of(rows)} · {len(lora_layers(pipe.unet))} layers with LoRA"
    cost += f" · {sampled / hours:,.0f} pictures an hour, sampled and learnt from"
    if task.device.type == "cuda":
        cost += f" · peak memory {torch.cuda.max_memory_allocated(task.device) / 2**30:.1f} GiB"
    task.report(Table("checkpoint", task.scores()), cost)
    task.plot("reward", rows, figures.UNREAD._replace(ylabel=" + ".join(config.reward)))
    task.plot("latents_by_round", rows, *figures.LATENTS)
    first = {name: x[:8] for name, x in images.items()}
    showcase.compare(first, plain, shown[:8], task.figure("before_and_after"), read=False)


# ------------------------------------------------------------ graphs: RL-RIG
def checker(task: Task, name: str = "checker") -> None:
    """Train the Checker, or the judge, which has another seed, size and other training pictures."""
    pipe, job = ours.load_pipeline(task.source), task.job
    if name == "judge":
        job = job._replace(seed=job.seed + 1)
    task.save(name, train_checker(task.config.checker, name, pipe, job), pipe.tokenizer)
    task.finish(name, *ours.PARTS, loss="cross-entropy")


def actor(task: Task) -> None:
    """Train RL-RIG's Actor to imitate a script."""
    pipe = ours.load_pipeline(task.source)
    task.save("actor", train_actor(task.config.actor, pipe.autoencoder, pipe.tokenizer, task.job))
    task.finish("actor", *ours.PARTS, "checker", "judge", loss="nats a token")


def rlrig(task: Task) -> None:
    """Evaluate the controls, train Actor and editor, and evaluate after each on the same graphs and noise."""
    config, run, weights = task.config, task.run, task.weights
    # the source may be a finished run, which also has the Actor before reinforcement learning
    first = "base_actor" if (task.source / "base_actor.safetensors").exists() else "actor"
    rig.load_parts(task.source, actor=first)  # checks the files before anything is copied
    load_checker(task.source, "judge")
    task.hand_on(*(part for part in rig.RIG_PARTS if part != "actor"), **{first: "base_actor"})
    judge, clock = load_checker(weights, "judge"), time.time()
    parts = rig.load_parts(weights, actor="base_actor", editor="unet", device=task.device)
    how = judge, config.evaluation
    for name, loop in rig.controls(parts, config.rlrig.loop).items() if config.rlrig.controls else ():
        task.measured(name, evaluate_loop, loop, *how, name)
    for name, phase in (("phase 1", rig.train_actor_grpo), ("phase 1 + 2", rig.train_editor)):
        kept = {"editor": parts.editor.unet, "actor": parts.actor}
        with keeping(lambda kept=kept: [task.save(*pair) for pair in kept.items()]):
            phase(config.rlrig, parts, task.job)
        task.measured(name, evaluate_loop, rig.loop_of(parts, config.rlrig.loop), *how, name)
    task.report(Table("test graphs", task.scores()), f"{(time.time() - clock) / 60:.1f} minutes")
    stages = {"phase 1, the Actor": run.metrics("phase-1"), "phase 2, the editor": run.metrics("phase-2")}
    panels = [figures.EDITS._replace(title=f"{name}: {figures.EDITS.title}") for name in stages]
    figures.curves(task.figure("phases"), *map(figures.of_run, panels, stages.values()))
    figures.bars(task.figure("scores"), "mean SG-IoU, share right", loop_bars(task.scores()))
    graphs = evaluation_graphs(config.evaluation)[:6]
    showcase.edit_strip(parts, graphs, config.rlrig.loop, config.seed, task.figure("edits"))


# ------------------------------------------------------------ tokens: ReasonGen-R1
def vq(task: Task) -> None:
    """Train the codebooks of image tokens."""
    config, source = task.config, ours.load_autoencoder(task.source)
    draw = choices(config.seed, "vq", "pictures")
    pixels, scenes, _ = training_pairs(config.vq.pictures // 2, config.world, draw)
    twins = np.stack([render_pixels(recolored(scene, draw)) for scene in scenes])
    codec = Codec(source, train_vq(config.vq, pixels, twins, source, task.job))
    ours.save_codec(task.weights, codec)
    task.report(codec_table(codec, config.evaluation))
    task.finish("vq", latents="squared error of the latents")


def captioner(task: Task) -> None:
    """Train the captioner; `scripts/measure.py captioner` evaluates it."""
    config, tokenizer = task.config, reason_tokenizer()
    task.save("captioner", train_captioner(config.captioner, config.world, tokenizer, task.job), tokenizer)
    task.finish("captioner", "autoencoder", "vq", loss="nats a word")


def reason_sft(task: Task) -> None:
    """Train ReasonGen-R1 on pictures and rationales, and evaluate it."""
    config = task.config
    start = ours.load_reasongen(task.source) if config.sft.continued else None
    pipe = train_reasongen(config.sft, config.world, ours.load_codec(task.source), task.job, start)
    ours.save_reasongen(task.weights, "reasongen", pipe)
    task.finish("reason-sft", "captioner", text="nats a word", image="nats an image token")
    reward = reward_beside(task.source, task.device)
    task.measured("SFT", evaluate_reason, pipe, reward, config.evaluation, "SFT")
    show_reasongen(task, pipe, reward)


def reason_grpo(task: Task) -> None:
    """Evaluate, train with GRPO, and evaluate again with the same prompts and noise."""
    config, weights, clock = task.config, task.weights, time.time()
    reward = reward_beside(task.source, task.device)
    first = ours.load_reasongen(task.source)
    task.run.once("reason-grpo", lambda: ours.save_reasongen(weights, "base_reasongen", first), "begun")
    pipe, reader = ours.load_reasongen(weights, "base_reasongen", task.device), None
    if config.grpo.read_rationales and pipe.writes_rationale:
        task.hand_on("captioner")
        if not (task.source / "captioner.safetensors").exists():
            do(task, "captioner")
        reader = load_captioner(weights, task.device)

    def measure(name: str, best_of: int = 1) -> None:
        task.measured(name, evaluate_reason, pipe, reward, config.evaluation, name, SAMPLING, best_of)

    def prompts(n: int, step: int, number: int) -> list[str]:
        return config.mix.draw(config.seed, n, step * config.grpo.max_resamples + number)[0]

    measure("SFT")
    for n in BEST_OF if config.grpo.controls else ():
        measure(f"SFT, best of {n}", n)
    wanted = replace(config.grpo.examples, rationales="true" if pipe.writes_rationale else "none")
    known = make_examples(wanted, config.world, pipe, task.job) if config.grpo.recall else None
    with keeping(partial(ours.save_reasongen, weights, "reasongen", pipe)):
        train_reason_grpo(config.grpo, pipe, Rewards(reward, reader), prompts, known, task.job)
    measure("SFT + GRPO")
    targets = [("target, text", config.grpo.text_entropy, figures.REWARD)]
    targets.append(("target, image", config.grpo.image_entropy, figures.TRUTH))
    share, entropy, weight = figures.TOKENS
    task.plot("reason_grpo", task.run.metrics("reason-grpo"), share, entropy._replace(levels=targets), weight)
    show_reasongen(task, pipe, reward, f"{(time.time() - clock) / 60:.1f} minutes")


def show_reasongen(task: Task, pipe: ReasonPipeline, reward: Reward, last: str = "") -> None:
    """Report the scores of all models, and plot samples of the first prompts of each kind."""
    task.report(Table("test prompts", {name: table_row(s) for name, s in task.scores().items()}), last)
    texts = [p.text for p in evaluation_prompts(replace(task.config.evaluation, pictures=3))]
    showcase.rationale_strip(pipe, reward, texts, SAMPLING, task.config.seed, task.figure("thoughts"))


STAGES: dict[str, Callable[[Task], None]] = {
    "autoencoder": autoencoder, "diffusion": diffusion, "reward": reward, "srrl": srrl, "lora": lora,
    "checker": checker, "judge": partial(checker, name="judge"), "actor": actor, "rlrig": rlrig,
    "vq": vq, "captioner": captioner, "reason-sft": reason_sft, "reason-grpo": reason_grpo,
}  # fmt: skip


def do(task: Task, *names: str) -> None:
    """Run the stages that the run has not finished."""
    for name in names:
        task.run.once(name, partial(STAGES[name], task))
