"""SRRL on a real checkpoint: the loop of srrl.py, with LoRA and a reward for real pictures.

    minireflect train srrl --base PATH --reward clip --clip PATH --prompts counter_intuitive
    minireflect train srrl --base PATH --reward incompressibility --prompts FILE

Differs from training the small model:
- the base is frozen, and on a GPU in half precision; only LoRA's matrices A and B are trained, in float32
- latents and log-probabilities are float32
- the networks process `micro_batch` pictures at a time; the micro-batches of rollout and update are the same,
  so that the first PPO ratio is exactly 1
- there is no inspector; whether a higher reward means better pictures is judged by statistics that the reward
  does not measure (brightness, edges), and by looking at the pictures
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
from ..models.lora import LoRAConfig, add_lora
from ..models.tokenizer import PromptError
from ..pipeline import LatentDiffusion, Reward, SamplerConfig
from ..ranges import Checked, Count, Natural, expect, quote
from ..rl.rewards import aesthetic_reward, clip_reward, compressibility, incompressibility, weighted
from ..run import Job, RewardFailed, keeping
from ..streams import choices, rng
from ..world.canvas import to_pixels, write_picture
from ..world.published import read_benchmark
from .srrl import Draw, SRRLConfig, train_srrl

PROMPTS = Path(__file__).parent.parent / "prompts"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
JPEG = {"incompressibility": incompressibility, "compressibility": compressibility}
CLIPS = ("clip", "aesthetic", "pickscore", "hps")  # rewards that read a CLIP, the first two that of --clip
MEASURED, SAMPLER = 16, SamplerConfig(steps=20, guidance=5.0)  # number and sampler of measured pictures


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """A published checkpoint, and how to run it."""

    # real checkpoint: Stable Diffusion 1.x, 2.x or SDXL, as a diffusers folder or a single file
    base: str | None = None
    # with --base: folder with the vocabulary, if the base has none (single files)
    tokenizer: str | None = None
    # with --base: side in pixels, or height and width (default: size in training)
    size: tuple[Count, ...] | None = None
    # with --base: another autoencoder, a folder or a file
    vae: str | None = None
    # with --base: negative prompt
    negative: str = ""
    # with --base: number of last blocks of the text encoder to skip
    clip_skip: Natural = 0
    # with --base: prediction type, if its files do not state it
    prediction: Prediction | None = None
    # with --base: precision (default: bf16 on a GPU, fp32 on a CPU)
    precision: Literal["fp32", "bf16", "fp16"] | None = None


@dataclass(frozen=True)
class FinetuneConfig(CheckpointConfig):
    # clip, pickscore=PATH, hps=PATH, aesthetic=HEAD, incompressibility, compressibility, MODULE:FUNCTION;
    # or a weighted sum, as 0.5*clip 2*MODULE:FUNCTION, each normalised in its group
    reward: tuple[str, ...] = ("clip",)
    # CLIP, a folder or a file, for the rewards clip and aesthetic (ViT-L/14)
    clip: str | None = None
    # activation of CLIP, if its files do not state it
    clip_activation: Literal["gelu", "quick_gelu"] | None = None
    # file with one prompt a line, or animals, colours, relations, physical_law, counter_intuitive
    prompts: str = "animals"
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    # pictures that a network processes at once; fewer need less memory
    micro_batch: Count = 4
    # recompute activations in the backward pass, to save memory
    checkpointing: bool = False
    # save pictures and LoRA every N iterations (default: only at the end)
    every: Natural = 0


def read_prompts(name: str) -> list[str]:
    """Read the prompts of a file (`read_benchmark`), or of a file in `PROMPTS` by its name.

    Raises PromptError if there is no such file, and ValueError if it has no prompts.
    """
    path = Path(name) if Path(name).is_file() else PROMPTS / f"{name}.txt"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise PromptError(f"there is no file of prompts {name}; shipped ones are {shipped}")
    return [task["prompt"] for task in read_benchmark(path)]


def load_base(config: FinetuneConfig, device: torch.device) -> LatentDiffusion:
    """The checkpoint on the device, as the config asks.  Raises ValueError, also if it has no vocabulary."""
    dtype = PRECISIONS[config.precision or ("bf16" if device.type == "cuda" else "fp32")]
    size = config.size[0] if config.size and len(config.size) == 1 else config.size
    if isinstance(size, tuple) and len(size) != 2:
        raise ValueError(f"--size takes one number, or height and width, got {size}")
    pipe = load_checkpoint(config.base, Given(dtype, config.tokenizer, config.prediction, size, config.vae))
    pipe.tokenizer([""])  # without a vocabulary, raises an error that says which option to give
    pipe.micro_batch, pipe.negative, pipe.clip_skip = config.micro_batch, config.negative, config.clip_skip
    pipe.unet.checkpointing = config.checkpointing
    return pipe.to(device)


def parsed(asked: str) -> tuple[float, str, str | None]:
    """Weight, name and path of a reward such as "0.5*pickscore=PATH".  Raises ValueError."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\*)?([\w.]+(?::\w+)?)(?:=(.+))?", asked)
    if found is None or (found[3] and (":" in found[2] or found[2] in JPEG)):  # these have no file
        raise ValueError(f"--reward {asked!r} is not [WEIGHT*]NAME[=PATH] or [WEIGHT*]MODULE:FUNCTION")
    return expect(float(found[1] or 1), float, f"the weight in --reward {asked}"), found[2], found[3]


