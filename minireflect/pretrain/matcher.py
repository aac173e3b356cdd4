"""Train the learned reward: which captions hold for which pictures, from the scenes' own facts; nothing here reads the inspector.

L = BCE(match) + contrast CLIP(towers) + caption CE(next word)         the network: models/matcher.py, as a reward: rl/rewards.py

python train.py reward
"""

import math
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..models.matcher import Matcher, MatcherConfig
from ..models.tokenizer import EOS, Tokenizer, trim, up_to
from ..pipeline import LatentDiffusion
from ..run import Run
from ..streams import choices, rng
from ..world.canvas import to_tensor
from ..world.captions import hints
from ..world.data import WorldConfig, training_pairs
from ..world.graphs import PREDICATES, THINGS, Entity, Requirement, SceneGraph, radius
from ..world.layout import sample_picture
from ..world.prompts import KINDS, Prompt, draw_prompts, law_prompt, near_miss, prompt_set
from ..world.rationales import rationale
from ..world.render import render
from ..world.scenes import COLORS, Reading, Scene
from .corrupt import FAITHFUL, faithful, spoil
from .optimise import lr_factor, set_lr

# Train RL-RIG's Checker, and the judge that is never asked in training: which requirements does a picture meet?
#
#     L = BCE(requirement met) + caption CE(next word of what stands where)         network: models/matcher.py
#
# The labels come from the scene that was drawn and from how much of it can still be seen; nothing here reads the inspector.
#
#     python train.py checker
# Train the captioner, which tells whether a picture keeps what a rationale promises.
#
# L = CE of the next word of the picture's rationale, given the picture and the words before       CoCa (Yu et al. 2022), equation 3
#
# The network is SRRL's matcher (models/matcher.py) without its verdict.  A yes or no teaches one bit a picture; whoever can say the next word
# of any true plan has to see every fact of it, and finds the word that is not true.  As a reward: rl/rewards.py, `caption_reward`.
# Its pictures are of training combinations, and six in ten of the laws' of things that no prompt asks for, lest it says what usually is in place of what it sees.
#
#     python train.py captioner


@dataclass(frozen=True)
class RewardTraining:
    pictures: int = 16_000  # drawn and spoilt once
    steps: int = 5_000
    batch: int = 64  # pictures; each is read against a true and a false caption
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    contrast: float = 0.1  # weight of CLIP's own loss on the two towers
    foreign: float = 0.1  # share of false captions that belong to any other picture; the rest are near misses
    caption: float = 1.0  # weight of the loss of describing the picture
    spoilt: bool = True  # learn from pictures spoilt as a generator spoils them; without, RL finds what the reward never saw
    continued: bool = False  # start from the reward in --weights instead of from nothing


def fair_prompt(draw: random.Random) -> Prompt:
    """A prompt of any kind in equal shares, lawful outcomes put into words among them; training combinations only.

    Three quarters of the arrangements say where things are, which is the hardest of their kinds to judge.
    """
    kind = draw.choice((*KINDS, "stated"))
    if kind == "arrangement" and draw.random() < 0.75:
        return draw.choice([p for p in prompt_set(kind, "train") if p.task == "position"])
    if kind != "stated":
        return draw.choice(draw_prompts(kind, "train", 8, draw))  # 8: one of each law
    prompt = draw.choice(draw_prompts("physical", "train", 8, draw))
    return law_prompt(prompt.law, prompt.objects, prompt.outcome)


def train_reward(
    config: RewardTraining,
    seed: int,
    pipe: LatentDiffusion,
    run: Run,
    device: torch.device,
    start: Matcher | None = None,
) -> Matcher:
    """Learn which captions hold for which pictures, from the scenes' own facts; the inspector has no part in it.

    The network begins at random, or where `start` left off.
    """
    stage = "reward"
    draw = choices(seed, stage, "pictures")
    prompts = [fair_prompt(draw) for _ in range(config.pictures)]
    scenes = [p.scene(draw) for p in prompts]
    twins = [
        replace(near_miss(p, draw).scene(draw), shift=s.shift) for p, s in zip(prompts, scenes)
    ]  # seen by the same camera
    images, twin_images = (
        torch.stack([render(s) for s in tqdm(part, "drawing", leave=False)]) for part in (scenes, twins)
    )  # (n 3 64 64)
    shown = torch.ones(config.pictures, dtype=torch.bool)
    pipe.to(device)
    for i in tqdm(range(0, config.pictures * config.spoilt, 128), "spoiling", leave=False):
        part, texts = images[i : i + 128].to(device), [p.text for p in prompts[i : i + 128]]
        other = twin_images[i : i + 128].to(device)
        spoilt = spoil(pipe, part, other, texts, rng(seed, stage, "spoil", i))
        images[i : i + 128], shown[i : i + 128] = spoilt.cpu(), faithful(spoilt, part, other).cpu()
    tokenizer = pipe.tokenizer
    torch.manual_seed(seed)
    model = Matcher(MatcherConfig(len(tokenizer), EOS, tokenizer.length)).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    joint = JointSpace(model.config.width).to(device)
    parameters = [*model.parameters(), *joint.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=1e-2)
    for step in run.steps(stage, config.steps, {stage: model, "joint": joint}, optimizer, save_every=50):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randperm(config.pictures, generator=rng(seed, stage, "batch", step))[
            : config.batch
        ].tolist()
        told = choices(seed, stage, "captions", step)
        true = [prompts[i] for i in pick]
        false = [false_prompt(prompts[i], scenes[i], prompts, config.foreign, told) for i in pick]
        texts = [p.text for p in true] + [p.text for p in false] + [full_text(p) for p in true]
        ids = trim(tokenizer(texts), EOS).to(device)  # (3b t)
        holds = torch.cat([shown[pick].float(), torch.zeros(len(pick))]).to(device)  # (2b)
        patches = model.vision(images[pick].to(device))  # (b n d)
        hidden = model.text(ids)  # (3b t d)
        b = len(pick)
        logits = model.match(patches.repeat(2, 1, 1), hidden[: 2 * b], ids[: 2 * b])  # (2b)
        loss = F.binary_cross_entropy_with_logits(logits, holds)
        contrast = joint.loss(patches[:, 0], model.text.pooled(hidden[:b], ids[:b]), ids[:b])
        seen = shown[pick].to(device)  # (b) bool; a broken picture cannot be described
        caption = caption_loss(model.describe(patches[seen], hidden[2 * b :][seen]), ids[2 * b :][seen])
        optimizer.zero_grad(set_to_none=True)
        (loss + config.contrast * contrast + config.caption * caption).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = ((logits > 0) == (holds > 0.5)).float().mean().item()
        run.log(stage, step, loss=loss.item(), contrast=contrast.item(), caption=caption.item(), right=right)
        run.bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.2f}")
    return model.eval().requires_grad_(False)


