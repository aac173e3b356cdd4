"""RL-RIG: generate a picture of a scene graph, check it, and edit it; train the Actor and the editor by RL.

Paper: Wang et al. 2026, arXiv 2602.19974, with its Reflection-GRPO.

    x ~ Diffuser(graph)                                     generate: round 0
    for k = 1 .. K, while a requirement is unmet:
        v    = Checker(x, graph)                            reflect: yes or no for each requirement
        a_i ~ Actor(x, graph, v),  i = 1 .. G               edit prompts: where objects should be
        x_i  = denoise(renoise(x, t*), graph + a_i)         edit: the Inverse Diffuser, here `editor`
        x    = the best x_i, unless the Checker prefers x

    phase 1   trains the Actor by GRPO on its tokens (rl/tokens.py); the reward is f(x_i), the share of the
              requirements that are met
    phase 2   trains the editor with the Actor fixed; a group has one edit prompt and G noises
              (methods/learn.py)

After training, G is 1.

Differs from the paper (its code is not public; this implementation follows its abstract and its reviews):
- the editor is initialised with the Diffuser's UNet, and reads the edit prompt after the graph's sentence
- all noise at t* is new by default (SDEdit, arXiv 2108.01073), because objects hardly move if DDIM inverts
  the picture (docs/log.md); `--loop.fresh-noise` below 1 inverts
- the Actor is a small transformer that reads latents and answers; in the paper it is a vision-language model
- training has one round (`--rounds`)
- the editor learns by reward-weighted regression, and its reward is the probability that all requirements are
  met; `--editor.objective ppo` is the paper's objective

    python train.py rlrig
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Generator, Tensor
from tyro.conf import Suppress

from ..checkpoints.ours import RIG, load_module, load_pipeline
from ..diffusion.reflection import ReflectionConfig, renoise_to
from ..diffusion.sample import Trajectory, collect, denoise, evaluations, last
from ..models.transformer import Actor, SampledText, questions
from ..models.unet import UNet
from ..parallel import share, total
from ..pipeline import LatentDiffusion
from ..ranges import Checked, Count, Natural, Several, Share, Weight
from ..rl.advantage import group_advantage, zero_variance_groups
from ..rl.collapse import statistics, watch
from ..rl.rewards import Answers, Checker, load_checker
from ..rl.tokens import TokenBatch, TokenConfig, entropy_of, token_step, token_weights
from ..run import Job
from ..streams import choices, rng
from ..world.captions import edit_prompt
from ..world.graphs import SceneGraph
from ..world.inspector import inspect_all
from ..world.layout import sample_graph
from .learn import LearnConfig, Learner, learn
from .rollout import ETA, Rollout, Round

RIG_PARTS = ("autoencoder", "text_encoder", "unet", "checker", "judge", "actor")  # files of weights
W_INVERT = 0.0  # guidance of the inversion, which does not use the prompt
ACTOR_UPDATES = 2  # optimiser steps per iteration of phase 1; the clip has no effect in the first
EDITOR = LearnConfig("regress", lr=3e-4, updates=8, replay=8, anchor_below=300)
STD_FLOOR = 0.02  # phase 1: added to the std of a group's rewards

Graphs = list[SceneGraph]
Tries = tuple[int, int]  # edit prompts per picture, edits per edit prompt; their product is G


@dataclass(frozen=True)
class LoopConfig(Checked):
    # K, number of edits of a picture, at most; 0 generates only
    rounds: Natural = 3
    # t*, share of the denoising steps that an edit re-noises
    t_star: Share = 0.9
    # denoising steps of a picture
    steps: Count = 20
    # guidance w in generating a picture
    guidance: Weight = 1.0
    # guidance w in editing a picture
    edit_guidance: Weight = 2.0
    # amplitude l of new noise at t*; its variance is l^2; 1 is SDEdit, without inversion
    fresh_noise: Share = 1.0
    # also edit pictures that meet all requirements
    edit_all: Annotated[bool, Suppress] = False

    @property
    def edit_steps(self) -> int:
        """Denoising steps of an edit."""
        return round(self.t_star * self.steps)

    @property
    def reflection(self) -> ReflectionConfig:
        part = ReflectionConfig(steps=self.steps, strength=self.t_star, fresh_noise=self.fresh_noise)
        return replace(part, w_renoise=W_INVERT)

    @property
    def generate_cost(self) -> int:
        """UNet evaluations to generate a picture."""
        return self.steps * evaluations(self.guidance)

    @property
    def edit_cost(self) -> int:
        """UNet evaluations to edit a picture."""
        return self.reflection.renoise_cost + self.edit_steps * evaluations(self.edit_guidance)

    def generating(self, rounds: int, edit_all: bool) -> "LoopConfig":
        """The config of a baseline in which each edit is a new picture, from new noise.

        It needs the Diffuser as editor and `silent_actor`.  With `edit_all` it is best-of-N by the Checker's
        score; without, it generates until the Checker accepts a picture.
        """
        anew = replace(self, t_star=1.0, fresh_noise=1.0, edit_guidance=self.guidance)
        return replace(anew, rounds=rounds, edit_all=edit_all)


class EditPrompts(NamedTuple):
    texts: list[str]  # b
    read: Tensor | None = None  # (b s) token ids that the Actor read; None for scripted Actors
    sampled: SampledText | None = None  # (b t) tokens that the Actor wrote


# latents (b c h w), b graphs, b answers of the Checker, generator -> b edit prompts
Act = Callable[[Tensor, Graphs, Answers, Generator], EditPrompts]


def silent_actor(_: Tensor, graphs: Graphs, *__: object) -> EditPrompts:
    """The Actor of a baseline: edit prompts are empty, so the editor reads only the graph's sentence."""
    return EditPrompts([""] * len(graphs))


