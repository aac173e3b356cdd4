"""SRRL on a real checkpoint: the loop of srrl.py, with LoRA in place of the whole UNet, and a reward for real pictures.

    python train.py srrl --base PATH --reward clip --clip PATH --prompts counter_intuitive
    python train.py srrl --base PATH --reward incompressibility --prompts FILE

What changes with the size of a checkpoint is said here and nowhere else: the base is frozen and held once, in half precision on
a GPU, only A and B learn, in float32; latents and log-probabilities stay float32; pictures go through the networks
`micro_batch` at a time, in rollout and update alike, so that the first ratio is exactly 1.

Differs from the synthetic world: there is no exact checker, so nothing says whether a higher reward is a better picture but
the statistics that the reward does not ask for (brightness, edges), and the pictures themselves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .. import figures
from ..checkpoints.load import load_checkpoint, load_clip
from ..checkpoints.lora import save_lora
from ..diffusion.schedule import Prediction
from ..evaluate import off_reward
from ..models.lora import LoRAConfig, add_lora, lora_layers
from ..models.tokenizer import NoVocabulary, PromptError
from ..pipeline import LatentDiffusion, SamplerConfig
from ..rl.rewards import Reward, clip_reward, compressibility, incompressibility
from ..run import Job, Run, write_text
from ..showcase import columns_of
from ..streams import choices, rng
from .srrl import SRRLConfig, train_srrl

PROMPTS = Path(__file__).parent.parent / "prompts"


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


SAMPLER = SamplerConfig(steps=20, guidance=5.0)


@dataclass(frozen=True)
class FinetuneConfig:
    # Stable Diffusion, folder or file: train LoRA on it in place of the synthetic world
    base: str | None = None
    # with --base: what is reinforced
    reward: Literal["clip", "incompressibility", "compressibility"] = "clip"
    clip: str | None = None  # CLIP, folder or file, for --reward clip
    prompts: str = "animals"  # with --base: a file with a prompt a line, or animals, colours, relations, physical_law, counter_intuitive
    tokenizer: str | None = None  # folder with the vocabulary of a base that brings none, as single files do
    size: int | None = None  # pixels; what the base was trained on when not given
    prediction: Prediction | None = None  # of a base that does not say it
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    # of the base; bf16 on a GPU, fp32 on a CPU when not given
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    micro_batch: int = 4  # pictures at once, in drawing and in learning; less needs less memory
    checkpointing: bool = False  # hold fewer activations for the backward pass, for one more forward
    compile: bool = False  # torch.compile: a minute or more at the start, faster after
    shown: int = 16  # pictures that are scored before and after

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.shown < 1:
            raise ValueError(
                f"micro_batch and shown must be at least 1, got {self.micro_batch} and {self.shown}"
            )


def read_prompts(name: str) -> list[str]:
    """The lines of a file, or of one of ours; empty lines and what follows # are left out.  Raises PromptError."""
    path = Path(name)
    if not path.is_file() and (PROMPTS / f"{name}.txt").is_file():
        path = PROMPTS / f"{name}.txt"
    if not path.is_file():
        ours = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise PromptError(f"there is no file of prompts {name}; ours are {ours}")
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not a text file: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise PromptError(f"there is no prompt in {path}")
    return prompts


def load_base(config: FinetuneConfig, device: torch.device) -> LatentDiffusion:
    """The checkpoint, in the precision and size that were asked for, on the device."""
    precision = config.precision or ("bf16" if device.type == "cuda" else "fp32")
    pipe = load_checkpoint(
        config.base, PRECISIONS[precision], config.tokenizer, config.prediction, config.size
    )
    if isinstance(pipe.tokenizer, NoVocabulary):
        pipe.tokenizer([""])  # raises, and says what to give
    pipe.micro_batch = config.micro_batch
    pipe.unet.checkpointing = config.checkpointing
    return pipe.to(device)


