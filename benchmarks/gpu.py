# ruff: noqa: E402  (missing dependencies are reported before they are imported)
"""Check and measure this project on a GPU, in parts that take minutes; each part writes one line of JSON.

    python benchmarks/gpu.py                         all parts on the GPU, 8 minutes at most, into gpu.jsonl
    python benchmarks/gpu.py device sd15             only these parts; those in gpu.jsonl are not repeated
    python benchmarks/gpu.py --tiny --device cpu     all parts at tiny sizes, as in the test suite

    device   smoke runs of all commands, compared with the CPU; noise, pictures, first ratio in fp32 and bf16
    train    `train srrl` from the shipped weights: seconds, and the shares of rollout, reward and update
    sd15     random weights of SD 1.5's size: memory and pictures per hour of LoRA by grpo, ddpo and srrl;
             sampling eager, compiled, and by diffusers (with its autoencoder in bf16, ours in float32)
    rl       the policy gradient with 1,152 pictures per step
    all      `train all` from random weights, until the time is over

Needs torch, torchvision and the dependencies of the package.  For a machine without a network, run
`pip install --target deps --no-deps einops tqdm tyro typing_extensions docstring_parser typeguard safetensors
scipy matplotlib ...` on another one, copy the folder, and run `PYTHONPATH=.:deps python benchmarks/gpu.py`.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
NEEDED = ("einops", "tqdm", "tyro", "safetensors", "numpy", "PIL", "scipy", "matplotlib")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"missing: {', '.join(missing)}; {' '.join(__doc__.split('Needs ')[1].split())}")

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minireflect.checkpoints.ours import load_pipeline
from minireflect.cli import TRAINED
from minireflect.config import preset
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.methods import srrl
from minireflect.methods.learn import Learner, learn
from minireflect.methods.rollout import rollout
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.models.clip import TextConfig, TextEncoder
from minireflect.models.lora import LoRAConfig, add_lora
from minireflect.models.unet import UNet, UNetConfig
from minireflect.pipeline import LatentDiffusion, best_device
from minireflect.rl.rewards import load_reward
from minireflect.run import read_metrics
from minireflect.streams import rng
from scripts.reports import described

Row = dict[str, float | str]
PROMPTS = ["a tall red candle in still air", "a big wooden ball on the left of a water tank"]
SECONDS = {"device": 100, "train": 120, "sd15": 140, "rl": 60, "all": 60}  # time limits; 8 minutes in all


class Place(NamedTuple):
    device: torch.device
    tiny: bool
    seconds: float  # time limit of the part


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def clocked(row: Row, name: str, device: torch.device) -> Iterator[None]:
    """Add the seconds that a block takes to row[name]."""
    wait(device)
    start = time.perf_counter()
    yield
    wait(device)
    row[name] = row.get(name, 0.0) + time.perf_counter() - start


def train(*words: str, seconds: float | None = None) -> Path:
    """Run `minireflect train` in a separate process, for at most `seconds`.  -> the run folder"""
    command = [sys.executable, str(ROOT / "train.py"), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, **output)
    try:
        said = process.communicate(timeout=seconds)[0]
        if process.returncode:
            raise RuntimeError(f"train {' '.join(words)}: {said[-800:]}")
    except subprocess.TimeoutExpired:
        process.terminate()  # the run finishes its step and saves
        process.communicate(timeout=60)
    finally:
        process.kill()
    return Path(words[words.index("--out") + 1])


# ---- parts -------------------------------------------------------------------------------------------------


def device(place: Place) -> Iterator[Row]:
    yield from same_pictures(place.device)
    yield from first_ratios(place.device)
    compared = ("srrl",) if place.tiny else ("srrl", "rlrig", "reason-grpo")
    others = [] if place.tiny else [c for c in TRAINED if c not in (*compared, "all")]
    start = time.perf_counter()
    for command in (*compared, *others):
        if time.perf_counter() - start > place.seconds:
            yield {"command": command, "skipped": "no time left"}
            continue
        with TemporaryDirectory() as folder:
            row: Row = {"command": command}
            words = [command, "--preset", "smoke", "--device"]
            with clocked(row, "seconds", place.device):
                found = read_metrics(train(*words, place.device.type, "--out", f"{folder}/device"))
            if command in compared:
                wanted = read_metrics(train(*words, "cpu", "--out", f"{folder}/cpu"))
                pairs = [(x.get(k), y[k]) for x, y in zip(found, wanted) for k in y]
                differences = [abs(x - y) for x, y in pairs if isinstance(x, float) and isinstance(y, float)]
                row["largest difference of a metric from the CPU's"] = max(differences)
            yield row


@torch.no_grad()
def same_pictures(device: torch.device) -> Iterator[Row]:
    """Pictures of the shipped model from the same noise, compared with those on the CPU."""
    wanted = load_pipeline().generate(PROMPTS, generator=rng(0, "gpu"))
    start = load_pipeline().noise(2, rng(0, "gpu"))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pipe = load_pipeline().to(device)
        pipe.unet.to(dtype)
        found = pipe.generate(PROMPTS, generator=rng(0, "gpu")).cpu()
        noise = pipe.noise(2, rng(0, "gpu")).cpu()
        yield {
            "pictures": name,
            "noise is the CPU's": float(noise.equal(start)),
            "mean difference of 2": (found - wanted).abs().mean().item(),
        }


def first_ratios(device: torch.device) -> Iterator[Row]:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        pipe = load_pipeline().to(device)
        pipe.unet.to(dtype)
        add_lora(pipe.unet, LoRAConfig(rank=4), rng(0, "lora"))
        config = replace(srrl.recipe("ddpo"), prompts_per_iteration=2, steps=4)
        row, _ = iteration(pipe, config, PROMPTS)
        yield {"LoRA by ppo": name, "first ratio - 1, exactly 0": row["first_ratio"]}


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    return (images.mean((1, 2, 3)) + 1) / 2


def iteration(
    pipe: LatentDiffusion, config: srrl.SRRLConfig, texts: list[str], learner: Learner | None = None
) -> tuple[Row, Learner]:
    """One iteration of SRRL with a trivial reward: seconds of rollout and update, and the learner."""
    row: Row = {}
    most = len(texts) * config.group * (config.rounds + 1)
    learner = learner or Learner(pipe, config, config.guidance, most)
    with clocked(row, "rollout", pipe.device):
        out = rollout(pipe, texts, bright, config, 0, 0)
    with clocked(row, "update", pipe.device):
        stats = learn(learner, out, 1.0, rng(0, "update"))
    pictures = sum(len(r.images) for r in out.rounds)
    return row | {"pictures": pictures, "first_ratio": stats.first_ratio or 0.0}, learner


def train_part(place: Place) -> Iterator[Row]:
    """`train srrl` with the preset cpu, in this process, with times of its parts."""
    times: Row = {}
    reward, kept = load_reward(device=place.device), (srrl.rollout, srrl.learn)
    named = {"reward": reward, "rollout": srrl.rollout, "update": srrl.learn}
    timed = {name: clocked(times, name, place.device)(function) for name, function in named.items()}
    srrl.rollout, srrl.learn = timed["rollout"], timed["update"]
    try:
        from minireflect.evaluate import evaluate
        from minireflect.run import Job, Run

        config = preset("smoke" if place.tiny else "cpu")
        pipe = load_pipeline().to(place.device)
        with TemporaryDirectory() as folder:
            texts = partial(config.mix.draw, config.seed, config.srrl.prompts_per_iteration)
            with clocked(times, "training", place.device):
                job = Job(Run(folder + "/run", {}))
                srrl.train_srrl(config.srrl, pipe, timed["reward"], texts, None, job)
        with clocked(times, "evaluation", place.device):
            scores = evaluate(pipe, reward, config.sampler, config.evaluation)
    finally:
        srrl.rollout, srrl.learn = kept
    times["rollout"] -= times["reward"]
    whole = times["training"]
    shares = {f"share of {name}": times[name] / whole for name in ("rollout", "reward", "update")}
    right = {f"{kind}, right": score["accuracy"] for kind, score in scores.items() if "accuracy" in score}
    yield {"seconds of training": whole, "of evaluation": times["evaluation"], **shares, **right}


class Words:
    """A tokenizer for random weights: the id of a word is the sum of its characters."""

    length = 77

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[49_406, *(sum(map(ord, w)) for w in text.split()), 49_407] for text in texts]
        return torch.tensor([(row + [49_407] * self.length)[: self.length] for row in rows])


def stable_diffusion(place: Place) -> LatentDiffusion:
    """A pipeline of SD 1.5's size with random weights; much narrower if tiny."""
    n, text = (16, (32, 1, 2)) if place.tiny else (320, (768, 12, 12))
    vae = (8, 8, 8, 8) if place.tiny else (128, 256, 512, 512)
    torch.manual_seed(0)
    with torch.device(place.device):
        sizes = {"groups": 8, "res_blocks": 1} if place.tiny else {}
        unet = UNet(UNetConfig((n, 2 * n, 4 * n, 4 * n), (1, 1, 1, 0), 1, text[0], heads=8, **sizes))
        sizes = {"groups": 4} if place.tiny else {}
        encoder = TextEncoder(TextConfig(49_408, 49_407, width=text[0], layers=text[1], heads=text[2]))
        autoencoder = Autoencoder(AutoencoderConfig(vae, scaling_factor=0.18215, **sizes))
    half = torch.float32 if place.device.type == "cpu" else torch.bfloat16
    parts = encoder.to(half), unet.to(half), autoencoder, Schedule(ScheduleConfig())
    return LatentDiffusion(Words(), *parts, image_size=64 if place.tiny else 512).to(place.device).eval()


