"""Speed of SRRL's UNet and of a rollout, compared with the rate of matrix products on the same machine.

python benchmarks/srrl.py
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from minireflect.checkpoints.ours import load_pipeline
from minireflect.config import preset
from minireflect.methods.rollout import rollout
from minireflect.pipeline import LatentDiffusion
from minireflect.rl.rewards import Reward, load_reward
from minireflect.streams import choices, rng
from minireflect.world.prompts import draw_prompts


def seconds(device: torch.device, works: dict[str, Callable], repeats: int = 15) -> dict[str, list[float]]:
    """Times of each function; they alternate, so that other load affects all equally."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats + 1):
        for name in works if i % 2 else reversed(works):
            start = time.perf_counter()
            works[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:  # the first is a warm-up
                taken[name].append(time.perf_counter() - start)
    return taken


def measure(pipe: LatentDiffusion, reward: Reward) -> None:
    """Print the speed of the UNet and of a rollout; the yardstick is a product of 1024 x 1024 matrices."""
    config, device = preset("cpu").srrl, pipe.device
    n, chance = config.prompts_per_iteration, choices(0, "measure", "speed")
    texts = [p.text for p in draw_prompts("physical", "train", n, chance)]
    b = n * config.group
    x_T, t = pipe.noise(b, rng(0, "measure", "speed")), torch.full((b,), 500, device=device)
    context = pipe.embed(texts).repeat_interleave(config.group, 0)  # (b t d)
    a = torch.randn(1024, 1024, device=device)

    def update() -> None:
        with torch.enable_grad():
            pipe.unet(x_T, t, context).square().mean().backward()

    pipe.unet.requires_grad_(True)
    works = {
        "matrix product": lambda: a @ a,
        "UNet, forward": lambda: pipe.unet(x_T, t, context),
        "UNet, forward and backward": update,
    }
    flops = {}
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        flops[name] = counter.get_total_flops()
    taken = {name: median(times) for name, times in seconds(device, works).items()}
    peak = flops["matrix product"] / taken["matrix product"]
    threads = torch.get_num_threads()
    print(f"  matrix products: {peak / 1e9:,.0f} GFLOP/s in float32 on {device}, {threads} threads")
    for name in list(works)[1:]:
        cost = f"{flops[name] / b / 1e6:.0f} MFLOP, {1e3 * taken[name] / b:.2f} ms per picture"
        reached = flops[name] / taken[name] / peak
        print(f"  {name:<27} batch {b}: {cost}, {reached:.0%} of the rate of matrix products")
    start = time.perf_counter()
    drawn = rollout(pipe, texts, reward, config, 0, 0)
    spent = time.perf_counter() - start
    rate = sum(len(r.images) for r in drawn.rounds) / spent
    share = drawn.cost.unet * taken["UNet, forward"] / b / spent
    print(f"  rollout of SRRL: {rate:.1f} pictures per second, {share:.0%} of the time in the UNet")


if __name__ == "__main__":
    about, layout = __doc__, argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=about, formatter_class=layout).parse_args()
    torch.set_grad_enabled(False)
    measure(load_pipeline(), load_reward())
