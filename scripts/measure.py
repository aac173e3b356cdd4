"""Measure the inspector, the shipped networks and reflection; the documents quote these figures.

    python scripts/measure.py inspector autoencoder base reward captioner memory [--weights RUN] [--n 2000]
    python scripts/measure.py gap --runs RUN ...

All random numbers have fixed seeds that no training uses.  Prompts ask for test combinations.
"""

import io
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from reports import auc, described, over_seeds
from torch import Tensor
from tqdm import tqdm

from minireflect.checkpoints.ours import load_autoencoder, load_pipeline, weights_folder
from minireflect.config import preset
from minireflect.diffusion.reflection import ReflectionConfig, renoise_to
from minireflect.diffusion.sample import denoise, last
from minireflect.evaluate import EvaluationConfig, Table, evaluate, law_table, sample_and_score
from minireflect.evaluate_reason import ORDER, evaluation_prompts
from minireflect.methods.rollout import ETA
from minireflect.models.autoencoder import Autoencoder
from minireflect.pipeline import LatentDiffusion, SamplerConfig
from minireflect.rl.rewards import ACCEPT_WORD, Reward, load_captioner, load_reward, verdicts
from minireflect.streams import choices, rng
from minireflect.world.canvas import to_pixels, to_tensor
from minireflect.world.captions import plan_of, rationale
from minireflect.world.inspector import inspect, inspect_all
from minireflect.world.laws import LAWS, render
from minireflect.world.prompts import KINDS, Prompt, draw_prompts, near_miss, sample_scene
from minireflect.world.scenes import COLORS, Reading, Scene


def share(values: Sequence[bool]) -> str:
    return f"{sum(values)}/{len(values)} = {np.mean(values):.4f}"


