"""The Actor imitates a script: its examples are wrong pictures with true edits, and its loss falls."""

import random
from pathlib import Path

import pytest
import torch

from minireflect.checkpoints.ours import RIG, load_pipeline
from minireflect.models.transformer import Actor, ActorConfig, questions
from minireflect.pretrain import sft as imitation
from minireflect.pretrain.sft import imitation_example, train_actor, wrong_scene
from minireflect.run import Job, Run, Training
from minireflect.streams import choices
from minireflect.world.graphs import GraphError, pair_split, parse_graph, sample_graph
from minireflect.world.laws import render
from tests.small import Stopped, begin_with, stop


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


def test_examples_name_places_and_few_answers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = choices(0, "examples")
    examples = [imitation_example(chance) for _ in range(60)]
    assert all(1 <= e.edit.count(" at the ") <= 2 for e in examples)  # it names one or two places
    assert all(len(e.requirements) == len(e.answers) for e in examples)
    monkeypatch.setattr(imitation, "MISTAKES", 0.0)
    chance = choices(0, "examples")
    true = [imitation_example(chance) for _ in range(60)]
    wrong = [a != b for e, t in zip(examples, true) for a, b in zip(e.answers, t.answers)]
    assert 0.005 < sum(wrong) / len(wrong) < 0.06
    for e in true:
        assert not all(e.answers)
        for words, met in zip(e.requirements, e.answers):
            if words.startswith("a ") and len(words.split()) == 3:  # "a red ball"
                assert met == (sum(f"a {o.words}" == words for o in e.scene.objects) == 1)
            elif " things" not in words and words.startswith("a "):  # of a relation
                (a, b), _ = (graph := parse_graph(words)).entities, graph.relations
                assert pair_split(a, b) == "train"
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
    begin_with(monkeypatch, imitation, tmp_path, actor=start)
    config = Training(pictures=4, steps=1, batch=4, lr=0.0)
    trained = train_actor(config, pipe.autoencoder, pipe.tokenizer, job)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))
    draw, log_probs = choices(0, "actor", "pictures"), []
    for example in (imitation_example(draw) for _ in range(4)):
        latents = pipe.autoencoder.encode(render(example.scene)[None])
        read = questions(pipe.tokenizer, [example.requirements], [example.answers], start.config.read)
        written = pipe.tokenizer.encode([example.edit], start.config.written)
        log_probs.append(start(latents, read, written)[0, : len(example.edit.split()) + 1])  # and its end
    assert job.run.metrics("actor")[0]["loss"] == pytest.approx(-torch.cat(log_probs).mean().item(), rel=1e-4)


def test_latents_are_noised_by_up_to_a_third_of_their_std(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen times the same example: what differs is noise, of a std between 0 and 0.3."""
    example, given = imitation_example(choices(0, "examples")), []
    monkeypatch.setattr(imitation, "imitation_example", lambda _: example)
    monkeypatch.setattr(Actor, "forward", lambda self, latents, *_: given.append(latents) or stop())
    pipe, job = load_pipeline(RIG), Job(Run(tmp_path / "run", {}))
    config = Training(pictures=16, steps=1, batch=16)
    with pytest.raises(Stopped):
        train_actor(config, pipe.autoencoder, pipe.tokenizer, job)
    std = (given[0] - pipe.autoencoder.encode(render(example.scene)[None])).flatten(1).std(1)
    assert std.min() < 0.1 and 0.2 < std.max() < 0.33 and 0.1 < std.mean() < 0.2
