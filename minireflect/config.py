"""All options of all training commands in one nested dataclass, their presets, and config.json.

Each group of options is a dataclass in the file of the loop that reads it; `Config` combines them. `FIELDS`
lists the groups that each command has.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from .disk import read_json
from .evaluate import EvaluationConfig
from .methods.finetune import FinetuneConfig
from .methods.reasongen import ReasonRLConfig
from .methods.rlrig import RLRIGConfig
from .methods.srrl import SRRLConfig
from .pipeline import SamplerConfig
from .pretrain.autoencoders import AUTOENCODER_TRAINING, VQ_TRAINING, AutoencoderTraining, VQTraining
from .pretrain.diffusion import DiffusionTraining
from .pretrain.matcher import CAPTIONER_TRAINING, CHECKER_TRAINING
from .pretrain.sft import ACTOR_TRAINING, REASON_TRAINING, ReasonTraining
from .ranges import Checked, Refusal, expect, hints, quote
from .tracking import Tracker
from .training import Training
from .world.data import WorldConfig
from .world.prompts import PromptMix

COMMON = ("preset", "seed", "out", "resume", "weights", "device", "log")  # options of every command
FIELDS = {  # further fields of Config that each command or stage reads
    "srrl": "srrl mix sampler evaluation method", "all": "scenes",
    "lora": "srrl finetune sampler evaluation method",
    "autoencoder": "autoencoder scenes", "diffusion": "diffusion scenes", "reward": "reward",
    "checker": "checker", "actor": "actor", "rlrig": "rlrig evaluation",
    "vq": "vq evaluation", "captioner": "captioner",
    "reason-sft": "sft evaluation", "reason-grpo": "grpo mix evaluation",
}  # fmt: skip
PREFIXED = ("mix", "sampler", "evaluation")  # their options are named --mix.physical and so on


@dataclass(frozen=True)
class Config(Checked):
    """All options of a run. The defaults are those of the preset cpu. `world` can only be set in Python."""

    # command of `minireflect train`
    command: Literal[tuple(name for name in FIELDS if name != "lora")] = "srrl"
    # budget (default: gpu on a CUDA GPU)
    preset: Literal["cpu", "gpu", "smoke"] = "cpu"
    # seed of all random numbers
    seed: int = 0
    # run folder (default: runs/COMMAND-1, -2, ...)
    out: Path | None = None
    # continue the run in --out, with its options
    resume: bool = False
    # run to start from (default: shipped weights)
    weights: Path | None = None
    # default: first available
    device: Literal["cuda", "mps", "cpu"] | None = None
    # also log the metrics there
    log: Tracker | None = None
    # content of the pictures: physical laws or scene graphs
    scenes: Literal["laws", "graphs"] = "laws"
    # recipe: sets other defaults
    method: Literal["srrl", "paper", "ddpo", "grpo"] = "srrl"
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: AutoencoderTraining = AUTOENCODER_TRAINING
    diffusion: DiffusionTraining = field(default_factory=DiffusionTraining)
    reward: Training = field(default_factory=Training)
    srrl: SRRLConfig = field(default_factory=SRRLConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    checker: Training = CHECKER_TRAINING
    actor: Training = ACTOR_TRAINING
    rlrig: RLRIGConfig = field(default_factory=RLRIGConfig)
    vq: VQTraining = VQ_TRAINING
    captioner: Training = CAPTIONER_TRAINING
    sft: ReasonTraining = REASON_TRAINING
    grpo: ReasonRLConfig = field(default_factory=ReasonRLConfig)
    mix: PromptMix = field(default_factory=PromptMix)
    # as many UNet evaluations as 20 steps without guidance, and more right pictures (docs/log.md)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=10, guidance=1.5))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def real(self) -> bool:
        """Whether a published checkpoint is trained, in the stage lora."""
        return self.finetune.base is not None

    @property
    def stages(self) -> list[str]:
        """The names of the command's stages, in order."""
        return SEVERAL.get(f"{self.command} {self.scenes}", "lora" if self.real else self.command).split()

    @property
    def kind(self) -> str:
        """The family of models that is trained: laws (SRRL), graphs (RL-RIG) or reason (ReasonGen-R1)."""
        graphs = self.scenes == "graphs" or self.command in ("checker", "actor", "rlrig")
        return "graphs" if graphs else "reason" if self.command in REASON else "laws"


REASON = ("vq", "captioner", "reason-sft", "reason-grpo")
SEVERAL = {  # commands with several stages
    "all laws": "autoencoder diffusion reward srrl", "checker laws": "checker judge",
    "all graphs": "autoencoder diffusion checker judge actor rlrig",
}  # fmt: skip
# options with few values, from which other defaults follow, and their values
CHOICES = {name: get_args(hints(Config)[name]) for name in ("preset", "scenes", "method")}