def sd15(place: Place) -> Iterator[Row]:
    """Rows in order of importance; none starts after the time limit."""
    start = time.perf_counter()
    few, many = (2, 2) if place.tiny else (4, 50)
    rows: list[Callable[[], Row]] = [partial(sd15_sampling, place, many)]
    batches = (1,) if place.tiny else (1, 4)
    for checkpointing, batch in product((False, True), batches):  # few steps: memory does not depend on them
        rows.append(partial(lora_row, place, "grpo", batch, checkpointing, few))
    for checkpointing, method in product((False, True), ("grpo", "ddpo", "srrl")):
        rows.append(partial(lora_row, place, method, 2 if place.tiny else 8, checkpointing, many))
    rows.insert(-3, partial(sd15_sampling, place, many, compiled=True))
    if not place.tiny and all(map(importlib.util.find_spec, ("diffusers", "transformers"))):
        rows.insert(-3, partial(beside_diffusers, place, many))
    for row in rows:
        if time.perf_counter() - start < place.seconds:
            yield row()


def lora_row(place: Place, method: str, batch: int, checkpointing: bool, steps: int) -> Row:
    """Pictures per hour of an iteration (rollout and update), and peak memory."""
    gc.collect()  # frees the networks of the previous row
    pipe = stable_diffusion(place)
    pipe.micro_batch, pipe.unet.checkpointing = batch, checkpointing
    add_lora(pipe.unet, LoRAConfig(), rng(0, "lora"))
    recipe, group = srrl.recipe(method, checkpoint=True), max(2, batch // 2)
    sizes = {"prompts_per_iteration": 2, "group": group, "steps": steps, "updates": 2, "batch": batch}
    config = replace(recipe, **sizes, rounds=min(1, recipe.rounds))
    _, learner = iteration(pipe, replace(config, steps=2), PROMPTS)  # to warm up
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place.device)
    row, _ = iteration(pipe, config, PROMPTS, learner)
    hours = (row["rollout"] + row["update"]) / 3600
    memory = torch.cuda.max_memory_allocated(place.device) / 1e9 if place.device.type == "cuda" else 0.0
    about = {"LoRA": method, "batch": batch, "checkpointing": str(checkpointing), "steps": steps}
    rate = {"pictures an hour": row["pictures"] / hours, "peak GB": memory}
    return about | rate | {"first_ratio": row["first_ratio"]}


