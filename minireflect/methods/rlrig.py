"""RL-RIG's loop: generate, reflect, edit (Wang et al. 2026, arXiv 2602.19974).

    x = Diffuser(graph)
    for k in 1 .. K:
        v = Checker(x, graph);  done if all requirements are met
        a = Actor(x, graph, v)                                          an edit prompt: what is to be where
        x' = Denoise(Invert(x, t*), graph with a)                       the Inverse Diffuser: back to level t*, then on under the edit prompt
        x = x' unless the Checker likes x better                        keep-best: an edit can hurt

Differs from the paper, whose code is not public: the Inverse Diffuser is the Diffuser itself, its inversion `renoise` and its drawing
`denoise`; it reads the graph's sentence and the edit prompt after it. All noise at t* is new by default (SDEdit, Meng et al. 2021, arXiv
2108.01073), because a picture that DDIM inverts hardly lets anything be moved (docs/log.md); `fresh_noise` below 1 inverts.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..checkpoints.ours import RIG, load_module, load_pipeline
from ..diffusion.reflection import ReflectionConfig, renoise_to
from ..diffusion.sample import Trajectory, collect, denoise, evaluations, last
from ..diffusion.schedule import StepTable
from ..models.actor import Actor, questions
from ..models.tokenizer import Tokenizer
from ..models.transformer import SampledText
from ..models.unet import UNet
from ..pipeline import LatentDiffusion, SamplerConfig
from ..rl.advantage import group_advantage, zero_variance_groups
from ..rl.checker import Answers, Checker, load_checker
from ..rl.tokens import TokenBatch, entropy_of, token_step, token_weights
from ..run import Run
from ..streams import choices, rng
from ..world.captions import edit_prompt, scripted_edit
from ..world.graphs import SceneGraph
from ..world.inspector import inspect_all
from ..world.layout import sample_graph
from .learn import LearnConfig, Learner, learn
from .rollout import Rollout, Round

# The four networks of RL-RIG from a folder, and the loops that can be made of them: its own, and the controls.
# RL-RIG: a spatial reasoner that generates, reflects and edits (Wang et al. 2026, arXiv 2602.19974), and its Reflection-GRPO.
#
#     phase 1, the Actor.  For each graph:   x ~ Diffuser, v = Checker(x)
#         for round k = 1 .. K, while a requirement is unmet:
#             G edit prompts a_i ~ pi(. | x, graph, v);   x_i = Edit(x, a_i);   r_i = f(x_i), the share of requirements met
#             go on from the best x_i, unless x was better
#         A_i = (r_i - mean) / (std + e) in each group
#         L = - 1/G sum_i 1/|a_i| sum_tokens min(rho A_i, clip(rho, 1 - e, 1 + e) A_i) + beta KL(pi || pi_ref)
#     phase 2, the editor, with the Actor fixed: the same, but G edits of one (x, a) that differ in their noise, and the loss of SRRL
#         on the editor's denoising: PPO (E8), or reward-weighted regression.
#
# The Diffuser that draws round 0 is frozen.  The loop itself is in edit_loop.py.
#
# Differs from the paper, of which neither text nor code is public (this follows its abstract and its reviews): the Actor sees the picture's latents and
# the answers, and writes where to put what; one round is trained on by default (`--rlrig.rounds`); the editor is the Diffuser's UNet and
# learns by regression by default, on what the Checker gives all requirements a high probability (`--rlrig.editor.objective ppo` is theirs).
#
#     python train.py rlrig


@dataclass(frozen=True)
class LoopConfig:
    rounds: int = 3  # K, edits at most; 0 draws once
    # t*, share of the steps that an edit goes back; 0 changes nothing, 1 is all the way to noise
    t_star: float = 0.9
    steps: int = 20  # of drawing a picture
    guidance: float = 1.0  # w of drawing
    edit_guidance: float = 2.0  # w of editing
    w_invert: float = 0.0  # guidance of the inversion; 0 = no prompt at all
    fresh_noise: float = 1.0  # share of new noise in the picture at t*; 1 = SDEdit, which inverts nothing
    eta: float = 1.0  # step noise, 1 = as much as DDPM

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.steps < 1:
            raise ValueError(f"rounds {self.rounds} must be 0 or more, and steps {self.steps} at least 1")
        if not 0 <= self.t_star <= 1:
            raise ValueError(f"t_star {self.t_star} is a share of the steps, in [0, 1]")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        _ = self.reflection  # raises on a share of fresh noise out of range

    @property
    def edited(self) -> int:
        """Steps of an edit, in each direction."""
        return round(self.t_star * self.steps)

    @property
    def reflection(self) -> ReflectionConfig:
        return ReflectionConfig(
            steps=self.steps, strength=self.t_star, w_renoise=self.w_invert, fresh_noise=self.fresh_noise
        )

    @property
    def edit_sampler(self) -> SamplerConfig:
        """How an edit denoises."""
        return SamplerConfig(self.steps, self.edit_guidance, self.eta)

    @property
    def draw_cost(self) -> int:
        """UNet evaluations of a picture drawn."""
        return self.steps * evaluations(self.guidance)

    @property
    def edit_cost(self) -> int:
        """UNet evaluations of a picture edited."""
        return self.reflection.renoise_cost + self.edited * evaluations(self.edit_guidance)


Act = Callable[
    [Tensor, list[SceneGraph], Answers, Generator], list[str]
]  # latents (b c h w), b graphs -> b edit prompts


def scripted_actor(
    latents: Tensor, graphs: list[SceneGraph], answers: Answers, generator: Generator
) -> list[str]:
    """Plans a layout of the graph without a look at the picture, and names the places of what the Checker misses."""
    draw = choices(int(torch.randint(2**31, (), generator=generator)), "script")
    return [scripted_edit(g, met, draw) for g, met in zip(graphs, answers.met.tolist())]


def silent_actor(
    latents: Tensor, graphs: list[SceneGraph], answers: Answers, generator: Generator
) -> list[str]:
    """Says nothing: the edit reads the graph's sentence once more."""
    return [""] * len(graphs)


