"""What writes learns: examples and loss of the first stage of ReasonGen-R1, and of the Actor of RL-RIG."""

import random
from pathlib import Path

import pytest
import torch

from minireflect import rng, training
from minireflect.checkpoints.ours import RIG, load_pipeline
from minireflect.models.reasongen import ReasonGen, SamplingConfig
from minireflect.models.tokenizer import EOS, trim, up_to
from minireflect.models.transformer import Actor, ActorConfig, questions
from minireflect.pretrain import sft
from minireflect.pretrain.sft import (
    Examples,
    ReasonTraining,
    imitation_example,
    make_examples,
    sft_loss,
    shuffled,
    text_only_loss,
    train_actor,
    train_reasongen,
    wrong_scene,
)
from minireflect.run import Job, Run
from minireflect.streams import choices
from minireflect.training import Training
from minireflect.world.captions import plan_of, rationale, read_rationale
from minireflect.world.data import WorldConfig
from minireflect.world.graphs import GraphError, parse_graph
from minireflect.world.laws import render
from minireflect.world.layout import pair_split, sample_graph
from minireflect.world.prompts import sample_scene, understand
from tests.small import REASON_WORDS as WORDS
from tests.small import Stopped, begin_with, small_reasongen, stop


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What AdamW is given; a training stops there."""
    told: list[dict] = []
    monkeypatch.setattr(training, "adamw", lambda _, **how: told.append(how) or stop())
    return told


def examples(**options: float | str) -> Examples:
    job = Job(None, 0)  # examples need no run
    return make_examples(ReasonTraining(**options), WorldConfig(), small_reasongen(rationale=64), job)


def test_shuffled_rationales_stay_in_their_law() -> None:
    rationales = [f"{law} {i}" for law in "ab" for i in range(50)]
    laws = [text[0] for text in rationales]
    moved = shuffled(rationales, laws, choices(0, "shuffle"))
    assert sorted(moved) == sorted(rationales) and all(t.startswith(law) for t, law in zip(moved, laws))
    assert all(a != b for a, b in zip(moved, rationales))


def test_shuffled_rationales_are_of_another_scene() -> None:
    draw = choices(1, "shuffle")
    for law in ("mirror", "arrangement"):
        scenes = [sample_scene(i, law) for i in range(300)]
        written = [rationale(scene, rng=draw) for scene in scenes]
        moved = shuffled(written, [law] * 300, draw)
        assert all(read_rationale(text) != plan_of(scene) for text, scene in zip(moved, scenes))
    with pytest.raises(ValueError, match="mirror: too few different scenes to shuffle the"):
        shuffled(["a", "a", "b"], ["mirror"] * 3, draw)


def test_a_dense_prompt_is_the_rationale_and_leaves_the_rationale_empty() -> None:
    """With the same random draws, each example is either the plain or the dense one."""
    made = {dense: examples(pictures=40, dense=dense) for dense in (0.0, 0.5, 1.0)}
    plain, mixed, dense = (
        list(zip(WORDS.decode(e.prompts), WORDS.decode(e.rationales))) for e in made.values()
    )
    assert all(read_rationale(text) and prompt != text for prompt, text in plain)
    assert dense == [(text, "") for _, text in plain]
    assert all(row in (a, b) for row, a, b in zip(mixed, plain, dense))
    assert 10 < sum(row == b for row, b in zip(mixed, dense)) < 30
    assert all(torch.equal(e.codes, made[0.0].codes) for e in made.values())
    assert all(torch.equal(e.short_prompts, made[0.0].prompts) for e in made.values())


def test_recombined_examples_are_of_no_prompt() -> None:
    prompts = WORDS.decode(examples(pictures=40, arrangements=0.0, recombined=1.0).short_prompts)
    assert len(prompts) == 40 and all(len(t.split()) > 4 and understand(t) is None for t in prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": 1.5}, r"dense must be in \[0, 1\], got 1\.5"),
        ({"recombined": 1.5}, r"recombined must be in \[0, 1\], got 1\.5"),
        ({"related_captions": -0.5}, r"related_captions must be in \[0, 1\], got -0\.5"),
        ({"text_only": -1}, "text_only must be at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasonTraining(**options)


def test_the_text_only_loss_of_a_rationale_is_its_loss_beside_the_picture() -> None:
    """A rationale comes before the picture, so the picture does not matter; every token up to BOI counts
    once.
    """
    model = small_reasongen(rationale=64).model.requires_grad_(True)
    data = examples(pictures=12, rationales="none", dense=0.5)
    lengths = up_to(data.full_rationales, model.config.boi).sum(1)
    data = Examples(*(rows[torch.stack([lengths.argmin(), lengths.argmax()])] for rows in data))
    assert lengths.min() < lengths.max()
    loss = text_only_loss(model, data, 64, False, rng(0, "test"))
    pick = torch.randint(2, (64,), generator=rng(0, "test"))
    given = trim(data.short_prompts[pick], EOS), trim(data.full_rationales[pick], model.config.boi)
    log_prob, _ = model.log_probs(*given, data.codes[pick, :20], SamplingConfig())
    counted = up_to(given[1], model.config.boi)
    assert loss.item() == pytest.approx(-(log_prob * counted).sum().item() / counted.sum().item(), rel=1e-5)
    loss.backward()
    image_parts = [*model.forms.parameters(), *model.colors.parameters(), *model.then.parameters()]
    assert not any(w.grad is not None and w.grad.any() for w in image_parts)


@torch.no_grad()
def test_rationales_only_are_learnt_with_short_prompts() -> None:
    """The prompt of a rationale without a picture is never the rationale."""
    model, data = small_reasongen(rationale=64).model, examples(pictures=12, dense=1.0)
    loss = text_only_loss(model, data, 8, False, rng(0, "test"))
    wanted = text_only_loss(model, data._replace(prompts=data.short_prompts), 8, False, rng(0, "test"))
    torch.testing.assert_close(loss, wanted)


def test_bfloat16_gives_nearly_the_same_losses(tmp_path: Path) -> None:
    """Products have 8 bits, weights stay float32: losses agree within a hundredth, but not exactly."""
    losses = {}
    for bf16 in (False, True):
        training = ReasonTraining(24, steps=3, batch=8, lr=1e-3, dense=0.5, bf16=bf16)
        job = Job(Run(tmp_path / str(bf16), {}))
        trained = train_reasongen(training, WorldConfig(), small_reasongen().codec, job)
        assert all(w.dtype == torch.float32 for w in trained.model.parameters())
        losses[bf16] = torch.tensor([row["loss"] for row in job.run.metrics("reason-sft")])
    assert not torch.equal(losses[True], losses[False])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=0)


def test_training_goes_on_from_a_given_model(tmp_path: Path) -> None:
    """At a learning rate of 0 the model stays what it was; whether it writes rationales follows from the
    examples.
    """
    start, job = small_reasongen(rationale=64), Job(Run(tmp_path / "run", {}))
    before = [w.clone() for w in start.model.parameters()]
    training = ReasonTraining(8, steps=1, batch=4, lr=0.0, rationales="none")
    trained = train_reasongen(training, WorldConfig(), start.codec, job, start)
    assert all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters()))
    assert not trained.writes_rationale and start.writes_rationale


def test_the_model_is_trained_with_its_own_settings_of_adamw(tmp_path: Path, settings: list[dict]) -> None:
    start, job = small_reasongen(rationale=64), Job(Run(tmp_path / "run", {}))
    with pytest.raises(Stopped):
        train_reasongen(ReasonTraining(3, steps=1, lr=0.1), WorldConfig(), start.codec, job, start)
    assert settings == [{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 5e-2}]


@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_the_loss_counts_a_rationales_tokens_twice_and_image_tokens_once(
    monkeypatch: pytest.MonkeyPatch, empty: float
) -> None:
    """By hand from log-probabilities; of an empty sample the picture alone, without prompt and rationale."""
    monkeypatch.setattr(sft, "EMPTY", empty)
    model, data = small_reasongen(rationale=64).model, examples(pictures=12)
    loss, parts = sft_loss(model, data, ReasonTraining(batch=5), rng(0, "sft"))
    pick = torch.randint(12, (5,), generator=rng(0, "sft"))
    codes = data.codes[pick]
    given = model.blank(5, codes.device) if empty else (data.prompts[pick], data.rationales[pick])
    text, image = model.log_probs(*given, codes, SamplingConfig())  # nats of a word; of a form and colours
    words = torch.zeros(()) if empty else text[up_to(given[1], model.config.boi)]
    n = 0 if empty else len(words)
    wanted = -(2 * words.sum() + image.sum()) / (2 * n + image.numel())
    torch.testing.assert_close(loss, wanted)
    assert parts["image"] == pytest.approx(-image.mean().item(), rel=1e-5)
    assert parts["text"] == pytest.approx(-words.sum().item() / max(1, n), rel=1e-5)


def test_a_tenth_of_the_samples_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2,000 samples, prompt and rationale alike; four standard errors."""
    model, data = small_reasongen(rationale=64).model, examples(pictures=2)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(type(model), "forward", lambda self, *ids: given.extend(ids) or stop())
    with pytest.raises(Stopped):
        sft_loss(model, data, ReasonTraining(batch=2_000), rng(0, "empty"))
    empty = given[0][:, 1] == EOS
    assert 146 < empty.sum() < 254
    assert torch.equal(empty, given[1][:, 0] == model.config.boi)


