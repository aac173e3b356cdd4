"""Train RL-RIG's Checker, and the judge that is never asked in training: which requirements does a picture meet?

    L = BCE(requirement met) + caption CE(next word of what stands where)         network: models/matcher.py

The labels come from the scene that was drawn and from how much of it can still be seen; nothing here reads the inspector.

    python train.py checker
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..models.matcher import Matcher, MatcherConfig
from ..models.tokenizer import EOS
from ..pipeline import LatentDiffusion
from ..rl.checker import trimmed
from ..run import Run
from ..streams import choices, rng
from ..world.arrangement import PREDICATES, THINGS, radius
from ..world.edits import hint
from ..world.graph import Entity, Requirement, SceneGraph
from ..world.layout import sample_picture
from ..world.render import render
from ..world.scenes import COLORS, Scene
from .rate import lr_factor, set_lr
from .spoil import FAITHFUL, spoil
from .train_reward import caption_loss

QUESTIONS = 6  # asked of a picture in one step


@dataclass(frozen=True)
class CheckerTraining:
    pictures: int = 16_000  # drawn and spoilt once
    steps: int = 4_000
    batch: int = 48  # pictures; each is asked QUESTIONS questions
    lr: float = 1.5e-3  # peak; cosine to zero after a warm-up of 5 %
    caption: float = 1.0  # weight of the loss of saying what stands where
    relations: float = 0.6  # share of questions about how things stand to each other, the hardest
    continued: bool = False  # go on from the ones in --weights


def checker_sizes(name: str, vocabulary: int, length: int) -> MatcherConfig:
    """The network of the "checker" or of the held-out "judge", which is smaller and deeper."""
    if name == "judge":
        return MatcherConfig(
            vocabulary, EOS, length, width=48, layers=2, depth=3, stem=(16, 32), fused=True, init_std=1.0
        )
    return MatcherConfig(
        vocabulary, EOS, length, width=64, layers=2, depth=2, stem=(24, 48), fused=True, init_std=1.0
    )


def train_checker(
    config: CheckerTraining,
    name: str,
    seed: int,
    pipe: LatentDiffusion,
    run: Run,
    device: torch.device,
    start: Matcher | None = None,
) -> Matcher:
    """Learn to answer from the scenes' own facts.  `name` is "checker" or "judge"; each has its own streams and size.

    The network begins at random, or where `start` left off.
    """
    draw = choices(seed, name, "pictures")
    graphs, scenes = zip(*(sample_picture(draw) for _ in range(config.pictures)))
    twins = [changed(s, draw) for s in scenes]
    images, shown = spoilt_scenes(pipe.to(device), graphs, scenes, twins, seed, name)
    tokenizer = pipe.tokenizer
    torch.manual_seed(seed)
    model = Matcher(checker_sizes(name, len(tokenizer), tokenizer.length)).to(
        device, memory_format=torch.channels_last
    )
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-2)
    for step in run.steps(name, config.steps, {name: model}, optimizer, save_every=50):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randperm(config.pictures, generator=rng(seed, name, "batch", step))[: config.batch]
        pick, told = pick.tolist(), choices(seed, name, "questions", step)
        asked = [
            question(graphs[i], scenes[i], shown[i], told, config.relations)
            for i in pick
            for _ in range(QUESTIONS)
        ]
        truth = torch.tensor([label for _, label in asked], device=device).float()  # (q)
        whole = [i for i in pick if all(shown[i])]  # a broken picture cannot be described
        ids = tokenizer([r.words for r, _ in asked]).to(device)
        told_ids = trimmed(tokenizer([described(scenes[i]) for i in whole])).to(device)
        ids = trimmed(ids)  # (q t)
        patches = model.vision(images[pick].to(device))  # (b n d)
        logits = model.judge(patches, model.text(ids), ids)  # (q)
        loss = F.binary_cross_entropy_with_logits(logits, truth)
        rows = [n for n, i in enumerate(pick) if all(shown[i])]
        caption = caption_loss(model.describe(patches[rows], model.text(told_ids)), told_ids)
        optimizer.zero_grad(set_to_none=True)
        (loss + config.caption * caption).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = ((logits > 0) == (truth > 0.5)).float().mean().item()
        run.log(name, step, loss=loss.item(), caption=caption.item(), right=right)
        run.bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.3f}")
    return model.eval().requires_grad_(False)


def described(scene: Scene) -> str:
    """What stands where, from left to right."""
    return " and ".join(hint(t) for t in scene.objects)


def changed(scene: Scene, draw: random.Random) -> Scene:
    """The same scene with one thing of another colour or name: what a ghost is mixed with."""
    things = list(scene.objects)
    i = draw.randrange(len(things))
    if draw.random() < 0.5:
        things[i] = replace(things[i], color=draw.choice([c for c in COLORS if c != things[i].color]))
    else:
        things[i] = replace(things[i], name=draw.choice([n for n in THINGS if n != things[i].name]))
    return replace(scene, objects=tuple(things))


def spoilt_scenes(
    pipe: LatentDiffusion,
    graphs: list[SceneGraph],
    scenes: list[Scene],
    twins: list[Scene],
    seed: int,
    name: str,
) -> tuple[Tensor, list[list[bool]]]:
    """Pictures made to look like what a generator draws, and for each which of its things, and at last whether all of it, can be seen.

    -> (n 3 64 64), n lists of one bool a thing and one for the whole
    """
    images = torch.stack([render(s) for s in tqdm(scenes, "drawing", leave=False)])
    shown = []
    for i in tqdm(range(0, len(scenes), 128), "spoiling", leave=False):
        clean = images[i : i + 128].to(pipe.device)
        other = torch.stack([render(s) for s in twins[i : i + 128]]).to(pipe.device)
        texts = [g.sentence for g in graphs[i : i + 128]]
        spoilt = spoil(pipe, clean, other, texts, rng(seed, name, "spoil", i))
        images[i : i + 128] = spoilt.cpu()
        shown += [visible(m, s) for m, s in zip(off_by(spoilt, clean).cpu(), scenes[i : i + 128])]
    return images, shown


def off_by(images: Tensor, clean: Tensor) -> Tensor:
    """How far each 4x4 block is off, in [0, 1].  Shapes: images (b 3 64 64), clean (b 3 64 64) -> (b 16 16)"""
    return F.avg_pool2d((images - clean) / 2, 4).abs().amax(1)


def visible(off: Tensor, scene: Scene) -> list[bool]:
    """Which things of a scene can still be seen, and whether nothing at all is off.  Shapes: off (16 16)"""
    seen = []
    for thing in scene.objects:
        r, (x, y) = radius(thing.name), thing.xy
        window = off[max(0, (y - r) // 4) : (y + r) // 4 + 1, max(0, (x - r) // 4) : (x + r) // 4 + 1]
        seen.append(bool(window.max() < FAITHFUL))
    return [*seen, bool(off.max() < FAITHFUL)]


def question(
    graph: SceneGraph, scene: Scene, shown: list[bool], draw: random.Random, relations: float = 0.5
) -> tuple[Requirement, bool]:
    """A requirement and whether the picture meets it: one of its own or, of a whole picture, one with a fact changed."""
    related = draw.random() < relations
    own = draw.choice([r for r in graph.requirements if bool(r.predicate) == related])
    if not shown[-1] or draw.random() < 0.4:
        return own, answer(own, scene, shown)
    asked = altered(own, graph, draw)
    return asked, answer(asked, scene, shown)


def answer(asked: Requirement, scene: Scene, shown: list[bool]) -> bool:
    """What is true of the picture: a thing that cannot be seen is not there, and a broken picture has no number of things."""
    if asked.subject.name == "thing" and not shown[-1]:
        return False
    return asked.met_by(tuple(t for t, seen in zip(scene.objects, shown) if seen))


def altered(asked: Requirement, graph: SceneGraph, draw: random.Random) -> Requirement:
    """The requirement with one fact changed; it may still be true by chance."""
    e = asked.subject
    if e.name == "thing":
        return Requirement(replace(e, count=draw.choice([n for n in (1, 2, 3, 4) if n != e.count])))
    if asked.object is None:
        return Requirement(_other(e, graph, draw))
    way = draw.randrange(4)
    if way == 0:
        return replace(asked, predicate=draw.choice([p for p in PREDICATES if p != asked.predicate]))
    if way == 1:  # two things of the graph in any relation
        a, b = draw.sample(graph.entities, 2)
        return Requirement(a, draw.choice(PREDICATES), b)
    if way == 2:
        return replace(asked, subject=_other(e, graph, draw))
    return replace(asked, object=_other(asked.object, graph, draw))


def _other(e: Entity, graph: SceneGraph, draw: random.Random) -> Entity:
    way = draw.randrange(4)
    if way == 0:
        return replace(e, count=draw.choice([n for n in (1, 2, 3) if n != e.count]))
    if way == 1:
        return replace(e, color=draw.choice([c for c in COLORS if c != e.color]))
    if way == 2:
        return replace(e, name=draw.choice([n for n in THINGS if n != e.name]))
    return draw.choice(graph.entities)
