"""Pictures for people: strips of rounds and grids of before and after, with the checker's verdict under each picture.

Nothing in them is picked: prompts come in the order in which the world lists them, noise from a fixed stream.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import figures
from .diffusion.reflection import ReflectionConfig, renoise_to
from .diffusion.sample import denoise, last
from .methods.rlrig import LoopConfig, Parts, loop_of
from .models.reasongen import SamplingConfig
from .pipeline import LatentDiffusion, ReasonPipeline, SamplerConfig
from .rl.rewards import Reward
from .streams import rng
from .world.graphs import SceneGraph
from .world.inspector import inspect
from .world.laws import LAWS
from .world.prompts import Prompt, prompt_set, understand

UNMET_SHOWN = 2  # requirements listed under a picture


Cell = tuple[Tensor, str, bool | None]  # picture, line under it, right or wrong


def fixed_prompts(kinds: tuple[str, ...] = ("physical", "unconventional")) -> list[Prompt]:
    """The first held-out prompt of every law and kind."""
    return [next(p for p in prompt_set(kind, "held-out") if p.law == law) for law in LAWS for kind in kinds]


@torch.no_grad()
def blind_rounds(
    pipe: LatentDiffusion, prompts: list[str], sampler: SamplerConfig, reflection: ReflectionConfig, seed: int
) -> Iterator[Tensor]:
    """Reflect as SRRL's code does and yield the pictures of every round, K + 1 of them; round 0 is what `generate` draws.

    Every picture, right or wrong, is turned back into noise with little guidance, and drawn again with `reflection.w_denoise`.
    -> (b 3 h w)
    """
    table, make_eps = pipe.table(sampler.steps, sampler.spacing), pipe.eps(prompts)
    noise = rng(seed, "sample")
    x_0 = last(
        denoise(make_eps(sampler.guidance), pipe.noise(len(prompts), noise), table, sampler.eta, noise)
    )
    yield pipe.decode(x_0)
    for _ in range(reflection.rounds):
        x = renoise_to(make_eps(reflection.w_renoise), x_0, table, reflection, noise)
        x_0 = last(denoise(make_eps(reflection.w_denoise), x, reflection.tail(table), sampler.eta, noise))
        yield pipe.decode(x_0)


def verdict(image: Tensor, text: str, reward: float) -> Cell:
    """A picture with what the inspector says of it and the learned reward."""
    reading, prompt = inspect(image), understand(text)
    if prompt is None:
        seen = reading.scene.law if reading.scene else "unreadable"
        return image, f"reads as: {seen} · reward {reward:.2f}", None
    right = prompt.fulfilled_by(reading)
    said = "right" if right else "wrong" if reading.readable else "unreadable"
    return image, f"{said} · reward {reward:.2f}", right


def rounds_strip(
    pipe: LatentDiffusion,
    reward: Reward,
    prompts: list[str],
    sampler: SamplerConfig,
    reflection: ReflectionConfig,
    seed: int,
    path: Path,
    blind: bool = False,
) -> list[list[Cell]]:
    """Draw and save the strip: a prompt a row, a round a column; judged by the reward, or `blind`.  -> the cells, row by row"""
    rows: list[list[Cell]] = [[] for _ in prompts]
    if blind:
        drawn = blind_rounds(pipe, prompts, sampler, reflection, seed)
    else:
        noise = rng(seed, "sample")
        x_T = pipe.noise(len(prompts), noise)
        drawn = pipe.judged_rounds(prompts, reward, reflection.rounds, sampler, x_T, noise)
    for images in drawn:
        for row, image, text, value in zip(rows, images.cpu(), prompts, reward(images, prompts).tolist()):
            row.append(verdict(image, text, value))
    figures.strip(rows, prompts, [f"round {k}" for k in range(reflection.rounds + 1)], path)
    return rows


def before_and_after(
    pipes: dict[str, LatentDiffusion],
    reward: Reward,
    sampler: SamplerConfig,
    seed: int,
    path: Path,
    copies: int = 3,
) -> None:
    """The same prompts and the same noise through every model, `copies` pictures each."""
    prompts = fixed_prompts()
    texts = [p.text for p in prompts]
    rows: list[list[Cell]] = [[] for _ in texts]
    heads = []
    for name, pipe in pipes.items():
        for c in range(copies):
            images = pipe.generate(
                texts,
                sampler.steps,
                sampler.guidance,
                sampler.eta,
                generator=rng(seed, "before and after", c),
            )
            heads.append(f"{name}, noise {c + 1}")
            for row, image, text, value in zip(rows, images.cpu(), texts, reward(images, texts).tolist()):
                row.append(verdict(image, text, value))
    figures.strip(rows, texts, heads, path)


def columns_of(
    drawn: dict[str, Tensor], reward: Reward, prompts: list[str], path: Path, rows: int = 8
) -> None:
    """Pictures of the same prompts by several models, side by side, the reward under each: the first `rows`.

    Shapes: drawn (n 3 h w) each, n prompts
    """
    prompts = prompts[:rows]
    values = {name: reward(images[:rows], prompts).tolist() for name, images in drawn.items()}
    cells = [
        [(images[i].cpu(), f"reward {values[name][i]:.3f}", None) for name, images in drawn.items()]
        for i in range(len(prompts))
    ]
    figures.strip(cells, prompts, list(drawn), path)


@torch.no_grad()
def check_picture(pipe: LatentDiffusion) -> np.ndarray:
    """The first held-out physical prompt of every law, side by side, drawn without step noise.  -> (64 512 3) uint8"""
    texts = [p.text for p in fixed_prompts(("physical",))]
    images = pipe.generate(texts, eta=0.0, generator=rng(0, "check"))  # (8 3 64 64)
    return rearrange(((images + 1) * 127.5).round().byte(), "b c h w -> h (b w) c").cpu().numpy()


def edit_strip(
    parts: Parts, graphs: list[SceneGraph], loop: LoopConfig, seed: int, path: Path
) -> list[list[Cell]]:
    """RL-RIG at work, a graph a row: picture, unmet requirements, edit prompt, next picture.  -> the cells, row by row"""
    rows: list[list[Cell]] = [[] for _ in graphs]
    for look in loop_of(parts, loop)(graphs, rng(seed, "edits")):
        edited = {i: n for n, i in enumerate(look.rows.tolist())}
        for i, graph in enumerate(graphs):
            if look.edits and i not in edited:
                continue
            image, said = look.images[i], look.answers
            edit, n = "", edited.get(i, i)
            if look.edits:
                image, said, edit = look.tried[n], look.said, look.edits[n]
            missed = [r.words for r, ok in zip(graph.requirements, said.met[n].tolist()) if not ok]
            lines = [f"edit: {edit}"] if edit else []
            more = [f"and {len(missed) - UNMET_SHOWN} more"] if len(missed) > UNMET_SHOWN else []
            listed = "; ".join([*missed[:UNMET_SHOWN], *more])
            lines.append(f"unmet: {listed}" if missed else "all met, says the Checker")
            reading = inspect(image.cpu())
            right = reading.scene is not None and graph.fulfilled_by(reading.scene.objects)
            rows[i].append((image.cpu(), "\n".join(figures.wrap(line, 30) for line in lines), right))
    heads = ["drawn", *(f"edit {k}" for k in range(1, loop.rounds + 1))]
    figures.strip(rows, [g.sentence for g in graphs], heads, path)
    return rows


def thoughts_strip(
    painter: ReasonPipeline, judge: Reward, texts: list[str], sampling: SamplingConfig, seed: int, path: Path
) -> list[list[tuple[str, str]]]:
    """ReasonGen-R1 at work, every prompt twice: the rationale as written, the picture, the verdict.  -> rationale and verdict, row by row"""
    cells: list[list[Cell]] = [[] for _ in texts]
    said: list[list[tuple[str, str]]] = [[] for _ in texts]
    for k in range(2):
        drawn = painter.sample(texts, sampling, rng(seed, "thoughts", k))
        images = painter.pictures(drawn.codes).cpu()  # (b 3 64 64)
        rewards, thoughts = judge(images, texts).tolist(), painter.rationales(drawn)  # b, b
        for i, (text, image, thought, reward) in enumerate(zip(texts, images, thoughts, rewards)):
            _, line, right = verdict(image, text, reward)
            said[i].append((thought or "(no rationale)", line))
            shown = figures.wrap(said[i][-1][0], 29).splitlines()[:8]
            cells[i].append((image, "\n".join([*shown, figures.wrap(line, 29)]), right))
    figures.blocks(cells, texts, 3, path)
    return said
