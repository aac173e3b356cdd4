"""How well ReasonGen-R1 reasons and draws: GenEval's tasks, the laws, and whether a picture keeps what its rationale promises.

Pictures are read by the inspector, rationales by their grammar; training asks neither.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .diffusion.reflection import ACCEPT
from .evaluate import EvaluationConfig, Table, fixed_batches
from .models.reasongen import SamplingConfig
from .models.vq import Codec
from .pipeline import Painter
from .rl.rewards import Reward
from .streams import choices
from .world import geneval
from .world.graphs import arrange
from .world.inspector import inspect_all
from .world.prompts import KINDS, Prompt, draw_prompts, near_miss
from .world.rationales import plan_of, rationale, read_rationale
from .world.render import render
from .world.scenes import COLORS, Scene

SAMPLING = SamplingConfig(temperature=0.8)  # of all tables, unless a row says otherwise
ORDER = ("arrangement", "physical", "unconventional")  # of the kinds of prompts


class Sampled(NamedTuple):
    """What a model makes of b prompts."""

    images: Tensor  # (b 3 64 64)
    rationales: list[str]  # b, "" where none is written
    tokens: int  # sampled for all of them, text and image


Sample = Callable[[list[str], Generator], Sampled]  # b prompts and the noise


def sampled_by(painter: Painter, sampling: SamplingConfig = SAMPLING) -> Sample:
    """A ReasonGen model as a function from prompts and noise to pictures and rationales."""

    def sample(texts: list[str], noise: Generator) -> Sampled:
        drawn = painter.draw(texts, sampling, noise)
        tokens = int(drawn.chosen.sum()) + drawn.codes.numel()
        return Sampled(painter.pictures(drawn.codes).cpu(), painter.thoughts(drawn), tokens)

    return sample


@dataclass(frozen=True)
class ReasonScore:
    """Shares of the pictures, unless said otherwise."""

    geneval: dict[str, float]  # by kind of task, and "overall", their mean
    physical: float  # right by the inspector
    unconventional: float
    accepted: float  # by the learned reward, over all prompts
    fooled: float  # of those, the share that is not right
    unreadable: float
    planned: float  # rationales that promise what the prompt asks for
    kept: float  # of the rationales that can be read, the share whose promise the picture keeps
    tokens: float  # sampled for a prompt, text and image
    # of each law's or task's prompts: right, planned, kept (here one that cannot be read is not kept)
    parts: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def evaluation_prompts(config: EvaluationConfig) -> list[Prompt]:
    """The prompts that every row of a table is measured on: `pictures` arrangements, then physical, then unconventional ones."""
    chance = choices(config.seed, "evaluate", "reason")
    return [p for kind in ORDER for p in draw_prompts(kind, config.split, config.pictures, chance)]


def group_of(prompt: Prompt) -> str:
    """A law or a task, as a row of `ReasonScore.parts`."""
    return prompt.task.kind if prompt.task else f"{prompt.kind} {prompt.law}"


def another_of_its_kind(prompts: list[Prompt]) -> list[int]:
    """For each prompt the row of the next one of the same law or task, the first for the last."""
    rows = _rows([(p.kind, group_of(p)) for p in prompts])
    following = {i: j for members in rows.values() for i, j in zip(members, members[1:] + members[:1])}
    return [following[i] for i in range(len(prompts))]


def _rows(names: list) -> dict:
    """For each name the places where it stands, in the order of first appearance."""
    return {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}


def mean(values: list) -> float:
    """Of numbers or booleans; 0 if there are none."""
    return sum(values) / len(values) if values else 0.0


@torch.no_grad()
def evaluate_reason(
    sample: Sample, reward: Reward, config: EvaluationConfig, name: str = "", best_of: int = 1
) -> ReasonScore:
    """Sample fixed prompts with fixed noise, each `best_of` times, and measure the picture with the highest reward."""
    prompts = evaluation_prompts(config)
    images, rewards, plans, tokens = [], [], [], 0
    for part, noise in fixed_batches([p.text for p in prompts], config, "reason", label=name):
        tries = [sample(part, noise(k)) for k in range(best_of)]
        values = torch.stack([reward(t.images, part).cpu() for t in tries])  # (k b)
        tokens += sum(t.tokens for t in tries)
        for i, k in enumerate(values.argmax(0).tolist()):
            images.append(tries[k].images[i])
            rewards.append(values[k, i].item())
            plans.append(read_rationale(tries[k].rationales[i]))
    readings, m = inspect_all(torch.stack(images)), config.pictures
    right = [p.fulfilled_by(r) for p, r in zip(prompts, readings)]
    planned = [plan is not None and plan.fulfils(p) for plan, p in zip(plans, prompts)]
    kept = [plan is not None and plan.shown_in(r) for plan, r in zip(plans, readings)]
    things = [r.scene.objects if r.scene and r.scene.law == "arrangement" else () for r in readings]
    accepted = [ok for ok, r in zip(right, rewards) if r >= ACCEPT]
    rows = _rows([group_of(p) for p in prompts])
    return ReasonScore(
        geneval=geneval.scores(things[:m], [p.task for p in prompts[:m]]),
        physical=mean(right[m : 2 * m]),
        unconventional=mean(right[2 * m :]),
        accepted=len(accepted) / len(prompts),
        fooled=1 - mean(accepted) if accepted else 0.0,
        unreadable=mean([not r.readable for r in readings]),
        planned=mean(planned),
        kept=mean([ok for ok, plan in zip(kept, plans) if plan is not None]),
        tokens=tokens / len(prompts),
        parts={n: tuple(mean([v[i] for i in part]) for v in (right, planned, kept)) for n, part in rows.items()},
    )


def reason_table(models: dict[str, ReasonScore]) -> Table:
    """A row for each model."""
    names = {
        "physical": "physical",
        "unconventional": "unconventional",
        "accepted": "accepted by the reward",
        "fooled": "of these wrong",
        "unreadable": "unreadable",
        "planned": "rationale right",
        "kept": "picture keeps it",
    }
    tasks = list(next(iter(models.values())).geneval)
    rows = [
        [name, *s.geneval.values(), *(getattr(s, key) for key in names), f"{s.tokens:.0f}"]
        for name, s in models.items()
    ]
    return Table(["held-out prompts", *tasks, *names.values(), "tokens"], rows)


# ------------------------------------------------------------------------------------------- the parts: codec, captioner
def codec_table(codec: Codec, config: EvaluationConfig) -> Table:
    """How many scenes the inspector still reads right after the autoencoder, and after the codebook."""
    prompts = evaluation_prompts(config)
    chance = choices(config.seed, "evaluate", "codec")
    images = torch.stack([render(p.scene(chance)) for p in prompts])  # (m 3 64 64)
    pixels, device = codec.autoencoder, next(codec.vq.parameters()).device
    ways = {
        "as rendered": lambda x: x,
        "through the autoencoder": lambda x: pixels.decode(pixels.encode(x)).clamp(-1, 1),
        "through the codebook": lambda x: codec.pictures(codec.words(x)),
    }
    rows = []
    for name, way in ways.items():
        with torch.no_grad():
            seen = torch.cat([way(x.to(device)).cpu() for x in images.split(config.batch)])
        right = torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, inspect_all(seen))])
        error = (seen - images).square().mean().item()
        rows.append([name, *(part.mean().item() for part in right.split(config.pictures)), f"{error:.4f}"])
    return Table(["held-out scenes read right", *ORDER, "squared error"], rows)


def false_rationale(prompt: Prompt, scene: Scene, split: str, draw: random.Random) -> str:
    """A rationale that a picture of the scene does not keep, by one fact.

    Of a law's scene that of a near miss; of an arrangement one where a thing has another colour, or things other places.
    """
    while True:
        if prompt.task is None:
            other = near_miss(prompt, draw, split).scene(draw)
        elif draw.random() < 0.5:
            other = arrange(prompt.task, draw)
        else:
            things, i = list(scene.objects), draw.randrange(len(scene.objects))
            things[i] = replace(things[i], color=draw.choice(COLORS))
            other = replace(scene, objects=tuple(things))
        if plan_of(other) != plan_of(scene):
            return rationale(other, draw=draw)


def reader_table(captioner: Reward, least: float, config: EvaluationConfig, device: torch.device) -> Table:
    """How many true and how many false rationales a captioner finds kept: those with a reward of `least` or more."""
    rows = []
    for split in ("train", "held-out"):
        prompts = evaluation_prompts(replace(config, split=split))
        draw = choices(config.seed, "evaluate", "captioner", split)
        scenes = [p.scene(draw) for p in prompts]
        images = torch.stack([render(s) for s in scenes]).to(device)  # (m 3 64 64)
        texts = {
            "true": [rationale(s, draw=draw) for s in scenes],
            "false by one fact": [false_rationale(p, s, split, draw) for p, s in zip(prompts, scenes)],
        }
        for name, told in texts.items():
            kept = (captioner(images, told) >= least).float()  # (m)
            shares = [part.mean().item() for part in kept.split(config.pictures)]
            rows.append([f"{name}, {split} combinations", *shares])
    return Table(["rationales found kept", *ORDER], rows)
