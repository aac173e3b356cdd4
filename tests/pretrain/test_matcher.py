"""One loop for the reward, the Checker and the captioner: losses, captions that do not hold, training
further.

The Checker's questions have answers that are true of the scene and of what is still visible of it.
"""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minireflect import load_pipeline, rng
from minireflect.checkpoints.ours import RIG
from minireflect.models.clip import Matcher, MatcherConfig
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.pretrain import matcher
from minireflect.pretrain.matcher import (
    CAPTIONER_TRAINING,
    CHECKER_TRAINING,
    JointSpace,
    answer,
    block_error,
    caption_loss,
    changed,
    changed_requirement,
    fair_prompt,
    false_prompt,
    question,
    train_captioner,
    train_checker,
    train_reward,
    visible,
)
from minireflect.rl.rewards import ACCEPT_WORD, caption_reward, matcher_reward
from minireflect.run import Job, Run
from minireflect.streams import choices
from minireflect.training import Training, optimise
from minireflect.world.captions import hints, rationale
from minireflect.world.data import WorldConfig, training_pairs
from minireflect.world.graphs import parse_graph
from minireflect.world.laws import LAWS, render
from minireflect.world.layout import lay_out, pair_split, sample_picture
from minireflect.world.prompts import KINDS, all_texts, draw_prompts, near_miss, prompt_set, understand
from minireflect.world.scenes import SPLITS, Object, Reading, Scene, arrangement
from tests.small import REASON_WORDS as WORDS
from tests.small import begin_with


def test_caption_loss_counts_every_word_and_the_end_once() -> None:
    """By hand: minus the mean log-probability of the words after the first, the first end included."""
    logits = torch.randn(2, 6, 40, dtype=torch.float64, generator=rng(0, "caption"))
    ids = torch.tensor([[0, 5, 9, EOS, EOS, EOS], [0, 5, 9, 12, 7, EOS]])
    terms = [-logits[0, j].log_softmax(0)[ids[0, j + 1]] for j in range(3)]
    terms += [-logits[1, j].log_softmax(0)[ids[1, j + 1]] for j in range(5)]
    assert torch.allclose(caption_loss(logits, ids), torch.stack(terms).mean())
    assert caption_loss(logits[:0], ids[:0]) == 0  # a batch in which no picture can be described


def test_the_contrastive_loss_is_that_of_clip() -> None:
    """Figure 3 of its paper: cross-entropy with the own sentence, and with the own picture.  A sentence that
    two pictures share is right for both: the target is spread over them.
    """
    joint = JointSpace(8).eval()
    image, text = torch.randn(2, 5, 8, generator=rng(0, "joint"))
    ids = torch.arange(10).view(5, 2)
    unit = F.normalize(joint.image(image), dim=-1), F.normalize(joint.text(text), dim=-1)
    logits = joint.logit_scale.exp() * unit[1] @ unit[0].T
    torch.testing.assert_close(
        joint.loss(image, text, ids),
        0.5 * (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))),
    )
    ids[1] = ids[0]
    log_prob = [(logits if d else logits.T).log_softmax(-1) for d in (0, 1)]
    each = [-torch.cat([p[:2, :2].mean(1), p.diagonal()[2:]]).mean() for p in log_prob]
    torch.testing.assert_close(joint.loss(image, text, ids), sum(each) / 2)


