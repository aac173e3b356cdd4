"""SRRL: self-reflective reinforcement learning (Pan et al. 2025, arXiv 2505.22407).  With no rounds it is DDPO.

A whole denoising is one thought; between thoughts the model looks at its picture and turns it back into noise.

    for each prompt c:  x_T^0 ~ N(0, I)
        for round k = 0 .. K:
            draw G branches  x_T^k -> x_0                      eta > 0: every step is an action with a density (E2, E3)
            score them; re-noise the best to x_T^(k+1)         guidance w_renoise below that of drawing: the condition-guided
                                                               forward process (E4)
            ours: a prompt whose best is accepted is done, what is refused goes on from minus its noise, see below
    learn from all rounds, by one of two objectives
        ppo      A = GRPO or history z-score within each group (E6, E7), summed over rounds:
                 L = mean max(-A rho, -A clip(rho, 1 - e, 1 + e)),  rho = exp(l_new - l_old)       (E8)
        regress  w = r / sum of the prompt's r:  L = sum w |eps - eps_theta(x_t, t, c)|^2, x_t = x_0 noised anew

`ppo` is the paper's and asks how each step of the sampler should have moved; it needs many pictures (docs/log.md). `regress` is
reward-weighted regression (Peters & Schaal 2007; RWR in DDPO, arXiv 2305.13301): as r is the probability that the picture is
right, it fits p(x_0 | c, right), and what a later round found teaches the first. It is the default on this budget.

Two readings of the paper: `select` is its figure (above); `blind` is its released code, where K rounds of guided
inversion run without a look at the reward and only the last round is drawn G times and trained.

Why minus: a re-noised picture is remembered, right or wrong. Of pictures that the base drew right, 0.87 are right again when drawn
from their noise, and of wrong ones 0.18 are; from new noise 0.56 and 0.44. The opposite noise is as likely under N(0, I), and avoids
what was drawn: 0.62 of the wrong ones are mended (512 held-out pictures, `python scripts/measure.py memory`).
`--srrl.wrong repeat` re-noises wrong pictures as if they were right, `fresh` forgets them.

Why accepted prompts are done: drawing them again teaches nothing new and costs as much. Spent on other prompts, the same reward calls
teach more, and fewer prompts are learnt by heart (docs/log.md). `--srrl.redraw all` gives every prompt all rounds.

Differs from the released code: reflection keeps no graph; every iteration has its own random stream; leftover
gradients are never dropped; latents and log-probabilities stay float32; the clip is stated in nats; group-relative
advantages by default, each round crediting its own branches only; guidance 1 in rollouts by default (half the cost, and the guidance is learnt into the weights);
re-noising without guidance, in 5 steps, to the scale of the prior and with half new noise; all rounds are trained, but for their almost
noiseless steps.  The paper's choices are options: `--srrl.objective ppo --srrl.lr 3e-5 --srrl.updates 2 --srrl.group 5 --srrl.mode blind
--srrl.w-renoise 0.1 --srrl.renoise-steps 20 --srrl.no-renormalise --srrl.fresh-noise 0 --srrl.train-rounds last --srrl.advantage history
--srrl.suffixes 1 5 9 --srrl.guidance 5`.

    python train.py srrl
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..diffusion.reflection import moments
from ..models.lora import adapters, lora_layers, remove_lora
from ..models.unet import UNet
from ..pipeline import LatentDiffusion
from ..rl.advantage import RewardHistory, zero_variance_groups
from ..rl.rewards import Reward
from ..run import Run
from ..streams import rng
from .learn import Replay, advantages, regress, remember, update
from .rollout import Cost, Rollout, Round, SRRLConfig, UpdateStats, rollout


def train_srrl(
    config: SRRLConfig,
    seed: int,
    pipe: LatentDiffusion,
    reward: Reward,
    draw_texts: Callable[[int], tuple[list[str], list[str]]],
    witness: Callable[[Tensor, list[str]], Tensor] | None,
    run: Run,
) -> tuple[LatentDiffusion, Cost]:
    """The loop.  `draw_texts(step)` gives prompts and the family that each belongs to; `witness` is the exact checker,
    printed and logged beside the reward and never trained on, where there is one.  A UNet with LoRA learns in its adapters
    alone.  -> the trained pipeline and what it took."""
    base = reference(pipe.unet)
    trained = adapters(pipe.unet) if lora_layers(pipe.unet) else pipe.unet
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, weight_decay=1e-4)
    history = RewardHistory(config.history)
    memory: dict = {"cost": [0, 0, 0], "updates": 0, "history": history.state_dict()}
    networks = {"unet": trained}
    if config.objective == "regress":
        spent = config.rounds + 1 if config.mode == "select" and config.train_rounds == "all" else 1
        kept = config.replay * config.prompts * config.group * spent
        replay = Replay(kept, pipe.latent_shape, pipe.tokenizer.length).to(pipe.device)
        networks["replay"] = replay
    for step in run.steps("srrl", config.iterations, networks, optimizer, memory=memory):
        history.load_state_dict(memory["history"])
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_factor(step, config.iterations)
        texts, keys = draw_texts(step)
        out = rollout(pipe, texts, reward, config, seed, step)
        if config.objective == "regress":
            remember(replay, pipe, out, config)
            stats = regress(pipe, base, optimizer, replay, config, rng(seed, "update", step))
        else:
            advantage = advantages(out, config, history, keys)
            stats = update(pipe, base, optimizer, out, advantage, config, rng(seed, "update", step))
        cost = Cost(*memory["cost"]).plus(*out.cost).plus(trained=stats.evaluations)
        memory |= {
            "cost": [*cost],
            "updates": memory["updates"] + stats.updates,
            "history": history.state_dict(),
        }
        report(run, step, out, stats, witness, memory, config)
    pipe.unet.eval().requires_grad_(False)
    return pipe, Cost(*memory["cost"])


def reference(unet: UNet) -> UNet:
    """The policy that it starts from, frozen.  With LoRA it is the same weights, held once, without the adapters."""
    if not lora_layers(unet):
        return copy.deepcopy(unet).eval().requires_grad_(False)
    shared = {id(p): p for p in unet.parameters() if not p.requires_grad}  # copied by reference
    return remove_lora(copy.deepcopy(unet, shared)).eval().requires_grad_(False)


def report(
    run: Run,
    step: int,
    out: Rollout,
    stats: UpdateStats,
    witness: Callable[[Tensor, list[str]], Tensor] | None,
    memory: dict,
    config: SRRLConfig,
) -> None:
    """One line a step with the numbers that reveal lies: the truth stands beside the reward."""
    by_round = [r.rewards.cpu() for r in out.rounds]  # (n g) each
    rewards = torch.cat([r.flatten() for r in by_round])
    verdicts = [witness(r.images.cpu(), out.texts_of(r)) for r in out.rounds] if witness else []
    latent = [[v.mean().item() for v in moments(r.x_T)] for r in out.rounds]
    values = {
        "reward": rewards.mean().item(),
        "reward_se": (rewards.std() / rewards.numel() ** 0.5).item(),
        "right": torch.cat(verdicts).mean().item() if verdicts else None,
        "reward_by_round": [r.mean().item() for r in by_round],
        "right_by_round": [v.mean().item() for v in verdicts],
        "pictures_by_round": [r.numel() for r in by_round],
        "mended": [mended(a, b, config.accept) for a, b in zip(out.rounds, out.rounds[1:])],
        "flat_groups": sum(int(zero_variance_groups(r).sum()) for r in by_round),
        **stats._asdict(),
        "latent_mean": [m for m, _ in latent],
        "latent_std": [s for _, s in latent],
        "updates_total": memory["updates"],
        "reward_calls": memory["cost"][2],
        "unet_evaluations": memory["cost"][0] + memory["cost"][1],
    }
    run.log("srrl", step, **values)
    shown = {"reward": f"{values['reward_by_round'][0]:.2f}"}
    if verdicts:
        shown["right"] = f"{values['right_by_round'][0]:.2f}"
    run.bar.set_postfix(**shown, kl=f"{stats.kl:.1f}")


def mended(before: Round, after: Round, accept: float) -> float | None:
    """Of the prompts whose best picture was refused, the share with an accepted one a round later; None if none was refused."""
    refused = before.rows[before.rewards.amax(1) < accept].tolist()
    again = dict(zip(after.rows.tolist(), (after.rewards.amax(1) >= accept).tolist()))
    return sum(again[i] for i in refused) / len(refused) if refused else None
