"""Does reflection help?  Every arm from the shipped base, several seeds, the exact checker, and beside each figure its cost.

    python scripts/study.py [--out runs/study] [--seeds 0 1 2]        writes docs/study.md and docs/study_*.png

Arms are trained by `train.py`, one after the other, and drawn from in several ways. It can be stopped at any time and goes
on where it stopped: a run that is finished is not trained again, and a row that is measured is not drawn again.
K = 0 differs from SRRL in nothing but reflection: the reward calls that SRRL spends on drawing refused pictures again
go to new prompts.  How many that is, 84 an iteration in place of 64, was read off a run of SRRL.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from minireflect import figures, load_pipeline, rng
from minireflect.config import preset
from minireflect.diffusion.reflection import OPPOSITE, ReflectionConfig, zigzag
from minireflect.diffusion.sample import last
from minireflect.evaluate import EvaluationConfig, over_seeds, score
from minireflect.methods.rollout import SRRLConfig, evaluations, rollout
from minireflect.pipeline import PARTS, SHIPPED, LatentDiffusion
from minireflect.rl.rewards import Reward, load_reward
from minireflect.run import read_metrics, write_text
from minireflect.showcase import blind_rounds
from minireflect.streams import choices
from minireflect.world.prompts import draw_prompts

ROOT = Path(__file__).parent.parent
KINDS = ("physical", "unconventional")
SAMPLER = preset("cpu").sampler

QUICK = ["--evaluation.pictures", "8"]  # train.py's own table; the study draws its own
COMPARED = {  # options of train.py
    "SRRL": [],
    "K = 0": [*QUICK, "--srrl.rounds", "0", "--srrl.prompts", "84"],
    "DDPO": [*QUICK, "--srrl.rounds", "0", "--srrl.prompts", "21", "--srrl.group", "4",
             "--srrl.objective", "ppo", "--srrl.lr", "3e-5", "--srrl.updates", "2"],
    "SRRL, blind": [*QUICK, "--srrl.mode", "blind", "--srrl.rounds", "1", "--srrl.prompts", "32",
                    "--srrl.w-renoise", "0.1", "--srrl.renoise-steps", "20", "--srrl.fresh-noise", "0"],
}  # fmt: skip
CLEAN = "SRRL, judge of clean pictures"  # a reward that never saw a spoilt picture: what RL makes of it
JUDGE = ["reward", "--reward.no-spoilt", "--reward.steps", "800"]


class Drawn(NamedTuple):
    images: Tensor  # (b 3 h w)
    unet: int  # evaluations for all b
    rewards: int  # reward calls for all b


Way = Callable[[LatentDiffusion, Reward, list[str], int, int], Drawn]  # pipe, judge, texts, seed, batch


def plain(steps: int) -> Way:
    """One picture, no look at any reward."""

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        images = pipe.generate(
            texts, steps, SAMPLER.guidance, SAMPLER.eta, generator=rng(seed, "plain", batch)
        )
        return Drawn(images, len(texts) * steps * evaluations(SAMPLER.guidance), 0)

    return way


def searched(**options: object) -> Way:
    """The picture of all branches and rounds that the reward likes best: best-of-N at K = 0, reflection with selection else."""
    config = SRRLConfig(steps=SAMPLER.steps, guidance=SAMPLER.guidance, **options)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        out = rollout(pipe, texts, judge, config, seed, batch)
        rewards = torch.cat([r.rewards for r in out.rounds], 1)  # (b k*g)
        images = torch.stack([r.images.unflatten(0, (len(texts), -1)) for r in out.rounds], 1).flatten(1, 2)
        best = images[torch.arange(len(texts)), rewards.argmax(1)]  # (b 3 h w)
        return Drawn(best, out.cost.unet, out.cost.rewards)

    return way


def blind(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
    """One blind reflection, the guidance gap as published, the noise brought back to the prior."""
    reflection = ReflectionConfig(rounds=1, steps=SAMPLER.steps)
    *_, images = blind_rounds(pipe, texts, SAMPLER, reflection, seed * 1_000 + batch)
    sides = [SAMPLER.guidance, reflection.w_renoise, reflection.w_denoise]
    return Drawn(images, len(texts) * SAMPLER.steps * sum(map(evaluations, sides)), 0)


def while_wrong(redraw: ReflectionConfig, rounds: int = 3) -> Way:
    """What the reward refuses is drawn again, `rounds` times at most."""
    back = 0 if redraw.fresh_noise == 1 else redraw.steps * evaluations(redraw.w_renoise)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        asked = []

        def counted(images: Tensor, prompts: list[str]) -> Tensor:
            asked.append(len(images))
            return judge(images, prompts)

        noise = rng(seed, "plain", batch)
        x_T = pipe.noise(len(texts), noise)
        *_, images = pipe.judged_rounds(texts, counted, rounds, SAMPLER, x_T, noise, redraw)
        drawing = SAMPLER.steps * evaluations(SAMPLER.guidance)
        again = sum(asked[1:])
        return Drawn(images, len(texts) * drawing + again * (back + drawing), sum(asked))

    return way


@torch.no_grad()
def stepwise(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
    """Reflection inside every step (Z-Sampling), with the same gap."""
    gap = ReflectionConfig()
    x_T = pipe.noise(len(texts), rng(seed, "plain", batch))
    moves = zigzag(pipe.eps(texts), x_T, pipe.table(SAMPLER.steps), gap.w_denoise, gap.w_renoise)
    down, up = 2 * SAMPLER.steps - 1, SAMPLER.steps - 1
    cost = down * evaluations(gap.w_denoise) + up * evaluations(gap.w_renoise)
    return Drawn(pipe.decode(last(moves)), len(texts) * cost, 0)


WAYS: dict[str, Way] = {
    "one picture": plain(SAMPLER.steps),
    "reflect while wrong": while_wrong(OPPOSITE),
}
MORE_WAYS: dict[str, Way] = {  # of the base alone
    "new noise while wrong": while_wrong(replace(OPPOSITE, fresh_noise=1.0)),
    "reflect, blind": blind,
    "twice the steps": plain(2 * SAMPLER.steps),
    "best of 2": searched(rounds=0, group=2, same_noise=False),
    "best of 4": searched(rounds=0, group=4, same_noise=False),
    "zigzag in every step": stepwise,
}


def diversity(pipe: LatentDiffusion, images: Tensor, texts: list[str]) -> float:
    """Mean distance of two pictures of one prompt, root mean square over the autoencoder's latents."""
    z = pipe.autoencoder.encode(images).flatten(1)  # (n d)
    groups = [[i for i, t in enumerate(texts) if t == text] for text in dict.fromkeys(texts)]
    spread = [torch.pdist(z[g]).mean().item() for g in groups if len(g) > 1]
    return float(np.mean(spread)) / z.shape[1] ** 0.5 if spread else float("nan")


