"""SRRL on a real checkpoint: the loop of srrl.py, with LoRA in place of the whole UNet, and a reward for real
pictures.

    minireflect train srrl --base PATH --reward clip --clip PATH --prompts counter_intuitive
    minireflect train srrl --base PATH --reward incompressibility --prompts FILE

What changes with the size of a checkpoint is said here and nowhere else: the base is frozen and held once, in
half precision on a GPU; only A and B learn, in float32; latents and log-probabilities stay float32; pictures
go through the networks `micro_batch` at a time, in rollout and update alike, so that the first ratio is
exactly 1.

Differs from the synthetic world: there is no inspector. Whether a higher reward is a better picture is seen
only in statistics that the reward does not ask for (brightness, edges) and in the pictures themselves.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from ..checkpoints.load import Given, load_checkpoint, load_clip
from ..checkpoints.lora import save_lora
from ..diffusion.schedule import Prediction
from ..models.lora import LoRAConfig, add_lora
from ..models.tokenizer import NoVocabulary, PromptError
from ..pipeline import LatentDiffusion, Reward, SamplerConfig
from ..ranges import Checked, Count
from ..rl.rewards import clip_reward, compressibility, incompressibility
from ..run import Job
from ..streams import choices, rng
from .srrl import Draw, SRRLConfig, train_srrl

PROMPTS = Path(__file__).parent.parent / "prompts"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLER = SamplerConfig(steps=20, guidance=5.0)  # of the pictures that are measured


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """A published checkpoint, and how it is run."""

    # Stable Diffusion 1.x, 2.x or SDXL, a diffusers folder or a single file, in place of the synthetic world
    base: str | None = None
    # with --base: folder with the vocabulary, for a base that brings none, as single files do
    tokenizer: str | None = None
    # with --base: pixels (default: what it was trained on)
    size: int | None = None
    # with --base: what it predicts, if its files do not say so
    prediction: Prediction | None = None
    # of the base (default: bf16 on a GPU, fp32 on a CPU)
    precision: Literal["fp32", "bf16", "fp16"] | None = None


@dataclass(frozen=True)
class FinetuneConfig(CheckpointConfig):
    # what is reinforced
    reward: Literal["clip", "incompressibility", "compressibility"] = "clip"
    # CLIP, a folder or a file, for --reward clip
    clip: str | None = None
    # a file with a prompt a line, or animals, colours, relations, physical_law, counter_intuitive
    prompts: str = "animals"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    # pictures at once, in sampling and in learning; less needs less memory
    micro_batch: Count = 4
    # hold fewer activations for the backward pass, for one more forward
    checkpointing: bool = False
    # pictures that are measured before and after
    shown: Count = 16


def read_prompts(name: str) -> list[str]:
    """The lines of a file, or of one of ours; empty lines and what follows # are left out.

    Raises PromptError.
    """
    path = Path(name)
    path = path if path.is_file() else PROMPTS / f"{name}.txt"
    if not path.is_file():
        ours = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise PromptError(f"there is no file of prompts {name}; ours are {ours}")
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not a text file in UTF-8; save it as one: {error}") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise PromptError(f"there is no prompt in {path}")
    return prompts


def load_base(config: FinetuneConfig, device: torch.device) -> LatentDiffusion:
    """The checkpoint, in the precision and size that were asked for, on the device."""
    dtype = PRECISIONS[config.precision or ("bf16" if device.type == "cuda" else "fp32")]
    pipe = load_checkpoint(config.base, Given(dtype, config.tokenizer, config.prediction, config.size))
    if isinstance(pipe.tokenizer, NoVocabulary):
        pipe.tokenizer([""])  # raises, and says what to give
    pipe.micro_batch = config.micro_batch
    pipe.unet.checkpointing = config.checkpointing
    return pipe.to(device)


def chosen_reward(config: FinetuneConfig, device: torch.device) -> Reward:
    """The reward that was asked for.  Raises ValueError when it needs a CLIP and has none."""
    if config.reward != "clip":
        return {"incompressibility": incompressibility, "compressibility": compressibility}[config.reward]
    if config.clip is None:
        raise ValueError("--reward clip needs --clip PATH; without one there is --reward incompressibility")
    clip, tokenizer = load_clip(config.clip, tokenizer=config.tokenizer)
    tokenizer([""])  # raises, and says what to give, where there is no vocabulary
    return clip_reward(clip.to(device), tokenizer)


def draw_from(prompts: list[str], seed: int, n: int) -> Draw:
    """A function from a step to `n` prompts; each is its own family."""

    def texts(step: int) -> tuple[list[str], list[str]]:
        drawn = choices(seed, "prompts", step).choices(prompts, k=n)
        return drawn, drawn

    return texts


def finetune(
    config: FinetuneConfig, srrl: SRRLConfig, pipe: LatentDiffusion, reward: Reward, job: Job
) -> None:
    """Train LoRA on a base, in place; its file is written even if the training is stopped."""
    add_lora(pipe.unet, config.lora, rng(job.seed, "lora"))
    texts = draw_from(read_prompts(config.prompts), job.seed, srrl.prompts_per_iteration)
    try:
        train_srrl(srrl, pipe, reward, texts, None, job)
    finally:
        save_lora(job.run.folder / "weights" / "lora.safetensors", pipe.unet)
