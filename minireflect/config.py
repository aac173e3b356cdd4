"""Everything that can be chosen, in one nested record: the command line, config.json and the presets are all this.

Presets: `cpu` is the published setting for two cores, `gpu` the same with larger batches and budgets, `smoke` runs
every line of every command in a minute and learns nothing.
"""

import json
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

from .evaluate import EvaluationConfig
from .evaluate_reason import ReasonEvaluation
from .methods.finetune import FinetuneConfig
from .methods.reasongen import ReasonRLConfig
from .methods.rlrig import LoopConfig, RLRIGConfig
from .methods.rollout import SRRLConfig, UpdateConfig
from .pipeline import SamplerConfig
from .pretrain.actor import ActorTraining
from .pretrain.autoencoder import AutoencoderTraining
from .pretrain.diffusion import DiffusionTraining
from .pretrain.matcher import CAPTIONER_TRAINING, CHECKER_TRAINING, MatcherTraining, RewardTraining
from .pretrain.sft import ReasonTraining
from .pretrain.vq import VQTraining
from .world.data import WorldConfig
from .world.prompts import PromptMix

Command = Literal[
    "autoencoder",
    "diffusion",
    "reward",
    "srrl",
    "checker",
    "actor",
    "rlrig",
    "vq",
    "captioner",
    "reason-sft",
    "reason-grpo",
    "all",
]


RIG_COMMANDS = ("checker", "actor", "rlrig")  # these belong to the world of scene graphs


REASON_COMMANDS = ("vq", "captioner", "reason-sft", "reason-grpo")


PRESETS = ("smoke", "cpu", "gpu")


@dataclass(frozen=True)
class Config:
    seed: int = 0  # of every random stream
    scenes: Literal["laws", "graphs"] = "laws"  # what `autoencoder`, `diffusion` and `all` learn to draw
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    diffusion: DiffusionTraining = field(default_factory=DiffusionTraining)
    reward: RewardTraining = field(default_factory=RewardTraining)
    srrl: SRRLConfig = field(default_factory=SRRLConfig)
    checker: MatcherTraining = CHECKER_TRAINING
    actor: ActorTraining = field(default_factory=ActorTraining)
    rlrig: RLRIGConfig = field(default_factory=RLRIGConfig)
    vq: VQTraining = field(default_factory=VQTraining)
    captioner: MatcherTraining = CAPTIONER_TRAINING
    sft: ReasonTraining = field(default_factory=ReasonTraining)
    grpo: ReasonRLConfig = field(default_factory=ReasonRLConfig)
    asked: PromptMix = field(default_factory=lambda: PromptMix(0.3, 0.4, 0.3))  # by reason-grpo
    prompts: PromptMix = field(default_factory=PromptMix)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reasoning: ReasonEvaluation = field(default_factory=ReasonEvaluation)  # of reason-sft and reason-grpo


def preset(name: str, scenes: str = "laws") -> Config:
    """The configuration of a preset, smoke, cpu or gpu, and what is to be drawn, laws or graphs."""
    if scenes not in ("laws", "graphs"):
        raise ValueError(f"scenes {scenes!r} is not one of laws, graphs")
    base = Config()
    if scenes == "graphs":
        base = replace(
            base,
            scenes=scenes,
            autoencoder=AutoencoderTraining(pictures=10_000, steps=5_000, kl=1e-4, noise=0.25),
            diffusion=DiffusionTraining(
                pictures=16_000, steps=8_000, plain=0.3, importance=0.5, reading_steps=1_600
            ),
        )
    if name == "cpu":
        return base
    if name == "gpu":
        return replace(
            base,
            autoencoder=replace(base.autoencoder, pictures=40_000, steps=6_000, batch=64),
            diffusion=replace(base.diffusion, pictures=60_000, steps=10_000, batch=256),
            reward=RewardTraining(pictures=40_000, steps=6_000, batch=128),
            srrl=SRRLConfig(iterations=400, prompts=256, batch=256),
            evaluation=EvaluationConfig(pictures=512, batch=256),
        )
    if name == "smoke":
        return replace(
            base,
            autoencoder=replace(base.autoencoder, pictures=64, steps=3, batch=4),
            diffusion=replace(
                base.diffusion,
                pictures=64,
                steps=3,
                batch=8,
                reading_steps=min(3, base.diffusion.reading_steps),
            ),
            reward=RewardTraining(pictures=64, steps=3, batch=8),
            srrl=SRRLConfig(iterations=2, prompts=4, steps=4, updates=2, batch=4),
            checker=replace(CHECKER_TRAINING, pictures=32, steps=3, batch=4),
            actor=ActorTraining(pictures=32, steps=3, batch=4),
            rlrig=RLRIGConfig(
                LoopConfig(rounds=1, steps=4),
                graphs=3,
                group=2,
                actor_iterations=2,
                editor_iterations=2,
                editor=UpdateConfig(updates=1, batch=4),
            ),
            vq=VQTraining(pictures=32, steps=3, batch=4, forms=32, colors=16, revive_every=2),
            captioner=replace(CAPTIONER_TRAINING, pictures=32, steps=3, batch=4),
            sft=ReasonTraining(pictures=32, steps=3, batch=4),
            grpo=ReasonRLConfig(
                iterations=2, prompts=2, group=2, most=1, examples=ReasonTraining(pictures=32, batch=4)
            ),
            reasoning=ReasonEvaluation(pictures=6, batch=6),
            sampler=SamplerConfig(steps=4),
            evaluation=EvaluationConfig(pictures=8, batch=8),
        )
    raise ValueError(f"preset {name!r} is not one of smoke, cpu, gpu")


def to_dict(config: Config | FinetuneConfig) -> dict:
    """Plain JSON values."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(kind: type, values: dict) -> object:
    """Undo `to_dict`.  Raises ValueError on a name that the configuration does not have."""
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}")
    hints = typing.get_type_hints(kind)
    built = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint):
            value = from_dict(hint, value)
        elif typing.get_origin(hint) is tuple:
            value = tuple(value)
        built[name] = value
    return kind(**built)


def read_config(folder: Path) -> tuple[str, Path | None, FinetuneConfig, Config]:
    """The command, the weights it started from, and the configuration of a run.  Raises ValueError in one sentence."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
        command, weights = values.pop("command"), values.pop("weights")
        finetuned = from_dict(FinetuneConfig, values.pop("finetune", {}))
        return command, weights and Path(weights), finetuned, from_dict(Config, values)
    except OSError as error:
        raise ValueError(f"there is no run to resume in {folder}: cannot read {path}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a run of train.py: {error!r}") from error
