"""Evaluate ReasonGen-R1: GenEval's tasks, the laws, and whether a picture shows what its rationale states.

The inspector reads the pictures, and a parser reads the rationales. Training uses neither.
"""

import numpy as np
import torch

from .evaluate import EvaluationConfig, Score, Table, fixed_batches
from .evaluate_graphs import share
from .models.autoencoder import Codec
from .models.reasongen import SamplingConfig
from .pipeline import ACCEPT, ReasonPipeline, scored
from .ranges import expect
from .rl.rewards import Reward
from .streams import choices
from .world.captions import read_rationale
from .world.inspector import inspect_all
from .world.laws import render
from .world.prompts import Prompt, draw_prompts
from .world.published import geneval_scores

SAMPLING = SamplingConfig(temperature=0.8)  # for all tables, unless a row states another
ORDER = ("arrangement", "physical", "unconventional")  # order of the kinds of prompts


def table_row(score: Score) -> dict[str, float]:
    """A score as a row of a table, without the values of single laws."""
    parts = expect(score.get("geneval"), dict, "geneval")
    return parts | {key: v for key, v in score.items() if key not in ("geneval", "parts")}


def evaluation_prompts(config: EvaluationConfig) -> list[Prompt]:
    """The prompts of the evaluation, the same for all models: `config.pictures` of each kind."""
    chance = choices(config.seed, "evaluate", "reason")
    return [p for kind in ORDER for p in draw_prompts(kind, config.split, config.pictures, chance)]


def another_of_its_kind(prompts: list[Prompt]) -> list[int]:
    """For each prompt, the index of the next prompt with other content: of the same law or task if there is
    one, otherwise of the same kind.

    Raises ValueError if there is none.
    """
    rows, n = [], len(prompts)
    for i, p in enumerate(prompts):
        ahead = (j % n for j in range(i + 1, i + n))
        others = [j for j in ahead if prompts[j].kind == p.kind and prompts[j].content != p.content]
        if not others:
            raise ValueError(f"no other {p.kind} prompt than {p.text!r} is in the batch; make it larger")
        rows.append(min(others, key=lambda j: _part(prompts[j]) != _part(p)))  # `min` returns the first
    return rows


def _part(prompt: Prompt) -> str:
    """The task of GenEval, or kind and law."""
    return prompt.task or f"{prompt.kind} {prompt.law}"


@torch.no_grad()
def evaluate_reason(
    pipe: ReasonPipeline, reward: Reward, config: EvaluationConfig, name: str = "",
    sampling: SamplingConfig = SAMPLING, best_of: int = 1,
) -> Score:  # fmt: skip
    """Sample fixed prompts with fixed noise, each `best_of` times, and evaluate the picture with the highest
    reward.

    -> shares of the pictures, unless stated otherwise
    """
    prompts, m = evaluation_prompts(config), config.pictures
    images, rewards, plans, tokens = [], [], [], 0
    for part, noise in fixed_batches([p.text for p in prompts], config, name, "reason"):
        tries = [pipe.sample(part, sampling, noise(k)) for k in range(best_of)]
        tokens += sum(int(t.chosen.sum()) + t.codes.numel() for t in tries)
        shown = [pipe.pictures(t.codes).cpu() for t in tries]  # (b 3 64 64) each
        values = torch.stack([scored(reward, x, part) for x in shown])  # (k b)
        for i, k in enumerate(values.argmax(0).tolist()):
            images.append(shown[k][i])
            rewards.append(values[k, i].item())
            plans.append(read_rationale(pipe.rationales(tries[k])[i]))
    readings = inspect_all(torch.stack(images))
    right = np.array([p.fulfilled_by(r) for p, r in zip(prompts, readings)])
    planned = np.array([plan is not None and plan.fulfils(p) for plan, p in zip(plans, prompts)])
    kept = np.array([plan is not None and plan.shown_in(r) for plan, r in zip(plans, readings)])
    things = [r.scene.objects if r.scene and r.scene.law == "arrangement" else () for r in readings]
    accepted, said = np.array(rewards) >= ACCEPT, np.array([plan is not None for plan in plans])
    names = np.array([_part(p) for p in prompts])
    unique = dict.fromkeys(names.tolist())
    return {
        "geneval": geneval_scores(things[:m], prompts[:m]),  # by task, and "overall", their mean
        "physical": float(right[m : 2 * m].mean()),  # share of right pictures by the inspector
        "unconventional": float(right[2 * m :].mean()),
        "accepted": float(accepted.mean()),  # by the learned reward, over all prompts
        "fooled": share(~right, accepted),  # share of wrong pictures among the accepted
        "unreadable": sum(not r.readable for r in readings) / len(prompts),
        "planned": float(planned.mean()),  # share of rationales that state what the prompt asks for
        "kept": share(kept, said),  # share of readable rationales whose picture shows what they state
        "tokens": tokens / len(prompts),  # text and image tokens sampled per prompt
        # for each law or task: [right, planned, kept]; an unreadable rationale counts as not kept
        "parts": {n: [float(v[names == n].mean()) for v in (right, planned, kept)] for n in unique},
    }


@torch.no_grad()
def codec_table(codec: Codec, config: EvaluationConfig) -> Table:
    """The share of scenes that the inspector reads correctly after autoencoder and after codebook."""
    prompts, chance = evaluation_prompts(config), choices(config.seed, "evaluate", "codec")
    images = torch.stack([render(p.scene(chance)) for p in prompts])  # (m 3 64 64)
    pixels, device = codec.autoencoder, next(codec.vq.parameters()).device
    ways = {
        "as rendered": lambda x: x,
        "through the autoencoder": lambda x: pixels.decode(pixels.encode(x)).clamp(-1, 1),
        "through the codebook": lambda x: codec.pictures(codec.codes(x)),
    }
    rows = {}
    for name, way in ways.items():
        seen = torch.cat([way(x.to(device)).cpu() for x in images.split(config.batch)])
        right = torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, inspect_all(seen))])
        shares = [part.mean().item() for part in right.split(config.pictures)]
        rows[name] = dict(zip(ORDER, shares)) | {"squared error": f"{(seen - images).square().mean():.4f}"}
    return Table("test scenes read correctly", rows)
