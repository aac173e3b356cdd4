"""Time and memory of DDPO with LoRA at the size of SD 1.5: our loop, and one with diffusers and peft.

    python benchmarks/ddpo.py              860 million parameters, latents 8 x 8, one thread; minutes
    python benchmarks/ddpo.py --small      the same loop at a twentieth of the size

One iteration is a rollout and an update.  `theirs` follows the trainers of TRL and ddpo-pytorch: guided DDIM
steps with log-densities, decoding and scoring, PPO-clip on half of the noisy steps with guidance, AdamW.
Both sides have the same tensors, prompts, noise, guidance, steps, LoRA, clip range and optimiser, in float32;
tests/test_ddpo.py compares rewards, evaluations and gradients.  Our loop also measures the KL from the base,
on one picture.  Each side runs in a process with one thread, in turns.  Times are processor times, so that
other work on the machine has little effect.  Needs the [test] dependencies.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.gpu import Words
from benchmarks.sd15 import ddim, resident
from benchmarks.sd15 import ours as our_networks
from benchmarks.sd15 import theirs as their_networks
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.methods.learn import Learner, learn
from minireflect.methods.rollout import rollout
from minireflect.methods.srrl import SRRLConfig
from minireflect.models.lora import LoRAConfig, add_lora
from minireflect.pipeline import LatentDiffusion
from minireflect.streams import rng
from scripts.reports import described

words = Words()
TEXTS = ["a red ball", "a tall red candle in still air"]
CONFIG = SRRLConfig(
    objective="ppo", advantage="group", prompts_per_iteration=2, group=2, rounds=0, steps=8, guidance=5.0,
    updates=1, batch=1, pull=0.0, clip_range=1e-4, lr=1e-4,
)  # fmt: skip
PICTURES, NOISY, TRAINED = 4, 6, 3  # six steps have enough noise, and half of them are trained
Iteration = Callable[[int], tuple[Tensor, float]]  # number of the iteration -> rewards, gradient norm


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def ours(nets: dict[str, nn.Module]) -> Iteration:
    pipe = LatentDiffusion(words, nets["text"], nets["unet"], nets["vae"], Schedule(ScheduleConfig()), 64)
    add_lora(pipe.eval().unet, LoRAConfig(rank=4), rng(0, "lora"))
    learner = Learner(pipe, CONFIG, CONFIG.guidance, PICTURES)

    def iteration(step: int) -> tuple[Tensor, float]:
        out = rollout(pipe, TEXTS, red, CONFIG, 0, step)
        return out.rewards.flatten(), learn(learner, out, 1.0, rng(0, "update", step)).grad_norm

    return iteration


def theirs(nets: dict[str, nn.Module]) -> Iteration:
    unet, text, vae = (nets[k].requires_grad_(False) for k in ("unet", "text", "vae"))
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    scheduler = ddim()
    scheduler.set_timesteps(CONFIG.steps)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, weight_decay=1e-4)

    def gaussian(t: Tensor, x: Tensor, context: Tensor) -> torch.distributions.Normal:
        """The distribution of a guided DDIM step with eta = 1."""
        output = unet(torch.cat([x] * 2), t, encoder_hidden_states=context).sample
        without, given = output.chunk(2)
        noise = without + CONFIG.guidance * (given - without)
        mean = scheduler.step(noise, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        before = t - scheduler.config.num_train_timesteps // CONFIG.steps
        return torch.distributions.Normal(mean, scheduler._get_variance(t, before).sqrt())

    @torch.no_grad()
    def sample(step: int) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        ids = words([text for text in TEXTS for _ in range(CONFIG.group)])
        null = text(words([""])).last_hidden_state.expand(PICTURES, -1, -1)
        context = torch.cat([null, text(ids).last_hidden_state])
        x = torch.randn(PICTURES, 4, 8, 8, generator=rng(0, "start", step, "all"))
        generator, path, log_probs = rng(0, "branch", step, 0), [x], []
        for t in scheduler.timesteps:
            now = gaussian(t, x, context)
            x = now.mean + now.stddev * torch.randn(x.shape, generator=generator)
            path.append(x)
            log_probs.append(now.log_prob(x).mean((1, 2, 3)))
        images = vae.decode(x / vae.config.scaling_factor).sample.clamp(-1, 1)
        return context, path, log_probs, red(images, TEXTS)

    def iteration(step: int) -> tuple[Tensor, float]:
        context, path, log_probs, rewards = sample(step)
        groups = rewards.view(-1, CONFIG.group)
        A = ((groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + CONFIG.std_floor)).flatten()
        optimizer.zero_grad()
        for i in torch.randperm(NOISY, generator=rng(0, "update", step))[:TRAINED].tolist():
            now = gaussian(scheduler.timesteps[i], path[i], context)
            ratio = (now.log_prob(path[i + 1]).mean((1, 2, 3)) - log_probs[i]).exp()
            clipped = ratio.clamp(1 - CONFIG.clip_range, 1 + CONFIG.clip_range)
            (torch.maximum(-A * ratio, -A * clipped).mean() / TRAINED).backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return rewards, norm.item()

    return iteration


SIDES = {"ours": ours, "theirs": theirs}


def networks(name: str, size: str) -> dict[str, nn.Module]:
    """The networks of one side; both sides have the same tensors."""
    torch.manual_seed(0)
    nets = their_networks(size)
    return our_networks(size, nets) if name == "ours" else nets


def work(name: str, size: str) -> None:
    """Run an iteration for each line of input; print its seconds, peak of resident bytes, and rewards."""
    torch.set_num_threads(1)
    iteration = SIDES[name](networks(name, size))
    print(json.dumps("ready"), flush=True)
    for step, _ in enumerate(sys.stdin):
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        start = time.process_time()
        rewards, _ = iteration(step)
        seconds = time.process_time() - start
        print(json.dumps([seconds, resident("VmHWM"), rewards.tolist()]), flush=True)


def compare(size: str, repeats: int) -> None:
    """Run both sides in turn, so that other load of the machine affects both equally."""
    both = {}
    for name in SIDES:
        command = [sys.executable, __file__, "--side", name, "--size", size]
        both[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        json.loads(both[name].stdout.readline())
    found: dict[str, list] = {name: [] for name in SIDES}
    for i in range(repeats + 1):
        for name in SIDES if i % 2 else reversed(SIDES):
            print(i, file=both[name].stdin, flush=True)
            answer = json.loads(both[name].stdout.readline())
            found[name] += [answer] if i else []  # the first is a warm-up
        if i:
            print(*(f"{name} {found[name][-1][0]:.2f} s" for name in found), flush=True)
    for process in both.values():
        process.stdin.close()
        process.wait()
    a, b = found["ours"], found["theirs"]
    ratio = statistics.median(x[0] / y[0] for x, y in zip(a, b))
    peak = [max(x[1] for x in rows) / 1e9 for rows in (a, b)]
    print(f"ours over theirs: time {ratio:.2f} (median of {len(a)} pairs), memory {peak[0] / peak[1]:.2f}")
    print(f"peak memory {peak[0]:.2f} and {peak[1]:.2f} GB")


if __name__ == "__main__":
    parser = described(__doc__)
    parser.add_argument("--small", dest="size", action="store_const", const="small", default="sd15")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", choices=("sd15", "small"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side, args.size)
    else:
        compare(args.size, args.repeats)