def ask(actor: Actor, tokenizer: Tokenizer, graphs: list[SceneGraph], answers: Answers) -> Tensor:
    """What an Actor reads about pictures of these graphs.  -> (b s) token ids"""
    asked = [[r.words for r in g.requirements] for g in graphs]
    said = [row[: len(a)] for row, a in zip(answers.met.tolist(), asked)]
    return questions(tokenizer, asked, said, actor.config.read).to(answers.probability.device)


def learned_actor(actor: Actor, tokenizer: Tokenizer) -> Act:
    """The Actor as the loop calls it."""

    def act(latents: Tensor, graphs: list[SceneGraph], answers: Answers, generator: Generator) -> list[str]:
        written = actor.write(latents, ask(actor, tokenizer, graphs, answers), generator)
        return tokenizer.decode(written.ids)

    return act


def prompts_of(graphs: list[SceneGraph], edits: list[str]) -> list[str]:
    """What the Inverse Diffuser reads."""
    return [edit_prompt(g, e) for g, e in zip(graphs, edits)]


@torch.no_grad()
def draw(pipe: LatentDiffusion, graphs: list[SceneGraph], config: LoopConfig, generator: Generator) -> Tensor:
    """The Diffuser.  -> (b c h w) latents"""
    eps = pipe.eps([g.sentence for g in graphs])(config.guidance)
    x_T = pipe.noise(len(graphs), generator)
    return last(denoise(eps, x_T, pipe.table(config.steps), config.eta, generator))


