"""Measure the accuracy of Checker and judge on test scenes, and on pictures of the loop.

    python scripts/rig_checker.py          prints the first table, for the shipped networks

The truth is known from the scene for renders, and is read by the inspector for pictures of the loop.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reports import described
from tqdm import tqdm

from minireflect import rng
from minireflect.checkpoints.ours import RIG, load_pipeline
from minireflect.config import preset
from minireflect.evaluate import EvaluationConfig, Table
from minireflect.evaluate_graphs import evaluation_graphs
from minireflect.methods.rlrig import load_parts, loop_of
from minireflect.pretrain.matcher import question
from minireflect.rl.rewards import load_checker, load_matcher
from minireflect.streams import choices
from minireflect.world.graphs import Requirement
from minireflect.world.inspector import inspect_all
from minireflect.world.laws import render
from minireflect.world.layout import sample_picture

SCENES, QUESTIONS, SEED = 1_000, 4, 77


def kind_of(r: Requirement) -> str:
    """The name of a requirement's kind, for a row of the table."""
    return "number of all things" if r.subject.name == "thing" else r.predicate or "things"


@torch.no_grad()
def asked_of_renders(name: str) -> dict[str, list]:
    """Ask a network about test scenes; half of the pictures are reconstructions of the autoencoder.

    -> lists over all questions: "probability" of yes, "truth" and "kind"
    """
    chance = choices(SEED, "questions")
    pictures = [sample_picture(chance, "test") for _ in range(SCENES)]
    images = torch.stack([render(scene) for _, scene in pictures])
    pipe, half = load_pipeline(RIG), SCENES // 2
    images[half:] = torch.cat([pipe.decode(pipe.autoencoder.encode(x)) for x in images[half:].split(100)])
    matcher, tokenizer = load_matcher(RIG / f"{name}.safetensors", "cpu")
    found: list[tuple[float, bool, str]] = []
    for image, (graph, scene) in tqdm(list(zip(images, pictures)), f"asking the {name}", leave=False):
        whole = [True] * (len(scene.objects) + 1)
        asked = [question(graph, scene, whole, chance) for _ in range(QUESTIONS)]
        ids = tokenizer([r.words for r, _ in asked])
        yes = matcher(image.expand(QUESTIONS, -1, -1, -1), ids).sigmoid().tolist()
        found += [(p, truth, kind_of(r)) for p, (r, truth) in zip(yes, asked)]
    return dict(zip(("probability", "truth", "kind"), map(list, zip(*found))))


@torch.no_grad()
def asked_of_the_loop(weights: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Compare Checker and judge with the inspector, on all requirements of the pictures that a loop returns.

    -> loop -> "checker" or "judge" -> share of agreement, and of wrong answers among "yes" and among "no"
    """
    config, rows = EvaluationConfig(pictures=256, seed=SEED), {}
    graphs = evaluation_graphs(config)
    who = {name: load_checker(weights, name) for name in ("checker", "judge")}
    raw, trained = load_parts(weights, "base_actor", "unet"), load_parts(weights)
    for name, parts, rounds in (("base", raw, 0), ("raw loop", raw, 3), ("trained loop", trained, 3)):
        loop = loop_of(parts, replace(preset("cpu").rlrig.loop, rounds=rounds))
        *_, look = loop(graphs, rng(SEED, "loop"))
        things = [r.scene.objects if r.scene else () for r in inspect_all(look.images)]
        true = torch.tensor([r.met_by(t) for g, t in zip(graphs, things) for r in g.requirements])  # (q)
        rows[name] = {}
        for judge, check in who.items():
            answers = check(look.images, graphs)
            said = answers.met[answers.asked]  # (q)
            found = {"agreement": said == true, "wrong yes": ~true[said], "wrong no": true[~said]}
            rows[name][judge] = {key: v.float().mean().item() if len(v) else 0.0 for key, v in found.items()}
    return rows


def checker_table(answers: dict[str, dict[str, list]]) -> Table:
    """Share of correct answers by truth and kind of the question, and the calibration error."""

    def right(a: dict[str, list], kind: str) -> str:
        asked = zip(a["probability"], a["truth"], a["kind"])
        rows = [(p >= 0.5) == t for p, t, k in asked if kind in ("all", "met" if t else "not met", k)]
        return f"{np.mean(rows):.3f} of {len(rows):,}"

    kinds = ["all", "met", "not met", *dict.fromkeys(k for a in answers.values() for k in a["kind"])]
    rows = {kind: {name: right(a, kind) for name, a in answers.items()} for kind in kinds}
    errors = {name: calibration(a)[1] for name, a in answers.items()}
    return Table("right answers", rows | {"calibration error": errors})


def calibration(answers: dict[str, list], bins: int = 10) -> tuple[np.ndarray, float]:
    """Mean probability, share true and number of each bin, and the expected calibration error.

    Guo et al. 2017, equation 3.  -> (3 bins), without empty bins, and the error
    """
    p, t = np.array(answers["probability"]), np.array(answers["truth"], float)
    of = np.minimum((p * bins).astype(int), bins - 1)
    rows = [(p[of == b].mean(), t[of == b].mean(), (of == b).sum()) for b in np.unique(of)]
    return np.array(rows).T, sum(n * abs(a - b) for a, b, n in rows) / len(p)


if __name__ == "__main__":
    described(__doc__).parse_args()
    print(checker_table({name: asked_of_renders(name) for name in ("checker", "judge")}))
