"""Every option of every training command in one nested record, the presets, and what config.json keeps of it.

A record stands beside the loop that reads it; this file joins them.  A command has its own records only.
"""

import json
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .evaluate import EvaluationConfig
from .methods.finetune import FinetuneConfig
from .methods.reasongen import ReasonRLConfig
from .methods.rlrig import RLRIGConfig
from .methods.srrl import SRRLConfig
from .pipeline import SamplerConfig
from .pretrain.actor import ACTOR_TRAINING
from .pretrain.autoencoder import AutoencoderTraining
from .pretrain.diffusion import DiffusionTraining
from .pretrain.matcher import CAPTIONER_TRAINING, CHECKER_TRAINING, RewardTraining
from .pretrain.optimise import Training
from .pretrain.sft import ReasonTraining
from .pretrain.vq import VQTraining
from .world.data import WorldConfig
from .world.prompts import PromptMix

FLAT = tyro.conf.arg(name="")  # a record whose options carry no prefix


@dataclass(frozen=True)
class Config:
    """What a run is configured with; the defaults are the preset cpu."""

    # budget (default: gpu on a CUDA GPU)
    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    # of every random stream
    seed: int = 0
    # run folder (default: runs/COMMAND-1, -2, ...)
    out: Path | None = None
    # continue the run in --out, with its options
    resume: bool = False
    # run to start from (default: shipped weights)
    weights: Path | None = None
    # default: the first that is there
    device: Literal["cuda", "mps", "cpu"] | None = None
    # what the pictures show: physical laws or scene graphs
    scenes: Literal["laws", "graphs"] = "laws"
    # sets the defaults of what follows
    method: Literal["srrl", "ddpo", "grpo"] = "srrl"
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    diffusion: DiffusionTraining = field(default_factory=DiffusionTraining)
    reward: RewardTraining = field(default_factory=RewardTraining)
    srrl: SRRLConfig = field(default_factory=SRRLConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checker: Training = CHECKER_TRAINING
    actor: Training = ACTOR_TRAINING
    rlrig: RLRIGConfig = field(default_factory=RLRIGConfig)
    vq: VQTraining = field(default_factory=VQTraining)
    captioner: Training = CAPTIONER_TRAINING
    sft: ReasonTraining = field(default_factory=ReasonTraining)
    grpo: ReasonRLConfig = field(default_factory=ReasonRLConfig)
    mix: PromptMix = field(default_factory=PromptMix)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


REASON_COMMANDS = ("vq", "captioner", "reason-sft", "reason-grpo")
COMMON = ("preset", "seed", "out", "resume", "weights", "device")  # options of every command
RECORDS: dict[str, tuple[str, ...]] = {  # the records of each stage; the options of the first carry no prefix
    "srrl": ("srrl", "mix", "sampler", "evaluation"),
    "lora": ("srrl", "finetune", "sampler"),
    "autoencoder": ("autoencoder", "world"),
    "diffusion": ("diffusion", "world"),
    "reward": ("reward",),
    "checker": ("checker",),
    "actor": ("actor",),
    "rlrig": ("rlrig", "evaluation"),
    "vq": ("vq", "world", "evaluation"),
    "captioner": ("captioner", "world"),
    "reason-sft": ("sft", "world", "evaluation"),
    "reason-grpo": ("grpo", "mix", "evaluation"),
}

# What a preset changes: `gpu` has larger budgets; `smoke` runs every line in seconds and learns nothing.
GPU = {
    "autoencoder": {"pictures": 40_000, "steps": 6_000, "batch": 64},
    "diffusion": {"pictures": 60_000, "steps": 10_000, "batch": 256},
    "reward": {"pictures": 40_000, "steps": 6_000, "batch": 128},
    "srrl": {"iterations": 400, "prompts_per_iteration": 256, "batch": 256},
    "evaluation": {"pictures": 512, "batch": 256},
}
TINY = {"pictures": 32, "steps": 3, "batch": 4}
SMOKE = {
    "autoencoder": TINY | {"pictures": 64},
    "diffusion": TINY | {"pictures": 64, "batch": 8},
    "reward": TINY | {"pictures": 64, "batch": 8},
    "srrl": {"iterations": 2, "prompts_per_iteration": 4, "steps": 4, "updates": 2, "batch": 4},
    "checker": TINY,
    "actor": TINY,
    "rlrig": {
        "loop": {"rounds": 1, "steps": 4},
        "editor": {"updates": 1, "batch": 4, "lr": 2e-4, "anchor_below": 150},
        "graphs": 3, "group": 2, "actor_iterations": 2, "editor_iterations": 2,
    },
    "vq": TINY | {"forms": 32, "colors": 16, "revive_every": 2},
    "captioner": TINY,
    "sft": TINY,
    "grpo": {
        "iterations": 2, "prompts": 2, "group": 2, "max_resamples": 1,
        "recall_pictures": 32, "recall_batch": 4,
    },
    "sampler": {"steps": 4},
    "evaluation": {"pictures": 8, "batch": 8},
}  # fmt: skip
# Scene graphs need a sharper autoencoder, and a diffusion model that has learned to read.
GRAPHS = {
    "autoencoder": {"pictures": 10_000, "steps": 5_000, "kl": 1e-4, "noise": 0.25},
    "diffusion": {
        "pictures": 16_000,
        "steps": 8_000,
        "plain": 0.3,
        "importance": 0.5,
        "reading_steps": 1_600,
    },
}
# ReasonGen-R1 is reinforced on more arrangements: they are GenEval's tasks.
REASON = {
    "mix": {"physical": 0.3, "unconventional": 0.4, "arrangement": 0.3},
    "evaluation": {"pictures": 240},
}
PRESETS = {"cpu": {}, "gpu": GPU, "smoke": SMOKE}


def preset(
    name: str, command: str = "srrl", scenes: str = "laws", recipe: SRRLConfig | None = None
) -> Config:
    """The options of a preset, cpu, gpu or smoke, for a command; `recipe` are those of SRRL to start from.

    Raises ValueError on another name.
    """
    if scenes not in ("laws", "graphs"):
        raise ValueError(f"scenes {scenes!r} is not one of laws, graphs")
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    config = Config(preset=name, scenes=scenes, srrl=recipe or SRRLConfig())
    reason, graphs = command in REASON_COMMANDS, scenes == "graphs"
    config = changed(changed(config, REASON if reason else {}), GRAPHS if graphs else {})
    config = changed(config, PRESETS[name])
    if name == "smoke" and reason:
        config = changed(config, {"evaluation": {"pictures": 6, "batch": 6}})
    if name == "smoke" and graphs:
        config = changed(config, {"diffusion": {"reading_steps": 3}})
    return config


def changed(record: object, values: dict) -> object:
    """A record with some fields replaced, in nested records too.
    Raises ValueError on a name that the record does not have.
    """
    if unknown := sorted(set(values) - {f.name for f in fields(record)}):
        raise ValueError(f"{type(record).__name__} has no {', '.join(unknown)}")
    new = {}
    for name, value in values.items():
        old = getattr(record, name)
        new[name] = (
            changed(old, value) if is_dataclass(old) else tuple(value) if isinstance(value, list) else value
        )
    return replace(record, **new)


def stages_of(command: str, config: Config) -> tuple[str, ...]:
    """The stages of a command, in order."""
    if command == "all" and config.scenes == "graphs":
        return "autoencoder", "diffusion", "checker", "judge", "actor", "rlrig"
    if command == "all":
        return "autoencoder", "diffusion", "reward", "srrl"
    if command == "srrl" and config.finetune.base is not None:
        return ("lora",)
    return ("checker", "judge") if command == "checker" else (command,)


def options_of(command: str, config: Config) -> object:
    """The options of a command as a record of their own, which tyro can fill."""
    hints, records = (
        typing.get_type_hints(Config),
        () if command == "all" else RECORDS[stages_of(command, config)[0]],
    )
    own = (
        ("scenes",)
        if command in ("autoencoder", "diffusion", "all")
        else ("method",)
        if command == "srrl"
        else ()
    )
    flat = (*records[:1], "finetune")
    kinds = [(n, Annotated[hints[n], FLAT] if n in flat else hints[n]) for n in (*COMMON, *own, *records)]
    record = make_dataclass(command, kinds, frozen=True, namespace={"SOURCE": Config})
    return record(**{name: getattr(config, name) for name, _ in kinds})


def to_dict(command: str, config: Config) -> dict:
    """The command and its options as plain JSON values, without --out and --device: they may change."""
    records = dict.fromkeys(name for stage in stages_of(command, config) for name in RECORDS.get(stage, ()))
    values = {n: getattr(config, n) for n in ("preset", "seed", "weights", "scenes", "method", *records)}
    values = {
        n: asdict(v) if is_dataclass(v) else str(v) if isinstance(v, Path) else v for n, v in values.items()
    }
    return json.loads(json.dumps({"command": command} | values))


def read_config(folder: Path) -> tuple[str, Config]:
    """The command of a run and all that it was given.  Raises ValueError in one sentence."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        command, weights = values.pop("command"), values.pop("weights")
        config = changed(preset(values["preset"], command, values["scenes"]), values)
        return command, replace(config, weights=weights and Path(weights), out=folder, resume=True)
    except OSError as error:
        raise ValueError(f"there is no run to resume in {folder}: cannot read {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a run of minireflect train: {error}") from error