@torch.no_grad()
def invert(
    pipe: LatentDiffusion, x0: Tensor, prompts: list[str], config: LoopConfig, generator: Generator
) -> tuple[Tensor, StepTable]:
    """A picture back to level t*, and the steps that lead on from there; at t* = 0 the picture and no steps.

    Shapes: x0 (b c h w), b prompts -> (b c h w)
    """
    table = pipe.table(config.steps)
    eps = pipe.eps(prompts)(config.w_invert)
    return renoise_to(eps, x0, table, config.reflection, generator), config.reflection.tail(table)


@torch.no_grad()
def edit(
    pipe: LatentDiffusion, x0: Tensor, prompts: list[str], config: LoopConfig, generator: Generator
) -> Trajectory:
    """The Inverse Diffuser: invert to level t*, draw on under the prompts.  Shapes: x0 (b c h w), b prompts"""
    x, tail = invert(pipe, x0, prompts, config, generator)
    return collect(x, denoise(pipe.eps(prompts)(config.edit_guidance), x, tail, config.eta, generator))


class Look(NamedTuple):
    """Where a loop stands after a round."""

    latents: Tensor  # (b c h w) the best so far
    images: Tensor  # (b 3 h w)
    answers: Answers  # of the checker, about them
    evaluations: Tensor  # (b) UNet evaluations spent on each picture so far
    calls: Tensor  # (b) of the checker, one a picture
    rows: Tensor  # (n) which pictures this round tried anew; none in round 0
    edits: list[str]  # n edit prompts
    tried: Tensor  # (n 3 h w) what came of it, kept or not
    said: Answers  # of the checker, about those


def first_look(
    diffuser: LatentDiffusion,
    checker: Checker,
    graphs: list[SceneGraph],
    config: LoopConfig,
    generator: Generator,
) -> Look:
    """Round 0: what the Diffuser draws."""
    x0 = draw(diffuser, graphs, config, generator)
    images = diffuser.decode(x0)
    answers = checker(images, graphs)
    spent = torch.full((len(graphs),), config.draw_cost), torch.ones(len(graphs), dtype=torch.long)
    none = torch.arange(0, device=x0.device)
    return Look(x0, images, answers, *spent, none, [], images[:0], answers.rows(none))


def keep_best(
    look: Look, rows: Tensor, edits: list[str], drawn: Tensor, tried: Tensor, said: Answers, cost: int
) -> Look:
    """The guard: what is new replaces what was there unless the checker likes it less.

    Shapes: rows (n), n edits, drawn (n c h w), tried (n 3 h w)
    """
    better = said.score >= look.answers.score[rows]  # (n) bool
    latents, images = look.latents.clone(), look.images.clone()
    probability = look.answers.probability.clone()
    kept = rows[better]
    latents[kept], images[kept] = drawn[better], tried[better]
    probability[kept, : said.probability.shape[1]] = said.probability[better]
    evaluations, calls = look.evaluations.clone(), look.calls.clone()
    evaluations[rows.cpu()] += cost
    calls[rows.cpu()] += 1
    answers = Answers(probability, look.answers.asked)
    return Look(latents, images, answers, evaluations, calls, rows, edits, tried, said)


@torch.no_grad()
def reflect_and_edit(
    diffuser: LatentDiffusion,
    editor: LatentDiffusion,
    checker: Checker,
    act: Act,
    graphs: list[SceneGraph],
    config: LoopConfig,
    generator: Generator,
) -> Iterator[Look]:
    """The loop; yields round 0 and every round that had something to edit.  A picture that meets its goal is left alone."""
    look = first_look(diffuser, checker, graphs, config, generator)
    yield look
    for _ in range(config.rounds):
        rows = (~look.answers.met.all(1)).nonzero().flatten()  # (n)
        if not len(rows):
            return
        asked = [graphs[i] for i in rows.tolist()]
        edits = act(look.latents[rows], asked, look.answers.rows(rows), generator)
        prompts = prompts_of(asked, edits)
        drawn = edit(editor, look.latents[rows], prompts, config, generator).latents[:, -1]
        tried = editor.decode(drawn)
        look = keep_best(look, rows, edits, drawn, tried, checker(tried, asked), config.edit_cost)
        yield look


