"""Train the matcher (models/clip.py) for its three uses:

    reward     SRRL's reward: does the prompt hold for the picture?      BCE + CE(caption) + 0.1 CLIP's loss
    checker    RL-RIG's Checker and the judge: is a requirement met?     BCE + CE(caption)
    captioner  does the picture show what a rationale says?              CE(rationale)

BCE is the binary cross-entropy of the verdict.  CE is the mean cross-entropy of the next word, given the
picture: CoCa (Yu et al. 2022), equation 3.  A caption supervises every fact in a picture, a verdict only one.
All labels come from the rendered scenes; the inspector is not used.  Reward and Checker are trained on
corrupted renders (corrupt.py).  rl/rewards.py turns the networks into rewards.

    python train.py reward | checker | captioner
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.clip import Matcher, MatcherConfig
from ..models.tokenizer import EOS, Tokenizer, trim, up_to
from ..pipeline import LatentDiffusion
from ..run import Job
from ..streams import choices, rng
from ..training import Loss, Training, optimise
from ..world.canvas import to_tensor
from ..world.captions import hints, rationale
from ..world.data import WorldConfig, training_pairs
from ..world.graphs import PREDICATES, THINGS, Entity, Requirement, SceneGraph
from ..world.layout import pair_split, sample_picture
from ..world.prompts import KINDS, Prompt, draw_prompts, law_prompt, near_miss, prompt_set
from ..world.scenes import COLORS, Object, Reading, Scene
from .corrupt import VISIBLE, block_error, corrupt_all, still_shows

Fact = Object | Entity | Requirement  # records in which `varied` can change a field

CONTRAST = 0.1  # weight of CLIP's loss
FOREIGN = 0.1  # share of false prompts that belong to another picture; the rest are near misses
QUESTIONS = 6  # per picture and step
RELATIONS = 0.6  # share of questions about relations, which are the hardest
ARRANGEMENTS = 0.3  # share of arrangements among the captioner's pictures
# share of the captioner's pictures of laws with combinations of objects that no prompt asks for; without them
# the captioner predicts the most common caption and ignores the picture
RECOMBINED = 0.6


CHECKER_TRAINING = Training(steps=4_000, batch=48, lr=1.5e-3)
CAPTIONER_TRAINING = Training(pictures=20_000, steps=2_500)

# for requirements and rationales: self-attention between words, and embeddings that learn positions fast
READER = {"fused": True, "init_std": 1.0}
SIZES = {  # changes to MatcherConfig's defaults; the judge is narrower and deeper than the Checker
    "reward": {},
    "checker": READER | {"width": 64, "layers": 2, "depth": 2, "stem": (24, 48)},
    "judge": READER | {"width": 48, "layers": 2, "depth": 3, "stem": (16, 32)},
    "captioner": READER | {"width": 64},
}


def new_matcher(name: str, tokenizer: Tokenizer, job: Job) -> Matcher:
    """A matcher of one of SIZES, with random weights."""
    torch.manual_seed(job.seed)
    return Matcher(MatcherConfig(len(tokenizer), EOS, tokenizer.length, **SIZES[name])).to(job.device)


def to_ids(tokenizer: Tokenizer, texts: list[str], job: Job) -> Tensor:
    """Token ids on the job's device, padded to the longest text.  -> (b t)"""
    return trim(tokenizer(texts), EOS).to(job.device)


def caption_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, up to the end of each sentence; 0 without sentences.

    Shapes: logits (b t v), ids (b t) -> ()
    """
    after = ids[:, 1:]  # (b t-1)
    counts = up_to(after, EOS)  # (b t-1) not the padding
    return F.cross_entropy(logits[:, :-1][counts], after[counts], reduction="sum") / max(1, int(counts.sum()))


def verdict_loss(logits: Tensor, holds: Tensor) -> Loss:
    """Binary cross-entropy (); for the log, its value "loss" and the share of correct verdicts "right".

    Shapes: logits (b), holds (b) of 0 and 1
    """
    loss = F.binary_cross_entropy_with_logits(logits, holds)
    return loss, {"loss": loss.item(), "right": ((logits > 0) == (holds > 0.5)).float().mean().item()}


# ------------------------------------------------------------------------------------------- SRRL's reward
def train_reward(config: Training, pipe: LatentDiffusion, job: Job) -> Matcher:
    """Train SRRL's reward: whether a prompt holds for a picture."""
    draw = choices(job.seed, "reward", "pictures")
    prompts = [fair_prompt(draw) for _ in range(config.pictures)]
    scenes = [p.scene(draw) for p in prompts]
    twins = [replace(near_miss(p, draw).scene(draw), shift=s.shift) for p, s in zip(prompts, scenes)]
    texts, stream = [p.text for p in prompts], partial(rng, job.seed, "reward", "spoil")
    images, shown = corrupt_all(pipe.to(job.device), scenes, twins, texts, still_shows, stream)
    model = new_matcher("reward", pipe.tokenizer, job)
    joint = JointSpace(model.config.width).to(job.device)
    both = {"reward": model, "joint": joint}
    for step, generator, minimise in optimise("reward", config, both, job, decay=1e-2):
        pick = torch.randperm(len(images), generator=generator)[: config.batch].tolist()
        draw, b = choices(job.seed, "reward", "captions", step), len(pick)
        false = [false_prompt(prompts[i], scenes[i], prompts, draw).text for i in pick]
        texts = [prompts[i].text for i in pick] + false + [stated(prompts[i]).text for i in pick]
        ids = to_ids(pipe.tokenizer, texts, job)  # (3b t)
        patches = model.vision(images[pick].to(job.device))  # (b n d)
        hidden = model.text(ids)  # (3b t d)
        logits = model.match(patches.repeat(2, 1, 1), hidden[: 2 * b], ids[: 2 * b])  # (2b)
        holds = torch.cat([shown[pick].float(), torch.zeros(b)]).to(job.device)  # (2b)
        match, values = verdict_loss(logits, holds)
        contrast = joint.loss(patches[:, 0], model.text.pooled(hidden[:b], ids[:b]), ids[:b])
        seen = shown[pick].to(job.device)  # (b) bool; only these pictures still show their caption
        caption = caption_loss(model.describe(patches[seen], hidden[2 * b :][seen]), ids[2 * b :][seen])
        values |= {"contrast": contrast.item(), "caption": caption.item()}
        minimise(match + CONTRAST * contrast + caption, **values)
    return model.eval().requires_grad_(False)