@torch.no_grad()
def sd15_sampling(place: Place, steps: int, compiled: bool = False) -> Row:
    """Seconds for two pictures, and their FLOP/s as a share of those of large matrix products."""
    pipe = stable_diffusion(place)
    side, dtype = 512 if place.tiny else 8192, next(pipe.unet.parameters()).dtype
    a, floor = torch.randn(side, side, device=place.device, dtype=dtype), {}
    a @ a  # to warm up
    with clocked(floor, "seconds", place.device):
        for _ in range(10):
            a @ a
    rate = 10 * 2 * side**3 / floor["seconds"]
    x, context = pipe.noise(2, rng(0, "x")), pipe.embed(PROMPTS)
    with FlopCounterMode(display=False) as counter:
        pipe.predict(x, torch.tensor([500, 500], device=place.device), context)
    if compiled:
        pipe.unet.compile(backend="eager" if place.tiny else "inductor")
    pipe.generate(PROMPTS, 2, 7.5, generator=rng(0, "x"))
    row: Row = {"sampling": "compiled" if compiled else "eager", "steps": steps}
    with clocked(row, "seconds", place.device):
        pipe.generate(PROMPTS, steps, 7.5, generator=rng(0, "x"))
    reached = 2 * steps * counter.get_total_flops() / row["seconds"]  # guided: twice as many rows
    return row | {"TFLOP/s": reached / 1e12, "of matrix products": reached / rate}


