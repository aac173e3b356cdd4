"""How well ReasonGen-R1 thinks and draws: GenEval's tasks, the laws, and whether the rationale is right about the picture.

Everything is read by the inspector and by the parser of rationales, neither of which training ever asks.
"""

import random
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from .methods.reasongen import EXPECTED
from .models.reasongen import SamplingConfig
from .models.vq import Codec
from .pipeline import ReasonPipeline
from .rl.rewards import Reward
from .streams import choices, rng
from .world import geneval
from .world.inspector import inspect_all
from .world.prompts import Prompt, draw_prompts, near_miss
from .world.rationales import plan_of, rationale, read_rationale
from .world.render import render
from .world.scenes import COLORS, Scene


@dataclass(frozen=True)
class ReasonEvaluation:
    pictures: int = 240  # of arrangements, physical and unconventional prompts each
    batch: int = 64
    seed: int = 1_000
    split: str = "held-out"  # combinations of objects that no training has seen, or "train"
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.8))
    best_of: int = 1  # pictures of a prompt, of which the judge's favourite counts
    swapped: bool = False  # draw each picture from the rationale of another prompt of its law or task


@dataclass(frozen=True)
class ReasonScore:
    """Shares of the pictures, unless said otherwise."""

    geneval: dict[str, float]  # by kind of task, and "overall", their mean
    physical: float  # right by the inspector
    unconventional: float
    accepted: float  # by the judge, over all prompts
    fooled: float  # of those, the share that is not right
    unreadable: float
    planned: float  # rationales that promise what the prompt asks for
    kept: float  # of the rationales that say something, the share whose promise the picture keeps
    tokens: float  # sampled for a prompt, words and image tokens, number
    # of each law's or task's prompts: right, planned, kept (here one that says nothing is not kept)
    parts: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def evaluation_prompts(config: ReasonEvaluation) -> list[Prompt]:
    """The prompts that every row of a table is measured on."""
    chance = choices(config.seed, "evaluate", "reason")
    return [
        p for kind in ("arrangement", "physical", "unconventional")
        for p in draw_prompts(kind, config.split, config.pictures, chance)
    ]  # fmt: skip


def another_of_its_kind(prompts: list[Prompt]) -> list[int]:
    """For each prompt the row of the next one of the same law or task, the first for the last."""
    kinds = [(p.kind, p.group) for p in prompts]
    rows = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)}
    following = {i: j for members in rows.values() for i, j in zip(members, members[1:] + members[:1])}
    return [following[i] for i in range(len(prompts))]


