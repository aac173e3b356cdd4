"""Three studies of training: how much of a gradient is signal, PPO on a single law, and the collapse.

    python scripts/gradients.py gradients                # all laws, with the learned reward
    python scripts/gradients.py gradients --law balance      # unconventional prompts of one law, inspector
    python scripts/gradients.py curve --law balance      # PPO as published, and with settings that learn
    python scripts/gradients.py collapse                 # default settings, and without pull and anchor

Each command prints a table, draws a figure into docs/, and continues where it was stopped.  `gradients` uses
the learner of the training: one update at learning rate 0 gives the gradient of one part, 16 pictures.  The
gradient of n pictures is the mean of n / 16 parts.
"""

from pathlib import Path

import torch
from reports import ROOT, described, over_runs, train
from tqdm import tqdm

from minireflect import figures, load_pipeline, load_reward
from minireflect.diffusion.ddim import ddim_step
from minireflect.evaluate import Table
from minireflect.figures import Line, Panel
from minireflect.methods.learn import Learner, learn
from minireflect.methods.rollout import Round, rollout
from minireflect.methods.srrl import SRRLConfig, train_srrl
from minireflect.pipeline import LatentDiffusion, Reward
from minireflect.rl.rewards import inspector_reward
from minireflect.run import Job, Run, read_metrics
from minireflect.streams import choices, rng
from minireflect.world.prompts import PromptMix, prompt_set

# PART: pictures per saved gradient, of which every KEPT-th number is saved.  TARGET: number of pictures with
# which grpo learns; the table states how many pictures other objectives need for the same cosine.
SEED, PART, KEPT, TARGET = 7, 16, 16, 64
BOTH = {"prompts_per_iteration": 4, "group": 4, "rounds": 0, "advantage": "group", "updates": 1}
PPO = BOTH | {"objective": "ppo", "pull": 0.0, "batch": 1}  # 4 of the 8 noisy steps of each picture
FORWARD = BOTH | {"batch": 2 * PART, "replay": 1}  # 2 noise levels of each picture, for policy and base
OBJECTIVES = {
    "ppo as published": PPO, "ppo, guard": PPO | {"ratio": "guard"}, "ppo, window": PPO | {"noise": "window"},
    "ppo, preserving": PPO | {"noise": "preserving"}, "regress": FORWARD | {"objective": "regress"},
    "grpo": FORWARD,
}  # fmt: skip
CURVE = {"objective": "ppo", "rounds": 0, "iterations": 28, "prompts_per_iteration": 16, "group": 16}
SETTINGS = {
    "as published": CURVE | {"advantage": "history", "updates": 2, "pull": 0.0, "lr": 3e-5},
    "learns": CURVE | {"advantage": "group", "updates": 4, "pull": 0.03, "lr": 1e-4, "clip_range": 1e-3},
}
GUARDS = {"as by default": [], "without pull and anchor": ["--pull", "0", "--anchor-below", "0"]}


def draw(law: str, seed: int, n: int, i: int) -> tuple[list[str], list[str]]:
    """n training prompts: unconventional ones of one law, or the default mix if `law` is empty."""
    pool = [p.text for p in prompt_set("unconventional", "train") if p.law == law]
    return (choices(seed, law, i).choices(pool, k=n), [law] * n) if law else PromptMix().draw(seed, n, i)


def remembered(r: Round) -> torch.Tensor:
    """Means of n^2, n e and e^2 for each step, where n is its noise and e the estimate of n from x_t and x_0.

    e is computed with DDIM (7), in which the predicted noise is the one that leads from x_t to x_0.  -> (s 3)
    """
    x, mean, table = r.path.latents.transpose(0, 1), r.path.means.transpose(0, 1), r.table
    abar, sigma = (v.view(-1, 1, 1, 1, 1) for v in (table.abar, r.sigmas))
    true = (x[:-1] - abar.sqrt() * x[-1]) / (1 - abar).sqrt()  # (s b c h w)
    steps = [ddim_step(*v) for v in zip(x[:-1], true, table.abar, table.abar_prev, r.sigmas, x[1:])]
    n, e = (x[1:] - mean) / sigma, (torch.stack([step.mean for step in steps]) - mean) / sigma
    return torch.stack([v.flatten(1).mean(1) for v in (n * n, n * e, e * e)], 1)


def part(pipe: LatentDiffusion, reward: Reward, texts: list[str], step: int) -> dict[str, torch.Tensor]:
    """Gradients of one part by objective, on the same prompts; the same sampler gives the same pictures."""
    outs, values = {}, {}
    for name, options in OBJECTIVES.items():
        config = SRRLConfig(**options)
        if config.noise not in outs:
            outs[config.noise] = rollout(pipe, texts, reward, config, SEED, step)
        pipe.unet.zero_grad()
        learner = Learner(pipe, config, config.guidance, PART)
        stats = learn(learner, outs[config.noise], 0.0, rng(SEED, name, step))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in pipe.unet.parameters()]
        whole = torch.cat([g.flatten() for g in grads])[::KEPT]  # 0 if the rewards of all groups are equal
        values[name] = whole * max(1.0, stats.grad_norm)  # undo the clipping of `take_step`
        values[f"{name}, cost"] = torch.tensor(float(stats.evaluations))
    return values | {"remembered": remembered(outs["all"].rounds[0])}