@torch.no_grad()
def measure(pipe: LatentDiffusion, judge: Reward, way: Way, seed: int, pictures: int) -> dict:
    """Accuracy, reward and cost of one way of drawing from one model; a row of the results."""
    row: dict = {"unet": 0, "rewards": 0}
    for kind in KINDS:
        config = EvaluationConfig(pictures=pictures)
        prompts = draw_prompts(kind, config.split, pictures, choices(config.seed, "evaluate", kind))
        texts = [p.text for p in prompts]
        images, values = [], []
        for i in range(0, pictures, config.batch):
            part = texts[i : i + config.batch]
            drawn = way(pipe, judge, part, 2_000 + seed, i)
            images.append(drawn.images), values.append(judge(drawn.images, part))
            row["unet"] += drawn.unet
            row["rewards"] += drawn.rewards
        found = score(torch.cat(images), prompts, kind, torch.cat(values))
        row[kind] = {**vars(found), "diversity": diversity(pipe, torch.cat(images), texts)}
    row["unet"] /= pictures * len(KINDS)  # per picture
    row["rewards"] /= pictures * len(KINDS)
    return row


def train_arm(folder: Path, seed: int, options: list[str]) -> None:
    """Run train.py, or go on with it."""
    if any(r["model"] == "SRRL" for r in read_metrics(folder, "evaluation")):
        return
    words = [sys.executable, str(ROOT / "train.py"), "--out", str(folder)]
    started = (folder / "config.json").exists()
    subprocess.run(
        [*words, "--resume"] if started else [*words, "--preset", "cpu", "--seed", str(seed), *options],
        check=True,
    )


def clean_judge(folder: Path) -> Path:
    """The shipped weights with a reward that was trained on clean renders only."""
    weights = folder / "weights"
    if not (weights / "reward.safetensors").exists():
        subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *JUDGE, "--preset", "cpu", "--out", str(folder)],
            check=True,
        )
    for part in PARTS:
        shutil.copyfile(SHIPPED / f"{part}.safetensors", weights / f"{part}.safetensors")
    return folder


def training(folder: Path) -> dict:
    """What a finished run took."""
    end = read_metrics(folder, "srrl")[-1]
    minutes = float((folder / "table.md").read_text().split("\n\n")[1].split(" ")[0])
    return {k: end[k] for k in ("reward_calls", "unet_evaluations")} | {"minutes": minutes}


