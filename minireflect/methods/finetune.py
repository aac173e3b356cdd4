"""SRRL on a real checkpoint: the loop of srrl.py, with LoRA in place of the whole UNet, and a reward for real
pictures.

    minireflect train srrl --base PATH --reward clip --clip PATH --prompts counter_intuitive
    minireflect train srrl --base PATH --reward incompressibility --prompts FILE

Differs from training the small model: the base is frozen and held once, in half precision on a GPU.  Only A
and B of LoRA learn, in float32.  Latents and log-probabilities are float32.  The networks process
`micro_batch` pictures at a time, the same ones in rollout and update, so that the first ratio is exactly 1.

Differs from the synthetic world: no inspector can read the pictures.  Statistics that the reward does not
measure (brightness, edges), and a look at the pictures, show whether a higher reward is a better picture.
"""

import importlib
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..checkpoints.files import read_weights
from ..checkpoints.load import Given, load_checkpoint, load_clip
from ..checkpoints.lora import save_lora
from ..diffusion.schedule import Prediction
from ..disk import read_text
from ..models.clip import CLIP
from ..models.lora import LoRAConfig, add_lora
from ..models.tokenizer import BytePairs, NoVocabulary, PromptError
from ..pipeline import LatentDiffusion, Reward, SamplerConfig
from ..ranges import Checked, Count, Natural, quote
from ..rl.rewards import aesthetic_reward, clip_reward, compressibility, incompressibility, weighted
from ..run import Job, RewardFailed, keeping
from ..streams import choices, rng
from ..world.canvas import to_pixels, write_picture
from .srrl import Draw, SRRLConfig, train_srrl

PROMPTS = Path(__file__).parent.parent / "prompts"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
JPEG = {"incompressibility": incompressibility, "compressibility": compressibility}
MEASURED, SAMPLER = 16, SamplerConfig(steps=20, guidance=5.0)  # number of the pictures that are measured


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """A published checkpoint, and how it is run."""

    # Stable Diffusion 1.x, 2.x or SDXL, a diffusers folder or a single file, in place of the synthetic world
    base: str | None = None
    # with --base: folder with the vocabulary, for a base that brings none, as single files do
    tokenizer: str | None = None
    # with --base: pixels of a side, or height and width (default: what it was trained on)
    size: tuple[Count, ...] | None = None
    # with --base: another autoencoder, a folder or a file
    vae: str | None = None
    # with --base: prompt that guidance leads away from
    negative: str = ""
    # with --base: last blocks of the text encoder that are left out
    clip_skip: Natural = 0
    # with --base: what it predicts, if its files do not say so
    prediction: Prediction | None = None
    # of the base (default: bf16 on a GPU, fp32 on a CPU)
    precision: Literal["fp32", "bf16", "fp16"] | None = None


@dataclass(frozen=True)
class FinetuneConfig(CheckpointConfig):
    # reinforced: clip, pickscore=PATH, hps=PATH, aesthetic=HEAD, (in)compressibility, MODULE:FUNCTION;
    # several, as 0.5*clip 2*MODULE:FUNCTION, are normalised in their group and added
    reward: tuple[str, ...] = ("clip",)
    # CLIP, a folder or a file, for --reward clip and, as ViT-L/14, for aesthetic
    clip: str | None = None
    # activation of a CLIP whose files do not state it
    clip_activation: Literal["gelu", "quick_gelu"] | None = None
    # a file with a prompt a line, or animals, colours, relations, physical_law, counter_intuitive
    prompts: str = "animals"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    # pictures at once, in sampling and in learning; less needs less memory
    micro_batch: Count = 4
    # compute activations again in the backward pass: less memory, one more forward pass
    checkpointing: bool = False
    # save pictures and LoRA every N iterations (default: only at the end)
    every: Natural = 0


def read_prompts(name: str) -> list[str]:
    """The lines of a file, or of one of ours; empty lines and what follows # are left out.

    Raises Refusal.
    """
    path = Path(name)
    path = path if path.is_file() else PROMPTS / f"{name}.txt"
    if not path.is_file():
        ours = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise PromptError(f"there is no file of prompts {name}; ours are {ours}")
    lines = [line.strip() for line in read_text(path).splitlines()]
    if odd := [line for line in lines if "\0" in line]:  # UTF-16 can be UTF-8 as well
        raise PromptError(f"{path} is not a text file in UTF-8: there is a NUL in {quote(odd[0])}")
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise PromptError(f"there is no prompt in {path}")
    return prompts


