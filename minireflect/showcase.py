"""Figures with pictures: strips of rounds, of edits and of models side by side, with a verdict under each
picture.

The pictures are not selected: prompts are the first in the order of the world, noise is from a fixed stream.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from . import figures
from .diffusion.reflection import ReflectionConfig
from .diffusion.sample import renoise
from .disk import replacing, write_text
from .figures import Cell
from .methods.rlrig import LoopConfig, Parts, loop_of
from .methods.rollout import RolloutConfig, rollout
from .methods.srrl import SRRLConfig
from .models.reasongen import SamplingConfig
from .pipeline import LatentDiffusion, ReasonPipeline, SamplerConfig, scored
from .rl.rewards import Reward
from .run import Job
from .streams import rng
from .world.canvas import to_pixels
from .world.captions import caption
from .world.graphs import SceneGraph
from .world.inspector import inspect
from .world.laws import LAWS
from .world.prompts import Prompt, prompt_set, understand

UNMET_SHOWN = 2  # unmet requirements listed under a picture
ALBUMS, STAGES, PAGE = 6, 6, (64, 64)  # sheets per run, denoising steps on a sheet, pixels of a picture
HOLD = 8  # frames of an animation that show a verdict


def fixed_prompts(kinds: tuple[str, ...] = ("physical", "unconventional")) -> list[Prompt]:
    """The first test prompt of each law and kind."""
    return [next(p for p in prompt_set(kind, "test") if p.law == law) for law in LAWS for kind in kinds]


def marked(image: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The picture with a magenta frame around the 4x4 block at (x, y), if given.  Shapes: image (3 h w)"""
    if block is None:
        return image
    framed, (x, y) = image.clone(), block
    framed[:, max(y - 1, 0) : y + 5, max(x - 1, 0) : x + 5] = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    framed[:, y : y + 4, x : x + 4] = image[:, y : y + 4, x : x + 4]
    return framed


def verdict(image: Tensor, text: str, reward: float | None = None) -> Cell:
    """A picture with the inspector's verdict and the learned reward, if given. In an unreadable picture the
    block with the largest error is marked.

    Shapes: image (3 64 64)
    """
    reading, prompt = inspect(image), understand(text)
    right = None if prompt is None else prompt.fulfilled_by(reading)
    said = {True: "right", False: "wrong: ", None: "no law covers the prompt; "}[right]
    if reading.scene is None:
        said = f"unreadable: {reading.why}"
    elif not right:
        said += f"reads as {caption(reading.scene)}"
    return marked(image, reading.block), said if reward is None else f"{said} · reward {reward:.2f}", right


def judged(images: Tensor, texts: list[str], reward: Reward | None = None) -> list[Cell]:
    """The cells of a gallery: the inspector's verdict in a word, and the reward.  Shapes: images (b 3 h w)"""
    marks = [f" · {v:.2f}" for v in scored(reward, images, texts).tolist()] if reward else [""] * len(texts)
    cells = [verdict(image, text) for image, text in zip(images, texts)]
    return [(x, said.split(":")[0] + mark, right) for (x, said, right), mark in zip(cells, marks)]


def compare(
    columns: dict[str, Tensor], reward: Reward, prompts: list[str], path: Path,
    notes: dict[str, list[str]] | None = None, read: bool = True,
) -> list[list[Cell]]:  # fmt: skip
    """Save a strip with one row per prompt and verdicts under the pictures.

    `notes` are texts above the verdicts of a column. Without notes, a picture that equals the one before it
    in its row is labelled "kept". `read=False` shows only the reward, for pictures that the inspector cannot
    read.

    Shapes: columns (n 3 h w) each, n prompts -> n rows of cells
    """
    rows: list[list[Cell]] = [[] for _ in prompts]
    for name, images in columns.items():
        values = scored(reward, images, prompts).tolist()
        above = notes[name] if notes else [""] * len(prompts)
        for row, image, text, value, note in zip(rows, images.cpu(), prompts, values, above):
            shown, said, right = verdict(image, text, value) if read else (image, f"reward {value:.3f}", None)
            if row and not notes and torch.equal(row[-1][0], shown):
                said = "kept: " + row[-1][1].removeprefix("kept: ")
            row.append((shown, f"{note}\n{said}".strip(), right))
    figures.strip(rows, prompts, list(columns), path, abreast=2 if len(rows) > 4 else 1)
    return rows