@pytest.mark.slow
def test_a_matcher_learns_which_prompt_holds() -> None:
    """It overfits sixteen pictures: true captions above, near misses below."""
    torch.manual_seed(0)
    draw = choices(0, "overfit")
    tokenizer = Tokenizer.of(all_texts(), 32)
    prompts = draw_prompts("physical", "train", 16, draw)
    images = torch.stack([render(p.scene(draw)) for p in prompts])
    ids = tokenizer([p.text for p in prompts] + [near_miss(p, draw).text for p in prompts])
    model = Matcher(MatcherConfig(len(tokenizer), EOS, 32, width=32, layers=1, heads=2, depth=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    holds = torch.cat([torch.ones(16), torch.zeros(16)])
    for _ in range(80):
        loss = F.binary_cross_entropy_with_logits(model(images.repeat(2, 1, 1, 1), ids), holds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.35  # 0.69 at chance
    reward = matcher_reward(model, tokenizer)(images, [p.text for p in prompts])
    assert reward.shape == (16,) and (reward >= 0).all() and (reward <= 1).all()


def test_a_false_prompt_never_holds() -> None:
    """What is left of a ball may stand above it too, so one near miss of an arrangement in twelve holds by
    chance.
    """
    draw = random.Random(0)
    prompts = draw_prompts("arrangement", "train", 600, draw)
    scenes = [p.scene(draw) for p in prompts]
    chance = [near_miss(p, draw).fulfilled_by(Reading(s, 0.0)) for p, s in zip(prompts, scenes)]
    assert any(chance)
    for prompt, scene in zip(prompts, scenes):
        assert not false_prompt(prompt, scene, prompts, draw).fulfilled_by(Reading(scene, 0.0))


@pytest.mark.slow  # a learning test, ten seconds
def test_a_captioner_learns_to_tell_true_rationales_from_false_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It overfits six pictures: the rationale of each holds, that of another does not."""
    monkeypatch.setattr(matcher, "ARRANGEMENTS", 0.0)  # six pictures of laws, as prompts ask for them
    monkeypatch.setattr(matcher, "RECOMBINED", 0.0)
    run = Run(tmp_path / "run", {})
    config = replace(CAPTIONER_TRAINING, pictures=6, steps=120, batch=16, lr=4e-3)
    net = train_captioner(config, WorldConfig(), WORDS, Job(run))
    losses = [row["loss"] for row in run.metrics("captioner")]
    assert len(losses) == 120 and losses[-1] < 0.3 * losses[0]
    reward = caption_reward(net, WORDS)
    draw = choices(0, "captioner", "pictures")  # the very pictures of the training
    _, scenes, _ = training_pairs(6, replace(WorldConfig(), arrangements=0.0), draw)
    images = torch.stack([render(s) for s in scenes])
    true = reward(images, [rationale(s) for s in scenes])
    false = reward(images, [rationale(s) for s in scenes[1:] + scenes[:1]])
    assert true.min() > ACCEPT_WORD > false.mean() and (true > false).all()


@pytest.mark.parametrize("name", ["reward", "checker", "captioner"])
def test_each_use_logs_its_losses_and_changes_its_network(tmp_path: Path, name: str) -> None:
    job, small = Job(Run(tmp_path / "run", {})), {"pictures": 8, "steps": 2, "batch": 4}
    if name == "reward":
        trained = train_reward(Training(**small), load_pipeline(), job)
    elif name == "checker":
        trained = train_checker(replace(CHECKER_TRAINING, **small), "checker", load_pipeline(RIG), job)
    else:
        trained = train_captioner(replace(CAPTIONER_TRAINING, **small), WorldConfig(), WORDS, job)
    rows = job.run.metrics(name)
    keys = {"reward": {"contrast", "caption", "right"}, "checker": {"caption", "right"}, "captioner": set()}
    assert [set(row) for row in rows] == [{"stage", "step", "loss"} | keys[name]] * 2
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())
    torch.manual_seed(0)
    untrained = Matcher(trained.config)
    assert not torch.equal(trained.next_word.weight, untrained.next_word.weight)


@pytest.mark.parametrize(
    ("name", "stream"), [("reward", "captions"), ("checker", "questions"), ("captioner", "styles")]
)
def test_every_step_has_its_own_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stream: str
) -> None:
    told: list[tuple] = []

    def clean(_: object, scenes: list[Scene], *__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Renders as they are, with a label or an error map each."""
        n = len(scenes)
        label = torch.ones(n, dtype=torch.bool) if name == "reward" else torch.zeros(n, 16, 16)
        return torch.stack([*map(render, scenes)]), label

    monkeypatch.setattr(matcher, "choices", lambda *path: told.append(path) or choices(*path))
    monkeypatch.setattr(matcher, "corrupt_all", clean)
    job, config = Job(Run(tmp_path / "run", {}), 5), Training(pictures=2, steps=2, batch=2)
    if name == "captioner":
        train_captioner(config, WorldConfig(), WORDS, job)
    elif name == "reward":
        train_reward(config, load_pipeline(), job)
    else:
        train_checker(config, "checker", load_pipeline(RIG), job)
    assert told[1:] == [(5, name, stream, step) for step in range(2)]


def test_a_reward_starts_from_a_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0 it stays what it was."""
    pipe, job = load_pipeline(), Job(Run(tmp_path / "run", {}))
    torch.manual_seed(5)
    start = Matcher(MatcherConfig(len(pipe.tokenizer), EOS, pipe.tokenizer.length))
    config = Training(pictures=4, steps=1, batch=2, lr=0.0)
    begin_with(monkeypatch, matcher, tmp_path, reward=start)
    trained = train_reward(config, pipe, job)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters()))


def test_answers_are_true_of_what_is_visible() -> None:
    chance = random.Random(0)
    both = {True: 0, False: 0}
    for _ in range(200):
        graph, scene = sample_picture(chance)
        shown = [True] * (len(scene.objects) + 1)
        for own in graph.requirements:
            assert answer(own, scene, shown)
            assert not answer(own, scene, [False] * len(shown))
        asked, label = question(graph, scene, shown, chance)
        assert label == asked.met_by(scene.objects)
        both[label] += 1
        assert changed_requirement(graph.requirements[0], graph, chance) is not None
    assert min(both.values()) > 50


@pytest.mark.parametrize("split", SPLITS)
def test_questions_about_pairs_of_another_split_are_never_asked(split: str) -> None:
    """In training: of no held-out pair.  For the others the graphs' own split, as true and false ones."""
    draw, asked = random.Random(split), Counter()
    for _ in range(60):
        graph, scene = sample_picture(draw, split)
        for _ in range(30):
            r, _ = question(graph, scene, [True] * (len(scene.objects) + 1), draw, 0.6)
            if r.object is not None:
                asked[pair_split(r.subject, r.object)] += 1
    assert set(asked) == {"train", split} and min(asked.values()) > 100


def test_an_object_that_is_painted_over_is_not_visible() -> None:
    scene = lay_out(parse_graph("red ball left of blue block"), random.Random(0))
    clean = render(scene)[None]
    ball = next(i for i, o in enumerate(scene.objects) if o.name == "ball")
    x, y = scene.objects[ball].xy
    painted = clean.clone()
    painted[:, :, y - 7 : y + 7, x - 7 : x + 7] = 0.95
    seen = visible(block_error(painted, clean)[0], scene)
    assert seen[ball] is False and seen[1 - ball] is True and seen[-1] is False
    assert all(visible(block_error(clean, clean)[0], scene))
    assert changed(scene, random.Random(1)) != scene


@pytest.mark.parametrize(
    ("row", "column"), [(9, 8), (6, 8), (8, 9), (8, 6), (10, 8), (5, 8), (8, 10), (8, 5)]
)
def test_an_object_is_hidden_by_an_error_in_any_of_its_blocks(row: int, column: int) -> None:
    """A ball at (32, 32) with a radius of 7 reaches from pixel 25 to 39, blocks 6 to 9 of 4 pixels."""
    error, scene = torch.zeros(16, 16), arrangement([Object("ball", "red", xy=(32, 32))])
    error[row, column] = 1.0
    assert visible(error, scene) == [not (6 <= row <= 9 and 6 <= column <= 9), False]


def test_the_reward_learns_from_training_prompts_of_all_kinds_and_laws() -> None:
    draw = random.Random(0)
    drawn = [fair_prompt(draw) for _ in range(400)]
    train = {(p.law, p.objects, p.graph) for kind in KINDS for p in prompt_set(kind, "train")}
    assert {(p.law, p.objects, p.graph) for p in drawn} <= train
    counts = {kind: sum(p.kind == kind for p in drawn) for kind in (*KINDS, "stated")}
    assert min(counts.values()) > 70  # a quarter each, less four standard errors
    laws = Counter(p.law for p in drawn)
    assert {*laws} == {*LAWS, "arrangement"} and min(laws.values()) > 14  # 37 each, less four standard errors
    tasks = [p.task == "position" for p in drawn if p.task]
    assert 0.6 < sum(tasks) / len(tasks) < 0.95


def minimised(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that a training of this file minimises, as it goes; the log has the verdict's alone."""
    losses: list[float] = []

    def watched(*given: object, **how: object):
        for step, generator, minimise in optimise(*given, **how):
            yield step, generator, lambda x, _do=minimise, **v: losses.append(x.item()) or _do(x, **v)

    monkeypatch.setattr(matcher, "optimise", watched)
    return losses


def test_the_rewards_loss_is_its_three_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0: a corrupted picture that shows nothing fails its own prompt too, and is not
    described; a false prompt always fails; CLIP's loss sees class tokens and the true prompts.
    """
    pipe, job = load_pipeline(), Job(Run(tmp_path / "run", {}))
    torch.manual_seed(5)
    start = Matcher(MatcherConfig(len(pipe.tokenizer), EOS, pipe.tokenizer.length))
    drawn: list[tuple] = []
    losses = minimised(monkeypatch)
    shown = torch.tensor([True, False, True, False])

    def corrupted(_: object, scenes: list, twins: list, texts: list[str], label: object, __: object) -> tuple:
        drawn.extend(zip(scenes, twins, texts))
        assert label is matcher.still_shows
        return torch.stack([render(s) for s in scenes]), shown

    monkeypatch.setattr(matcher, "corrupt_all", corrupted)
    monkeypatch.setattr(matcher, "false_prompt", lambda *_: understand("a red ball"))
    contrasted: list[torch.Tensor] = []
    two = torch.tensor(2.0)
    monkeypatch.setattr(JointSpace, "loss", lambda self, *given: contrasted.extend(given) or two)
    begin_with(monkeypatch, matcher, tmp_path, reward=start)
    train_reward(Training(pictures=4, steps=1, batch=4, lr=0.0), pipe, job)
    scenes, twins, texts = zip(*drawn)
    assert all(t.shift == s.shift and t.facts != s.facts for s, t in zip(scenes, twins))
    images, read = torch.stack([render(s) for s in scenes]), pipe.tokenizer
    true, false = start(images, read(texts)), start(images, read(["a red ball"] * 4))
    match = F.softplus(torch.cat([torch.where(shown, -true, true), false])).mean()
    ids = read([matcher.stated(understand(text)).text for text in texts])[shown]
    caption = caption_loss(start.describe(start.vision(images[shown]), start.text(ids)), ids)
    (row,) = job.run.metrics("reward")
    assert row["caption"] == pytest.approx(caption.item(), rel=1e-4)
    assert row["loss"] == pytest.approx(match.item(), rel=1e-4)
    assert losses == pytest.approx([(match + 0.1 * 2 + caption).item()], rel=1e-4)
    right = torch.cat([(true > 0) == shown, false <= 0]).float().mean()
    assert row["right"] == pytest.approx(right.item())
    patches, sentences, words = contrasted
    assert sorted(read.decode(words)) == sorted(read.decode(read(texts)))
    torch.testing.assert_close(patches.sum(0), start.vision(images)[:, 0].sum(0), rtol=1e-3, atol=1e-4)
    pooled = start.text.pooled(start.text(read(texts)), read(texts))
    torch.testing.assert_close(sentences.sum(0), pooled.sum(0), rtol=1e-3, atol=1e-4)


def test_the_checkers_loss_is_of_answers_and_of_whole_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six questions about each picture, 0.6 of them about relations, answered by what is still visible; the
    places of the objects where the whole picture is.
    """
    pipe, job = load_pipeline(RIG), Job(Run(tmp_path / "run", {}))
    start, losses = matcher.new_matcher("checker", pipe.tokenizer, Job(None, 3)), minimised(monkeypatch)
    errors, asked, images = torch.zeros(3, 16, 16), [], {}
    errors[1] = 1.0  # nothing is visible in the second picture

    def corrupted(_: object, scenes: list, *__: object) -> tuple:
        images.update((s, render(s)) for s in scenes)
        return torch.stack([*images.values()]), errors

    def noted(*given: object) -> tuple:
        answered = question(*given)
        asked.append((*given, *answered))
        return answered

    monkeypatch.setattr(matcher, "corrupt_all", corrupted), monkeypatch.setattr(matcher, "question", noted)
    config = replace(CHECKER_TRAINING, pictures=3, steps=1, batch=3, lr=0.0)
    begin_with(monkeypatch, matcher, tmp_path, checker=start)
    train_checker(config, "checker", pipe, job)
    whole = [s for i, s in enumerate(images) if i != 1]
    assert len(asked) == 18 and all(share == 0.6 for *_, share, _, _ in asked)
    assert all(set(shown) == {scene in whole} for _, scene, shown, *_ in asked)
    assert not any(met for _, scene, *_, met in asked if scene not in whole)
    ids = pipe.tokenizer([words.words for *_, words, _ in asked])
    logits = start(torch.stack([images[scene] for _, scene, *_ in asked]), ids)
    met = torch.tensor([float(met) for *_, met in asked])
    match = F.binary_cross_entropy(torch.sigmoid(logits), met)
    ids = pipe.tokenizer([hints(s.objects) for s in whole])
    patches = start.vision(torch.stack([images[s] for s in whole]))
    caption = caption_loss(start.describe(patches, start.text(ids)), ids)
    (row,) = job.run.metrics("checker")
    assert row["caption"] == pytest.approx(caption.item(), rel=1e-4)
    assert losses == pytest.approx([(match + caption).item()], rel=1e-4)


def test_the_captioner_learns_the_rationales_of_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a world with 0.3 arrangements, 0.6 of the others in combinations that no prompt asks for."""
    said: list[tuple] = []
    drawn: list[tuple] = []

    def noted(scene: Scene, **how: object) -> str:
        said.append((scene, rationale(scene, **how)))
        return said[-1][1]

    monkeypatch.setattr(matcher, "rationale", noted)
    monkeypatch.setattr(
        matcher, "training_pairs", lambda *given: drawn.append(given) or training_pairs(*given)
    )
    job = Job(Run(tmp_path / "run", {}))
    config = replace(CAPTIONER_TRAINING, pictures=6, steps=1, batch=8, lr=0.0)
    net = train_captioner(config, WorldConfig(), WORDS, job)
    ((n, world, _, recombined),) = drawn
    assert (n, world.arrangements, recombined) == (6, 0.3, 0.6)
    images, ids = torch.stack([render(s) for s, _ in said]), WORDS([text for _, text in said])
    loss = caption_loss(net.describe(net.vision(images), net.text(ids)), ids)
    assert len({s for s, _ in said}) > 2
    assert job.run.metrics("captioner")[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_the_words_that_no_rationale_uses_decay_by_a_hundredth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no gradient, so AdamW multiplies them by 1 - lr decay."""
    monkeypatch.setattr(matcher, "rationale", lambda scene, **_: "a red ball")
    start, job = matcher.new_matcher("captioner", WORDS, Job(None, 3)), Job(Run(tmp_path / "run", {}))
    begin_with(monkeypatch, matcher, tmp_path, captioner=start)
    config = replace(CAPTIONER_TRAINING, pictures=2, steps=1, batch=2, lr=0.5)
    net = train_captioner(config, WorldConfig(), WORDS, job)
    unused = [i for i in range(len(WORDS)) if i not in WORDS(["a red ball"])]
    before, after = (x.text.token.weight[unused] for x in (start, net))
    torch.testing.assert_close(after, before * (1 - 0.5e-2), rtol=1e-6, atol=0)


def test_questions_are_about_relations_as_often_as_asked_and_of_corrupted_pictures_the_graphs_own() -> None:
    draw = random.Random(0)
    graph, scene = sample_picture(draw)
    asked = [question(graph, scene, [True] * len(scene.objects) + [False], draw, 0.75) for _ in range(400)]
    assert {r for r, _ in asked} == set(graph.requirements)
    assert 0.66 < sum(bool(r.predicate) for r, _ in asked) / 400 < 0.84  # four standard errors
    assert all(met == (r.subject.name != "thing") for r, met in asked)  # of a total nothing can be said
    asked = [question(graph, scene, [True] * (len(scene.objects) + 1), draw, 0.75)[0] for _ in range(400)]
    assert 0.4 < sum(r in graph.requirements for r in asked) / 400 < 0.7  # two fifths and more


def test_a_tenth_of_the_false_prompts_is_foreign() -> None:
    draw = random.Random(0)
    (true,) = draw_prompts("physical", "train", 1, draw)
    other, scene = understand("a ball"), true.scene(draw)
    foreign = sum(false_prompt(true, scene, [other], draw) == other for _ in range(400))
    assert 16 < foreign < 64  # four standard errors