def table(rows: list[dict]) -> str:
    """One line for each arm and way of drawing."""
    lines = [
        "| arm | drawn by | physical | unconventional | reward | unreadable | diversity | edges | brightness | UNet evaluations, reward calls a picture | in training: reward calls, UNet evaluations, minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm, way in dict.fromkeys((r["arm"], r["way"]) for r in rows):
        mine = [r for r in rows if (r["arm"], r["way"]) == (arm, way)]

        def both(key: str, mine: list[dict] = mine) -> str:
            return over_seeds([np.mean([r[kind][key] for kind in KINDS]) for r in mine])

        training = mine[0].get("training")
        lines.append(
            "| "
            + " | ".join(
                [arm, way]
                + [over_seeds([r[kind]["accuracy"] for r in mine]) for kind in KINDS]
                + [both(key) for key in ("reward", "unreadable", "diversity", "edges", "brightness")]
                + [f"{mine[0]['unet']:.0f}, {mine[0]['rewards']:.0f}"]
                + [
                    f"{training['reward_calls']:,}, {training['unet_evaluations']:,}, {np.mean([r['training']['minutes'] for r in mine]):.1f}"
                    if training
                    else "0"
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def paired(rows: list[dict]) -> str:
    """By how much SRRL is ahead of every other trained arm: both kinds of prompts, seed by seed, and the interval of the mean."""
    lines = ["| SRRL minus | drawn by | physical | unconventional |", "|---|---|---|---|"]
    of = {(r["arm"], r["way"], r["seed"]): r for r in rows}
    for arm in list(COMPARED)[1:]:
        for way in WAYS:
            seeds = [s for a, w, s in of if (a, w) == (arm, way) and ("SRRL", way, s) in of]
            if not seeds:
                continue
            ahead = [
                over_seeds(
                    [of["SRRL", way, s][kind]["accuracy"] - of[arm, way, s][kind]["accuracy"] for s in seeds]
                )
                for kind in KINDS
            ]
            lines.append(f"| {arm} | {way} | {' | '.join(ahead)} |")
    return "\n".join(lines)


def at_equal_cost(runs: dict[str, list[Path]], window: int = 8) -> str:
    """Right first pictures of training prompts once every arm has spent the same, mean of the `window` iterations up to there."""
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    lines, cells = [], {arm: [] for arm in logs}
    heads = ["arm"]
    for key, name in (("reward_calls", "reward calls"), ("unet_evaluations", "UNet evaluations")):
        budget = min(log[-1][key] for several in logs.values() for log in several)
        heads.append(f"after {budget:,} {name}")
        for arm, several in logs.items():
            spent = [[r for r in log if r[key] <= budget][-window:] for log in several]
            cells[arm].append(over_seeds([np.mean([r["right_by_round"][0] for r in part]) for part in spent]))
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|"]
    return "\n".join(lines + [f"| {arm} | {' | '.join(values)} |" for arm, values in cells.items()])


def page(rows: list[dict], runs: dict[str, list[Path]]) -> str:
    """docs/study.md"""
    options = "\n".join(
        f"- **{arm}**: `{' '.join(['python train.py', *words])}`" for arm, words in COMPARED.items()
    )
    minutes = sum(training(f)["minutes"] for folders in runs.values() for f in folders)
    seeds = len(next(iter(runs.values())))
    return f"""# Does reflection help?

Made by `python scripts/study.py`; {minutes:.0f} minutes of training in all, on the processor that it ran on. Every arm starts from the shipped base and its
reward; {seeds} seeds, mean ± 95 % interval over them (Student's t). {rows[0]["physical"]["pictures"]} held-out prompts of each kind; right = by the exact inspector.

{options}

*One picture*: {SAMPLER.steps} steps, no look at any reward. *Reflect while wrong*: what the reward refuses is drawn again from the opposite of its noise, three times
at most; *new noise while wrong*: the same without memory. *Best of N*: N pictures, the reward chooses. *Reflect, blind*: one round of the guidance gap, nobody looks.
*Zigzag*: the gap inside every step. Edges and brightness are statistics of the pictures that no reward asks for.

{table(rows)}

![Accuracy of all arms](study_arms.png)

## By how much, seed by seed

{paired(rows)}

## At equal cost in training

{at_equal_cost({arm: runs[arm] for arm in COMPARED})}

![Right pictures in training against both costs](study_curves.png)

## When the reward is wrong

**{CLEAN}** is SRRL with a reward from `python train.py {" ".join(JUDGE)}`, everything else as in SRRL. Its own reward stands in the table and in the figure.

![Learned reward and truth](study_hacking.png)
"""


def bars(rows: list[dict], path: Path) -> None:
    """Accuracy of every arm and way, with intervals over seeds."""
    names = list(dict.fromkeys((r["arm"], r["way"]) for r in rows))
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 1))
    for j, (kind, color) in enumerate(zip(KINDS, (figures.REWARD, figures.TRUTH))):
        values = [[r[kind]["accuracy"] for r in rows if (r["arm"], r["way"]) == n] for n in names]
        y = np.arange(len(names)) + 0.2 * (2 * j - 1)
        axes.barh(y, [np.mean(v) for v in values], 0.38, color=color, label=kind)
        for yy, v in zip(y, values):
            axes.plot(v, [yy] * len(v), "o", ms=2.5, color=figures.INK)
    axes.set_yticks(range(len(names)), [f"{a} · {w}" for a, w in names], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="right by the inspector, held-out; a dot is a seed")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figures.save(figure, path)


def curves(runs: dict[str, list[Path]], path: Path) -> None:
    """Right pictures in training against both costs, mean over seeds and their range."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for (arm, folders), color in zip(runs.items(), plt.get_cmap("tab10").colors):
        logs = [read_metrics(f, "srrl") for f in folders]
        right = np.array([figures.smooth([r["right_by_round"][0] for r in log], 8) for log in logs])
        for axes, key in zip(panels, ("reward_calls", "unet_evaluations")):
            x = [r[key] for r in logs[0]]
            axes.plot(x, right.mean(0), color=color, label=arm)
            axes.fill_between(x, right.min(0), right.max(0), color=color, alpha=0.15, lw=0)
            axes.set(xlabel=key.replace("_", " ").replace("unet", "UNet"), ylim=(0, 1))
            axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylabel("right by the inspector, round 0,\ntraining prompts")
    panels[0].legend(fontsize=7, loc="lower right")
    figures.save(figure, path)


def hacking(runs: dict[str, list[Path]], path: Path) -> None:
    """Learned reward and truth of round 0 over a long training."""
    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), sharey=True, squeeze=False)
    for axes, (name, folders) in zip(panels[0], runs.items()):
        log = read_metrics(folders[0], "srrl")
        calls = [r["reward_calls"] for r in log]
        for key, color, label in (
            ("reward_by_round", figures.REWARD, "learned reward"),
            ("right_by_round", figures.TRUTH, "right"),
        ):
            axes.plot(calls, figures.smooth([r[key][0] for r in log], 15), color=color, label=label)
        axes.set(title=name, xlabel="reward calls", ylim=(0, 1))
        axes.legend(fontsize=8, loc="lower right")
    figures.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=256, help="of each kind of prompt in every row")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.docs.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {(r["arm"], r["way"], r["seed"]) for r in rows}

    def add(
        arm: str, pipe: LatentDiffusion, judge: Reward, ways: dict[str, Way], seed: int, more: dict
    ) -> None:
        for name, way in ways.items():
            if (arm, name, seed) in known:
                continue
            clock = time.time()
            row = {
                "arm": arm,
                "way": name,
                "seed": seed,
                **more,
                **measure(pipe, judge, way, seed, args.pictures),
            }
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            found = " ".join(f"{kind} {row[kind]['accuracy']:.3f}" for kind in KINDS)
            print(f"{arm} · {name} · seed {seed}: {found} ({time.time() - clock:.0f} s)", flush=True)

    runs: dict[str, list[Path]] = {}
    clean = {CLEAN: [*QUICK, "--weights", str(clean_judge(args.out / "judge-of-clean-pictures"))]}
    for arms, seeds in ((COMPARED, args.seeds), (clean, args.seeds[:1])):
        for arm, options in arms.items():
            for seed in seeds:
                folder = args.out / f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"
                train_arm(folder, seed, options)
                runs[arm] = [*runs.get(arm, []), folder]
                own = load_reward(folder)  # the reward that it was trained with
                add(arm, load_pipeline(folder), own, WAYS, seed, {"training": training(folder)})
    for seed in args.seeds:
        add("base", load_pipeline(), load_reward(), WAYS | MORE_WAYS, seed, {})
    rows.sort(key=lambda r: ["base", *runs].index(r["arm"]))
    write_text(args.docs / "study.md", page(rows, runs))
    bars(rows, args.docs / "study_arms.png")
    curves({arm: runs[arm] for arm in COMPARED}, args.docs / "study_curves.png")
    hacking({arm: runs[arm] for arm in (CLEAN, "SRRL")}, args.docs / "study_hacking.png")
    print(args.docs / "study.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