def test_text_only_is_added_and_the_world_has_the_share_of_arrangements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds: list[WorldConfig] = []
    pairs = sft.training_pairs
    monkeypatch.setattr(
        sft, "training_pairs", lambda n, world, *a: worlds.append(world) or pairs(n, world, *a)
    )
    monkeypatch.setattr(sft, "sft_loss", lambda model, *_: (0 * model.where.sum() + 1, {}))
    monkeypatch.setattr(sft, "text_only_loss", lambda model, *_: 0 * model.where.sum() + 2)
    job, start = Job(Run(tmp_path / "run", {})), small_reasongen(rationale=64)
    train_reasongen(ReasonTraining(3, steps=1, text_only=5), WorldConfig(), start.codec, job, start)
    assert job.run.metrics("reason-sft")[0]["loss"] == 3 and worlds[0].arrangements == 0.35


def test_rationales_without_pictures_are_drawn_anew_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(sft, "sft_loss", lambda model, *_: (0 * model.where.sum(), {}))

    def noted(model: ReasonGen, data: Examples, n: int, bf16: bool, chance: torch.Generator) -> torch.Tensor:
        seeds.append(chance.initial_seed())
        return 0 * model.where.sum()

    monkeypatch.setattr(sft, "text_only_loss", noted)
    job, start = Job(Run(tmp_path / "run", {}), 5), small_reasongen(rationale=64)
    train_reasongen(ReasonTraining(3, steps=2, text_only=5), WorldConfig(), start.codec, job, start)
    assert seeds == [rng(5, "reason-sft", "told", step).initial_seed() for step in range(2)]


