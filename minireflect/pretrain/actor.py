"""Warm up RL-RIG's Actor: imitate a script that sees the scene, so that reinforcement starts from sentences and not from noise.

    L = - mean log pi(edit prompt | picture, requirements, answers)          the end token included

The script (`scripted_edit` in world/captions.py) keeps what is right where it is, finds places for the rest, and names two of them.

    python train.py actor
"""

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.actor import Actor, ActorConfig, questions
from ..models.autoencoder import Autoencoder
from ..models.tokenizer import EOS, Tokenizer, up_to
from ..run import Run
from ..streams import choices, rng
from ..world.captions import scripted_edit
from ..world.graphs import THINGS, GraphError, SceneGraph
from ..world.layout import lay_out, sample_graph
from ..world.render import render
from ..world.scenes import COLORS, Scene
from .optimise import lr_factor, set_lr


@dataclass(frozen=True)
class ActorTraining:
    pictures: int = 16_000  # drawn and encoded once
    steps: int = 3_000
    batch: int = 48
    lr: float = 2e-3  # peak; cosine to zero after a warm-up of 5 %
    noise: float = 0.3  # most noise on the latents, whose std is 1
    mistaken: float = 0.03  # share of answers turned round, as a Checker's sometimes are
    continued: bool = False  # go on from the one in --weights


def wrong_scene(graph: SceneGraph, draw: random.Random) -> Scene:
    """A picture that was meant to show the graph and does not quite: relations fail, a thing is missing or another."""
    loose = SceneGraph(graph.entities, tuple(r for r in graph.relations if draw.random() < 0.4))
    scene = lay_out(loose, draw)
    things = list(scene.objects)
    if draw.random() < 0.35:
        i = draw.randrange(len(things))
        way = draw.randrange(3)
        if way == 0 and len(things) > 1:
            things.pop(i)
        elif way == 1:
            things[i] = replace(things[i], color=draw.choice(COLORS))
        else:
            things[i] = replace(things[i], name=draw.choice([n for n in THINGS if n != "box"]))
    return replace(scene, objects=tuple(sorted(things, key=lambda o: o.xy)))


def lesson(draw: random.Random, mistaken: float) -> tuple[Scene, list[str], list[bool], str]:
    """A wrong picture, the requirements, the answers (some mistaken) and what the script would say."""
    while True:
        graph = sample_graph(draw)
        try:
            scene = wrong_scene(graph, draw)
            met = [r.met_by(scene.objects) for r in graph.requirements]
            edit = scripted_edit(graph, met, draw, scene)
        except GraphError:
            continue
        if edit:
            said = [m != (draw.random() < mistaken) for m in met]
            return scene, [r.words for r in graph.requirements], said, edit


def train_actor(
    config: ActorTraining,
    seed: int,
    autoencoder: Autoencoder,
    tokenizer: Tokenizer,
    run: Run,
    device: torch.device,
    start: Actor | None = None,
) -> Actor:
    """Imitate the script, from nothing or from where `start` left off."""
    draw = choices(seed, "actor", "pictures")
    scenes, asked, said, edits = zip(*(lesson(draw, config.mistaken) for _ in range(config.pictures)))
    latents = encode(autoencoder.to(device), scenes, device)  # (n 4 8 8)
    torch.manual_seed(seed)
    actor = Actor(ActorConfig(len(tokenizer))).to(device)
    if start is not None:
        actor.load_state_dict(start.state_dict())
    ids = questions(tokenizer, asked, said, actor.config.read).to(device)  # (n s)
    written = tokenizer.encode(edits, actor.config.written).to(device)  # (n t)
    mask = up_to(written, EOS)  # (n t)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=config.lr, weight_decay=1e-2)
    for step in run.steps("actor", config.steps, {"actor": actor}, optimizer, save_every=50):
        set_lr(optimizer, config.lr * lr_factor(step, config.steps))
        chance = rng(seed, "actor", "batch", step)
        pick = torch.randperm(len(latents), generator=chance)[: config.batch]
        level = config.noise * torch.rand(len(pick), 1, 1, 1, generator=chance)
        noise = (level * torch.randn(len(pick), *latents.shape[1:], generator=chance)).to(device)
        log_prob = actor(latents[pick] + noise, ids[pick], written[pick])  # (b t)
        loss = -log_prob[mask[pick]].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()
        run.log("actor", step, loss=loss.item())
        run.bar.set_postfix(loss=f"{loss.item():.3f} nats a token")
    return actor.eval().requires_grad_(False)


@torch.no_grad()
def encode(autoencoder: Autoencoder, scenes: tuple[Scene, ...], device: torch.device) -> Tensor:
    """-> (n 4 8 8)"""
    parts = [scenes[i : i + 256] for i in range(0, len(scenes), 256)]
    return torch.cat([autoencoder.encode(torch.stack([render(s) for s in p]).to(device)) for p in parts])
