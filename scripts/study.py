"""Study of SRRL: does reflection help?  The inspector measures all arms on test prompts, over several seeds.

    python scripts/study.py [--out runs/study] [--seeds 0 1 2 3 4]

It writes docs/study.md, whose numbers the README quotes, and docs/study_*.png.

All arms are trained by `train.py srrl` from the shipped base, with the options in ARMS.  All but those of PPO
have the same number of optimiser steps and learn from the pictures of the last four iterations.  The arms
"K = 0" do not reflect.  They have as many reward calls as SRRL, which needs 84 per iteration (measured in a
run on validation prompts); "K = 0, more pairs" has as many UNet evaluations.  The arms in CLAIM have all
seeds, the others the first three.

The study can be stopped at any time, and continues when started again.  Several processes may run at once
with different --seeds.  `--seeds` without a number only writes the page.
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from reports import arguments, arms_figure, differences, once, over_runs, over_seeds, page, train, with_ends
from torch import Tensor

from minireflect import figures, load_pipeline, rng
from minireflect.config import preset
from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.diffusion.sample import evaluations
from minireflect.evaluate import EvaluationConfig, Table, score
from minireflect.figures import OTHER, REWARD, TRUTH, Panel, curves, smooth
from minireflect.methods.rollout import Cost, RolloutConfig, rollout
from minireflect.pipeline import OPPOSITE, LatentDiffusion
from minireflect.rl.rewards import Reward, inspector_reward, load_reward
from minireflect.run import read_metrics
from minireflect.streams import choices
from minireflect.world.prompts import draw_prompts, prompt_set

KINDS = ("physical", "unconventional")
SAMPLER = preset("cpu").sampler
QUICK = ["--evaluation.pictures", "8"]  # few pictures for train.py's own table: the study measures on its own
FEW = ["--rounds", "0", "--prompts-per-iteration"]
PPO = ["--objective", "ppo", "--group", "2", "--clip-range", "1e-3", "--ratio", "guard"]
ARMS = {  # options of train.py
    "SRRL": [],
    "K = 0, pairs": [*FEW, "42", "--group", "2"],
    "regression": ["--objective", "regress"],
    "K = 0, more pairs": [*FEW, "46", "--group", "2"],
    "SRRL, opposite pairs": ["--rounds", "1", "--redraw", "all", "--prompts-per-iteration", "42"],
    "SRRL, new noise": ["--wrong", "fresh"],
    "K = 0, single pictures": [*FEW, "84"],
    "regression, K = 0": ["--objective", "regress", *FEW, "84"],
    "PPO": [*PPO, "--rounds", "1", "--redraw", "all", "--prompts-per-iteration", "21"],
    "PPO, K = 0": [*PPO, *FEW, "21", "--group", "4"],
    "DDPO as published": ["--method", "ddpo"],
    "SRRL as published": ["--method", "paper"],
}
CLAIM = ("SRRL", "K = 0, pairs", "K = 0, more pairs")  # all seeds; the others have the first three
TRIED = 8  # pictures per training prompt after training; four times as many for the base
PAIRS = (
    ("SRRL", "K = 0, pairs"), ("SRRL", "K = 0, more pairs"), ("SRRL", "K = 0, single pictures"),
    ("SRRL, opposite pairs", "K = 0, pairs"), ("SRRL", "SRRL, new noise"), ("SRRL", "regression"),
    ("regression", "regression, K = 0"), ("PPO", "PPO, K = 0"), ("SRRL", "PPO"),
)  # fmt: skip
BINS = (0.05, 0.2, 0.5)  # edges of the bins of a prompt's success rate under the base
# means over both kinds of prompts
OFF = ("reward", "unreadable", "diversity", "edges", "brightness")
COSTS = {"reward_calls": "reward calls", "unet_evaluations": "UNet evaluations"}  # keys of a run's log
Logs = dict[str, list[list[dict]]]  # arm -> its runs -> metrics of each iteration


# ------------------------------------------------------------------ ways of sampling, with counted costs
Drawn = tuple[Tensor, Cost]  # pictures (b 3 h w), and the cost of all b
Way = Callable[[LatentDiffusion, Reward, list[str], int, int], Drawn]  # pipe, judge, texts, seed, batch


def plain(steps: int, rounds: int = 0) -> Way:
    """One picture per prompt, without a reward, after `rounds` blind reflections with the guidance gap."""
    cost = steps * evaluations(SAMPLER.guidance) + ReflectionConfig(rounds, steps=steps).blind_cost(steps)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        how, noise = (steps, SAMPLER.guidance, SAMPLER.eta, rounds), rng(seed, "plain", batch)
        return pipe.generate(texts, *how, generator=noise), Cost(len(texts) * cost)

    return way


def best_of(n: int) -> Way:
    """The picture with the highest reward of n."""
    config = RolloutConfig(group=n, steps=SAMPLER.steps, guidance=SAMPLER.guidance, rounds=0)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        out = rollout(pipe, texts, judge, config, seed, batch)
        images = out.rounds[0].images.unflatten(0, (len(texts), n))
        return images[torch.arange(len(texts)), out.rounds[0].rewards.argmax(1)], out.cost

    return way


def while_wrong(redraw: ReflectionConfig) -> Way:
    """Pictures that the reward refuses are sampled again, at most three times."""
    redraw = replace(redraw, rounds=3)

    def way(pipe: LatentDiffusion, judge: Reward, texts: list[str], seed: int, batch: int) -> Drawn:
        asked = []

        def counted(images: Tensor, prompts: list[str]) -> Tensor:
            asked.append(len(images))
            return judge(images, prompts)

        noise = rng(seed, "plain", batch)
        x_T = pipe.noise(len(texts), noise)
        *_, images = pipe.selected_rounds(texts, counted, x_T, SAMPLER, redraw, noise)
        cost = len(texts) * SAMPLER.cost + sum(asked[1:]) * (redraw.renoise_cost + SAMPLER.cost)
        return images, Cost(cost, rewards=sum(asked))

    return way


WAYS: dict[str, Way] = {"one picture": plain(SAMPLER.steps), "reflect while wrong": while_wrong(OPPOSITE)}
MORE_WAYS: dict[str, Way] = {  # measured with the base only
    "new noise while wrong": while_wrong(replace(OPPOSITE, fresh_noise=1.0)),
    "reflect, blind": plain(SAMPLER.steps, rounds=1),
    "twice the steps": plain(2 * SAMPLER.steps),
    "best of 2": best_of(2),
    "best of 4": best_of(4),
}


def diversity(pipe: LatentDiffusion, images: Tensor, texts: list[str]) -> float:
    """Mean distance between pictures of the same prompt: root mean square difference of their latents."""
    z = pipe.autoencoder.encode(images).flatten(1)  # (n d)
    groups = [[i for i, t in enumerate(texts) if t == text] for text in dict.fromkeys(texts)]
    spread = [torch.pdist(z[g]).mean().item() for g in groups if len(g) > 1]
    return float(np.mean(spread)) / z.shape[1] ** 0.5 if spread else float("nan")


@torch.no_grad()
def measure(pipe: LatentDiffusion, judge: Reward, way: Way, seed: int, pictures: int) -> dict:
    """Accuracy, reward and cost of one model with one way of sampling."""
    config, row = EvaluationConfig(pictures=pictures), {"unet": 0, "rewards": 0}
    for kind in KINDS:
        prompts = draw_prompts(kind, config.split, pictures, choices(config.seed, "evaluate", kind))
        texts = [p.text for p in prompts]
        parts = {i: texts[i : i + config.batch] for i in range(0, pictures, config.batch)}
        drawn = [way(pipe, judge, part, 2_000 + seed, i) for i, part in parts.items()]
        images = torch.cat([x for x, _ in drawn])
        values = torch.cat([judge(x, part) for (x, _), part in zip(drawn, parts.values())])
        row[kind] = score(images, prompts, values) | {"diversity": diversity(pipe, images, texts)}
        for cost in ("unet", "rewards"):  # per picture
            row[cost] += sum(getattr(spent, cost) for _, spent in drawn) / (pictures * len(KINDS))
    return row


# ----------------------------------------------------------------------------------- the runs and their rows
def training(folder: Path) -> dict:
    """The costs of a finished run, and its training time in minutes."""
    end = read_metrics(folder, "srrl")[-1]
    minutes = float((folder / "table.md").read_text().split("\n\n")[1].split(" ")[0])
    return {k: end[k] for k in ("reward_calls", "unet_evaluations", "updates_total")} | {"minutes": minutes}


def add(results: Path, row: dict, folder: Path | None, ways: dict[str, Way], n: int) -> None:
    """Measure an arm with each way of sampling, and append the results to a file, unless they are in it.

    `row` has the name of the arm; `folder` is its run, or None for the base.
    """
    known = {(r["arm"], r["way"], r["seed"]) for r in read_rows(results)}
    for name in [name for name in ways if (row["arm"], name, row["seed"]) not in known]:
        clock, pipe = time.time(), load_pipeline(folder)
        found = {**row, "way": name, **measure(pipe, load_reward(), ways[name], row["seed"], n)}
        with results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        shares = " ".join(f"{kind} {found[kind]['accuracy']:.3f}" for kind in KINDS)
        took = f"{time.time() - clock:.0f} s"
        print(f"{row['arm']} · {name} · seed {row['seed']}: {shares} ({took})", flush=True)


def read_rows(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@torch.no_grad()
def success(folder: Path | None, tries: int, seed: int) -> dict[str, float]:
    """Training prompt -> share of right pictures, sampled with ten steps."""
    pipe, batch = load_pipeline(folder), EvaluationConfig().batch
    texts = [p.text for kind in KINDS for p in prompt_set(kind, "train")]
    right = torch.zeros(len(texts))
    for k in range(tries):
        for i in range(0, len(texts), batch):
            part = texts[i : i + batch]
            images = pipe.generate(part, 10, generator=rng(3_000 + seed, "success", k, i))
            right[i : i + batch] += inspector_reward(images, part)
    return dict(zip(texts, (right / tries).tolist()))


# -------------------------------------------------------------------------------- the page and its figures
def by_seed(rows: list[dict]) -> list[dict]:
    """The accuracies of all arms and ways of sampling, one dictionary for each seed."""
    seeds: dict[int, dict] = {seed: {} for seed in sorted({r["seed"] for r in rows})}
    for r in rows:
        found = {kind: r[kind]["accuracy"] for kind in KINDS}
        seeds[r["seed"]][f"{r['arm']} · {r['way']}"] = found | {"mean": sum(found.values()) / len(KINDS)}
    return list(seeds.values())


def table(rows: list[dict]) -> Table:
    """One line for each arm and way of sampling."""
    lines = {}
    for arm, way in dict.fromkeys((r["arm"], r["way"]) for r in rows):
        mine = [r for r in rows if (r["arm"], r["way"]) == (arm, way)]
        took = mine[0].get("training")
        minutes = f"{np.mean([r['training']['minutes'] for r in mine]):.1f}" if took else "0"
        lines[f"{arm} · {way}"] = {
            **{kind: over_seeds([r[kind]["accuracy"] for r in mine]) for kind in KINDS},
            **{key: over_seeds([np.mean([r[kind][key] for kind in KINDS]) for r in mine]) for key in OFF},
            "UNet evaluations a picture": f"{mine[0]['unet']:.0f}",
            "reward calls a picture": f"{mine[0]['rewards']:.0f}",
            "reward calls in training": f"{took['reward_calls']:,}" if took else "0",
            "UNet evaluations in training": f"{took['unet_evaluations']:,}" if took else "0",
            "minutes of training": minutes,
        }
    return Table("arm · sampled by", lines)


def paired(rows: list[dict]) -> Table:
    """Differences of the arms in PAIRS, paired by seed."""
    pairs = {f"{one} − {other}": (f"{one} · one picture", f"{other} · one picture") for one, other in PAIRS}
    seeds = by_seed(rows)
    there = {name: p for name, p in pairs.items() if all({*p} <= s.keys() for s in seeds[:2])}
    return differences("test prompts", seeds, there, {k: k for k in (*KINDS, "mean")})


def at_equal_cost(logs: Logs, window: int = 8) -> Table:
    """SRRL and each other arm at the same cost, which is the total of the cheaper of the two.

    The values are shares of right pictures in round 0, on training prompts; they are means of the last
    `window` iterations within that cost.
    """
    rows = {}
    for arm in list(logs)[1:]:
        rows[arm] = {}
        for key, name in COSTS.items():
            budget = min(log[-1][key] for several in (logs["SRRL"], logs[arm]) for log in several)
            rows[arm][f"at {name}"] = f"{budget:,}"
            for who, several in (("SRRL", logs["SRRL"]), ("the other", logs[arm])):
                spent = [[r for r in log if r[key] <= budget][-window:] for log in several]
                right = [np.mean([r["right_by_round"][0] for r in part]) for part in spent]
                rows[arm][f"{who} at these {name}"] = over_seeds(right)
    return Table("SRRL and", rows)


def by_success(before: dict[str, float], after: dict[str, list[dict[str, float]]], path: Path) -> Table:
    """A table and a figure: success rates of training prompts after training, in bins of that of the base.

    `before` has the success rate of each prompt for the base; `after` has it for every arm and seed.  Bins
    without prompts are left out.
    """
    edges, rows, points = (0.0, *BINS, 1.01), {}, {arm: [] for arm in ("base", *after)}
    for low, high in zip(edges, edges[1:]):
        texts = [text for text, rate in before.items() if low <= rate < high]
        if not texts:
            continue
        row = {"prompts": str(len(texts))}
        for arm, seeds in {"base": [before], **after}.items():
            shares = [float(np.mean([seed[t] for t in texts])) for seed in seeds if seed]
            row[arm] = over_seeds(shares)
            points[arm].append(with_ends(shares))
        rows[f"{low:g} to {min(high, 1):g}"] = row
    groups = {arm: dict(zip(rows, values)) for arm, values in points.items()}
    title = "Training prompts, by the base's success rate"
    figures.bars(path, "right by the inspector, share; 95 % intervals", {title: groups})
    return Table("base's success rate", rows)


def study_page(path: Path, rows: list[dict], logs: Logs, options: str, bins: Table) -> None:
    """Write docs/study.md."""
    took = {(r["arm"], r["seed"]): r["training"]["minutes"] for r in rows if "training" in r}
    machine = f"{os.cpu_count()} cores {'and a' if torch.cuda.is_available() else 'without a'} GPU"
    tables = {"table": table(rows), "paired": paired(rows), "bins": bins, "equal_cost": at_equal_cost(logs)}
    numbers = {"pictures": rows[0]["physical"]["pictures"], "sampler": SAMPLER, "options": options}
    numbers |= {"machine": machine, "minutes": sum(took.values())}
    page("study", path, **numbers, **tables)


def cost_curves(logs: Logs, path: Path) -> None:
    """Right pictures in training against both costs: mean over seeds, and dotted lines for their range."""
    panels = []
    for key, name in COSTS.items():
        lines = []  # in the colours of `by_success`
        for (arm, several), color in zip(logs.items(), (TRUTH, REWARD, OTHER)):
            right = [smooth([r["right_by_round"][0] for r in log], 8) for log in several]
            lines += over_runs(arm, [r[key] for r in several[0]], right, color)
        panels.append(Panel("Training prompts, round 0", name, "right by the inspector", lines, ylim=(0, 1)))
    curves(path, *panels)


def main() -> None:
    args = arguments(__doc__, "runs/study", 256, "of each kind of prompt in every row", seeds=[0, 1, 2, 3, 4])
    results, few = args.out / "results.jsonl", [s for s in args.seeds if s < 3]
    for seed in few:
        add(results, {"arm": "base", "seed": seed}, None, WAYS | MORE_WAYS, args.pictures)
    for arm, options in ARMS.items():
        for seed in args.seeds if arm in CLAIM else few:
            folder = train("srrl", args.out / named(arm, seed), ["--seed", str(seed), *QUICK, *options])
            row = {"arm": arm, "seed": seed, "training": training(folder)}
            ways = WAYS if arm == "SRRL" else {"one picture": WAYS["one picture"]}
            add(results, row, folder, ways, args.pictures)
            if arm in CLAIM:
                once(args.out / "success" / f"{folder.name}.json", partial(success, folder, TRIED, seed))
    before = once(args.out / "success" / "base.json", partial(success, None, 4 * TRIED, 9))
    rows, order = read_rows(results), ["base", *ARMS]
    rows.sort(key=lambda r: (order.index(r["arm"]), r["seed"]))
    seeds = {arm: list(dict.fromkeys(r["seed"] for r in rows if r["arm"] == arm)) for arm in ARMS}
    runs = {arm: [args.out / named(arm, seed) for seed in found] for arm, found in seeds.items() if found}
    lines = {arm: " ".join(["python train.py", *ARMS[arm]]) for arm in ARMS}
    options = "\n".join(f"- **{arm}**: `{lines[arm]}`; seeds: {seeds[arm] or 'none yet'}" for arm in ARMS)
    after = {arm: [once(args.out / "success" / f"{f.name}.json", dict) for f in runs[arm]] for arm in CLAIM}
    bins = by_success(before, after, args.docs / "study_success.png")
    titles = {kind: f"Right, {kind} test prompts" for kind in KINDS}
    arms_figure(by_seed(rows), titles, args.docs / "study_arms.png", best_by="mean")
    logs = {arm: [read_metrics(f, "srrl") for f in folders] for arm, folders in runs.items()}
    cost_curves({arm: logs[arm] for arm in CLAIM}, args.docs / "study_curves.png")
    study_page(args.docs / "study.md", rows, logs, options, bins)


def named(arm: str, seed: int) -> str:
    """The folder name of a run."""
    return f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"


if __name__ == "__main__":
    main()