class Parts(NamedTuple):
    """The four parts of RL-RIG."""

    diffuser: LatentDiffusion
    editor: LatentDiffusion  # the Inverse Diffuser: the Diffuser with another UNet
    checker: Checker
    actor: Actor

    def act(self, latents: Tensor, graphs: Graphs, answers: Answers, generator: Generator) -> EditPrompts:
        """Sample edit prompts from the Actor.  Shapes: latents (b c h w), b graphs, b answers"""
        tokenizer, asked = self.diffuser.tokenizer, [[r.words for r in g.requirements] for g in graphs]
        # (b s); `questions` leaves out the answers in the padding, which have no requirement
        read = questions(tokenizer, asked, answers.met.tolist(), self.actor.config.read).to(latents.device)
        sampled = self.actor.write(latents, read, generator)
        return EditPrompts(tokenizer.decode(sampled.ids), read, sampled)


def load_parts(
    folder: str | Path = RIG, actor: str = "actor", editor: str = "editor", device: torch.device | str = "cpu"
) -> Parts:
    """Load RL-RIG from a folder with weights.

    actor, editor: names of the files.  The weights before RL are "base_actor" and, for the editor, "unet".
        If the editor's file is missing, the editor is the Diffuser.
    Raises WeightsError if another file is missing or does not fit.
    """
    folder = Path(folder)
    editor = editor if (folder / f"{editor}.safetensors").exists() else "unet"
    diffuser = load_pipeline(folder).to(device)
    unet, _ = load_module(folder / f"{editor}.safetensors", UNet)
    policy, _ = load_module(folder / f"{actor}.safetensors", Actor)
    checker = load_checker(folder, "checker", device)
    return Parts(diffuser, replace(diffuser, unet=unet).to(device), checker, policy.to(device))


def generate(pipe: LatentDiffusion, graphs: Graphs, config: LoopConfig, generator: Generator) -> Tensor:
    """Generate the pictures of round 0.  -> latents (b c h w)"""
    eps = pipe.eps([g.sentence for g in graphs])(config.guidance)
    return last(denoise(eps, pipe.noise(len(graphs), generator), pipe.table(config.steps), ETA, generator))


def edit(
    pipe: LatentDiffusion, x0: Tensor, prompts: list[str], config: LoopConfig, generator: Generator
) -> Trajectory:
    """Re-noise pictures up to level t*, and denoise them with the prompts.

    Shapes: x0 (b c h w), b prompts -> latents (b s+1 c h w)
    """
    make_eps, table, how = pipe.eps(prompts), pipe.table(config.steps), config.reflection
    x = renoise_to(make_eps(W_INVERT), x0, table, how, generator)
    return collect(x, denoise(make_eps(config.edit_guidance), x, how.tail(table), ETA, generator))