# Options that differ from the defaults, by preset, by kind, and by "preset kind".
TINY = {"pictures": 32, "steps": 3, "batch": 4}
# fmt: off
CHANGES: dict[str, dict[str, dict]] = {
    "gpu": {  # larger batches and more steps
        "autoencoder": {"pictures": 40_000, "steps": 6_000, "batch": 64},
        "diffusion": {"pictures": 60_000, "steps": 10_000, "batch": 256},
        "reward": {"pictures": 40_000, "steps": 6_000, "batch": 128},
        "srrl": {"iterations": 400, "prompts_per_iteration": 256, "batch": 256},
        "evaluation": {"pictures": 512, "batch": 256},
    },
    "smoke": dict.fromkeys(("checker", "actor", "captioner", "sft"), TINY) | {  # seconds, learns nothing
        "autoencoder": TINY | {"pictures": 64},
        "diffusion": TINY | {"pictures": 64, "batch": 8}, "reward": TINY | {"pictures": 64, "batch": 8},
        "srrl": {"iterations": 2, "prompts_per_iteration": 4, "steps": 4, "updates": 2, "batch": 4},
        "rlrig": {"loop": {"rounds": 1, "steps": 4}, "graphs": 3, "group": 2,
                  "editor": {"updates": 1, "batch": 4, "lr": 2e-4, "anchor_below": 150},
                  "actor_iterations": 2, "editor_iterations": 2},
        "vq": TINY | {"forms": 32, "colors": 16},
        "grpo": {"iterations": 2, "prompts_per_iteration": 2, "group": 2, "max_resamples": 1,
                 "recall_pictures": 32, "recall_batch": 4},
        "sampler": {"steps": 4}, "evaluation": {"pictures": 8, "batch": 8},
    },
    "graphs": {  # scene graphs need a sharper autoencoder and a longer training on reading captions
        "autoencoder": {"pictures": 10_000, "steps": 5_000, "kl": 1e-4, "noise": 0.25},
        "diffusion": {"pictures": 16_000, "steps": 8_000, "plain": 0.3, "importance": 0.5,
                      "reading_steps": 1_600},
    },
    "reason": {  # more arrangements, because GenEval's tasks are arrangements
        "mix": {"physical": 0.3, "unconventional": 0.4, "arrangement": 0.3}, "evaluation": {"pictures": 240},
    },
    "smoke graphs": {"diffusion": {"reading_steps": 3}},
    "smoke reason": {"evaluation": {"pictures": 6, "batch": 6}},
}
# fmt: on


def preset(name: str, command: str = "srrl", scenes: str = "laws", srrl: SRRLConfig = SRRLConfig()) -> Config:
    """The options of a command with the preset cpu, gpu or smoke, starting from the SRRL options `srrl`.

    Raises ValueError on another preset.
    """
    config = Config(command, name, scenes=scenes, srrl=srrl)
    for key in (config.kind, name, f"{name} {config.kind}"):
        config = changed(config, CHANGES.get(key, {}))
    return config


def changed(record: object, values: dict, prefix: str = "") -> object:
    """A copy of a record with some fields replaced, also in nested records.

    Raises ValueError on an unknown field, or a value of another type or out of range.
    """
    if unknown := sorted(set(values) - {f.name for f in fields(record)}):
        raise ValueError(f"{type(record).__name__} has no {quote(', '.join(unknown))}")
    new, kinds = {}, hints(type(record))
    for name, value in values.items():
        old, where = getattr(record, name), f"{prefix}{name}"
        if is_dataclass(old):
            new[name] = changed(old, expect(value, dict, where), f"{where}.")
        else:
            new[name] = expect(value, kinds[name], where)
    return replace(record, **new)


def options_of(config: Config) -> object:
    """The options of the command as a new dataclass, for tyro to parse."""
    names = FIELDS["lora" if config.real else config.command].split()
    values = {name: getattr(config, name) for name in (*COMMON, *names)}
    kinds = {name: hints(Config)[name] for name in values}
    for name in (name for name, value in values.items() if is_dataclass(value) and name not in PREFIXED):
        kinds[name] = Annotated[kinds[name], tyro.conf.arg(name="")]
    return make_dataclass(config.command, kinds.items(), frozen=True, namespace={"SOURCE": Config})(**values)


def to_dict(config: Config) -> dict:
    """The options that the stages read, as JSON values; --out, --device and --log may change on resume."""
    names = [name for stage in config.stages for name in FIELDS.get(stage, "").split()]
    names = dict.fromkeys(("command", "preset", "seed", "weights", "scenes", "method", *names))
    values = {n: asdict(v) if is_dataclass(v := getattr(config, n)) else v for n in names}
    return json.loads(json.dumps(values, default=str))  # paths become text


def read_config(folder: Path) -> Config:
    """Read the options of an earlier run.  Raises Refusal if there are none or they are not valid."""
    path = folder / "config.json"
    if not path.is_file():
        raise Refusal(f"there is no run to resume in {folder}: cannot read {path}")
    try:
        values = read_json(path)
        weights = expect(values.pop("weights", None), str | None, "weights")
        config = changed(preset(*map(values.get, ("preset", "command", "scenes"))), values)
        return replace(config, weights=weights and Path(weights), out=folder, resume=True)
    except ValueError as error:
        raise Refusal(f"{path} is not a valid configuration of minireflect train: {error}") from error
