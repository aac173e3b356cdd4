"""Pictures for people: strips of rounds, of edits and of models side by side, with a verdict under each
picture.

Nothing in them is picked: prompts come in the order in which the world lists them, noise from a fixed stream.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import figures
from .diffusion.reflection import ReflectionConfig
from .figures import Cell
from .methods.rlrig import LoopConfig, Parts, loop_of
from .models.reasongen import SamplingConfig
from .pipeline import LatentDiffusion, ReasonPipeline, SamplerConfig
from .rl.rewards import Reward
from .streams import rng
from .world.captions import caption
from .world.graphs import SceneGraph
from .world.inspector import inspect
from .world.laws import LAWS
from .world.prompts import Prompt, prompt_set, understand

UNMET_SHOWN = 2  # requirements listed under a picture


def fixed_prompts(kinds: tuple[str, ...] = ("physical", "unconventional")) -> list[Prompt]:
    """The first held-out prompt of every law and kind."""
    return [next(p for p in prompt_set(kind, "held-out") if p.law == law) for law in LAWS for kind in kinds]


def verdict(image: Tensor, text: str, reward: float | None = None) -> Cell:
    """A picture, what the inspector says of it, and the learned reward.  Shapes: image (3 64 64)"""
    reading, prompt = inspect(image), understand(text)
    right = None if prompt is None else prompt.fulfilled_by(reading)
    if reading.scene is None:
        said = f"unreadable: {reading.why}"
    elif right:
        said = "right"
    else:
        said = "no law covers the prompt; " if right is None else "wrong: "
        said += f"reads as {caption(reading.scene)}"
    return image, said if reward is None else f"{said} · reward {reward:.2f}", right


def compare(
    columns: Iterable[Tensor], reward: Reward, prompts: list[str], read: bool = True
) -> list[list[Cell]]:
    """For each prompt the pictures of all columns with their verdicts; "kept" where a column repeats the one
    before.

    `read=False` shows the reward alone, where no inspector can read the pictures.
    Shapes: columns (n 3 h w) each, n prompts -> n rows
    """
    rows: list[list[Cell]] = [[] for _ in prompts]
    for images in columns:
        values = reward(images, prompts).tolist()
        for row, image, text, value in zip(rows, images.cpu(), prompts, values):
            cell = verdict(image, text, value) if read else (image, f"reward {value:.3f}", None)
            if row and torch.equal(row[-1][0], image):
                cell = image, f"kept: {row[-1][1].removeprefix('kept: ')}", cell[2]
            row.append(cell)
    return rows


@torch.no_grad()
def sampled_rounds(
    pipe: LatentDiffusion, prompts: list[str], sampler: SamplerConfig, reflection: ReflectionConfig,
    seed: int, reward: Reward | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The pictures of every round, K + 1 of them: refused ones are sampled again, or without a reward all.
    -> (b 3 h w)
    """
    noise = rng(seed, "sample")
    x_T = pipe.noise(len(prompts), noise)
    if reward:
        return pipe.selected_rounds(prompts, reward, x_T, sampler, reflection, noise)
    return map(pipe.decode, pipe.blind_rounds(prompts, x_T, sampler, reflection, noise))


def rounds_strip(
    rounds: Iterable[Tensor], reward: Reward, prompts: list[str], path: Path
) -> list[list[Cell]]:
    """Save a strip, a prompt a row and a round a column.  -> the cells, row by row"""
    rows = compare(rounds, reward, prompts)
    heads = [f"round {k}" for k in range(len(rows[0]))]
    figures.strip(rows, prompts, heads, path, abreast=2 if len(rows) > 4 else 1)
    return rows