class Edits(NamedTuple):
    """The edits of a round: G of each of n pictures."""

    rows: Tensor  # (n) indices of the edited pictures
    graphs: Graphs  # n
    latents: Tensor  # (n c h w) before the edit
    before: Answers  # n, about the pictures before the edit
    edit_prompts: EditPrompts  # n*g, or n if a group shares its edit prompt
    prompts: list[str]  # n*g texts that the editor read
    path: Trajectory  # latents (n*g s+1 c h w)
    images: Tensor  # (n*g 3 h w) after the edit
    after: Answers  # n*g, about the edited pictures

    @property
    def group(self) -> int:
        return len(self.images) // len(self.rows)

    @property
    def rewards(self) -> Tensor:
        """f(x) of the edited pictures, the share of the requirements that are met.  -> (n g)"""
        return self.after.share.view(-1, self.group)


class LoopState(NamedTuple):
    """The best pictures after a round, their cost, and the edits of the round."""

    latents: Tensor  # (b c h w)
    images: Tensor  # (b 3 h w)
    answers: Answers  # of the Checker
    evaluations: Tensor  # (b) UNet evaluations so far
    calls: Tensor  # (b) Checker calls so far
    edits: Edits | None = None  # None for round 0


def keep_best(state: LoopState, edits: Edits, cost: int) -> LoopState:
    """Replace each picture with its best edit, unless the Checker gives the picture a higher score.

    cost: UNet evaluations of an edit.
    """
    score, best = edits.after.score.view(-1, edits.group).max(1)  # (n)
    better = score >= edits.before.score  # (n) bool
    rows = edits.rows[better]
    pick = (best + torch.arange(len(best), device=best.device) * edits.group)[better]
    latents = state.latents.index_copy(0, rows, edits.path.latents[pick, -1])
    images = state.images.index_copy(0, rows, edits.images[pick])
    probability, new = state.answers.probability.clone(), edits.after.probability[pick]
    probability[rows, : new.shape[1]] = new  # columns of the edited graphs' requirements
    answers, tried = Answers(probability, state.answers.asked), torch.zeros_like(state.calls)
    tried[edits.rows.cpu()] = edits.group
    return LoopState(latents, images, answers, state.evaluations + cost * tried, state.calls + tried, edits)


@torch.no_grad()
def reflect_and_edit(
    parts: Parts, graphs: Graphs, config: LoopConfig, generator: Generator, act: Act | None = None,
    tries: Tries = (1, 1),
) -> Iterator[LoopState]:  # fmt: skip
    """The loop.  Yields the state after round 0, and after each round in which a picture is edited."""
    act, (p, e) = act or parts.act, tries
    x0 = generate(parts.diffuser, graphs, config, generator)
    images = parts.diffuser.decode(x0)
    spent = torch.full((len(graphs),), config.generate_cost)
    state = LoopState(x0, images, parts.checker(images, graphs), spent, torch.ones_like(spent))
    yield state
    for _ in range(config.rounds):
        rows = (config.edit_all | ~state.answers.met.all(1)).nonzero().flatten()  # (n)
        if not len(rows):
            return
        wrong, x0, before = [graphs[i] for i in rows.tolist()], state.latents[rows], state.answers.rows(rows)
        asked = [g for g in wrong for _ in range(p)]  # n*p
        answers = state.answers.rows(rows.repeat_interleave(p))
        written = act(x0.repeat_interleave(p, 0), asked, answers, generator)
        prompts = [edit_prompt(g, a) for g, a in zip(asked, written.texts) for _ in range(e)]
        path = edit(parts.editor, x0.repeat_interleave(p * e, 0), prompts, config, generator)
        images = parts.editor.decode(path.latents[:, -1])  # (n*p*e 3 h w)
        after = parts.checker(images, [g for g in asked for _ in range(e)])
        edits = Edits(rows, wrong, x0, before, written, prompts, path, images, after)
        state = keep_best(state, edits, config.edit_cost)
        yield state


Loop = Callable[[Graphs, Generator], Iterator[LoopState]]


def loop_of(parts: Parts, config: LoopConfig, act: Act | None = None) -> Loop:
    """The loop as a function of graphs and generator.  The Actor is `act`, or that of `parts` if None."""
    return lambda graphs, noise: reflect_and_edit(parts, graphs, config, noise, act)


