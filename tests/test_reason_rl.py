"""ReasonGen-R1's training: what counts in SFT and GRPO, which groups teach, and a controller that holds an entropy at its target."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minireflect import rng
from minireflect.checkpoints.ours import load_reasongen
from minireflect.evaluate_reason import (
    ReasonEvaluation,
    another_of_its_kind,
    evaluate_painter,
    evaluation_prompts,
    reason_table,
)
from minireflect.methods.reasongen import (
    Groups,
    ReasonRLConfig,
    collect_groups,
    token_shares,
    train_reason_grpo,
    update_painter,
)
from minireflect.models.reasongen import ReasonGenConfig, SamplingConfig
from minireflect.models.tokenizer import EOS, trim, up_to
from minireflect.pipeline import ReasonPipeline
from minireflect.pretrain.sft import (
    Lessons,
    ReasonTraining,
    lesson_loss,
    lessons,
    shuffled,
    told_loss,
    train_reasongen,
)
from minireflect.rl.entropy import AdaptiveEntropy, EntropyConfig, entropy_of
from minireflect.rl.rewards import judge_of
from minireflect.run import Run
from minireflect.streams import choices
from minireflect.world.data import WorldConfig
from minireflect.world.graphs import TASKS
from minireflect.world.prompts import draw_prompts
from minireflect.world.rationales import rationale, read_rationale
from tests.small import REASON_WORDS as WORDS
from tests.small import law_texts as texts
from tests.small import small_reasongen as painter


def even(images: Tensor, prompts: list[str]) -> Tensor:
    """A judge that likes about half of all pictures, by their far decimals."""
    return (1e4 * images.mean((1, 2, 3)).double() % 1 > 0.5).float()


CONFIG = ReasonRLConfig(iterations=2, prompts=3, group=4, most=3, lr=1e-2)


def test_rationales_go_through_tokens_and_back() -> None:
    config = ReasonGenConfig(len(WORDS), 8, 4)
    draw = choices(0, "words")
    scenes = [p.scene(draw) for k in ("physical", "unconventional", "arrangement") for p in draw_prompts(k, "train", 60, draw)]  # fmt: skip
    written = [rationale(s, rng=draw) for s in scenes]
    ids = WORDS.encode(written, config.rationale, config.boi)
    assert ids.shape == (180, config.rationale) and ((ids == config.boi).sum(1) == 1).all()
    assert [read_rationale(t) for t in WORDS.decode(ids)] == [read_rationale(t) for t in written]
    mask = up_to(ids, config.boi)
    for row, counts in zip(ids.tolist(), mask.tolist()):
        end = row.index(config.boi)
        assert counts == [i <= end for i in range(len(row))] and set(row[end + 1 :]) <= {EOS}
    with pytest.raises(ValueError, match="at most 2 fit"):
        WORDS.encode(["a red ball"], 3, config.boi)


def test_who_does_not_think_is_given_the_switch() -> None:
    """Both get as many image tokens; the one that does not think chooses no word."""
    p, asked = painter(), texts(5)
    silent = p._replace(writes_rationale=False).sample(asked, SamplingConfig(), rng(0, "silent"))
    assert torch.equal(silent.rationale, p.model.blank(5, torch.device("cpu"))[1]) and not silent.chosen.any()
    spoken = p.sample(asked, SamplingConfig(), rng(0, "silent"))
    assert spoken.chosen.any(1).all() and spoken.codes.shape == silent.codes.shape
    given = p.sample(asked, SamplingConfig(), rng(0, "silent"), spoken.rationale)
    assert torch.equal(given.rationale, spoken.rationale) and not given.chosen.any()


def test_swapped_rationales_are_anothers_of_the_same_law() -> None:
    prompts = evaluation_prompts(ReasonEvaluation(pictures=16))
    other = another_of_its_kind(prompts)
    assert sorted(other) == list(range(48)) and all(i != j for i, j in enumerate(other))
    for p, q in zip(prompts, (prompts[i] for i in other)):
        assert (p.kind, p.law) == (q.kind, q.law) and (p.task is None or p.task.kind == q.task.kind)
    seen = []

    class Spy(ReasonPipeline):
        def sample(self, asked, sampling, generator, rationale=None):
            drawn = super().sample(asked, sampling, generator, rationale)
            seen.append((rationale, drawn.rationale))
            return drawn

    evaluate_painter(Spy(*painter()), even, ReasonEvaluation(pictures=16, batch=48, swapped=True))
    (nothing, written), (given, drawn) = seen
    assert nothing is None and torch.equal(given, written[other]) and torch.equal(drawn, given)


def test_shuffled_rationales_stay_in_their_law() -> None:
    thoughts, laws = (
        [f"{law} {i}" for law in "ab" for i in range(50)],
        [law for law in "ab" for _ in range(50)],
    )
    moved = shuffled(thoughts, laws, choices(0, "shuffle"))
    assert sorted(moved) == sorted(thoughts) and all(t.startswith(law) for t, law in zip(moved, laws))
    assert sum(a == b for a, b in zip(moved, thoughts)) < 10


def test_a_dense_caption_is_the_rationale_as_prompt() -> None:
    """With the same draws: where the prompt is dense it is that picture's rationale, and nothing is left to think."""
    p, none = painter(), torch.device("cpu")
    told = {
        dense: lessons(ReasonTraining(40, dense=dense), WorldConfig(), 0, WORDS, ReasonGenConfig(len(WORDS), 16, 4), p.codec, none)
        for dense in (0.0, 0.5, 1.0)
    }  # fmt: skip
    plain, mixed, dense = (
        [pair for pair in zip(WORDS.decode(t.prompts), WORDS.decode(t.words))]
        for t in told.values()
    )  # fmt: skip
    assert all(read_rationale(thought) and prompt != thought for prompt, thought in plain)
    assert dense == [(thought, "") for _, thought in plain]
    assert all(row in (a, b) for row, a, b in zip(mixed, plain, dense))
    assert 10 < sum(row == b for row, b in zip(mixed, dense)) < 30
    assert all(torch.equal(t.codes, told[0.0].codes) for t in told.values())
    with pytest.raises(ValueError, match=r"dense is 1\.5"):
        ReasonTraining(dense=1.5)
    with pytest.raises(ValueError, match="told is -1"):
        ReasonTraining(told=-1)