@torch.no_grad()
def redraw(
    diffuser: LatentDiffusion,
    checker: Checker,
    graphs: list[SceneGraph],
    config: LoopConfig,
    generator: Generator,
    patient: bool,
) -> Iterator[Look]:
    """The controls: `rounds` more pictures from new noise, of which the checker's favourite is kept.

    Best-of-N draws all of them; with `patient`, repeated generation: only what is not accepted is drawn again.
    """
    look = first_look(diffuser, checker, graphs, config, generator)
    yield look
    for _ in range(config.rounds):
        rows = torch.arange(len(graphs), device=look.latents.device)
        if patient:
            rows = (~look.answers.met.all(1)).nonzero().flatten()
        if not len(rows):
            return
        asked = [graphs[i] for i in rows.tolist()]
        drawn = draw(diffuser, asked, config, generator)
        tried = diffuser.decode(drawn)
        said = checker(tried, asked)
        look = keep_best(look, rows, [""] * len(rows), drawn, tried, said, config.draw_cost)
        yield look


class Parts(NamedTuple):
    """The four of RL-RIG."""

    diffuser: LatentDiffusion
    editor: LatentDiffusion  # the Inverse Diffuser; the Diffuser's networks, until phase 2 trains its UNet
    checker: Checker
    actor: Actor

    @property
    def act(self) -> Act:
        return learned_actor(self.actor, self.diffuser.tokenizer)


# the files of a folder with RL-RIG's weights
RIG_PARTS = ("autoencoder", "text_encoder", "unet", "checker", "judge", "actor")


def load_parts(
    folder: str | Path = RIG, actor: str = "actor", editor: str = "editor", device: torch.device | str = "cpu"
) -> Parts:
    """RL-RIG from a folder with its weights.  Without an editor's there, it is the Diffuser itself.

    A run of train.py also holds what it started from: the Actor "base_actor", and "unet", the Diffuser's and so the first editor's.
    Raises WeightsError when a file is missing or another's.
    """
    folder = Path(folder)
    editor = editor if (folder / f"{editor}.safetensors").exists() else "unet"
    diffuser = load_pipeline(folder).to(device)
    unet, _ = load_module(folder / f"{editor}.safetensors", UNet)
    policy, _ = load_module(folder / f"{actor}.safetensors", Actor)
    checker = load_checker(folder, "checker", device)
    return Parts(diffuser, replace(diffuser, unet=unet).to(device), checker, policy.to(device))


Loop = Callable[[list[SceneGraph], Generator], Iterable[Look]]


def loop_of(parts: Parts, config: LoopConfig, act: Act | None = None) -> Loop:
    """The loop as a function of graphs and noise, with the Actor of the parts unless another is given."""
    act = act or parts.act
    return lambda graphs, noise: reflect_and_edit(
        parts.diffuser, parts.editor, parts.checker, act, graphs, config, noise
    )


def redraws(parts: Parts, config: LoopConfig, patient: bool) -> Loop:
    """Best-of-N of the Diffuser or, if `patient`, repeated generation."""
    return lambda graphs, noise: redraw(parts.diffuser, parts.checker, graphs, config, noise, patient)


def most_redraws(config: LoopConfig) -> int:
    """Further pictures that cost at least what the loop's edits can."""
    return math.ceil(config.rounds * config.edit_cost / config.draw_cost)


def controls(parts: Parts, config: LoopConfig) -> dict[str, Loop]:
    """What the trained loop is compared with; N is such that it spends at least what the loop can, or two thirds of it, as most loops end early."""
    n = most_redraws(config)
    best_of = {
        f"best of {k + 1}": redraws(parts, replace(config, rounds=k), False)
        for k in (math.ceil(2 * n / 3), n)
    }
    return {
        "base": loop_of(parts, replace(config, rounds=0)),
        **best_of,
        "repeated generation": redraws(parts, replace(config, rounds=n), True),
        "raw loop, silent": loop_of(parts, config, silent_actor),
        "raw loop, scripted Actor": loop_of(parts, config, scripted_actor),
        "raw loop, warmed-up Actor": loop_of(parts, config),
    }