def fair_prompt(draw: random.Random) -> Prompt:
    """A training prompt of a random kind, or one that states a lawful outcome, all with equal probability.

    Three quarters of the arrangements are about positions, which are the hardest.
    """
    kind = draw.choice((*KINDS, "stated"))
    if kind == "arrangement" and draw.random() < 0.75:
        return draw.choice([p for p in prompt_set(kind, "train") if p.task == "position"])
    drawn = draw_prompts("physical" if kind == "stated" else kind, "train", 8, draw)  # 8: one of each law
    return stated(draw.choice(drawn)) if kind == "stated" else draw.choice(drawn)


def false_prompt(true: Prompt, scene: Scene, others: list[Prompt], draw: random.Random) -> Prompt:
    """A prompt that the scene does not fulfil: a near miss of the true prompt, or one of the others.

    A near miss of an arrangement may hold by chance: an object left of a ball can also be above it.  Hence
    each candidate is checked, and drawn again if it holds.
    """
    while True:
        prompt = draw.choice(others) if draw.random() < FOREIGN else near_miss(true, draw)
        if not prompt.fulfilled_by(Reading(scene, 0.0)):
            return prompt


def stated(prompt: Prompt) -> Prompt:
    """The same prompt with its outcome stated, which prompts with a lawful outcome leave out."""
    return prompt if prompt.graph else law_prompt(prompt.law, prompt.objects, prompt.outcome)