def test_shuffled_examples_have_the_rationales_of_other_pictures() -> None:
    true, moved = (examples(pictures=100, rationales=kind) for kind in ("true", "shuffled"))
    rows = [WORDS.decode(e.full_rationales) for e in (true, moved)]
    assert torch.equal(true.codes, moved.codes) and sorted(rows[0]) == sorted(rows[1])
    assert sum(a != b for a, b in zip(*rows)) > 10


# -------------------------------------------------------------------------------------------- RL-RIG's Actor
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
    monkeypatch.setattr(sft, "MISTAKES", 0.0)
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
    monkeypatch.setattr(sft, "NOISE", 0.0)
    pipe, job = load_pipeline(RIG), Job(Run(tmp_path / "run", {}))
    torch.manual_seed(5)
    start = Actor(ActorConfig(len(pipe.tokenizer)))
    begin_with(monkeypatch, sft, tmp_path, actor=start)
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


def test_the_actor_is_trained_with_its_own_settings_of_adamw(tmp_path: Path, settings: list[dict]) -> None:
    pipe, job = load_pipeline(RIG), Job(Run(tmp_path / "run", {}))
    with pytest.raises(Stopped):
        train_actor(Training(pictures=2, steps=1, lr=0.1), pipe.autoencoder, pipe.tokenizer, job)
    assert settings == [{"lr": 0.1, "betas": (0.9, 0.999), "weight_decay": 1e-2}]


def test_latents_are_noised_by_up_to_a_third_of_their_std(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen times the same example: what differs is noise, of a std between 0 and 0.3."""
    example, given = imitation_example(choices(0, "examples")), []
    monkeypatch.setattr(sft, "imitation_example", lambda _: example)
    monkeypatch.setattr(Actor, "forward", lambda self, latents, *_: given.append(latents) or stop())
    pipe, job = load_pipeline(RIG), Job(Run(tmp_path / "run", {}))
    config = Training(pictures=16, steps=1, batch=16)
    with pytest.raises(Stopped):
        train_actor(config, pipe.autoencoder, pipe.tokenizer, job)
    std = (given[0] - pipe.autoencoder.encode(render(example.scene)[None])).flatten(1).std(1)
    assert std.min() < 0.1 and 0.2 < std.max() < 0.33 and 0.1 < std.mean() < 0.2