def controls(parts: Parts, config: LoopConfig) -> dict[str, Loop]:
    """The baselines of the trained loop.  Best-of-N costs at least as much as a loop with all its rounds."""
    n = math.ceil(config.rounds * config.edit_cost / config.generate_cost)
    untrained, again = parts._replace(editor=parts.diffuser), config.generating(n, edit_all=True)
    return {
        "base": loop_of(parts, replace(config, rounds=0)),
        f"best of {n + 1}": loop_of(untrained, again, silent_actor),
        "raw loop, warmed-up Actor": loop_of(parts, config),
    }


@dataclass(frozen=True)
class RLRIGConfig(TokenConfig):
    loop: LoopConfig = field(default_factory=LoopConfig)
    # graphs per iteration
    graphs: Count = 40
    group: Several = 4
    # K in training; loop.rounds is K in measuring
    rounds: Count = 1
    # iterations of phase 1, which trains the Actor
    actor_iterations: Natural = 10
    # learning rate of the Actor's AdamW
    actor_lr: Weight = 3e-4
    beta: Weight = 0.01
    # iterations of phase 2, which trains the editor
    editor_iterations: Natural = 60
    # how the editor learns
    editor: LearnConfig = EDITOR

    def require(self) -> None:
        if self.editor.advantage == "history":
            raise ValueError("editor.advantage history needs prompts that recur; use shrunk or group")
        if not self.loop.edit_steps:
            raise ValueError("an edit has no steps; increase loop.steps or loop.t-star")


def graphs_of(seed: int, step: int, config: RLRIGConfig) -> Graphs:
    """Draw the training graphs of an iteration."""
    draw = choices(seed, "graphs", step)
    return [sample_graph(draw) for _ in range(config.graphs)]


def try_edits(
    parts: Parts, graphs: Graphs, config: RLRIGConfig, tries: Tries, generator: Generator
) -> list[Edits]:
    """Run the loop for training.  -> the edits of each round; empty if round 0 meets all requirements"""
    loop = replace(config.loop, rounds=config.rounds)
    states = reflect_and_edit(parts, graphs, loop, generator, tries=tries)
    return [state.edits for state in states if state.edits]


def update_actor(
    actor: Actor, reference: Actor, optimizer: torch.optim.Optimizer, rounds: list[Edits], config: RLRIGConfig
) -> dict[str, float]:
    """ACTOR_UPDATES steps of GRPO on the edit prompts of all rounds.

    -> statistics of the last optimiser step; `first_ratio` (must be 0) and `entropy` are of the first
    """
    A = torch.cat([group_advantage(r.rewards, STD_FLOOR).flatten() for r in rounds])  # (m)
    flat = sum(int(zero_variance_groups(r.rewards).sum()) for r in rounds)
    latents = torch.cat([r.latents.repeat_interleave(r.group, 0) for r in rounds])  # (m c h w)
    read = torch.cat([r.edit_prompts.read for r in rounds])  # (m s)
    ids, chosen, _ = map(torch.cat, zip(*(r.edit_prompts.sampled for r in rounds)))  # (m t) each
    own = share(len(A))  # the part of this process
    latents, read, ids = latents[own], read[own], ids[own]
    with torch.no_grad():  # not those of sampling: its cache rounds differently, so the ratio would not be 1
        old, ref = actor(latents, read, ids), reference(latents, read, ids)  # (m t)
    batch = TokenBatch(old, ref, A[own], token_weights(chosen)[own])
    first: dict[str, float] = {}
    for _ in range(ACTOR_UPDATES):
        log_probs = actor.all_logits(latents, read, ids).log_softmax(-1)  # (m t v)
        now = log_probs.gather(2, ids[..., None])[..., 0]  # (m t)
        stats = token_step(now, batch, optimizer, config.clip_range, config.beta)
        entropy = total((batch.weight * entropy_of(log_probs)).sum().detach()).item()
        first = first or {"first_ratio": stats.ratio_error, "entropy": entropy}
    return stats._asdict() | first | {"flat_groups": flat}


