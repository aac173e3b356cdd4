"""The Actor imitates a script: its examples are wrong pictures with true edits, and its loss falls."""

import random
from pathlib import Path

import pytest
import torch

from minireflect.checkpoints.ours import RIG, load_pipeline
from minireflect.models.transformer import Actor, ActorConfig, questions
from minireflect.pretrain import actor as imitation
from minireflect.pretrain.actor import imitation_example, train_actor, wrong_scene
from minireflect.run import Job, Run, Training
from minireflect.streams import choices
from minireflect.world.graphs import GraphError, sample_graph
from minireflect.world.laws import render


def test_wrong_scenes_often_fail_their_graph_and_sometimes_lack_an_object() -> None:
    chance, failed, lacking = random.Random(0), 0, 0
    for _ in range(100):
        graph = sample_graph(chance)
        try:
            scene = wrong_scene(graph, chance)
        except GraphError:
            continue
        failed += not all(r.met_by(scene.objects) for r in graph.requirements)
        lacking += len(scene.objects) < sum(e.count for e in graph.entities)
    assert failed > 60 and 0 < lacking < 40


def test_examples_name_places_and_few_answers_are_wrong() -> None:
    chance = choices(0, "examples")
    examples = [imitation_example(chance) for _ in range(60)]
    assert all(1 <= e.edit.count(" at the ") <= 2 for e in examples)  # it names one or two places
    assert all(len(e.requirements) == len(e.answers) for e in examples)
    answers = [a for e in examples for a in e.answers]
    assert 0.2 < sum(answers) / len(answers) < 0.95  # both answers occur


@pytest.mark.slow
def test_imitation_lowers_the_loss_and_is_the_same_twice(tmp_path: Path) -> None:
    pipe, config = load_pipeline(RIG), Training(pictures=6, steps=40, batch=6, lr=4e-3)
    jobs = [Job(Run(tmp_path / name, {})) for name in ("one", "two")]
    one, two = (train_actor(config, pipe.autoencoder, pipe.tokenizer, job) for job in jobs)
    losses = [row["loss"] for row in jobs[0].run.metrics("actor")]
    assert len(losses) == 40 and losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not one.training and not any(p.requires_grad for p in one.parameters())


def test_imitation_starts_from_a_given_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0 it stays what it was; its loss is a mean over words and ends, written out."""
    monkeypatch.setattr(imitation, "NOISE", 0.0)
    pipe, job = load_pipeline(RIG), Job(Run(tmp_path / "run", {}))
    torch.manual_seed(5)
    start = Actor(ActorConfig(len(pipe.tokenizer)))
    config = Training(pictures=4, steps=1, batch=4, lr=0.0)
    trained = train_actor(config, pipe.autoencoder, pipe.tokenizer, job, start)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))
    draw, log_probs = choices(0, "actor", "pictures"), []
    for example in (imitation_example(draw) for _ in range(4)):
        latents = pipe.autoencoder.encode(render(example.scene)[None])
        read = questions(pipe.tokenizer, [example.requirements], [example.answers], start.config.read)
        written = pipe.tokenizer.encode([example.edit], start.config.written)
        log_probs.append(start(latents, read, written)[0, : len(example.edit.split()) + 1])  # and its end
    assert job.run.metrics("actor")[0]["loss"] == pytest.approx(-torch.cat(log_probs).mean().item(), rel=1e-4)