def test_a_rationale_learnt_without_its_picture_scores_as_it_does_with_it() -> None:
    """Words stand before the picture, so nothing of it counts; and only rationales have words to score, up to BOI."""
    p = painter()
    model = p.model.requires_grad_(True)
    sizes = ReasonGenConfig(len(WORDS), 16, 4)
    training = ReasonTraining(12, rationales="none", dense=0.5, told=64)
    data = lessons(training, WorldConfig(), 0, WORDS, sizes, p.codec, torch.device("cpu"))
    lengths = up_to(data.thoughts, sizes.boi).sum(1)
    data = Lessons(*(rows[torch.stack([lengths.argmin(), lengths.argmax()])] for rows in data))
    assert lengths.min() < lengths.max()
    loss = told_loss(model, data, training, torch.device("cpu"), rng(0, "test"))
    pick = torch.randint(2, (64,), generator=rng(0, "test"))
    given = trim(data.captions[pick], EOS), trim(data.thoughts[pick], sizes.boi)
    words, _ = model.log_probs(*given, data.codes[pick, :20], SamplingConfig())
    counted = up_to(given[1], sizes.boi)
    assert loss.item() == pytest.approx(-(words * counted).sum().item() / counted.sum().item(), rel=1e-5)
    loss.backward()
    drawing = [*model.forms.parameters(), *model.colors.parameters(), *model.then.parameters()]
    assert not any(w.grad is not None and w.grad.any() for w in drawing)


def test_bfloat16_learns_the_same_from_the_same(tmp_path: Path) -> None:
    """Multiplied with eight bits, kept in float32: losses within a hundredth, and not the very same."""
    losses = {}
    for bf16 in (False, True):
        training = ReasonTraining(24, steps=3, batch=8, lr=1e-3, dense=0.5, bf16=bf16)
        run = Run(tmp_path / str(bf16), {})
        codec = painter().codec
        model, _ = train_reasongen(training, WorldConfig(), 0, codec, run, torch.device("cpu"))
        assert all(w.dtype == torch.float32 for w in model.parameters())
        losses[bf16] = torch.tensor([row["loss"] for row in run.metrics("reason-sft")])
    assert not torch.equal(losses[True], losses[False])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=0)