class JointSpace(nn.Module):
    """The projections and the temperature of CLIP's loss; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text = nn.Linear(width, width, bias=False)
        self.image = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # section 2.5: temperature 0.07

    def loss(self, image: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        """CLIP's symmetric cross-entropy over the batch; equal sentences share the target probability.

        Shapes: image (b d) class tokens, text (b d) pooled, ids (b t) -> ()
        """
        image, text = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        logits = self.logit_scale.exp().clamp(max=100) * image @ text.T  # (b b)
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


# ----------------------------------------------------------------- RL-RIG's Checker and the held-out judge
def train_checker(config: Training, name: str, pipe: LatentDiffusion, job: Job) -> Matcher:
    """Train a network to answer whether a requirement is met.

    `name` is "checker" or "judge"; each has its own pictures, random streams and size.
    """
    draw = choices(job.seed, name, "pictures")
    graphs, scenes = zip(*(sample_picture(draw) for _ in range(config.pictures)))
    twins = [changed(s, draw) for s in scenes]
    texts, stream = [g.sentence for g in graphs], partial(rng, job.seed, name, "spoil")
    label = lambda images, clean, _: block_error(images, clean)  # noqa: E731
    images, errors = corrupt_all(pipe.to(job.device), scenes, twins, texts, label, stream)
    shown = [visible(error, scene) for error, scene in zip(errors, scenes)]
    model = new_matcher(name, pipe.tokenizer, job).to(memory_format=torch.channels_last)
    for step, generator, minimise in optimise(name, config, {name: model}, job, decay=1e-2):
        pick = torch.randperm(len(images), generator=generator)[: config.batch].tolist()
        draw = choices(job.seed, name, "questions", step)
        rows = [i for i in pick for _ in range(QUESTIONS)]
        asked, met = zip(*(question(graphs[i], scenes[i], shown[i], draw, RELATIONS) for i in rows))
        ids = to_ids(pipe.tokenizer, [r.words for r in asked], job)  # (q t)
        captions = to_ids(pipe.tokenizer, [hints(scenes[i].objects) for i in pick], job)  # (b t)
        patches = model.vision(images[pick].to(job.device))  # (b n d)
        logits = model.match(patches, model.text(ids), ids)  # (q)
        match, values = verdict_loss(logits, torch.tensor(met, device=job.device).float())
        # (b) bool; only pictures that are visible as a whole have a true caption
        whole = torch.tensor([all(shown[i]) for i in pick], device=job.device)
        words = model.describe(patches[whole], model.text(captions)[whole])  # (m t v)
        caption = caption_loss(words, captions[whole])
        minimise(match + caption, caption=caption.item(), **values)
    return model.eval().requires_grad_(False)


def changed(scene: Scene, draw: random.Random) -> Scene:
    """The same scene with one object of another colour or name; it serves as the twin in `corrupt`."""
    things, i = list(scene.objects), draw.randrange(len(scene.objects))
    field, values = ("color", COLORS) if draw.random() < 0.5 else ("name", THINGS)
    things[i] = varied(things[i], field, values, draw)
    return replace(scene, objects=tuple(things))


def visible(error: Tensor, scene: Scene) -> list[bool]:
    """Whether each object is still visible; the last element is whether the whole picture is.

    Shapes: error (16 16) of each block, in [0, 1]
    """
    seen = []
    for thing in scene.objects:
        r, (x, y) = thing.radius, thing.xy
        window = error[max(0, (y - r) // 4) : (y + r) // 4 + 1, max(0, (x - r) // 4) : (x + r) // 4 + 1]
        seen.append(bool(window.max() < VISIBLE))
    return [*seen, bool(error.max() < VISIBLE)]


def question(
    graph: SceneGraph, scene: Scene, shown: list[bool], draw: random.Random, relations: float = 0.5
) -> tuple[Requirement, bool]:
    """A random requirement, and whether the picture meets it; a share `relations` is about two entities.

    The requirement is one of the graph.  If the whole picture is visible, one fact in it is changed with a
    probability of 60 %.  A changed relation is between a pair of the training split or of the graph's own
    split.
    """
    related = draw.random() < relations
    own = draw.choice([r for r in graph.requirements if bool(r.predicate) == related])
    if not shown[-1] or draw.random() < 0.4:
        return own, answer(own, scene, shown)
    own_pairs = {pair_split(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations}
    while True:
        asked = changed_requirement(own, graph, draw)
        if asked.object is None or pair_split(asked.subject, asked.object) in own_pairs | {"train"}:
            return asked, answer(asked, scene, shown)


def answer(asked: Requirement, scene: Scene, shown: list[bool]) -> bool:
    """Whether the visible objects meet the requirement.

    A requirement about the total number of things is never met unless the whole picture is visible.
    """
    if asked.subject.name == "thing" and not shown[-1]:
        return False
    return asked.met_by(tuple(t for t, seen in zip(scene.objects, shown) if seen))


def changed_requirement(asked: Requirement, graph: SceneGraph, draw: random.Random) -> Requirement:
    """The requirement with one fact changed.  A picture may meet both by chance."""
    e = asked.subject
    if e.name == "thing":
        return Requirement(varied(e, "count", (1, 2, 3, 4), draw))
    if asked.object is None:
        return Requirement(changed_entity(e, graph, draw))
    way = draw.randrange(4)
    if way == 0:
        return varied(asked, "predicate", PREDICATES, draw)
    if way == 1:
        a, b = draw.sample(graph.entities, 2)
        return Requirement(a, draw.choice(PREDICATES), b)
    if way == 2:
        return replace(asked, subject=changed_entity(e, graph, draw))
    return replace(asked, object=changed_entity(asked.object, graph, draw))


def changed_entity(e: Entity, graph: SceneGraph, draw: random.Random) -> Entity:
    """The entity with another number, colour or name, or a random entity of the graph."""
    way = draw.randrange(4)
    if way == 3:
        return draw.choice(graph.entities)
    field, values = (("count", (1, 2, 3)), ("color", COLORS), ("name", THINGS))[way]
    return varied(e, field, values, draw)


def varied(record: Fact, field: str, values: Sequence[str | int], draw: random.Random) -> Fact:
    """The record with another one of `values` in `field`."""
    return replace(record, **{field: draw.choice([v for v in values if v != getattr(record, field)])})


# -------------------------------------------------------------------- the captioner that reads rationales
def train_captioner(config: Training, world: WorldConfig, tokenizer: Tokenizer, job: Job) -> Matcher:
    """Train a network to describe pictures with rationales, in all their styles."""
    draw = choices(job.seed, "captioner", "pictures")
    world = replace(world, arrangements=ARRANGEMENTS)
    pixels, scenes, _ = training_pairs(config.pictures, world, draw, RECOMBINED)
    model = new_matcher("captioner", tokenizer, job)
    for step, generator, minimise in optimise("captioner", config, {"captioner": model}, job, decay=1e-2):
        pick = torch.randint(len(pixels), (config.batch,), generator=generator)
        draw = choices(job.seed, "captioner", "styles", step)
        ids = to_ids(tokenizer, [rationale(scenes[i], rng=draw) for i in pick.tolist()], job)  # (b t)
        patches = model.vision(to_tensor(pixels[pick.numpy()]).to(job.device))  # (b n d)
        minimise(caption_loss(model.describe(patches, model.text(ids)), ids))
    return model.eval().requires_grad_(False)