def load_base(config: FinetuneConfig, device: torch.device) -> LatentDiffusion:
    """The checkpoint, in the precision and size that were asked for, on the device."""
    dtype = PRECISIONS[config.precision or ("bf16" if device.type == "cuda" else "fp32")]
    size = config.size[0] if config.size and len(config.size) == 1 else config.size
    if isinstance(size, tuple) and len(size) != 2:
        raise ValueError(f"--size takes one number, or height and width; got {size}")
    pipe = load_checkpoint(config.base, Given(dtype, config.tokenizer, config.prediction, size, config.vae))
    if isinstance(pipe.tokenizer, NoVocabulary):
        pipe.tokenizer([""])  # raises, and says what to give
    pipe.micro_batch, pipe.negative, pipe.clip_skip = config.micro_batch, config.negative, config.clip_skip
    pipe.unet.checkpointing = config.checkpointing
    return pipe.to(device)


def chosen_reward(config: FinetuneConfig, device: torch.device) -> Reward:
    """The rewards that were asked for, as one.  Raises ValueError when one needs a file and has none."""

    def clip_of(path: str | None, name: str) -> tuple[CLIP, BytePairs]:
        if path is None:
            other = "without one there is --reward incompressibility"
            raise ValueError(f"--reward {name} needs --clip PATH; {other}")
        quick = {None: None, "gelu": False, "quick_gelu": True}[config.clip_activation]
        clip, tokenizer = load_clip(path, config.tokenizer, quick)
        return clip.to(device), tokenizer

    def reward_of(asked: str) -> tuple[float, Reward]:
        found = re.fullmatch(r"(?:([\d.]+)\*)?([\w.]+(?::\w+)?)(?:=(.+))?", asked)
        if found is None:
            raise ValueError(f"--reward {asked!r} is not [WEIGHT*]NAME[=PATH] or [WEIGHT*]MODULE:FUNCTION")
        weight, name, path = float(found[1] or 1), found[2], found[3]
        if ":" in name:
            return weight, reward_of_module(name)
        if name in JPEG:
            return weight, JPEG[name]
        if name == "aesthetic" and path:
            return weight, aesthetic_reward(clip_of(config.clip, name)[0], read_weights(path))
        if name == "clip" or (name in ("pickscore", "hps") and path):
            clip, tokenizer = clip_of(path or config.clip, name)
            tokenizer([""])  # raises, and says what to give, where there is no vocabulary
            return weight, clip_reward(clip, tokenizer, scaled=name != "clip")
        names = "clip, pickscore=PATH, hps=PATH, aesthetic=HEAD, MODULE:FUNCTION"
        raise ValueError(f"--reward {asked} is none of {', '.join(JPEG)}, {names}")

    return weighted([reward_of(each) for each in config.reward])


def reward_of_module(name: str) -> Reward:
    """A function (images (b 3 h w) in [-1, 1], b prompts) -> (b), of a module here or on the Python path.

    Raises ValueError when there is none, RewardFailed when it or its module raises an error.
    """
    module, function = name.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        raise ValueError(f"--reward {name}: {error}; it is MODULE:FUNCTION, of a file here") from error
    except Exception as error:
        raise RewardFailed(name, error) from error
    if not callable(found):
        raise ValueError(f"--reward {name} is no function, but {quote(found)}")

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        try:
            return found(images, prompts)
        except Exception as error:
            raise RewardFailed(name, error) from error

    return reward


def draw_from(prompts: list[str], seed: int, n: int) -> Draw:
    """A function from a step to `n` prompts; each prompt is a family of its own."""

    def texts(step: int) -> tuple[list[str], list[str]]:
        drawn = choices(seed, "prompts", step).choices(prompts, k=n)
        return drawn, drawn

    return texts


def finetune(
    config: FinetuneConfig, srrl: SRRLConfig, pipe: LatentDiffusion, reward: Reward, job: Job
) -> None:
    """Train LoRA on a base, in place; its file is written even if the training is stopped."""
    add_lora(pipe.unet, config.lora, rng(job.seed, "lora"))
    prompts, folder = read_prompts(config.prompts), job.run.folder
    draw = draw_from(prompts, job.seed, srrl.prompts_per_iteration)

    def texts(step: int) -> tuple[list[str], list[str]]:
        if config.every and step and step % config.every == 0:  # the weights before this step
            save_lora(folder / "weights" / f"lora_{step}.safetensors", pipe.unet)
            how, noise = (srrl.steps, srrl.guidance, 0.0), rng(job.seed, "shown")
            images = pipe.generate(prompts[:4], *how, generator=noise)
            picture = rearrange(to_pixels(images), "b h w c -> h (b w) c")
            write_picture(picture, folder / "figures" / f"samples_{step}.png")
        return draw(step)

    with keeping(lambda: save_lora(folder / "weights" / "lora.safetensors", pipe.unet)):
        train_srrl(srrl, pipe, reward, texts, None, job)