def test_every_chosen_token_counts_alike_or_every_modality() -> None:
    chosen = torch.tensor([[True, True, False], [True, False, False]])
    text, image = token_shares(chosen, 4, modality=False)
    assert torch.allclose(text[chosen], torch.tensor(1 / 11)) and torch.allclose(image, torch.tensor(1 / 11))
    assert (text[~chosen] == 0).all()
    text, image = token_shares(chosen, 4, modality=True)
    assert text.sum().item() == pytest.approx(0.5) and image.sum().item() == pytest.approx(0.5)
    text, image = token_shares(torch.zeros(2, 3, dtype=torch.bool), 4, modality=True)
    assert text.sum() == 0 and image.sum().item() == pytest.approx(1)


def test_only_mixed_groups_are_kept_and_drawing_goes_on_until_there_are_enough() -> None:
    asked = []

    def prompts(n: int, step: int, number: int) -> list[str]:
        asked.append((n, step, number))
        return texts(n, step, number)

    groups, tally = collect_groups(painter(), even, prompts, CONFIG, 7, rng(0, "groups"))
    assert groups.rewards.shape == (3, 4) and len(groups.texts) == 3 and len(groups.drawn.codes) == 12
    assert (groups.rewards.amax(1) == 1).all() and (groups.rewards.amin(1) == 0).all()
    assert [(step, number) for _, step, number in asked] == [(7, i) for i in range(len(asked))]
    assert asked[0][0] == 3 and all(1 <= n <= 3 for n, _, _ in asked)
    assert tally.drawn == sum(n for n, _, _ in asked) and tally.mixed == 3
    asked.clear()

    def all_but_first(images: Tensor, prompts: list[str]) -> Tensor:
        """The first group of a draw is refused, in all others one sample is accepted."""
        number = torch.arange(len(images))
        return ((number >= 4) & (number % 4 == 1)).float()

    _, tally = collect_groups(painter(), all_but_first, prompts, CONFIG, 7, rng(0, "groups"))
    assert [n for n, _, _ in asked] == [3, 2] and (tally.drawn, tally.mixed) == (5, 3)
    assert tally.reward == pytest.approx(3 / 20)
    asked.clear()

    def better_later(images: Tensor, prompts: list[str]) -> Tensor:
        """Of the first draw one group is mixed, of later ones all are: more than wanted."""
        number = torch.arange(len(images))
        return ((number % 4 == 1) & ((number < 4) | (len(asked) > 1))).float()

    groups, tally = collect_groups(painter(), better_later, prompts, CONFIG, 7, rng(0, "groups"))
    assert [n for n, _, _ in asked] == [3, 3] and tally.mixed == len(groups.texts) == 3
    asked.clear()
    nobody = lambda images, prompts: torch.zeros(len(images))  # noqa: E731
    nothing, tally = collect_groups(painter(), nobody, prompts, CONFIG, 7, rng(0, "groups"))
    assert nothing is None and len(asked) == CONFIG.most and tally.mixed == 0 and tally.reward == 0


