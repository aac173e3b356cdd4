"""Train RL-RIG's Actor to imitate a script that sees the scene, as a start for reinforcement.

    L = - mean log pi(edit prompt | picture, requirements, answers)          the end token included

The script (`scripted_edit` in world/captions.py) keeps what is right in place, finds places for the rest, and
names two of them.

    python train.py actor
"""

import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..models.autoencoder import Autoencoder
from ..models.tokenizer import EOS, Tokenizer, up_to
from ..models.transformer import Actor, ActorConfig, questions
from ..run import Job, Training, optimise
from ..streams import choices
from ..world.captions import scripted_edit
from ..world.graphs import THINGS, GraphError, SceneGraph, lay_out, sample_graph
from ..world.laws import render_pixels
from ..world.scenes import COLORS, Scene
from .autoencoders import encode_all

NOISE = 0.3  # largest std of the noise on the latents, whose std is 1: generated latents are not exact
MISTAKES = 0.03  # share of answers turned round, because a learned Checker makes mistakes

ACTOR_TRAINING = Training(steps=3_000, batch=48, lr=2e-3)


class Example(NamedTuple):
    """A picture that fails its graph, and what the script would write."""

    scene: Scene
    requirements: list[str]
    answers: list[bool]  # whether each requirement is met; some are wrong
    edit: str


def wrong_scene(graph: SceneGraph, draw: random.Random) -> Scene:
    """A scene that nearly shows the graph: relations fail, and an object may be missing or changed."""
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
    """A random example for which the script has something to say."""
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
    """Imitate the script."""
    seed, device = job.seed, job.device
    draw = choices(seed, "actor", "pictures")
    scenes, requirements, answers, edits = zip(*(imitation_example(draw) for _ in range(config.pictures)))
    pixels = np.stack([render_pixels(scene) for scene in scenes])
    latents = encode_all(autoencoder.to(device).encode, pixels, device)  # (n 4 8 8)
    torch.manual_seed(seed)
    actor = Actor(ActorConfig(len(tokenizer))).to(device)
    ids = questions(tokenizer, requirements, answers, actor.config.read).to(device)  # (n s)
    written = tokenizer.encode(edits, actor.config.written).to(device)  # (n t)
    mask = up_to(written, EOS)  # (n t)
    for _, generator, minimise in optimise("actor", config, {"actor": actor}, job, decay=1e-2):
        pick = torch.randperm(len(latents), generator=generator)[: config.batch]
        std = NOISE * torch.rand(len(pick), 1, 1, 1, generator=generator)
        noise = (std * torch.randn(len(pick), *latents.shape[1:], generator=generator)).to(device)
        log_prob = actor(latents[pick] + noise, ids[pick], written[pick])  # (b t)
        minimise(-log_prob[mask[pick]].mean())
    return actor.eval().requires_grad_(False)