def codec_table(codec: Codec, config: ReasonEvaluation) -> str:
    """How many scenes the inspector still reads right after the autoencoder, and after the codebook: a Markdown table."""
    prompts = evaluation_prompts(config)
    chance = choices(config.seed, "evaluate", "codec")
    images = torch.stack([render(p.scene(chance)) for p in prompts])  # (m 3 64 64)
    pixels, device = codec.autoencoder, next(codec.vq.parameters()).device
    ways = {
        "as rendered": lambda x: x,
        "through the autoencoder": lambda x: pixels.decode(pixels.encode(x)).clamp(-1, 1),
        "through the codebook": lambda x: codec.pictures(codec.codes(x)),
    }
    lines = ["| held-out scenes read right | arrangement | physical | unconventional | squared error |", "|---|---|---|---|---|"]  # fmt: skip
    for name, way in ways.items():
        with torch.no_grad():
            seen = torch.cat([way(x.to(device)).cpu() for x in images.split(config.batch)])
        right = [p.fulfilled_by(r) for p, r in zip(prompts, inspect_all(seen))]
        n = config.pictures  # of each kind
        shares = [sum(right[i : i + n]) / n for i in range(0, len(right), n)]
        cells = [f"{v:.3f}" for v in shares] + [f"{(seen - images).square().mean().item():.4f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def false_rationale(prompt: Prompt, scene: Scene, split: str, draw: random.Random) -> str:
    """What a picture of the scene does not keep by one fact: of laws that of a near miss; of arrangements one thing of another colour, or things elsewhere."""
    while True:
        if prompt.graph is None:
            other = near_miss(prompt, draw, split).scene(draw)
        elif draw.random() < 0.5:
            other = prompt.scene(draw)
        else:
            things, i = list(scene.objects), draw.randrange(len(scene.objects))
            things[i] = replace(things[i], color=draw.choice(COLORS))
            other = replace(scene, objects=tuple(things))
        if plan_of(other) != plan_of(scene):
            return rationale(other, rng=draw)


def reader_table(captioner: Reward, config: ReasonEvaluation, device: torch.device) -> str:
    """How many true rationales of pictures it finds kept, and how many false ones: a Markdown table."""
    lines = ["| rationales found kept | arrangement | physical | unconventional |", "|---|---|---|---|"]
    for split in ("train", "held-out"):
        prompts = evaluation_prompts(replace(config, split=split))
        draw = choices(config.seed, "evaluate", "captioner", split)
        scenes = [p.scene(draw) for p in prompts]
        images = torch.stack([render(s) for s in scenes]).to(device)  # (m 3 64 64)
        told = {
            "true": [rationale(s, rng=draw) for s in scenes],
            "false by one fact": [false_rationale(p, s, split, draw) for p, s in zip(prompts, scenes)],
        }
        for name, texts in told.items():
            kept = captioner(images, texts) >= EXPECTED  # (m)
            cells = [f"{part.float().mean():.3f}" for part in kept.split(config.pictures)]
            lines.append(f"| {name}, {split} combinations | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.no_grad()
def evaluate_painter(
    painter: ReasonPipeline, judge: Reward, config: ReasonEvaluation, name: str = ""
) -> ReasonScore:
    """Draw fixed prompts with fixed noise; with `best_of`, each as often, and the picture that the judge likes best."""
    prompts, n = evaluation_prompts(config), config.best_of
    images, rewards, plans, tokens = [], [], [], 0
    for i in tqdm(range(0, len(prompts), config.batch), f"measuring {name}", unit="batch", leave=False):
        texts = [p.text for p in prompts[i : i + config.batch]]
        tries = []
        for k in range(n):
            noise = rng(config.seed, "evaluate", "reason", i, k)
            drawn = painter.sample(texts, config.sampling, noise)
            if config.swapped:
                words = drawn.rationale[another_of_its_kind(prompts[i : i + config.batch])]
                drawn = painter.sample(texts, config.sampling, noise, words)
            pictures = painter.pictures(drawn.codes)
            tries.append((pictures.cpu(), judge(pictures, texts).cpu(), painter.rationales(drawn)))
            tokens += int(drawn.chosen.sum()) + drawn.codes.numel()
        best = torch.stack([r for _, r, _ in tries]).argmax(0).tolist()  # (b)
        images += [tries[k][0][j] for j, k in enumerate(best)]
        rewards += [tries[k][1][j].item() for j, k in enumerate(best)]
        plans += [read_rationale(tries[k][2][j]) for j, k in enumerate(best)]
    readings = inspect_all(torch.stack(images))
    right = [p.fulfilled_by(r) for p, r in zip(prompts, readings)]
    things = [r.scene.objects if r.scene and r.scene.law == "arrangement" else () for r in readings]
    m = config.pictures
    accepted = [ok for ok, r in zip(right, rewards) if r >= 0.5]
    planned = [plan is not None and plan.fulfils(p) for plan, p in zip(plans, prompts)]
    kept = [plan is not None and plan.shown_in(r) for plan, r in zip(plans, readings)]
    names = [p.task or f"{p.kind} {p.law}" for p in prompts]
    rows = {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}
    said = sum(plan is not None for plan in plans)
    return ReasonScore(
        geneval=geneval.scores(things[:m], prompts[:m]),
        physical=sum(right[m : 2 * m]) / m,
        unconventional=sum(right[2 * m :]) / m,
        accepted=len(accepted) / len(prompts),
        fooled=1 - sum(accepted) / len(accepted) if accepted else 0.0,
        unreadable=sum(not r.readable for r in readings) / len(prompts),
        planned=sum(planned) / len(prompts),
        kept=sum(kept) / said if said else 0.0,
        tokens=tokens / len(prompts),
        parts={
            name: tuple(sum(v[i] for i in part) / len(part) for v in (right, planned, kept))
            for name, part in rows.items()
        },
    )


def reason_table(rows: dict[str, ReasonScore]) -> str:
    """A Markdown table: a model a row."""
    kinds = list(next(iter(rows.values())).geneval)
    heads = [*kinds, "physical", "unconventional", "judge accepts", "of these wrong", "unreadable", "rationale right", "picture keeps it", "tokens"]  # fmt: skip
    lines = ["| held-out prompts | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, s in rows.items():
        values = [
            *s.geneval.values(),
            s.physical,
            s.unconventional,
            s.accepted,
            s.fooled,
            s.unreadable,
            s.planned,
            s.kept,
        ]
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {s.tokens:.0f} |")
    return "\n".join(lines)