def train_actor_grpo(config: RLRIGConfig, parts: Parts, job: Job) -> None:
    """Phase 1: train the Actor, in place, on G edit prompts for each picture."""
    reference = copy.deepcopy(parts.actor).eval().requires_grad_(False)
    actor = parts.actor.requires_grad_(True)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=config.actor_lr, weight_decay=1e-4)
    memory, tries = {"calls": 0, "evaluations": 0}, (config.group, 1)
    for step in job.run.steps("phase-1", config.actor_iterations, {"actor": actor}, optimizer, memory=memory):
        graphs, noise = graphs_of(job.seed, step, config), rng(job.seed, "phase 1", step)
        if rounds := try_edits(parts, graphs, config, tries, noise):
            stats = update_actor(actor, reference, optimizer, rounds, config)
            job.run.log("phase-1", step, **summary(rounds, config, memory, job), **stats)
    actor.eval().requires_grad_(False)


def train_editor(config: RLRIGConfig, parts: Parts, job: Job) -> None:
    """Phase 2: train the editor, in place, on G edits for each edit prompt."""
    pictures, total = config.graphs * config.group * config.rounds, config.editor_iterations
    learner = Learner(parts.editor, config.editor, config.loop.edit_guidance, pictures)
    run, memory, tries = job.run, {"calls": 0, "evaluations": 0, "watch": {}}, (1, config.group)
    for step in run.steps("phase-2", total, learner.networks, learner.optimizer, memory=memory):
        graphs, noise = graphs_of(job.seed, step, config), rng(job.seed, "phase 2", step)
        if rounds := try_edits(parts, graphs, config, tries, noise):
            out, factor = as_rollout(parts.editor, rounds, config), config.editor.lr_factor(step, total)
            stats = learn(learner, out, factor, rng(job.seed, "update", step))
            seen = statistics(rounds[0].path.latents[:, -1], rounds[0].images)
            said = watch(config, run, memory["watch"], seen)
            run.log("phase-2", step, **summary(rounds, config, memory, job), **stats._asdict(), collapse=said)
            run.show("phase-2", step, rounds[0].images)
    parts.editor.unet.eval().requires_grad_(False)


def as_rollout(editor: LatentDiffusion, rounds: list[Edits], config: RLRIGConfig) -> Rollout:
    """Edits in the form that the learner takes.  Each edited picture is a prompt, with G edits as branches.

    The reward is f(x) or, for the objective "regress", the probability that all requirements are met.
    """
    texts = [text for r in rounds for text in r.prompts[:: r.group]]
    out = Rollout(texts, editor.embed(texts))
    tail = config.loop.reflection.tail(editor.table(config.loop.steps))
    for r, rows in zip(rounds, torch.arange(len(texts)).split([len(r.rows) for r in rounds])):
        # the probability that all requirements are met, if they are independent
        all_hold = r.after.probability.prod(1).view_as(r.rewards)
        rewards = all_hold if config.editor.objective == "regress" else r.rewards
        x = r.path.latents[:: r.group, 0]
        out.rounds.append(Round(rows, x, tail, tail.sigma(ETA), r.path, r.images, rewards.cpu()))
    return out


def summary(rounds: list[Edits], config: RLRIGConfig, memory: dict[str, int], job: Job) -> dict[str, object]:
    """The values that an iteration logs.  Adds its cost to `memory`, and updates the progress bar."""
    first, edits = rounds[0], sum(len(r.images) for r in rounds)
    things = [r.scene.objects if r.scene else () for r in inspect_all(first.images.cpu())]
    asked = [g for g in first.graphs for _ in range(first.group)]
    memory["evaluations"] += config.graphs * config.loop.generate_cost + edits * config.loop.edit_cost
    memory["calls"] += config.graphs + edits
    values = {
        "before": first.before.share.mean().item(),  # f(x) before the edit
        "reward": first.after.share.mean().item(),
        "accepted": first.after.met.all(1).float().mean().item(),
        "right": sum(g.fulfilled_by(seen) for g, seen in zip(asked, things)) / len(asked),
        "reward_by_round": [r.after.share.mean().item() for r in rounds],
        "pictures_by_round": [len(r.graphs) for r in rounds],
        "checker_calls": memory["calls"],
        "unet_evaluations": memory["evaluations"],
    }
    job.run.bar.set_postfix({key: f"{values[key]:.2f}" for key in ("reward", "accepted", "right")})
    return values