def trained_controls(parts: Parts, config: LoopConfig) -> dict[str, Loop]:
    """What of the trained loop's gain is the editor's alone: it draws anew from the sentence, or edits and nobody speaks."""
    n = most_redraws(config)
    return {
        "trained editor, repeated generation": redraws(
            parts._replace(diffuser=parts.editor), replace(config, rounds=n), True
        ),
        "trained editor, silent": loop_of(parts, config, silent_actor),
    }


ACTOR_UPDATES = 2  # optimiser steps per iteration of phase 1: the second shows whether the clip binds


@dataclass(frozen=True)
class RLRIGConfig:
    loop: LoopConfig = field(default_factory=LoopConfig)
    graphs: int = 40  # per iteration
    group: int = 4  # G, edits of a picture and round
    rounds: int = 1  # K of training; the loop that is measured has its own
    actor_iterations: int = 10  # of phase 1
    actor_lr: float = 3e-4  # of AdamW
    clip: float = 0.2  # e, on the ratio of a token's probabilities
    beta: float = 0.01  # weight of the KL to the warmed-up Actor, nats per token
    std_floor: float = 0.02  # added to a group's std of rewards
    editor_iterations: int = 60  # of phase 2
    # how phase 2 learns
    editor: LearnConfig = field(default_factory=lambda: LearnConfig(lr=3e-4, anchor_below=300))

    controls: bool = True  # measure what the loop is compared with as well

    def __post_init__(self) -> None:
        if self.graphs < 1 or min(self.actor_iterations, self.editor_iterations) < 0:
            raise ValueError("graphs must be at least 1, and iterations 0 or more")
        if self.group < 2:
            raise ValueError(
                f"group is {self.group}: an edit is compared with others of the same picture, so at least 2"
            )
        if self.rounds < 1 or not self.loop.edited or self.loop.eta == 0:
            raise ValueError(
                "training needs a round, an edit of one step at least, and step noise: rounds, loop.t-star, loop.eta"
            )


class Attempt(NamedTuple):
    """One round: n pictures that were not right yet, G edits of each."""

    graphs: list[SceneGraph]  # n
    latents: Tensor  # (n c h w) before
    before: Answers  # n
    read: Tensor  # (n s) what the Actor read
    written: SampledText  # (n*g t), or (n t) where a group shares its edit prompt
    prompts: list[str]  # n*g, what the editor read
    path: Trajectory  # of the edits, latents (n*g s+1 c h w)
    images: Tensor  # (n*g 3 h w)
    after: Answers  # n*g
    group: int  # G

    @property
    def rewards(self) -> Tensor:
        """f(x) of every edit.  -> (n g)"""
        return self.after.share.view(-1, self.group)

    @property
    def best(self) -> tuple[Tensor, Answers]:
        """What the next round goes on from: the best edit of each group, unless the picture was better.  -> (n c h w), n"""
        score, best = self.after.score.view(-1, self.group).max(1)  # (n)
        better = score >= self.before.score
        pick = best + torch.arange(len(best), device=best.device) * self.group  # (n) rows of the best edits
        new, asked = self.after.probability[pick], self.after.asked[pick]  # (n r)
        old = self.before.probability[:, : new.shape[1]]
        latents = torch.where(better.view(-1, 1, 1, 1), self.path.latents[pick, -1], self.latents)
        return latents, Answers(torch.where(better[:, None], new, old), asked)