def beside_diffusers(place: Place, steps: int) -> Row:
    from benchmarks.sd15 import diffusers_pipeline, theirs

    them = {k: v.to(place.device, torch.bfloat16) for k, v in theirs("sd15").items()}
    pipe = diffusers_pipeline(them)
    rows = torch.randn(2, 77, 768, device=place.device, dtype=torch.bfloat16)
    row = {"sampling": "diffusers", "steps": steps}
    how = {"prompt_embeds": rows, "negative_prompt_embeds": rows, "guidance_scale": 7.5, "output_type": "pt"}
    pipe(**how, num_inference_steps=2)
    with clocked(row, "seconds", place.device):
        pipe(**how, num_inference_steps=steps)
    return row


def rl(place: Place) -> Iterator[Row]:
    """The policy gradient on the sampler's steps, until the time is over."""
    words = ["srrl", "--method", "ddpo", "--preset", "smoke" if place.tiny else "cpu"]
    words += ["--device", place.device.type]
    words += [] if place.tiny else ["--prompts-per-iteration", "288", "--group", "4", "--iterations", "400"]
    with TemporaryDirectory() as folder:
        rows = read_metrics(train(*words, "--out", f"{folder}/run", seconds=place.seconds), "srrl")
    pictures = sum(rows[-1]["pictures_by_round"])
    right = {f"{when}, right": row["right"] for when, row in (("first", rows[0]), ("last", rows[-1]))}
    yield {"pictures a step": pictures, "iterations": len(rows), "last reward": rows[-1]["reward"], **right}


def everything(place: Place) -> Iterator[Row]:
    words = ["all", "--preset", "smoke" if place.tiny else "gpu", "--device", place.device.type]
    with TemporaryDirectory() as folder:
        rows = read_metrics(train(*words, "--out", f"{folder}/run", seconds=place.seconds))
    stages = {row["stage"]: row["step"] + 1 for row in rows}
    yield {"steps of " + stage: steps for stage, steps in stages.items()}


PARTS = {"device": device, "train": train_part, "sd15": sd15, "rl": rl, "all": everything}


def said(row: Row) -> str:
    return " · ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def table(lines: list[dict]) -> str:
    """The results as text: each part, and its rows."""
    about = "{part}: {seconds:.0f} s on {card} {error}"
    return "\n".join("\n  ".join([about.format(**line), *map(said, line["rows"])]) for line in lines)


def main(words: list[str] | None = None) -> list[dict]:
    parser = described(__doc__)
    parser.add_argument("parts", nargs="*", default=[*PARTS], help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="a JSON line a part")
    args = parser.parse_args(words)
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    on = torch.device(args.device)
    card = torch.cuda.get_device_name(on) if on.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {line["part"] for line in lines if not line["error"]}
    for part in [p for p in args.parts if p not in done]:
        clock, rows, error = time.time(), [], ""
        try:
            for row in PARTS[part](Place(on, args.tiny, SECONDS[part])):
                rows.append(row)
                print(f"{part}: {said(row)}", file=sys.stderr, flush=True)
        except Exception as problem:  # the next part may work
            error = f"{type(problem).__name__}: {str(problem)[:600]}"
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
        about = {"card": card, **versions, "date": time.strftime("%F")}
        line = {"part": part, **about, "seconds": time.time() - clock, "error": error, "rows": rows}
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        lines.append(line)
    print(table(lines))
    return lines


if __name__ == "__main__":
    sys.exit(any(line["error"] for line in main()))