def load_judge(config: FinetuneConfig, device: torch.device) -> Reward:
    """The reward that was asked for.  Raises ValueError when it needs a CLIP and has none."""
    if config.reward == "incompressibility":
        return incompressibility
    if config.reward == "compressibility":
        return compressibility
    if config.clip is None:
        raise ValueError("--reward clip needs --clip PATH; without one there is --reward incompressibility")
    clip, tokenizer = load_clip(config.clip, tokenizer=config.tokenizer)
    tokenizer([""])
    return clip_reward(clip.to(device), tokenizer)


def draw_from(prompts: list[str], seed: int, n: int) -> Callable[[int], tuple[list[str], list[str]]]:
    """A function from a step to `n` prompts; each is its own family."""

    def texts(step: int) -> tuple[list[str], list[str]]:
        drawn = choices(seed, "prompts", step).choices(prompts, k=n)
        return drawn, drawn

    return texts


def finetune(
    config: FinetuneConfig,
    srrl: SRRLConfig,
    sampler: SamplerConfig,
    seed: int,
    run: Run,
    device: torch.device,
) -> LatentDiffusion:
    """Score the base, train LoRA on it, score it again with the same prompts and noise; figures and a table.  -> the trained pipeline"""
    judge, prompts = load_judge(config, device), read_prompts(config.prompts)
    pipe = load_base(config, device)
    shown = [prompts[i % len(prompts)] for i in range(config.shown)]
    before, first = scored(run, "base", pipe, judge, shown, sampler)
    add_lora(pipe.unet, config.lora, rng(seed, "lora"))
    if config.compile:
        pipe.unet.compile()
    clock = time.time()
    try:
        texts = draw_from(prompts, seed, srrl.prompts_per_iteration)
        train_srrl(srrl, pipe, judge, texts, None, Job(run, seed, device))
    finally:
        save_lora(run.folder / "weights" / "lora.safetensors", pipe.unet)  # also when stopped
    hours = (time.time() - clock) / 3600
    after, second = scored(run, "SRRL", pipe, judge, shown, sampler)
    rows = run.metrics("srrl")
    lines = ["| | " + " | ".join(before) + " |", "|---|" + "---|" * len(before)]
    for name, values in (("base", before), ("SRRL", after)):
        lines.append(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values.values()) + " |")
    cost = [
        f"{rows[-1][k]:,} {k.replace('_', ' ')}"
        for k in ("updates_total", "reward_calls", "unet_evaluations")
    ]
    drawn = sum(sum(r["pictures_by_round"]) for r in rows)
    cost += [
        f"{len(lora_layers(pipe.unet))} layers with LoRA",
        f"{drawn / hours:,.0f} pictures an hour, drawn and learnt from",
    ]
    if device.type == "cuda":
        cost.append(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    summary = "\n".join(lines) + f"\n\n{60 * hours:.1f} minutes · " + " · ".join(cost)
    write_text(run.folder / "table.md", summary + "\n")
    print(summary)
    pictures = run.folder / "figures"
    figures.reward_curve(rows, pictures / "reward.png", config.reward)
    figures.latent_moments(rows, pictures / "latents_by_round.png")
    columns_of({"base": first, "SRRL": second}, judge, shown, pictures / "before_and_after.png")
    return pipe


def scored(
    run: Run, name: str, pipe: LatentDiffusion, judge: Reward, prompts: list[str], sampler: SamplerConfig
) -> tuple[dict[str, float], Tensor]:
    """Draw with fixed noise, and log what the reward says and what it does not ask for.  -> the figures, the pictures (n 3 h w)"""
    images = []
    for i in range(0, len(prompts), pipe.micro_batch):
        texts = prompts[i : i + pipe.micro_batch]
        noise = rng(1_000, "evaluate", i)
        images.append(
            pipe.generate(texts, sampler.steps, sampler.guidance, sampler.eta, generator=noise).cpu()
        )
    drawn = torch.cat(images)
    rewards = judge(drawn.to(pipe.device), prompts).cpu()
    brightness, edges = off_reward(drawn)
    values = {
        "reward": rewards.mean().item(),
        "reward_se": (rewards.std() / len(rewards) ** 0.5).item() if len(rewards) > 1 else 0.0,
        "brightness": brightness,
        "edges": edges,
    }
    if not any(row["model"] == name for row in run.metrics("evaluation")):
        run.log("evaluation", 0, model=name, **values)
    return values, drawn