@torch.no_grad()
def attempts(
    parts: Parts, graphs: list[SceneGraph], config: RLRIGConfig, shared: bool, generator: Generator
) -> list[Attempt]:
    """Draw, and K rounds of G edits of what is not right yet; `shared`: a group has one edit prompt (phase 2)."""
    g, loop, editor = config.group, config.loop, parts.editor
    x0 = draw(parts.diffuser, graphs, loop, generator)
    answers = parts.checker(parts.diffuser.decode(x0), graphs)
    done = []
    for _ in range(config.rounds):
        rows = (~answers.met.all(1)).nonzero().flatten()  # (n)
        if not len(rows):
            break
        graphs = [graphs[i] for i in rows.tolist()]
        x0, answers = x0[rows], answers.rows(rows)
        read = ask(parts.actor, editor.tokenizer, graphs, answers)  # (n s)
        copies = 1 if shared else g
        written = parts.actor.write(
            x0.repeat_interleave(copies, 0), read.repeat_interleave(copies, 0), generator
        )
        edits = editor.tokenizer.decode(written.ids)  # n or n*g
        each = [graph for graph in graphs for _ in range(g)]
        prompts = prompts_of(each, [e for e in edits for _ in range(g // copies)])
        x, tail = invert(editor, x0.repeat_interleave(g, 0), prompts, loop, generator)
        path = collect(x, denoise(editor.eps(prompts)(loop.edit_guidance), x, tail, loop.eta, generator))
        images = editor.decode(path.latents[:, -1])
        after = parts.checker(images, each)
        done.append(Attempt(graphs, x0, answers, read, written, prompts, path, images, after, g))
        x0, answers = done[-1].best
    return done


class ActorStats(NamedTuple):
    loss: float
    clip_high: float
    clip_low: float
    first_ratio: float  # largest |rho - 1| before the first update: 0, or something is wrong
    kl: float  # nats per token from the warmed-up Actor
    entropy: float  # nats per token
    grad_norm: float
    flat_groups: int  # groups whose rewards are all equal teach nothing


def update_actor(
    actor: Actor, reference: Actor, optimizer: torch.optim.Optimizer, done: list[Attempt], config: RLRIGConfig
) -> ActorStats:
    """GRPO on the edit prompts of all rounds."""
    g = config.group
    advantage = torch.cat([group_advantage(a.rewards, config.std_floor).flatten() for a in done])  # (m)
    flat = sum(int(zero_variance_groups(a.rewards).sum()) for a in done)
    latents = torch.cat([a.latents.repeat_interleave(g, 0) for a in done])  # (m c h w)
    read = torch.cat([a.read.repeat_interleave(g, 0) for a in done])  # (m s)
    ids, mask = (torch.cat([getattr(a.written, name) for a in done]) for name in ("ids", "chosen"))  # (m t)
    with torch.no_grad():  # in one pass, as below: sampling with a cache rounds differently
        old, ref = actor(latents, read, ids), reference(latents, read, ids)  # (m t)
    batch = TokenBatch(old, ref, advantage, token_weights(mask))
    first: tuple[float, float] | None = None
    for _ in range(ACTOR_UPDATES):
        logits = actor.all_logits(latents, read, ids).log_softmax(-1)  # (m t v)
        now = logits.gather(2, ids[..., None])[..., 0]  # (m t)
        stats = token_step(now, batch, optimizer, config.clip, config.beta)
        entropy = (batch.weight * entropy_of(logits)).sum().item()
        first = first or (stats.ratio_error, entropy)
    return ActorStats(
        stats.surrogate, stats.clip_high, stats.clip_low, first[0], stats.kl, first[1], stats.grad_norm, flat
    )


def train_actor_grpo(config: RLRIGConfig, seed: int, parts: Parts, run: Run) -> Actor:
    """Phase 1.  The editor's weights are not touched.  -> the Actor"""
    reference = copy.deepcopy(parts.actor).eval().requires_grad_(False)
    actor = parts.actor.requires_grad_(True)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=config.actor_lr, weight_decay=1e-4)
    memory = {"calls": 0, "evaluations": 0}
    for step in run.steps("phase-1", config.actor_iterations, {"actor": actor}, optimizer, memory=memory):
        done = attempts(parts, graphs_of(seed, step, config), config, False, rng(seed, "phase 1", step))
        if not done:
            continue
        stats = update_actor(actor, reference, optimizer, done, config)
        report(run, "phase-1", step, done, config, memory, stats._asdict())
    return actor.eval().requires_grad_(False)


def train_editor(config: RLRIGConfig, seed: int, parts: Parts, run: Run) -> LatentDiffusion:
    """Phase 2.  The Actor's weights are not touched.  -> the editor"""
    pictures, settings = config.graphs * config.group * config.rounds, config.editor
    learner = Learner.of(parts.editor, settings, config.loop.edit_sampler, pictures)
    memory = {"calls": 0, "evaluations": 0}
    total = config.editor_iterations
    for step in run.steps("phase-2", total, learner.networks, learner.optimizer, memory=memory):
        done = attempts(parts, graphs_of(seed, step, config), config, True, rng(seed, "phase 2", step))
        if not done:
            continue
        out = as_rollout(parts.editor, done, config)
        stats = learn(learner, out, settings.lr_factor(step, total), rng(seed, "update", step))
        report(run, "phase-2", step, done, config, memory, stats._asdict())
    parts.editor.unet.eval().requires_grad_(False)
    return parts.editor


def as_rollout(editor: LatentDiffusion, done: list[Attempt], config: RLRIGConfig) -> Rollout:
    """The edits as SRRL's update reads them: a (picture, edit prompt) is a prompt, its edits are the branches.

    PPO learns from f(x), which is what the group is compared by; the regression weighs by the probability that all holds.
    """
    g = config.group
    texts = [text for a in done for text in a.prompts[::g]]
    out = Rollout(texts, editor.embed(texts))
    tail = editor.table(config.loop.steps)[config.loop.steps - config.loop.edited :]
    start = 0
    for a in done:
        n = len(a.graphs)
        rows = torch.arange(start, start + n, device=a.latents.device)
        rewards = a.rewards if config.editor.objective == "ppo" else a.after.all_hold.view(n, g)
        out.rounds.append(Round(rows, a.path.latents[::g, 0], tail, a.path, a.images, rewards))
        start += n
    return out


def graphs_of(seed: int, step: int, config: RLRIGConfig) -> list[SceneGraph]:
    chance = choices(seed, "graphs", step)
    return [sample_graph(chance) for _ in range(config.graphs)]


def report(
    run: Run, stage: str, step: int, done: list[Attempt], config: RLRIGConfig, memory: dict, stats: dict
) -> None:
    """One line a step; the truth stands beside the reward."""
    first, loop = done[0], config.loop
    readings = [r.scene.objects if r.scene else () for r in inspect_all(first.images.cpu())]
    each = [g for g in first.graphs for _ in range(first.group)]
    right = [g.fulfilled_by(things) for g, things in zip(each, readings)]
    edits = sum(len(a.images) for a in done)
    memory["evaluations"] += config.graphs * loop.draw_cost + edits * loop.edit_cost
    memory["calls"] += config.graphs + edits
    values = {
        "before": first.before.share.mean().item(),  # f of what was edited
        "reward": first.after.share.mean().item(),
        "accepted": first.after.met.all(1).float().mean().item(),
        "right": sum(right) / len(right),
        "reward_by_round": [a.after.share.mean().item() for a in done],
        "pictures_by_round": [len(a.graphs) for a in done],
        **stats,
        "checker_calls": memory["calls"],
        "unet_evaluations": memory["evaluations"],
    }
    run.log(stage, step, **values)
    run.bar.set_postfix(
        met=f"{values['reward']:.2f}", accepted=f"{values['accepted']:.2f}", right=f"{values['right']:.2f}"
    )