def cosines(gradients: torch.Tensor, n: int) -> torch.Tensor:
    """Cosines between pairs of gradients of n disjoint pictures each.  Shapes: gradients (m d) -> (pairs)"""
    pairs = gradients[: len(gradients) * PART // (2 * n) * 2 * n // PART]
    return torch.cosine_similarity(*pairs.unflatten(0, (-1, 2, n // PART)).mean(2).unbind(1), dim=1)


def signal(gradients: torch.Tensor) -> float:
    """s = squared mean of the gradient / variance of one part, estimated without bias.

    The estimate uses products of different parts only.  The cosine between gradients of k parts each is about
    k s / (1 + k s).  Shapes: gradients (m d)
    """
    m, square = len(gradients), gradients.square().sum(1).mean()
    mean = (gradients.sum(0).square().sum() / m - square) / (m - 1)
    return (mean / (square - mean)).item()


def noise(law: str, pictures: int, folder: Path) -> list[figures.Panel]:
    """Measure gradients and print two tables.  -> panels of cosines, and of the noise that x_0 determines"""
    pipe, reward, found, rows = load_pipeline(), inspector_reward if law else load_reward(), [], {}
    folder.mkdir(parents=True, exist_ok=True)
    for step in tqdm(range(pictures // PART), "parts of 16 pictures"):
        if not (path := folder / f"{step}.pt").exists():
            torch.save(part(pipe, reward, draw(law, SEED, 4, step)[0], step), path)
        found.append(torch.load(path, weights_only=True))
    values = {name: torch.stack([v[name] for v in found]) for name in found[0]}
    sizes = [n for n in (16, 64, 256, 512) if 2 * n <= pictures]
    each = {name: {n: cosines(values[name], n) for n in sizes} for name in OBJECTIVES}
    signals = {name: signal(values[name]) for name in OBJECTIVES}
    for name, s in signals.items():
        cells = {f"{n}, {len(c)} pairs": f"{c.mean():.3f} ± {c.std():.3f}" for n, c in each[name].items()}
        needed = f"{signals['grpo'] / s * TARGET:,.0f}" if min(s, signals["grpo"]) > 0 else "no signal seen"
        spent = f"{values[f'{name}, cost'].mean() / PART:.1f}"
        rows[name] = {"evaluations": spent, **cells, f"pictures for the cosine of grpo's {TARGET}": needed}
    (n2, ne, e2), t = values["remembered"].mean(0).T, pipe.table(SRRLConfig.steps).t.tolist()
    shares = {"share remembered": (ne**2 / (n2 * e2)).tolist(), "predicted": e2.tolist()}
    levels = {f"t = {i}": {k: f"{v[j]:.4f}" for k, v in shares.items()} for j, i in enumerate(t)}
    print(Table("gradients", rows).markdown, Table("noise level", levels).markdown, sep="\n\n")
    lines = [Line(name, sizes, [c.mean().item() for c in of.values()]) for name, of in each.items()]
    left = Panel("Gradients of disjoint pictures", "pictures of each", "cosine, mean of the pairs", lines)
    remembered = [Line(k, t, v) for k, v in shares.items()]
    title = "What x_0 remembers of a step's noise"
    return [left, Panel(title, "t", "share of the variance", remembered, ylim=(1e-3, 1), log=True)]


def curve(law: str, setting: str, seed: int, folder: Path) -> list[float]:
    """Train, or continue.  -> the share of right pictures in every iteration, as a running mean of 4"""
    config, folder = SRRLConfig(**SETTINGS[setting]), folder / f"{law}, {setting}, {seed}"
    run = Run(folder, vars(config), resume=(folder / "config.json").exists())
    pipe, texts = load_pipeline(), lambda i: draw(law, seed, 16, i)
    train_srrl(config, pipe, inspector_reward, texts, None, Job(run, seed))
    return figures.smooth([row["reward"] for row in run.metrics("srrl")], 4)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("what", choices=("gradients", "curve", "collapse"))
    parser.add_argument("--law", default="", help="prompts of one law (default: the mix)")
    parser.add_argument("--pictures", type=int, default=1024, help="of each objective (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"), help="default: %(default)s")
    args, lines = parser.parse_args(), []
    folder = args.out / f"gradients{args.law}"
    panels = noise(args.law, args.pictures, folder) if args.what == "gradients" else []
    for name, options in GUARDS.items() if args.what == "collapse" else ():
        run = train("srrl", args.out / name, [*options, "--iterations", "30", "--cooldown", "0"])
        print(name, (run / "table.md").read_text(), sep="\n\n")
        panels.append(figures.of_run(figures.LEARNING._replace(title=name), read_metrics(run, "srrl")))
    for name, color in zip(SETTINGS, (figures.BASE, figures.TRUTH)) if args.what == "curve" else ():
        runs = [curve(args.law, name, seed, args.out) for seed in (1, 2, 3)]
        print(name, *(f"{r[3]:.3f} to {r[-1]:.3f}" for r in runs), sep="; ")
        lines += over_runs(name, range(len(runs[0])), runs, color)
    panels += [Panel(f"{args.law}, PPO", "iteration", "right by the inspector", lines)] if lines else []
    figures.curves(ROOT / "docs" / f"{args.what}{'_' * bool(args.law)}{args.law}.png", *panels)


if __name__ == "__main__":
    main()