def test_rewarded_tokens_become_likelier_and_the_first_ratio_is_1() -> None:
    """A bandit: pictures that begin with one of eight forms are right, every second by its share at first; forty updates teach it."""
    p = painter()
    reference = painter().model
    soft = SamplingConfig(temperature=4.0)  # untrained it is sure of a token or two
    config = ReasonRLConfig(prompts=4, group=8, updates=1, adaptive=False, beta=0.0, sampling=soft)
    optimizer = torch.optim.AdamW(p.model.requires_grad_(True).parameters(), lr=2e-3)
    asked = texts(4)
    each = [t for t in asked for _ in range(8)]
    at_first = p.sample(each * 8, config.sampling, rng(0, "first")).codes[:, 0] // 4
    liked = at_first.bincount(minlength=16).argsort(descending=True)[1::2]  # (8)
    shares = []
    for step in range(40):
        drawn = p.sample(each, config.sampling, rng(step, "bandit"))
        rewards = torch.isin(drawn.codes[:, 0] // 4, liked).float().view(4, 8)
        stats = update_painter(p, reference, optimizer, Groups(asked, drawn, rewards), (), config, rng(step))
        assert stats.first_ratio == 0 and stats.kl >= 0
        shares.append(rewards.mean().item())
    assert sum(shares[:5]) / 5 < 0.6 and sum(shares[-5:]) / 5 > 0.9


def test_where_no_sample_is_better_only_what_is_recalled_teaches() -> None:
    """Without advantage, KL and entropy the gradient is that of stage 1's loss, times the weight."""
    p, config = painter(rationale=64), ReasonTraining(20, batch=8, altered=0.5)
    known = lessons(config, WorldConfig(), 0, WORDS, p.model.config, p.codec, torch.device("cpu"))
    groups = Groups(
        texts(2),
        p.sample([t for t in texts(2) for _ in range(4)], SamplingConfig(), rng(0)),
        torch.ones(2, 4),
    )
    silent = ReasonRLConfig(
        prompts=2, group=4, updates=1, adaptive=False, beta=0.0, recall=0.5, lessons=config, grad_norm=1e9
    )
    optimizer = torch.optim.SGD(p.model.requires_grad_(True).parameters(), lr=0.0)
    update_painter(p, copy.deepcopy(p.model), optimizer, groups, (), silent, rng(7), known)
    found = [w.grad.clone() for w in p.model.parameters()]
    p.model.zero_grad()
    chance = rng(7)
    torch.randperm(2, generator=chance)  # which group comes first is drawn before
    (0.5 * lesson_loss(p.model, known, config, torch.device("cpu"), chance)[0]).backward()
    torch.testing.assert_close(found, [w.grad for w in p.model.parameters()], rtol=1e-5, atol=1e-8)
    assert sum(g.abs().sum() for g in found) > 0


def test_tokens_that_were_not_chosen_have_no_gradient() -> None:
    p = painter()
    drawn = p.sample(texts(2) * 2, SamplingConfig(), rng(0, "chosen"))
    drawn = drawn._replace(chosen=torch.zeros_like(drawn.chosen))  # as if all words had been given
    groups = Groups(texts(2), drawn, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    optimizer = torch.optim.SGD(p.model.requires_grad_(True).parameters(), lr=0.0)
    update_painter(p, painter().model, optimizer, groups, (), ReasonRLConfig(prompts=2, group=2, updates=1, adaptive=False), rng(0))  # fmt: skip
    assert p.model.transformer.head.weight.grad.abs().sum() == 0
    assert p.model.forms.head[0].weight.grad.abs().sum() > 0


def test_entropy_is_that_of_torch_and_impossible_tokens_count_nothing() -> None:
    logits = torch.randn(5, 9, generator=rng(0, "h"))
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy_of(logits.log_softmax(-1)), wanted)
    log_prob = torch.tensor([0.5, 0.5, 0.0]).log()
    assert entropy_of(log_prob).item() == pytest.approx(math.log(2))
    logits = torch.tensor([1.0, 0.5, -200.0, -torch.inf]).requires_grad_()  # of which the third underflows
    entropy_of(logits.log_softmax(-1)).backward()
    two = logits.detach()[:2].clone().requires_grad_()
    torch.distributions.Categorical(logits=two).entropy().backward()
    torch.testing.assert_close(logits.grad, torch.cat([two.grad, torch.zeros(2)]))


@pytest.mark.parametrize("start", [0.2, 1.9])
def test_the_controller_moves_the_entropy_to_its_target_from_both_sides(start: float) -> None:
    """A policy over eight tokens that only minimises alpha H; its entropy begins below or above the target of 1.2 nats."""
    sharp = torch.tensor(6.0 if start < 1 else 0.8)
    policy = (sharp * torch.linspace(0, 1, 8) ** 2).requires_grad_()
    optimizer = torch.optim.SGD([policy], lr=0.2)
    control = AdaptiveEntropy(EntropyConfig(target=1.2, bound=0.2, lr=5e-3))
    history = []
    for _ in range(2000):
        h = entropy_of(policy.log_softmax(-1))
        optimizer.zero_grad()
        (control.alpha * h).backward()
        optimizer.step()
        control.step(h.item())
        history.append(h.item())
    assert (history[0] < 1.0) is (start < 1)  # it swings around its target, as what only integrates does
    assert (
        abs(sum(history[-1000:]) / 1000 - 1.2) < 0.15
        and max(history[-1500:]) < 1.9
        and min(history[-1500:]) > 0.5
    )


def test_alpha_does_not_stick_at_its_bound() -> None:
    control = AdaptiveEntropy(EntropyConfig(target=1.0, bound=5e-3, lr=1e-3))
    for _ in range(400):
        control.step(3.0)
    assert control.alpha == pytest.approx(5e-3, rel=1e-3)
    steps = 0
    while control.alpha > 0 and steps < 200:
        control.step(0.5)
        steps += 1
    assert steps < 60 and control.alpha <= 0


def test_adam_of_the_controller_is_torchs() -> None:
    config = EntropyConfig(target=1.0, bound=1e3, lr=1e-2)
    control, psi = AdaptiveEntropy(config), torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    adam = torch.optim.Adam([psi], lr=1e-2, maximize=True)
    for h in (2.0, 1.5, 0.3, 0.9, 1.1, 4.0):
        adam.zero_grad()
        (torch.sinh(psi) * (h - 1.0)).backward()
        adam.step(), control.step(h)
        assert control.alpha == pytest.approx(math.sinh(psi.item()), rel=1e-4)


def test_a_training_says_what_it_did_and_is_the_same_twice(tmp_path: Path) -> None:
    one, two = painter(), painter()
    run = Run(tmp_path / "one", {})
    train_reason_grpo(CONFIG, 0, one, even, texts, run)
    rows = run.metrics("reason-grpo")
    assert len(rows) == 2 and all(0 <= r["right"] <= 1 and r["tokens"] > 0 for r in rows)
    train_reason_grpo(CONFIG, 0, two, even, texts, Run(tmp_path / "two", {}))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))
    assert not torch.equal(one.model.where, painter().model.where)


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"group": 1}, "at least 2"),
        ({"updates": 99}, "cannot share 16"),
        ({"most": 0}, "at least 1"),
        ({"recall": -1.0}, "recall is -1"),
    ],
)
def test_bad_options_are_named(bad: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ReasonRLConfig(**bad)
    with pytest.raises(ValueError, match="bound"):
        EntropyConfig(1.0, bound=0.0)


def test_an_untrained_painter_is_measured_as_what_it_is() -> None:
    """Noise for pictures and sentences: nothing is right, promised or kept, and best-of-N costs N times the tokens."""
    config = ReasonEvaluation(pictures=12, batch=16)
    score = evaluate_painter(painter(), even, config)
    assert score.geneval == dict.fromkeys([*TASKS, "overall"], 0.0)
    assert (
        score.physical == score.unconventional == score.planned == score.kept == 0 and score.unreadable == 1
    )
    assert 0.2 < score.accepted < 0.8 and score.fooled == 1 and 64 < score.tokens <= 64 + 5
    best = evaluate_painter(painter(), even, replace(config, best_of=3))
    assert best.accepted > score.accepted and 2.8 < best.tokens / score.tokens < 3.2
    assert reason_table({"one": score, "best of 3": best}).count("\n") == 3


def test_the_shipped_model_plans_what_is_asked_and_draws_what_it_planned() -> None:
    """Far below what it reaches, far above chance; 24 prompts of each kind, of training combinations."""
    config = ReasonEvaluation(pictures=24, split="train", sampling=SamplingConfig(temperature=0.4))
    score = evaluate_painter(load_reasongen(), judge_of("."), config)
    assert score.planned > 0.85 and score.kept > 0.6 and score.physical > 0.6 and score.fooled < 0.4