def in_pillow(image: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    picture = Image.fromarray(to_pixels(image[None])[0])
    return to_tensor(np.asarray(change(picture))[None])[0]


def jpeg(picture: Image.Image) -> Image.Image:
    picture.save(buffer := io.BytesIO(), "JPEG", quality=50)
    return Image.open(buffer)


def tint(image: Tensor, noise: torch.Generator) -> Tensor:
    """The picture after a random colour matrix, each entry within 0.05 of the identity."""
    M = torch.eye(3) + 0.1 * torch.rand(3, 3, generator=noise) - 0.05
    return (torch.einsum("ij,jhw->ihw", M, image + 1) - 1).clamp(-1, 1)


def strip(image: Tensor, noise: torch.Generator) -> Tensor:
    """The picture with two adjacent rows or columns in one random colour."""
    covered, (at, turned) = image.clone(), torch.randint(0, 63, (2,), generator=noise).tolist()
    (covered.mT if turned % 2 else covered)[:, at : at + 2] = 2 * torch.rand(3, 1, 1, generator=noise) - 1
    return covered


def disturbances(noise: torch.Generator) -> dict[str, Callable[[Tensor], Tensor]]:
    """Disturbances by name.  Their strengths refer to pictures in [0, 1]; in [-1, 1] they are doubled."""
    pad = torch.nn.functional.pad
    return {
        "clean": lambda x: x,
        "Gaussian noise 0.05": lambda x: (x + 0.1 * torch.randn(x.shape, generator=noise)).clamp(-1, 1),
        "JPEG quality 50": lambda x: in_pillow(x, jpeg),
        "blur of 1 pixel": lambda x: in_pillow(x, lambda p: p.filter(ImageFilter.GaussianBlur(1))),
        "shift of 2 pixels": lambda x: pad(x[None], (0, 2, 2, 0), mode="replicate")[0, :, :64, 2:],
        "brightness +10 %": lambda x: ((x + 1) * 1.1 - 1).clamp(-1, 1),
        "brightness -10 %": lambda x: (x + 1) * 0.9 - 1,
        "tint of 5 %": lambda x: tint(x, noise),
        "strip of 2 pixels": lambda x: strip(x, noise),
    }


def forge(scene: Scene, kind: str, draw: random.Random) -> Scene | None:
    """The scene with one fact changed by `kind`, or None if this is not possible.

    kind: "removed" (an object of an arrangement), "recoloured", "swapped" (two objects), "reversed" (outcome)
    """
    objects, arranged = list(scene.objects), scene.law == "arrangement"
    if kind == "removed" and arranged and len(objects) > 1:
        objects.pop(draw.randrange(len(objects)))
    elif kind == "recoloured" and any(colours := [o.color.split(" ")[0] in COLORS for o in objects]):
        i = draw.choice([i for i, there in enumerate(colours) if there])
        old = objects[i].color.split(" ")[0]
        new = draw.choice([c for c in COLORS if c != old])
        objects[i] = replace(objects[i], color=objects[i].color.replace(old, new))
    elif kind == "swapped" and scene.law == "balance":
        a, b = objects
        objects = [replace(b, place="left"), replace(a, place="right")]
    elif kind == "swapped" and arranged and (pairs := [(i, j) for i in range(len(objects)) for j in range(i)
                                                       if objects[i].words != objects[j].words]):  # fmt: skip
        i, j = pairs[0]
        a, b = objects[i], objects[j]
        objects[i], objects[j] = replace(a, xy=b.xy), replace(b, xy=a.xy)
    elif kind == "reversed" and not arranged:
        others = [o for o in LAWS[scene.law].outcomes if o != scene.outcome]
        return replace(scene, outcome=draw.choice(others))
    else:
        return None
    return replace(scene, objects=tuple(objects))


def painted_over(scene: Scene, left: int) -> Tensor:
    """A picture of a balance in which one ball is covered by the colour of the paper."""
    picture, x = render(scene).clone(), slice(0, 25) if left else slice(39, 64)
    colourful = (picture.amax(0) - picture.amin(0) > 0.35)[:, x]  # not ink or paper, which are nearly grey
    paper = torch.tensor([0.96, 0.945, 0.9])[:, None, None]
    picture[:, :, x] = torch.where(colourful, paper, picture[:, :, x])
    return picture


def junk(scenes: list[Scene], some: list[Tensor], noise: torch.Generator) -> Iterator[tuple[str, list]]:
    """Pictures that the inspector must not be able to read, with a name for each kind."""

    def static() -> Tensor:
        return torch.rand(3, 64, 64, generator=noise) * 2 - 1

    yield "uniform noise", [static() for _ in range(300)]
    yield "blank", [torch.full((3, 64, 64), float(v)) for v in np.linspace(-1, 1, 300)]
    yield "half dissolved into noise", [0.5 * p + 0.5 * torch.randn(p.shape, generator=noise) for p in some]
    half = [torch.where(torch.rand(64, 64, generator=noise) < 0.5, p, static()) for p in some]
    yield "half the pixels noise", half
    both = zip(some, some[1:], scenes, scenes[1:])
    yield "dissolved into another law", [0.5 * p + 0.5 * q for p, q, s, t in both if s.law != t.law]


def measure_inspector(n: int) -> None:
    scenes = [sample_scene(1_000_000 + i, split="test" if i % 2 else "train") for i in range(n)]
    pictures = [render(s) for s in scenes]
    inspect(pictures[0])  # makes the matched filters, so that the times below exclude this
    for name, disturb in disturbances(rng(0, "measure", "inspector")).items():
        disturbed = [disturb(p) for p in pictures]
        start = time.perf_counter()
        right = [inspect(p).agrees_with(s) for p, s in zip(disturbed, scenes)]
        ms = (time.perf_counter() - start) / n * 1e3
        print(f"  read right, {name:<20} {share(right)}   {ms:.2f} ms a picture")
    draw = choices(0, "measure", "forge")
    for kind in ("removed", "recoloured", "swapped", "reversed"):
        law = "arrangement" if kind == "removed" else ""
        scenes_in_turn = (sample_scene(2_000_000 + i, law) for i in count())
        pairs = ((scene, forged) for scene in scenes_in_turn if (forged := forge(scene, kind, draw)))
        accepted = [inspect(render(forged)).agrees_with(scene) for scene, forged in islice(pairs, n)]
        print(f"  accepted, {kind:<22} {share(accepted)}")
    balances = [sample_scene(3_000_000 + i, "balance") for i in range(n)]
    painted = [inspect(painted_over(s, i % 2)).agrees_with(s) for i, s in enumerate(balances)]
    print(f"  accepted, a ball painted over    {share(painted)}")
    collaged = []
    for i in range(n):  # half of one picture beside or above half of another, of another law
        seeds, laws = (4_000_000 + 2 * i, 4_000_001 + 2 * i), draw.sample([*LAWS, "arrangement"], 2)
        a, b = (render(sample_scene(seed, law)).clone() for seed, law in zip(seeds, laws))
        (a.mT if i % 2 else a)[:, 32:] = (b.mT if i % 2 else b)[:, 32:]
        collaged.append(inspect(a).readable)
    print(f"  accepted, collaged               {share(collaged)}")
    for name, images in junk(scenes[:300], pictures[:300], rng(0, "measure", "noise")):
        print(f"  unreadable, {name:<27} {share([not r.readable for r in inspect_all(torch.stack(images))])}")


@torch.no_grad()
def through(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Reconstructions of pictures.  Shapes: images (n 3 64 64) -> (n 3 64 64)"""
    parts = tqdm(images.split(100), "autoencoder", leave=False)
    return torch.cat([autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1) for x in parts])


def measure_autoencoder(autoencoder: Autoencoder, n: int) -> None:
    scenes = [sample_scene(4_000_000 + i, split="test" if i % 2 else "train") for i in range(n)]
    images = torch.stack([render(s) for s in scenes])
    again = through(autoencoder, images)
    right = [r.agrees_with(s) for r, s in zip(inspect_all(again), scenes)]
    error = ((again - images) ** 2).mean()
    print(f"  reconstructions read right: {share(right)}   squared error {error:.5f}")
    for law in (*LAWS, "arrangement"):
        print(f"    {law:<12} {share([ok for ok, s in zip(right, scenes) if s.law == law])}")


def measure_base(pipe: LatentDiffusion, reward: Reward, n: int) -> None:
    print(law_table({"base": evaluate(pipe, reward, SamplerConfig(), EvaluationConfig(pictures=n), KINDS)}))


def measure_gap(runs: list[Path], n: int) -> None:
    """Reward minus truth of trained models: the mean over prompts, with its 95 % interval over prompts."""
    for split, kind in product(("validation", "test"), KINDS[:2]):
        off, config = defaultdict(list), EvaluationConfig(n, split)
        prompts = draw_prompts(kind, split, n, choices(config.seed, "evaluate", kind))
        texts = [p.text for p in prompts]
        for run in runs:
            how = texts, preset("cpu").sampler, config, kind
            images, rewards = sample_and_score(load_pipeline(run), load_reward(run), *how)
            for text, gap in zip(texts, (rewards - verdicts(images, prompts)).tolist()):
                off[text].append(gap)
        mean = {text: float(np.mean(gaps)) for text, gaps in off.items()}
        most = max(mean, key=lambda text: abs(mean[text]))
        found = f"{over_seeds([*mean.values()])} over {len(mean)} prompts; {mean[most]:.3f} of {most!r}"
        print(f"  {kind}, {split}: {found}")


def measure_reward(pipe: LatentDiffusion, reward: Reward, n: int) -> None:
    draw = choices(0, "measure", "twins")
    prompts = [p for kind in KINDS for p in draw_prompts(kind, "test", n // 3 + 1, draw)][:n]
    right = torch.stack([render(p.scene(draw)) for p in prompts])
    wrong = torch.stack([render(twin_scene(p, draw)) for p in prompts])
    texts = [p.text for p in prompts]
    law, again = np.array([p.law for p in prompts]), partial(through, pipe.autoencoder)
    for name, shown in (("clean", lambda x: x), ("after the autoencoder", again)):
        better = (reward(shown(right), texts) > reward(shown(wrong), texts)).numpy()
        print(f"  prefers the right picture to its twin, {name}: {share(list(better))}")
        print("    " + " · ".join(f"{k} {better[law == k].mean():.3f}" for k in (*LAWS, "arrangement")))
    seen = []
    # few prompts with many pictures each, so that a prompt has both right and wrong pictures
    for kind in KINDS[:2]:
        asked = [p for p in draw_prompts(kind, "test", 64, draw) for _ in range(-(-n // 128))]
        how = SamplerConfig(), EvaluationConfig(pictures=len(asked)), f"reward {kind}"
        images, scored = sample_and_score(pipe, reward, [p.text for p in asked], *how)
        rated = zip(asked, scored.tolist(), (verdicts(images, asked) > 0.5).tolist())
        seen += [(p.law, p.text, value, true) for p, value, true in rated]
    laws, group, v, t = map(np.array, zip(*seen))
    within = {g: auc(v[group == g], t[group == g]) for g in dict.fromkeys(group)}
    of = [x for x in within.values() if np.isfinite(x)]
    print(f"  on {len(v)} pictures of the base, {t.mean():.3f} of them right: AUC {auc(v, t):.4f},")
    print(f"  within a prompt {np.mean(of):.4f} (mean of {len(of)} prompts)")
    for k in LAWS:
        rows = laws == k
        inner = [x for g, x in within.items() if g in group[rows] and np.isfinite(x)]
        mean = np.mean(inner or [float("nan")])
        print(f"    {k:<10} AUC {auc(v[rows], t[rows]):.3f}   within a prompt {mean:.3f}")
    print(f"  mean reward where right {v[t].mean():.3f}, where wrong {v[~t].mean():.3f}")


def false_rationale(prompt: Prompt, scene: Scene, split: str, draw: random.Random) -> str:
    """A rationale that contradicts the scene in one fact.

    For a law, it is the rationale of a near miss.  For an arrangement, one object has another colour, or the
    objects have other positions.
    """
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


def measure_captioner(captioner: Reward, n: int) -> Table:
    """Shares of true and of false rationales that the captioner accepts; n pictures per kind of prompt."""
    rows = {}
    for split in ("train", "test"):
        prompts = evaluation_prompts(EvaluationConfig(n, split))
        draw = choices(EvaluationConfig.seed, "evaluate", "captioner", split)
        scenes = [p.scene(draw) for p in prompts]
        images = torch.stack([render(s) for s in scenes])  # (m 3 64 64)
        true = [rationale(s, rng=draw) for s in scenes]
        false = [false_rationale(p, s, split, draw) for p, s in zip(prompts, scenes)]
        for name, texts in (("true", true), ("false by one fact", false)):
            kept = (captioner(images, texts) >= ACCEPT_WORD).float()  # (m)
            rows[f"{name}, {split} combinations"] = dict(zip(ORDER, (p.mean().item() for p in kept.split(n))))
    return Table("rationales found kept", rows)


def measure_memory(pipe: LatentDiffusion, n: int) -> None:
    """Share of right pictures after renoising and denoising again, for first pictures right and wrong."""
    config, table = preset("cpu").srrl, pipe.table(preset("cpu").srrl.steps)
    ours, published = config.reflection, ReflectionConfig(renormalise=False)
    both = (draw_prompts(k, "test", n // 2, choices(0, "measure", "memory", k)) for k in KINDS[:2])
    prompts = [prompt for kind in both for prompt in kind]
    found: dict[str, list[Tensor]] = {}
    for i in tqdm(range(0, len(prompts), 48), "sampling twice", leave=False):
        part = prompts[i : i + 48]
        eps, noise = pipe.eps([p.text for p in part]), rng(0, "measure", "memory", i)

        def draw(x_T: Tensor, eps=eps, noise=noise) -> Tensor:
            return last(denoise(eps(config.guidance), x_T, table, ETA, noise))

        x_0, plain = draw(pipe.noise(len(part), noise)), torch.ones(len(part), device=pipe.device)
        back = [eps(config.w_renoise), x_0, pipe.table(config.renoise_steps), ours, noise]
        starts = {
            "new noise": pipe.noise(len(part), noise),
            "its noise, as published": renoise_to(eps(published.w_renoise), x_0, table, published),
            "its noise": renoise_to(*back, plain),
            "the opposite of its noise": renoise_to(*back, -plain),
        }
        for name, z in {"first": x_0, **{k: draw(x) for k, x in starts.items()}}.items():
            found.setdefault(name, []).append(verdicts(pipe.decode(z), part) > 0.5)
    right = {name: torch.cat(v) for name, v in found.items()}
    first = right.pop("first")
    print(f"  first pictures: {share(first.tolist())} right")
    for name, again in right.items():
        kept, repaired = share(again[first].tolist()), share(again[~first].tolist())
        print(f"  from {name:<26} right stays right {kept:<18} wrong becomes right {repaired}")


def twin_scene(prompt: Prompt, draw: random.Random) -> Scene:
    """A scene of a near miss of the prompt, which does not fulfil the prompt.

    For arrangements, near misses are taken from the training split, as the test split has too few.
    """
    while True:
        scene = near_miss(prompt, draw, "train" if prompt.graph else "test").scene(draw)
        if not prompt.fulfilled_by(Reading(scene, 0.0)):
            return scene


def main() -> None:
    parser = described(__doc__)

    def base() -> LatentDiffusion:
        return load_pipeline(args.weights, args.unet)

    measures = {
        "inspector": lambda: measure_inspector(args.n),
        "autoencoder": lambda: measure_autoencoder(load_autoencoder(weights_folder(args.weights)), args.n),
        "base": lambda: measure_base(base(), load_reward(args.weights), args.n),
        "gap": lambda: measure_gap(args.runs, min(args.n, 256)),
        "reward": lambda: measure_reward(base(), load_reward(args.weights), args.n),
        "captioner": lambda: print(measure_captioner(load_captioner(args.weights), min(args.n, 240))),
        "memory": lambda: measure_memory(base(), min(args.n, 512)),
    }
    parser.add_argument("what", nargs="+", choices=measures)
    parser.add_argument("--weights", type=Path, help="run folder (default: the shipped weights)")
    parser.add_argument("--unet", default="unet", help="unet, or base_unet for that before training by srrl")
    parser.add_argument("--runs", nargs="+", type=Path, help="run folders of srrl, for gap")
    parser.add_argument("--n", type=int, default=2_000, help="pictures (default: %(default)s)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for what in args.what:
        print(what, flush=True)
        measures[what]()


if __name__ == "__main__":
    main()
