"""Supervised fine-tuning (SFT) of the models that write text: ReasonGen-R1 and RL-RIG's Actor.

ReasonGen-R1 (arXiv 2505.24875, section 3.1) is trained on prompts, rationales and pictures:

    L = sum_i s_i CE_i / sum_i s_i,   s = 2 for rationale tokens and BOI, 1 for image tokens, else 0

In a tenth of the samples prompt and rationale are empty, for classifier-free guidance.

Differs from the paper: the paper's base model can already write, and generate pictures from dense captions.
Our model learns both in this training, with these options:
    dense               rationales are also used as prompts
    text_only           adds the mean CE of rationales without pictures
    recombined, related_captions
                        adds examples that no prompt asks for, so that appearances, positions and outcomes are
                        learnt independently
Differs from the released code: the model learns to end the rationale with BOI; in the released code BOI has
weight 0, and generation is told when to switch to image tokens.  Text and image positions have separate
logits, so none are clamped; the released code pads one row of logits with -1e9 and clamps it at 30.

RL-RIG's Actor imitates a script, before reinforcement learning.  The script (`scripted_edit` in
world/captions.py) knows the scene.  It keeps objects that are right where they are, finds positions for the
others, and names two of these positions:

    L = - mean log pi(edit prompt | picture, requirements, answers)          the end token included

    python train.py reason-sft | actor
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..models.autoencoder import Autoencoder, Codec
from ..models.reasongen import ReasonGen, ReasonGenConfig
from ..models.tokenizer import EOS, Tokenizer, trim, up_to
from ..models.transformer import Actor, ActorConfig, questions
from ..pipeline import ReasonPipeline
from ..ranges import Natural, Share
from ..run import Job
from ..streams import choices, rng, sent
from ..training import Loss, Training, optimise
from ..world.captions import rationale, rationale_vocabulary, read_rationale, scripted_edit
from ..world.data import WorldConfig, training_pairs
from ..world.graphs import THINGS, GraphError, SceneGraph
from ..world.laws import render_pixels
from ..world.layout import lay_out, sample_graph
from ..world.prompts import all_texts
from ..world.scenes import COLORS, Scene
from .autoencoders import encode_all

TEXT_WEIGHT = 2.0  # s of a rationale token, as in the paper
EMPTY = 0.1  # share of samples without prompt and rationale


@dataclass(frozen=True)
class ReasonTraining(Training):
    # share of arrangements among the pictures
    arrangements: Share = 0.35
    # share of pictures with a dense caption: the rationale is the prompt, and no rationale follows
    dense: Share = 0.0
    # share of the laws' pictures with combinations of objects that no prompt asks for
    recombined: Share = 0.0
    # share of the captions of two objects that name both colours and their relation
    related_captions: Share = 0.0
    # rationales per step that are learnt without pictures, each at a third of the cost of a picture
    text_only: Natural = 0
    # rationales in training: true ones, none, or those of other pictures of the same law
    rationales: Literal["true", "none", "shuffled"] = "true"
    # matrix products in bfloat16, 1.7 times faster on CPUs with AMX
    bf16: bool = False
    # continue from the model in --weights, which may have been trained without rationales
    continued: bool = False


REASON_TRAINING = ReasonTraining(60_000, steps=4_500, lr=2e-3)


class Examples(NamedTuple):
    """The training set as tokens."""

    prompts: Tensor  # (m p) captions, some of them dense
    rationales: Tensor  # (m r) rationales that end in BOI, some of them empty
    codes: Tensor  # (m n) image tokens
    short_prompts: Tensor  # (m p) captions, none of them dense
    full_rationales: Tensor  # (m r) rationales that end in BOI, none of them empty


def reason_tokenizer(length: int = ReasonGenConfig.prompt) -> Tokenizer:
    """A tokenizer for the words of all prompts and rationales."""
    return Tokenizer.of([*all_texts(), *rationale_vocabulary()], length)


def make_examples(config: ReasonTraining, world: WorldConfig, pipe: ReasonPipeline, job: Job) -> Examples:
    """Render pictures, and turn pictures, captions and rationales into tokens."""
    draw = choices(job.seed, "reason-sft", "pictures")
    world = replace(world, arrangements=config.arrangements)
    beyond = config.recombined, config.related_captions
    pixels, scenes, captions = training_pairs(config.pictures, world, draw, *beyond)
    rationales = [rationale(s, rng=draw) for s in scenes]
    if config.rationales == "shuffled":
        rationales = shuffled(rationales, [s.law for s in scenes], draw)
    dense = [draw.random() < config.dense for _ in scenes]
    prompts = [long if d else short for d, long, short in zip(dense, rationales, captions)]
    written = ["" if d or config.rationales == "none" else text for d, text in zip(dense, rationales)]
    codes = encode_all(pipe.codec.to(job.device).codes, pixels, job.device)  # (m n)
    read, sizes = pipe.tokenizer, pipe.model.config
    write = partial(read.encode, length=sizes.rationale, end=sizes.boi)
    tokens = read(prompts), write(written), codes, read(captions), write(rationales)
    return Examples(*(ids.to(job.device) for ids in tokens))


def shuffled(rationales: list[str], laws: list[str], draw: random.Random) -> list[str]:
    """Give each picture a rationale of the same law that states another scene.

    Raises ValueError if more than half of a law's rationales state the same scene.
    """
    plans, given = [read_rationale(text) or text for text in rationales], list(range(len(rationales)))
    for law in dict.fromkeys(laws):
        rows = [i for i, name in enumerate(laws) if name == law]
        if 2 * max(Counter(plans[i] for i in rows).values()) > len(rows):
            raise ValueError(f"{law}: too few different scenes to shuffle the {len(rows)} rationales")
        for i, j in zip(rows, draw.sample(rows, len(rows))):
            given[i] = j
        while same := [i for i in rows if plans[given[i]] == plans[i]]:
            for i, j in zip(same, draw.choices(rows, k=len(same))):
                given[i], given[j] = given[j], given[i]
    return [rationales[i] for i in given]


def sft_loss(model: ReasonGen, data: Examples, config: ReasonTraining, generator: Generator) -> Loss:
    """L of a random batch, in nats per token.  -> (); "text" and "image", in nats per token of each kind"""
    device, boi = data.codes.device, model.config.boi
    pick = sent(torch.randint(len(data.codes), (config.batch,), generator=generator), device)
    empty = sent(torch.rand(config.batch, 1, generator=generator), device) < EMPTY  # (b 1)
    blank, codes = model.blank(config.batch, device), data.codes[pick]
    prompts, words = (torch.where(empty, b, v[pick]) for b, v in zip(blank, data))
    prompts, words = trim(prompts, EOS), trim(words, boi)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        text, *image = model(prompts, words, codes)  # (b r v+1), (b n f), (b n k)
    mask = up_to(words, boi) & ~empty  # (b r)
    ids = words.masked_fill(~mask, -100).flatten()  # cross_entropy ignores the label -100
    of_text = F.cross_entropy(text.float().flatten(0, 1), ids, reduction="sum") / mask.sum().clamp(min=1)
    parts = zip(image, model.split(codes))  # forms; colours given the forms
    of_image = sum(F.cross_entropy(x.float().flatten(0, 1), ids.flatten()) for x, ids in parts)
    share = TEXT_WEIGHT * mask.sum(), float(codes.numel())
    loss = (share[0] * of_text + share[1] * of_image) / sum(share)
    return loss, {"text": of_text.detach(), "image": of_image.detach()}


def text_only_loss(model: ReasonGen, data: Examples, n: int, bf16: bool, generator: Generator) -> Tensor:
    """Mean cross-entropy of `n` random rationales, BOI included, in nats per token.  -> ()"""
    pick = torch.randint(len(data.codes), (n,), generator=generator)
    prompts, words = trim(data.short_prompts[pick], EOS), trim(data.full_rationales[pick], model.config.boi)
    with torch.autocast(words.device.type, torch.bfloat16, enabled=bf16):
        text = model(prompts, words, data.codes[pick, :1]).text  # (b r v+1)
    mask = up_to(words, model.config.boi)  # (b r)
    return F.cross_entropy(text[mask].float(), words[mask])


def train_reasongen(
    config: ReasonTraining, world: WorldConfig, codec: Codec, job: Job, start: ReasonPipeline | None = None
) -> ReasonPipeline:
    """Train the model to write rationales and generate pictures, from random weights or those of `start`."""
    torch.manual_seed(job.seed)
    if start is None:
        tokenizer, vq = reason_tokenizer(), codec.vq
        sizes = ReasonGenConfig(len(tokenizer), vq.config.forms, vq.config.colors, vq.config.dimensions)
        model = ReasonGen(sizes, (vq.forms.codebook, vq.colors.codebook)).to(job.device)
    else:
        model, tokenizer = start.model.to(job.device).train().requires_grad_(True), start.tokenizer
    pipe = ReasonPipeline(model, tokenizer, codec, writes_rationale=config.rationales != "none")
    data = make_examples(config, world, pipe, job)
    how = {"decay": 5e-2, "beta2": 0.95}
    for step, generator, minimise in optimise("reason-sft", config, {"model": model}, job, **how):
        loss, nats = sft_loss(model, data, config, generator)
        if config.text_only:
            generator = rng(job.seed, "reason-sft", "told", step)
            of_text = text_only_loss(model, data, config.text_only, config.bf16, generator)
            loss, nats["text_only"] = loss + of_text, of_text.item()
        minimise(loss, **nats)
    model.eval().requires_grad_(False)
    return pipe


# ------------------------------------------------------------------------------------------ RL-RIG's Actor
NOISE = 0.3  # largest std of noise on the latents, whose std is 1; generated latents are not exact either
MISTAKES = 0.03  # share of answers that are inverted, because a learned Checker also makes mistakes

ACTOR_TRAINING = Training(steps=3_000, batch=48, lr=2e-3)


class Example(NamedTuple):
    """A scene that does not show its graph, with the edit prompt of the script."""

    scene: Scene
    requirements: list[str]
    answers: list[bool]  # whether each requirement is met; some answers are wrong
    edit: str


def wrong_scene(graph: SceneGraph, draw: random.Random) -> Scene:
    """A scene similar to the graph: some relations are dropped, and an object may be missing or changed."""
    loose = SceneGraph(graph.entities, tuple(r for r in graph.relations if draw.random() < 0.4))
    scene = lay_out(loose, draw)
    things = list(scene.objects)
    if draw.random() < 0.35:
        i, way = draw.randrange(len(things)), draw.randrange(3)
        if way == 0 and len(things) > 1:
            things.pop(i)
        elif way == 1:
            things[i] = replace(things[i], color=draw.choice(COLORS))
        else:
            things[i] = replace(things[i], name=draw.choice([n for n in THINGS if n != "box"]))
    return replace(scene, objects=tuple(sorted(things, key=lambda o: o.xy)))


def imitation_example(draw: random.Random) -> Example:
    """A random example with an edit prompt that is not empty."""
    while True:
        graph = sample_graph(draw)
        try:
            scene = wrong_scene(graph, draw)
            met = [r.met_by(scene.objects) for r in graph.requirements]
            edit = scripted_edit(graph, met, draw, scene)
        except GraphError:
            continue
        if edit:
            answers = [m != (draw.random() < MISTAKES) for m in met]
            return Example(scene, [r.words for r in graph.requirements], answers, edit)


def train_actor(config: Training, autoencoder: Autoencoder, tokenizer: Tokenizer, job: Job) -> Actor:
    """Train an Actor to imitate the script."""
    draw = choices(job.seed, "actor", "pictures")
    scenes, requirements, answers, edits = zip(*(imitation_example(draw) for _ in range(config.pictures)))
    pixels = np.stack([render_pixels(scene) for scene in scenes])
    latents = encode_all(autoencoder.to(job.device).encode, pixels, job.device)  # (n 4 8 8)
    torch.manual_seed(job.seed)
    actor = Actor(ActorConfig(len(tokenizer))).to(job.device)
    ids = questions(tokenizer, requirements, answers, actor.config.read).to(job.device)  # (n s)
    written = tokenizer.encode(edits, actor.config.written).to(job.device)  # (n t)
    mask = up_to(written, EOS)  # (n t)
    for _, generator, minimise in optimise("actor", config, {"actor": actor}, job, decay=1e-2):
        pick = torch.randperm(len(latents), generator=generator)[: config.batch]
        std = NOISE * torch.rand(len(pick), 1, 1, 1, generator=generator)
        noise = (std * torch.randn(len(pick), *latents.shape[1:], generator=generator)).to(job.device)
        log_prob = actor(latents[pick] + noise, ids[pick], written[pick])  # (b t)
        minimise(-log_prob[mask[pick]].mean())
    return actor.eval().requires_grad_(False)