def before_and_after(
    pipes: dict[str, LatentDiffusion],
    reward: Reward,
    sampler: SamplerConfig,
    seed: int,
    path: Path,
    copies: int = 2,
) -> None:
    """The same prompts and the same noise through every model, `copies` pictures each."""
    texts = [p.text for p in fixed_prompts()]
    columns = {
        f"{name}, noise {c + 1}": pipe.generate(
            texts, sampler.steps, sampler.guidance, sampler.eta, generator=rng(seed, "before and after", c)
        )
        for c in range(copies)
        for name, pipe in pipes.items()
    }
    figures.strip(compare(columns.values(), reward, texts), texts, list(columns), path, abreast=2)


def columns_of(
    models: dict[str, Tensor], reward: Reward, prompts: list[str], path: Path, rows: int = 8
) -> None:
    """The first `rows` pictures of several models side by side, the reward under each.

    Shapes: models (n 3 h w) each, n prompts
    """
    cells = compare([images[:rows] for images in models.values()], reward, prompts[:rows], read=False)
    figures.strip(cells, prompts[:rows], list(models), path)


@torch.no_grad()
def check_picture(pipe: LatentDiffusion) -> np.ndarray:
    """The first held-out physical prompt of every law, side by side, sampled without step noise.
    -> (64 512 3) uint8
    """
    texts = [p.text for p in fixed_prompts(("physical",))]
    images = pipe.generate(texts, eta=0.0, generator=rng(0, "check"))  # (8 3 64 64)
    return rearrange(((images + 1) * 127.5).round().byte(), "b c h w -> h (b w) c").cpu().numpy()


def edit_strip(
    parts: Parts, graphs: list[SceneGraph], loop: LoopConfig, seed: int, path: Path
) -> list[list[Cell]]:
    """RL-RIG at work, a graph a row: picture, unmet requirements, edit prompt, next picture.
    -> the cells, row by row
    """
    rows: list[list[Cell]] = [[] for _ in graphs]
    for state in loop_of(parts, loop)(graphs, rng(seed, "edits")):
        tried = range(len(graphs)) if state.edits is None else state.edits.rows.tolist()
        texts = [""] * len(graphs) if state.edits is None else state.edits.said.texts
        images, answers = (state.edits or state).images, state.edits.after if state.edits else state.answers
        for n, i in enumerate(tried):
            unmet = [r.words for r, ok in zip(graphs[i].requirements, answers.met[n].tolist()) if not ok]
            more = [f"and {len(unmet) - UNMET_SHOWN} more"] if len(unmet) > UNMET_SHOWN else []
            said = f"unmet: {'; '.join(unmet[:UNMET_SHOWN] + more)}" if unmet else "all met, says the Checker"
            edit = f"edit: {texts[n]}\n" if texts[n] else ""
            image = images[n].cpu()
            scene = inspect(image).scene
            rows[i].append((image, edit + said, scene is not None and graphs[i].fulfilled_by(scene.objects)))
    heads = ["round 0", *(f"edit {k}" for k in range(1, loop.rounds + 1))]
    figures.strip(rows, [g.sentence for g in graphs], heads, path)
    return rows


def thoughts_strip(
    pipe: ReasonPipeline, reward: Reward, texts: list[str], sampling: SamplingConfig, seed: int, path: Path
) -> list[list[tuple[str, str]]]:
    """ReasonGen-R1 at work, every prompt twice: the rationale as written, the picture, the verdict.
    -> rationale and verdict, row by row
    """
    cells: list[list[Cell]] = [[] for _ in texts]
    said: list[list[tuple[str, str]]] = [[] for _ in texts]
    for k in range(2):
        sampled = pipe.sample(texts, sampling, rng(seed, "thoughts", k))
        images = pipe.pictures(sampled.codes).cpu()  # (b 3 64 64)
        for i, (rationale, [cell]) in enumerate(
            zip(pipe.rationales(sampled), compare([images], reward, texts))
        ):
            said[i].append((rationale or "(no rationale)", cell[1]))
            cells[i].append((cell[0], "\n".join(said[i][-1]), cell[2]))
    figures.strip(cells, texts, ["first sample", "second sample"], path, abreast=3)
    return said