def false_prompt(
    true: Prompt, scene: Scene, others: list[Prompt], foreign: float, draw: random.Random
) -> Prompt:
    """A sentence that the scene does not fulfil: a near miss of the true one, or with probability `foreign` any other.

    A near miss of an arrangement can hold by chance (what is left of a ball may stand above it too), so it is checked.
    """
    while True:
        prompt = draw.choice(others) if draw.random() < foreign else near_miss(true, draw)
        if not prompt.fulfilled_by(Reading(scene, 0.0)):
            return prompt


def full_text(prompt: Prompt) -> str:
    """The sentence that tells everything about the prompt's picture, a lawful outcome included."""
    return prompt.text if prompt.graph else law_prompt(prompt.law, prompt.objects, prompt.outcome).text


def caption_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every next word up to the end of the sentence: CoCa (Yu et al. 2022), equation 3, a mean over words.

    Shapes: logits (b t v), ids (b t) -> ()
    """
    after = ids[:, 1:]  # (b t-1)
    counted = up_to(after, EOS)  # (b t-1)
    total = F.cross_entropy(logits[:, :-1][counted], after[counted], reduction="sum")
    return total / max(1, int(counted.sum()))  # a small batch may hold broken pictures only


class JointSpace(nn.Module):
    """What CLIP adds to its towers, for its own loss; nobody needs it afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, width, bias=False)
        self.image = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # section 2.5: temperature 0.07

    def loss(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        """CLIP's symmetric cross-entropy over the batch; rows with the same sentence count as right for each other.

        Shapes: image (b d) class tokens, text (b d) pooled, ids (b t) -> ()
        """
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * image @ text.T  # (b b)
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


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
        told_ids = trim(tokenizer([described(scenes[i]) for i in whole]), EOS).to(device)
        ids = trim(ids, EOS)  # (q t)
        patches = model.vision(images[pick].to(device))  # (b n d)
        logits = model.match(patches, model.text(ids), ids)  # (q)
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
    return hints(scene.objects)


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
    asked = altered_requirement(own, graph, draw)
    return asked, answer(asked, scene, shown)


def answer(asked: Requirement, scene: Scene, shown: list[bool]) -> bool:
    """What is true of the picture: a thing that cannot be seen is not there, and a broken picture has no number of things."""
    if asked.subject.name == "thing" and not shown[-1]:
        return False
    return asked.met_by(tuple(t for t, seen in zip(scene.objects, shown) if seen))


def altered_requirement(asked: Requirement, graph: SceneGraph, draw: random.Random) -> Requirement:
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


@dataclass(frozen=True)
class CaptionerTraining:
    pictures: int = 20_000
    steps: int = 2_500
    batch: int = 64
    lr: float = 1e-3  # peak; cosine to zero after a warm-up of 5 %
    width: int = 64  # of the network
    arrangements: float = 0.3  # share of arrangements among the pictures
    altered: float = 0.6  # share of the laws' pictures with things that no prompt asks for

    def __post_init__(self) -> None:
        for name in ("arrangements", "altered"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, a share from 0 to 1 is wanted")


def train_captioner(
    config: CaptionerTraining, world: WorldConfig, seed: int, tokenizer: Tokenizer, run: Run, device: torch.device
) -> Matcher:  # fmt: skip
    """Learn to say what is to be seen, in the words and the styles of rationales."""
    draw = choices(seed, "captioner", "pictures")
    world = replace(world, arrangements=config.arrangements)
    pixels, scenes, _ = training_pairs(config.pictures, world, draw, config.altered)
    torch.manual_seed(seed)
    sizes = MatcherConfig(len(tokenizer), EOS, tokenizer.length, width=config.width, fused=True, init_std=1.0)
    model = Matcher(sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-2)
    for step in run.steps("captioner", config.steps, {"captioner": model}, optimizer, save_every=50):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        pick = torch.randint(len(pixels), (config.batch,), generator=rng(seed, "captioner", "batch", step))
        told = choices(seed, "captioner", "styles", step)
        texts = [rationale(scenes[i], rng=told) for i in pick.tolist()]
        ids = trim(tokenizer(texts), EOS).to(device)  # (b t)
        patches = model.vision(to_tensor(pixels[pick.numpy()]).to(device))  # (b n d)
        loss = caption_loss(model.describe(patches, model.text(ids)), ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.log("captioner", step, loss=loss.item())
        run.bar.set_postfix(loss=f"{loss.item():.3f} nats a word")
    return model.eval().requires_grad_(False)
