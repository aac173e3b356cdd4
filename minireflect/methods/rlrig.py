"""RL-RIG: a spatial reasoner that generates, reflects and edits (Wang et al. 2026, arXiv 2602.19974), and its Reflection-GRPO.

    phase 1, the Actor.  For each graph:   x ~ Diffuser, v = Checker(x)
        for round k = 1 .. K, while a requirement is unmet:
            G edit prompts a_i ~ pi(. | x, graph, v);   x_i = Edit(x, a_i);   r_i = f(x_i), the share of requirements met
            go on from the best x_i, unless x was better
        A_i = (r_i - mean) / (std + e) in each group
        L = - 1/G sum_i 1/|a_i| sum_tokens min(rho A_i, clip(rho, 1 - e, 1 + e) A_i) + beta KL(pi || pi_ref)
    phase 2, the editor, with the Actor fixed: the same, but G edits of one (x, a) that differ in their noise, and the loss of SRRL
        on the editor's denoising: PPO (E8), or reward-weighted regression.

The Diffuser that draws round 0 is frozen.  The loop itself is in edit_loop.py.

Differs from the paper, of which neither text nor code is public (this follows its abstract and its reviews): the Actor sees the picture's latents and
the answers, and writes where to put what; one round is trained on by default (`--rlrig.rounds`); the editor is the Diffuser's UNet and
learns by regression by default, on what the Checker gives all requirements a high probability (`--rlrig.editor.objective ppo` is theirs).

    python train.py rlrig
"""

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..diffusion.sample import Trajectory, collect, denoise
from ..models.actor import Actor, Written, read_out
from ..pipeline import LatentDiffusion
from ..rl.advantage import RewardHistory, group_advantage, zero_variance_groups
from ..rl.checker import Answers
from ..rl.policy import ppo_clip, token_kl, token_weights
from ..run import Run
from ..streams import choices, rng
from ..world.graph import SceneGraph
from ..world.inspector import inspect_all
from ..world.layout import sample_graph
from .edit_loop import LoopConfig, ask, draw, invert, prompts_of
from .ppo import advantages, update
from .regression import Replay, regress, remember
from .rig_parts import Parts
from .rollout import Rollout, Round, SRRLConfig
from .step import UpdateConfig


@dataclass(frozen=True)
class RLRIGConfig:
    loop: LoopConfig = field(default_factory=LoopConfig)
    graphs: int = 40  # per iteration
    group: int = 4  # G, edits of a picture and round
    rounds: int = 1  # K of training; the loop that is measured has its own
    actor_iterations: int = 10  # of phase 1
    actor_lr: float = 3e-4  # of AdamW
    actor_updates: int = 2  # optimiser steps per iteration
    clip: float = 0.2  # e, on the ratio of a token's probabilities
    beta: float = 0.01  # weight of the KL to the warmed-up Actor, nats per token
    std_floor: float = 0.02  # added to a group's std of rewards
    grad_norm: float = 1.0  # largest norm of an Actor's gradient
    editor_iterations: int = 60  # of phase 2
    editor: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(lr=3e-4, anchored=300)
    )  # how phase 2 learns

    controls: bool = True  # measure what the loop is compared with as well

    def __post_init__(self) -> None:
        if min(self.graphs, self.actor_updates) < 1 or min(self.actor_iterations, self.editor_iterations) < 0:
            raise ValueError("graphs and actor_updates must be at least 1, and iterations 0 or more")
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
    written: Written  # (n*g t), or (n t) where a group shares its edit prompt
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
        edits = read_out(editor.tokenizer, written.ids)  # n or n*g
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
    ids, mask = (torch.cat([getattr(a.written, name) for a in done]) for name in ("ids", "mask"))  # (m t)
    weight, A = token_weights(mask), advantage[:, None].expand_as(mask)
    with torch.no_grad():  # in one batch, as below: the cache rounds otherwise than the whole sequence does
        old, ref = actor(latents, read, ids), reference(latents, read, ids)  # (m t)
    for number in range(config.actor_updates):
        logits = actor.all_logits(latents, read, ids).log_softmax(-1)  # (m t v)
        now = logits.gather(2, ids[..., None])[..., 0]  # (m t)
        stats = ppo_clip(now[mask], old[mask], A[mask], config.clip, weight[mask])
        kl = (weight * token_kl(now, ref)).sum()
        if number == 0:
            first = (now - old)[mask].detach().abs().max().expm1().item()
            entropy = -(weight * (logits.exp() * logits).sum(-1)).sum().item()
        optimizer.zero_grad(set_to_none=True)
        (stats.loss + config.beta * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), config.grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient of the Actor is not finite; lower --rlrig.actor-lr {config.actor_lr}"
            )
        optimizer.step()
    shares = stats.clip_high.item(), stats.clip_low.item()
    return ActorStats(stats.loss.item(), *shares, first, kl.item(), entropy, norm.item(), flat)


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
    base = copy.deepcopy(parts.editor.unet).eval().requires_grad_(False)
    unet = parts.editor.unet.requires_grad_(True)
    settings = update_options(config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.lr, weight_decay=1e-4)
    memory = {"calls": 0, "evaluations": 0}
    networks = {"unet": unet}
    if settings.objective == "regress":
        kept = settings.replay * config.graphs * config.group * config.rounds
        replay = Replay(kept, parts.editor.latent_shape, parts.editor.tokenizer.length).to(
            parts.editor.device
        )
        networks["replay"] = replay
    for step in run.steps("phase-2", config.editor_iterations, networks, optimizer, memory=memory):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * settings.lr_factor(step, config.editor_iterations)
        done = attempts(parts, graphs_of(seed, step, config), config, True, rng(seed, "phase 2", step))
        if not done:
            continue
        out = as_rollout(parts.editor, done, config)
        if settings.objective == "regress":
            remember(replay, parts.editor, out, settings)
            stats = regress(parts.editor, base, optimizer, replay, settings, rng(seed, "update", step))
        else:
            advantage = advantages(out, settings, RewardHistory(0), out.texts)
            stats = update(parts.editor, base, optimizer, out, advantage, settings, rng(seed, "update", step))
        report(run, "phase-2", step, done, config, memory, stats._asdict())
    unet.eval().requires_grad_(False)
    return parts.editor


def update_options(config: RLRIGConfig) -> SRRLConfig:
    """Phase 2 as SRRL's update reads it, with the loop's sampler."""
    loop = config.loop
    return SRRLConfig(
        **vars(config.editor),
        group=config.group,
        steps=loop.steps,
        guidance=loop.edit_guidance,
        eta=loop.eta,
    )


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
