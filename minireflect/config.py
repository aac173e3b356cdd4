"""Every option of every training command in one nested record, the presets, and what config.json keeps of it.

A record stands beside the loop that reads it; this file puts them together.  A command shows and keeps only its own records.
"""

import json
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .evaluate import EvaluationConfig
from .evaluate_reason import ReasonEvaluation
from .methods.finetune import FinetuneConfig
from .methods.reasongen import ReasonRLConfig
from .methods.rlrig import RLRIGConfig
from .methods.rollout import SRRLConfig
from .pipeline import SamplerConfig
from .pretrain.actor import ActorTraining
from .pretrain.autoencoder import AutoencoderTraining
from .pretrain.diffusion import DiffusionTraining
from .pretrain.matcher import CaptionerTraining, CheckerTraining, RewardTraining
from .pretrain.sft import ReasonTraining
from .pretrain.vq import VQTraining
from .world.data import WorldConfig
from .world.prompts import PromptMix

PRESETS = ("cpu", "gpu", "smoke")
FLAT = tyro.conf.arg(name="")  # a record whose options carry no prefix


@dataclass(frozen=True)
class Config:
    """What a run is configured with; the defaults are the preset cpu."""

    seed: int = 0
    scenes: str = "laws"
    method: str = "srrl"
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    diffusion: DiffusionTraining = field(default_factory=DiffusionTraining)
    reward: RewardTraining = field(default_factory=RewardTraining)
    srrl: SRRLConfig = field(default_factory=SRRLConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checker: CheckerTraining = field(default_factory=CheckerTraining)
    actor: ActorTraining = field(default_factory=ActorTraining)
    rlrig: RLRIGConfig = field(default_factory=RLRIGConfig)
    vq: VQTraining = field(default_factory=VQTraining)
    captioner: CaptionerTraining = field(default_factory=CaptionerTraining)
    sft: ReasonTraining = field(default_factory=ReasonTraining)
    grpo: ReasonRLConfig = field(default_factory=ReasonRLConfig)
    mix: PromptMix = field(default_factory=PromptMix)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reasoning: ReasonEvaluation = field(default_factory=ReasonEvaluation)


@dataclass(frozen=True)
class RunOptions:
    """What every training command is given."""

    # budget: smoke, cpu or gpu (default: gpu with a CUDA GPU, else cpu)
    preset: Literal["smoke", "cpu", "gpu"] = "cpu"
    # of every random stream
    seed: int = 0
    # run folder (default: the first free runs/COMMAND-N)
    out: Path | None = None
    # go on with the run in --out, with its options
    resume: bool = False
    # run folder to start from (default: the shipped weights)
    weights: Path | None = None
    # cuda, mps or cpu (default: the first that is there)
    device: Literal["cuda", "mps", "cpu"] | None = None


@dataclass(frozen=True)
class SceneOptions:
    # what to draw: pictures of physical laws, or of scene graphs
    scenes: Literal["laws", "graphs"] = "laws"


@dataclass(frozen=True)
class MethodOptions:
    # recipe: it decides the defaults of the options below
    method: Literal["srrl", "ddpo", "grpo"] = "srrl"


RECORDS: dict[str, tuple[str, ...]] = {  # the records of each stage; the options of the first carry no prefix
    "srrl": ("srrl", "mix", "sampler", "evaluation"),
    "lora": ("srrl", "finetune", "sampler"),
    "autoencoder": ("autoencoder", "world"),
    "diffusion": ("diffusion", "world"),
    "reward": ("reward",),
    "checker": ("checker",),
    "actor": ("actor",),
    "rlrig": ("rlrig", "evaluation"),
    "vq": ("vq", "world", "reasoning"),
    "captioner": ("captioner", "world", "reasoning"),
    "reason-sft": ("sft", "world", "reasoning"),
    "reason-grpo": ("grpo", "mix", "reasoning"),
}

# What a preset changes.  `gpu` has larger batches and budgets; `smoke` runs every line in seconds and learns nothing.
GPU = {
    "autoencoder": {"pictures": 40_000, "steps": 6_000, "batch": 64},
    "diffusion": {"pictures": 60_000, "steps": 10_000, "batch": 256},
    "reward": {"pictures": 40_000, "steps": 6_000, "batch": 128},
    "srrl": {"iterations": 400, "prompts": 256, "batch": 256},
    "evaluation": {"pictures": 512, "batch": 256},
}
TINY = {"pictures": 32, "steps": 3, "batch": 4}
SMOKE = {
    "autoencoder": TINY | {"pictures": 64},
    "diffusion": TINY | {"pictures": 64, "batch": 8},
    "reward": TINY | {"pictures": 64, "batch": 8},
    "srrl": {"iterations": 2, "prompts": 4, "steps": 4, "updates": 2, "batch": 4},
    "checker": TINY,
    "actor": TINY,
    "rlrig": {
        "loop": {"rounds": 1, "steps": 4}, "editor": {"updates": 1, "batch": 4, "lr": 2e-4, "anchored": 150},
        "graphs": 3, "group": 2, "actor_iterations": 2, "editor_iterations": 2,
    },
    "vq": TINY | {"forms": 32, "colors": 16, "revived": 2},
    "captioner": TINY,
    "sft": TINY,
    "grpo": {
        "lessons": {"pictures": 32, "batch": 4, "altered": 0.0, "related": 0.0},
        "iterations": 2, "prompts": 2, "group": 2, "most": 1,
    },
    "reasoning": {"pictures": 6, "batch": 6},
    "sampler": {"steps": 4},
    "evaluation": {"pictures": 8, "batch": 8},
}  # fmt: skip
# Scene graphs need a sharper autoencoder, and a diffusion model that has learned to read.
GRAPHS = {
    "autoencoder": {"pictures": 10_000, "steps": 5_000, "kl": 1e-4, "noise": 0.25},
    "diffusion": {"pictures": 16_000, "steps": 8_000, "words": 0.3, "levels": 0.5, "reading": 1_600},
}
# ReasonGen-R1 is reinforced on more arrangements: they are GenEval's tasks.
REASON = {"mix": {"physical": 0.3, "unconventional": 0.4, "arrangement": 0.3}}


def preset(
    name: str, command: str = "srrl", scenes: str = "laws", recipe: SRRLConfig | None = None
) -> Config:
    """The options of a preset, cpu, gpu or smoke, for a command; `recipe` are the options of SRRL to start from.

    Raises ValueError on another name.
    """
    if scenes not in ("laws", "graphs"):
        raise ValueError(f"scenes {scenes!r} is not one of laws, graphs")
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    config = Config(scenes=scenes, srrl=recipe or SRRLConfig())
    if command == "reason-grpo":
        config = changed(config, REASON)
    if scenes == "graphs":
        config = changed(config, GRAPHS)
    reading = min(TINY["steps"], config.diffusion.reading)
    if name == "smoke":
        return changed(changed(config, SMOKE), {"diffusion": {"reading": reading}})
    return changed(config, GPU) if name == "gpu" else config


def changed(record: object, values: dict) -> object:
    """A record with some fields replaced, in nested records too."""
    return replace(
        record, **{k: changed(getattr(record, k), v) if isinstance(v, dict) else v for k, v in values.items()}
    )


# ---------------------------------------------------------------------------------------------- from and to config.json
def stages_of(command: str, config: Config) -> tuple[str, ...]:
    """The stages of a command, in order."""
    if command == "all" and config.scenes == "graphs":
        return "autoencoder", "diffusion", "checker", "judge", "actor", "rlrig"
    if command == "all":
        return "autoencoder", "diffusion", "reward", "srrl"
    if command == "srrl" and config.finetune.base is not None:
        return ("lora",)
    return ("checker", "judge") if command == "checker" else (command,)


def to_dict(command: str, options: RunOptions, config: Config) -> dict:
    """The command and all that it was given, as plain JSON values.  Not --out and --device: they may change on resume."""
    weights = options.weights and str(options.weights)
    kept = {"command": command, "preset": options.preset, "weights": weights}
    records = dict.fromkeys(name for stage in stages_of(command, config) for name in RECORDS.get(stage, ()))
    for name in ("seed", "scenes", "method", *records):
        value = getattr(config, name)
        kept[name] = asdict(value) if is_dataclass(value) else value
    return json.loads(json.dumps(kept))


def from_dict(start: object, values: dict) -> object:
    """A record with the values of `to_dict`, nested ones too.  Raises ValueError on a name that the record does not have."""
    if unknown := sorted(set(values) - {f.name for f in fields(start)}):
        raise ValueError(f"{type(start).__name__} has no {', '.join(unknown)}")
    built = {}
    for name, value in values.items():
        old = getattr(start, name)
        built[name] = (
            from_dict(old, value) if is_dataclass(old) else tuple(value) if isinstance(value, list) else value
        )
    return replace(start, **built)


def read_config(folder: Path) -> tuple[str, RunOptions, Config]:
    """The command of a run and all that it was given.  Raises ValueError in one sentence."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        command, name, weights = (values.pop(key) for key in ("command", "preset", "weights"))
        options = RunOptions(name, values["seed"], folder, True, weights and Path(weights))
        return command, options, from_dict(preset(name, command, values["scenes"]), values)
    except OSError as error:
        raise ValueError(f"there is no run to resume in {folder}: cannot read {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a run of minireflect train: {error}") from error


# ---------------------------------------------------------------------------------------------------- the command line
def record_for(command: str, config: Config) -> type:
    """The dataclass that tyro reads the options of a command into: RunOptions, and the records of the command."""
    flat: list[tuple[str, type]] = [("options", RunOptions)]
    if command in ("autoencoder", "diffusion", "all"):
        flat.append(("scenes", SceneOptions))
    if command == "srrl":
        flat.append(("method", MethodOptions))
    hints = typing.get_type_hints(Config)
    names = () if command == "all" else RECORDS[stages_of(command, config)[0]]
    flat += [(name, hints[name]) for name in names if name in (*names[:1], "finetune")]
    prefixed = [(name, hints[name]) for name in names[1:] if name != "finetune"]
    return make_dataclass(command, [(name, Annotated[t, FLAT]) for name, t in flat] + prefixed, frozen=True)