def chosen_reward(config: FinetuneConfig, device: torch.device) -> Reward:
    """The rewards of the config as one reward.  Raises ValueError if one is unknown, or lacks its file."""

    def reward_of(name: str, path: str | None) -> Reward:
        if ":" in name:
            return reward_of_module(name)
        if name in JPEG:
            return JPEG[name]
        if name not in CLIPS or not (path or name == "clip"):
            names = "clip, pickscore=PATH, hps=PATH, aesthetic=HEAD, MODULE:FUNCTION"
            raise ValueError(f"--reward {name} is not one of {', '.join(JPEG)}, {names}")
        source = config.clip if name == "aesthetic" else path or config.clip
        if source is None:
            raise ValueError(f"--reward {name} needs --clip PATH; --reward incompressibility does not")
        clip, tokenizer = load_clip(source, config.tokenizer, config.clip_activation)
        if name == "aesthetic":
            return aesthetic_reward(clip.to(device), read_weights(path), path)
        tokenizer([""])  # without a vocabulary, raises an error that says which option to give
        return clip_reward(clip.to(device), tokenizer, scaled=name != "clip")

    # an empty list stands for --reward without a name, which `parsed` refuses
    return weighted([(weight, reward_of(*named)) for weight, *named in map(parsed, config.reward or ("",))])


def reward_of_module(name: str) -> Reward:
    """Import a reward from a module in the working directory or on the Python path.

    name: MODULE:FUNCTION; the function maps images (b 3 h w) in [-1, 1] and b prompts to rewards (b).
    Raises ValueError if the import fails, RewardFailed if the module or the function raises an error.
    """
    module, function = name.split(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError, TypeError) as error:
        raise ValueError(f"--reward {name}: {error}; expected MODULE:FUNCTION") from error
    except (Exception, SystemExit) as error:
        raise RewardFailed(name, error) from error
    if not callable(found):
        raise ValueError(f"--reward {name} is not a function, but {quote(found)}")

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        try:
            return found(images, prompts)
        except (Exception, SystemExit) as error:
            raise RewardFailed(name, error) from error

    return reward


def draw_from(prompts: list[str], seed: int, n: int) -> Draw:
    """A function that draws `n` random prompts for an iteration; each prompt is its own family."""

    def texts(step: int) -> tuple[list[str], list[str]]:
        drawn = choices(seed, "prompts", step).choices(prompts, k=n)
        return drawn, drawn

    return texts


def finetune(
    config: FinetuneConfig, srrl: SRRLConfig, pipe: LatentDiffusion, reward: Reward, job: Job
) -> None:
    """Train LoRA on a base, in place.  The weights of LoRA are saved even if the training is stopped."""
    add_lora(pipe.unet, config.lora, rng(job.seed, "lora"))
    prompts, folder = read_prompts(config.prompts), job.run.folder
    draw = draw_from(prompts, job.seed, srrl.prompts_per_iteration)

    def texts(step: int) -> tuple[list[str], list[str]]:
        if config.every and step and step % config.every == 0:  # before the iteration `step`
            save_lora(folder / "weights" / f"lora_{step}.safetensors", pipe.unet)
            noise = rng(job.seed, "shown")
            images = pipe.generate(prompts[:4], srrl.steps, srrl.guidance, 0.0, generator=noise)
            picture = rearrange(to_pixels(images), "b h w c -> h (b w) c")
            write_picture(picture, folder / "figures" / f"samples_{step}.png")
        return draw(step)

    with keeping(lambda: save_lora(folder / "weights" / "lora.safetensors", pipe.unet)):
        train_srrl(srrl, pipe, reward, texts, None, job)
