"""What `train.py` can train, one function a stage: from the weights in a folder to weights and figures in the run's.

    autoencoder -> diffusion -> reward -> srrl

A stage that its run has finished is not done again.  The stages of scene graphs are in rig_stages.py.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import figures
from .config import Config
from .evaluate import Score, evaluate, table
from .methods.srrl import train_srrl
from .methods.train_autoencoder import teach_autoencoder, train_autoencoder
from .methods.train_diffusion import GRAPH_NETWORKS, LAW_NETWORKS, train_diffusion
from .methods.train_reward import train_reward
from .models.autoencoder import Autoencoder, AutoencoderConfig
from .models.matcher import Matcher, MatcherConfig
from .models.tokenizer import Tokenizer
from .pipeline import LatentDiffusion, load_module, load_pipeline, save_module
from .rl.rewards import Reward, checker, match_reward
from .run import Run, write_text
from .showcase import before_and_after, fixed_prompts, rounds_strip
from .streams import choices
from .world.data import Captioned, captioned_laws
from .world.edits import captioned_graphs


def captioned(config: Config, stage: str, pictures: int) -> Captioned:
    """What the autoencoder and the base learn from."""
    draw = choices(config.seed, stage, "pictures")
    if config.scenes == "graphs":
        return captioned_graphs(pictures, draw, config.world.told)
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


LAW_STAGES = {"autoencoder": autoencoder, "diffusion": diffusion, "reward": reward, "srrl": srrl}
