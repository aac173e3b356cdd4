"""What `train.py` can train, one function a stage: from the weights in a folder to weights and figures in the run's.

    autoencoder -> diffusion -> reward -> srrl

A stage that its run has finished is not done again.  The stages of scene graphs are in rig_stages.py.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import figures
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
from .evaluate import GraphScore, Score, evaluate, evaluate_loop, evaluation_graphs, graph_table, table
from .evaluate_reason import (
    ReasonScore,
    codec_table,
    evaluate_painter,
    evaluation_prompts,
    reader_table,
    reason_table,
)
from .methods.reasongen import train_reason_grpo
from .methods.rlrig import RIG_PARTS as PARTS
from .methods.rlrig import (
    Loop,
    controls,
    load_parts,
    loop_of,
    train_actor_grpo,
    train_editor,
    trained_controls,
)
from .methods.srrl import train_srrl
from .models.actor import Actor, ActorConfig
from .models.autoencoder import Autoencoder, AutoencoderConfig
from .models.matcher import Matcher, MatcherConfig
from .models.reasongen import ReasonGenConfig
from .models.tokenizer import Tokenizer
from .models.vq import Codec
from .pipeline import LatentDiffusion, ReasonPipeline
from .pretrain.actor import train_actor
from .pretrain.autoencoder import teach_autoencoder, train_autoencoder
from .pretrain.diffusion import GRAPH_NETWORKS, LAW_NETWORKS, train_diffusion
from .pretrain.matcher import train_captioner, train_checker, train_reward
from .pretrain.sft import lessons, reason_tokenizer, train_reasongen
from .pretrain.vq import refine_vq, train_vq
from .rl.checker import Checker, load_checker
from .rl.rewards import Reward, caption_reward, inspector_reward, judge_of, load_captioner, match_reward
from .run import Run, write_text
from .showcase import before_and_after, edit_strip, fixed_prompts, rounds_strip, thoughts_strip
from .streams import choices
from .world.data import Captioned, captioned_graphs, captioned_laws, recolored, training_pairs
from .world.render import render_pixels

# The stages of RL-RIG, see stages.py:  autoencoder -> diffusion -> checker and judge -> actor -> rlrig
# The stages of ReasonGen-R1, see stages.py:  vq -> captioner -> reason-sft -> reason-grpo
#
# Its judge is SRRL's learned reward, from the same folder if it is there, else the shipped one.  What reads rationales, the captioner, is handed on from
# stage to stage, and trained when `reason-grpo` wants it and the folder has none.


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
    if config.autoencoder.continued or config.autoencoder.taught:
        start, _ = load_module(folder / "autoencoder.safetensors", Autoencoder, AutoencoderConfig)
    if config.autoencoder.taught:
        model = teach_autoencoder(config.autoencoder, start, pixels, config.seed, run, device)
    else:
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
    save_pipeline(pipe, weights)
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
        train_srrl(config.srrl, config.seed, pipe, judge, texts, inspector_reward, run)
    finally:
        save_pipeline(pipe, weights, ("unet",))  # also when stopped: what was trained is never lost
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


LAW_STAGES = {"autoencoder": autoencoder, "diffusion": diffusion, "reward": reward, "srrl": srrl}


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


BEST_OF = (2, 4)  # without rationale, two pictures take more tokens than one with a rationale


def vq(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("vq"):
        return
    draw = choices(config.seed, "vq", "pictures")
    pixels, scenes, _ = training_pairs(config.vq.pictures // 2, config.world, draw)
    twins = np.stack([render_pixels(recolored(scene, draw)) for scene in scenes])
    if config.vq.continued:
        codec = load_codec(folder)
        refine_vq(config.vq, np.concatenate([pixels, twins]), config.seed, codec, run, device)
    else:
        autoencoder = load_autoencoder(folder)
        codec = Codec(autoencoder, train_vq(config.vq, pixels, twins, config.seed, autoencoder, run, device))
    save_codec(run.folder / "weights", codec)
    readable = codec_table(codec, config.reasoning)
    write_text(run.folder / "table.md", readable + "\n")
    print(readable)
    figures.training_curve(
        run.metrics("vq"), {"latents": "squared error of the latents"}, run.folder / "figures" / "vq.png"
    )
    run.finish("vq")


def captioner(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    """Learn to read rationales, and measure how well on combinations that no training has seen."""
    if run.is_done("captioner"):
        return
    weights, tokenizer = run.folder / "weights", reason_tokenizer(ReasonGenConfig.prompt)
    model = train_captioner(config.captioner, config.world, config.seed, tokenizer, run, device)
    save_module(weights / "captioner.safetensors", model, {"words": " ".join(tokenizer.words)})
    hand_on(folder, weights, "autoencoder", "vq")
    readable = reader_table(caption_reward(model, tokenizer), config.reasoning, device)
    write_text(run.folder / "captioner.md", readable + "\n")
    print(readable)
    figures.training_curve(
        run.metrics("captioner"), {"loss": "nats a word"}, run.folder / "figures" / "captioner.png"
    )
    run.finish("captioner")


def hand_on(folder: Path, weights: Path, *names: str) -> None:
    """Keep beside a run what a later stage will look for, if it is there."""
    for name in names:
        there, here = (place / f"{name}.safetensors" for place in (folder, weights))
        if there.exists() and not here.exists():
            shutil.copyfile(there, here)


def reason_sft(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("reason-sft"):
        return
    weights = run.folder / "weights"
    codec, start = load_codec(folder), None
    if config.sft.continued:
        first = load_reasongen(folder)
        start = first.model, first.tokenizer
    model, tokenizer = train_reasongen(config.sft, config.world, config.seed, codec, run, device, start)
    painter = ReasonPipeline(model, tokenizer, codec, writes_rationale=config.sft.rationales != "none")
    save_reasongen(weights, "reasongen", painter)
    hand_on(folder, weights, "captioner")
    figures.training_curve(
        run.metrics("reason-sft"),
        {"text": "nats a word", "image": "nats an image token"},
        run.folder / "figures" / "reason_sft.png",
    )
    judge = judge_of(folder, device)
    report(run, {"SFT": measured_painter(run, "SFT", painter, judge, config)})
    show(painter, judge, config, run)
    run.finish("reason-sft")


def reason_grpo(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    """Measure, reinforce, measure again with the same prompts and noise."""
    weights, judge, clock = run.folder / "weights", judge_of(folder, device), time.time()
    if not (weights / "base_reasongen.safetensors").exists():
        first = load_reasongen(folder)
        save_reasongen(
            weights,
            "base_reasongen",
            first._replace(writes_rationale=first.writes_rationale or config.grpo.freed),
        )
    painter, reader = load_reasongen(weights, "base_reasongen", device), None
    if config.grpo.reads and painter.writes_rationale:
        hand_on(folder, weights, "captioner")
        if not (weights / "captioner.safetensors").exists():
            captioner(config, run, folder, device)
        reader = load_captioner(weights, device)
    rows = {"SFT": measured_painter(run, "SFT", painter, judge, config)}
    for n in BEST_OF if config.grpo.controls else ():
        rows[f"SFT, best of {n}"] = measured_painter(run, f"SFT, best of {n}", painter, judge, config, n)

    def prompts(n: int, step: int, number: int) -> list[str]:
        return config.asked.draw(config.seed, n)(step * config.grpo.most + number)[0]

    known = None
    if config.grpo.recall:
        wanted = replace(config.grpo.lessons, rationales="true" if painter.writes_rationale else "none")
        known = lessons(wanted, config.world, config.seed, painter.tokenizer, painter.model.config, painter.codec, device)  # fmt: skip
    try:
        train_reason_grpo(config.grpo, config.seed, painter, judge, prompts, run, reader, known)
    finally:  # also when stopped: what was trained is never lost
        save_reasongen(weights, "reasongen", painter)
    rows["SFT + GRPO"] = measured_painter(run, "SFT + GRPO", painter, judge, config)
    report(run, rows, f"{(time.time() - clock) / 60:.1f} minutes")
    targets = {"text": config.grpo.text.target, "image": config.grpo.image.target}
    figures.reason_curves(run.metrics("reason-grpo"), targets, run.folder / "figures" / "reason_grpo.png")
    show(painter, judge, config, run)
    run.finish("reason-grpo")


def report(run: Run, rows: dict[str, ReasonScore], last: str = "") -> None:
    text = "\n\n".join([reason_table(rows), *([last] if last else [])])
    write_text(run.folder / "table.md", text + "\n")
    print(text)


def show(painter: ReasonPipeline, judge: Reward, config: Config, run: Run) -> None:
    """The first prompts of each kind, nothing picked."""
    texts = [p.text for p in evaluation_prompts(replace(config.reasoning, pictures=3))]
    thoughts_strip(
        painter, judge, texts, config.reasoning.sampling, config.seed, run.folder / "figures" / "thoughts.png"
    )


def measured_painter(
    run: Run, name: str, painter: ReasonPipeline, judge: Reward, config: Config, best_of: int = 1
) -> ReasonScore:
    """Measure, unless this run has done so before it was interrupted."""
    known = [row for row in run.metrics("evaluation") if row["model"] == name]
    if known:
        return ReasonScore(**known[-1]["score"])
    score = evaluate_painter(painter, judge, replace(config.reasoning, best_of=best_of), name)
    run.log("evaluation", 0, model=name, score=vars(score))
    return score


REASON_STAGES = {"vq": vq, "captioner": captioner, "reason-sft": reason_sft, "reason-grpo": reason_grpo}