@torch.no_grad()
def sampled_rounds(
    pipe: LatentDiffusion, prompts: list[str], sampler: SamplerConfig, reflection: ReflectionConfig,
    seed: int, reward: Reward | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The pictures of K + 1 rounds. With a reward, refused pictures are sampled again; otherwise all are.

    -> columns of a strip, (b 3 h w) each
    """
    noise = rng(seed, "sample")
    how = pipe.noise(len(prompts), noise), sampler, reflection, noise
    rounds = pipe.selected_rounds(prompts, reward, *how) if reward else pipe.blind_rounds(prompts, *how)
    # blind rounds are latents
    return {f"round {k}": x if reward else pipe.decode(x) for k, x in enumerate(rounds)}


def same_noise(
    pipes: dict[str, LatentDiffusion], texts: list[str], sampler: SamplerConfig, seed: int
) -> dict[str, Tensor]:
    """Two pictures of each prompt by each model, from the same noise, as columns of a strip."""
    how = sampler.steps, sampler.guidance, sampler.eta
    return {
        f"{name}, noise {c + 1}": pipe.generate(texts, *how, generator=rng(seed, "before and after", c))
        for c in range(2)
        for name, pipe in pipes.items()
    }


def album(
    pipe: LatentDiffusion, reward: Reward, texts: list[str], config: SRRLConfig, job: Job
) -> Callable[[int], None]:
    """A function of the iteration that saves pictures for the report, ALBUMS times per run.

    It samples all rounds of fixed prompts from fixed noise and saves a sheet, album/STEP.jpg, with a row per
    picture and STAGES denoising steps as columns. album/STEP.json has the prompts, rounds, rewards and
    verdicts of the rows.
    """
    config = replace(config, group=1, suffixes=(), advantage="shrunk")
    every = max(1, -(-config.iterations // (ALBUMS - 1)))

    def save(step: int) -> None:
        if step % every and step != config.iterations:
            return
        out = rollout(pipe, texts, reward, config, job.seed, -1)  # no training iteration has this noise
        rows, sheet = [], []
        for k, round_ in enumerate(out.rounds):
            latents = round_.path.latents  # (n s+1 c h w)
            columns = torch.linspace(0, latents.shape[1] - 1, STAGES).round().long()
            shown = pipe.decode(latents[:, columns].flatten(0, 1)).float().cpu()  # (n*stages 3 h w)
            sheet.append(F.interpolate(shown, PAGE, mode="area").unflatten(0, (-1, STAGES)))
            for i, value, image in zip(round_.rows.tolist(), round_.rewards, round_.images.cpu()):
                right = verdict(image, texts[i])[2] if image.shape[-1] == 64 else None
                rows.append({"prompt": texts[i], "round": k, "reward": value.item(), "right": right})
        (pixels,) = to_pixels(rearrange(torch.cat(sheet), "n s c h w -> 1 c (n h) (s w)"))
        path = job.run.folder / "album" / f"{step:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            Image.fromarray(pixels).save(file, "JPEG", quality=85)
        write_text(path.with_suffix(".json"), json.dumps(rows))

    return save


@torch.no_grad()
def animation(pipe: LatentDiffusion, reward: Reward, texts: list[str], seed: int, path: Path) -> None:
    """A GIF of a rollout: denoise, score, re-noise refused pictures, denoise from the negative noise, score.

    Frames are green where the reward accepts a picture and red where it refuses it.
    """
    config = RolloutConfig(rounds=1)
    out = rollout(pipe, texts, reward, config, seed, 0)
    x_0, accepted = out.rounds[0].path.latents[:, -1], out.rounds[0].rewards[:, 0] >= config.accept
    scenes = [("denoise", x, None) for x in out.rounds[0].path.latents.unbind(1)]
    scenes += [("score", x_0, accepted)] * HOLD
    for again in out.rounds[1:]:
        eps, table = pipe.eps(out.context[again.rows])(config.w_renoise), pipe.table(config.renoise_steps)
        moves = [("re-noise refused pictures", step.x) for step in renoise(eps, x_0[again.rows], table)]
        moves += [("denoise from the negative noise", x) for x in again.path.latents.unbind(1)]
        scenes += [(words, x_0.index_copy(0, again.rows, x), accepted) for words, x in moves]
        found = again.rewards[:, 0] >= config.accept
        scenes += [("score", scenes[-1][1], accepted.index_copy(0, again.rows, found))] * (2 * HOLD)
    frames = []
    for words, x, right in scenes:
        frame = Image.new("RGB", (144 * len(texts), 160), "white")
        ImageDraw.Draw(frame).text((8, 2), words, figures.INK)
        for i, image in enumerate(to_pixels(pipe.decode(x))):
            color = figures.INK if right is None else figures.TRUTH if right[i] else figures.WRONG
            shown = ImageOps.expand(Image.fromarray(image).resize((128, 128), 0), 4, color)
            frame.paste(shown, (144 * i + 4, 20))
        frames.append(frame.quantize(48, dither=Image.Dither.NONE))
    with replacing(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=120, loop=0)


@torch.no_grad()
def check_picture(pipe: LatentDiffusion) -> np.ndarray:
    """The first physical test prompt of each law, side by side, sampled without step noise.

    -> (64 512 3) uint8
    """
    texts = [p.text for p in fixed_prompts(("physical",))]
    images = pipe.generate(texts, eta=0.0, generator=rng(0, "check"))  # (8 3 64 64)
    return rearrange(to_pixels(images), "b h w c -> h (b w) c")


def edit_strip(
    parts: Parts, graphs: list[SceneGraph], loop: LoopConfig, seed: int, path: Path
) -> list[list[Cell]]:
    """Save a strip of RL-RIG, one row per graph: picture, unmet requirements, edit prompt, next picture.

    -> rows of cells
    """
    rows: list[list[Cell]] = [[] for _ in graphs]
    for state in loop_of(parts, loop)(graphs, rng(seed, "edits")):
        tried, texts, answers = range(len(graphs)), [""] * len(graphs), state.answers
        if edits := state.edits:
            tried, texts, answers = edits.rows.tolist(), edits.edit_prompts.texts, edits.after
        for i, image, text, met in zip(tried, (edits or state).images.cpu(), texts, answers.met.tolist()):
            unmet = [r.words for r, ok in zip(graphs[i].requirements, met) if not ok]
            if len(unmet) > UNMET_SHOWN:
                unmet[UNMET_SHOWN:] = [f"and {len(unmet) - UNMET_SHOWN} more"]
            said = f"unmet: {'; '.join(unmet)}" if unmet else "all met according to the Checker"
            reading = inspect(image)
            right = reading.scene is not None and graphs[i].fulfilled_by(reading.scene.objects)
            rows[i].append((marked(image, reading.block), f"edit: {text}\n{said}" if text else said, right))
    heads = ["round 0", *(f"edit {k}" for k in range(1, loop.rounds + 1))]
    figures.strip(rows, [g.sentence for g in graphs], heads, path)
    return rows


def rationale_strip(
    pipe: ReasonPipeline, reward: Reward, texts: list[str], sampling: SamplingConfig, seed: int, path: Path
) -> list[list[Cell]]:
    """Save a strip of ReasonGen-R1, two samples per prompt: rationale, picture and verdict.

    -> rows of cells
    """
    columns, notes = {}, {}
    for k, name in enumerate(("first sample", "second sample")):
        sampled = pipe.sample(texts, sampling, rng(seed, "thoughts", k))
        columns[name] = pipe.pictures(sampled.codes).cpu()  # (b 3 64 64)
        notes[name] = [rationale or "(no rationale)" for rationale in pipe.rationales(sampled)]
    return compare(columns, reward, texts, path, notes)
