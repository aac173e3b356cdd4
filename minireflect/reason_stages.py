"""The stages of ReasonGen-R1, see stages.py:  vq -> captioner -> reason-sft -> reason-grpo

Its judge is SRRL's learned reward, from the same folder if it is there, else the shipped one.  What reads rationales, the captioner, is handed on from
stage to stage, and trained when `reason-grpo` wants it and the folder has none.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import figures
from .config import Config
from .evaluate_reason import (
    ReasonScore,
    codec_table,
    evaluate_painter,
    evaluation_prompts,
    reader_table,
    reason_table,
)
from .methods.reasongen import Painter, train_reason_grpo
from .methods.train_captioner import train_captioner
from .methods.train_reasongen import lessons, reason_tokenizer, train_reasongen
from .methods.train_vq import refine_vq, train_vq
from .models.autoencoder import Autoencoder, AutoencoderConfig
from .models.reasongen import ReasonGen, ReasonGenConfig
from .models.tokenizer import Tokenizer
from .models.vq import Codec, VQAutoencoder, VQConfig
from .pipeline import SHIPPED, load_module, save_module
from .rl.rewards import Reward, caption_reward, load_captioner, load_reward
from .run import Run, write_text
from .showcase import thoughts_strip
from .streams import choices
from .world.data import training_pairs, twin
from .world.render import render_pixels

BEST_OF = (2, 4)  # without rationale, two pictures take more tokens than one with a rationale
REASON = SHIPPED / "reasongen"  # the shipped weights of ReasonGen-R1


def load_painter(
    folder: str | Path = REASON, name: str = "reasongen", device: torch.device | str = "cpu"
) -> Painter:
    """ReasonGen-R1 from a folder with its weights: "reasongen", or the "base_reasongen" that reinforcement started from."""
    model, about = load_module(Path(folder) / f"{name}.safetensors", ReasonGen, ReasonGenConfig)
    words, thinks = Tokenizer(about["words"].split(), model.config.prompt), about.get("thinks") != "no"
    return Painter(model.to(device), words, load_codec(folder).to(device), thinks)


def save_painter(folder: Path, name: str, painter: Painter) -> None:
    about = {"words": " ".join(painter.tokenizer.words), "thinks": "yes" if painter.thinks else "no"}
    save_module(folder / f"{name}.safetensors", painter.model, about)
    save_codec(folder, painter.codec)


def load_codec(folder: str | Path) -> Codec:
    vq, _ = load_module(Path(folder) / "vq.safetensors", VQAutoencoder, VQConfig)
    return Codec(load_autoencoder(folder), vq)


def save_codec(folder: Path, codec: Codec) -> None:
    save_module(folder / "autoencoder.safetensors", codec.autoencoder, {})
    save_module(folder / "vq.safetensors", codec.vq, {})


def load_autoencoder(folder: str | Path) -> Autoencoder:
    """The folder's, else the shipped one."""
    return load_module(
        or_shipped(folder, "autoencoder") / "autoencoder.safetensors", Autoencoder, AutoencoderConfig
    )[0]


def judge_of(folder: str | Path, device: torch.device | str = "cpu") -> Reward:
    """The folder's, else the shipped one."""
    return load_reward(or_shipped(folder, "reward"), device)


def or_shipped(folder: str | Path, name: str) -> Path:
    return Path(folder) if (Path(folder) / f"{name}.safetensors").exists() else SHIPPED


def vq(config: Config, run: Run, folder: Path, device: torch.device) -> None:
    if run.is_done("vq"):
        return
    draw = choices(config.seed, "vq", "pictures")
    pixels, scenes, _ = training_pairs(config.vq.pictures // 2, config.world, draw)
    twins = np.stack([render_pixels(twin(scene, draw)) for scene in scenes])
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
        first = load_painter(folder)
        start = first.model, first.tokenizer
    model, tokenizer = train_reasongen(config.sft, config.world, config.seed, codec, run, device, start)
    painter = Painter(model, tokenizer, codec, thinks=config.sft.rationales != "none")
    save_painter(weights, "reasongen", painter)
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
        first = load_painter(folder)
        save_painter(weights, "base_reasongen", first._replace(thinks=first.thinks or config.grpo.freed))
    painter, reader = load_painter(weights, "base_reasongen", device), None
    if config.grpo.reads and painter.thinks:
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
        wanted = replace(config.grpo.lessons, rationales="true" if painter.thinks else "none")
        known = lessons(wanted, config.world, config.seed, painter.tokenizer, painter.model.config, painter.codec, device)  # fmt: skip
    try:
        train_reason_grpo(config.grpo, config.seed, painter, judge, prompts, run, reader, known)
    finally:  # also when stopped: what was trained is never lost
        save_painter(weights, "reasongen", painter)
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


def show(painter: Painter, judge: Reward, config: Config, run: Run) -> None:
    """The first prompts of each kind, nothing picked."""
    texts = [p.text for p in evaluation_prompts(replace(config.reasoning, pictures=3))]
    thoughts_strip(
        painter, judge, texts, config.reasoning.sampling, config.seed, run.folder / "figures" / "thoughts.png"
    )


def measured_painter(
    run: Run, name: str, painter: Painter, judge: Reward, config: Config, best_of: int = 1
) -> ReasonScore:
    """Measure, unless this run has done so before it was interrupted."""
    known = [row for row in run.metrics("evaluation") if row["model"] == name]
    if known:
        return ReasonScore(**known[-1]["score"])
    score = evaluate_painter(painter, judge, replace(config.reasoning, best_of=best_of), name)
    run.log("evaluation", 0, model=name, score=vars(score))
    return score


REASON_STAGES = {"vq": vq, "captioner": captioner, "reason-sft": reason_sft, "reason-grpo": reason_grpo}
