"""ReasonGen-R1's GRPO: which groups it learns from, what each token counts, and what one update does."""

import copy
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from minireflect import rng, training
from minireflect.methods import reasongen
from minireflect.methods.reasongen import (
    Learner,
    ReasonRLConfig,
    Rewards,
    Samples,
    sample_groups,
    shares_of,
    token_shares,
    train_reason_grpo,
    update,
)
from minireflect.models.reasongen import Sampled, SamplingConfig
from minireflect.pipeline import ReasonPipeline
from minireflect.pretrain.sft import ReasonTraining, make_examples, sft_loss
from minireflect.rl.advantage import group_advantage
from minireflect.rl.rewards import ACCEPT_WORD
from minireflect.rl.tokens import AdaptiveEntropy, TokenStats
from minireflect.run import Interrupted, Job, Run
from minireflect.world.data import WorldConfig
from tests.small import Stopped, shaken, small_reasongen, stop
from tests.small import law_texts as texts

CPU = torch.device("cpu")


def even(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that accepts about half of all pictures, by their far decimals."""
    return (1e4 * images.mean((1, 2, 3)).double() % 1 > 0.5).float()


CONFIG = ReasonRLConfig(iterations=2, prompts_per_iteration=3, group=4, max_resamples=3, lr=1e-2)


def test_without_a_rationale_boi_is_given_and_not_chosen() -> None:
    """Both have as many image tokens; without a rationale no text token is chosen."""
    p, asked = small_reasongen(), texts(5)
    silent = p._replace(writes_rationale=False).sample(asked, SamplingConfig(), rng(0, "silent"))
    assert torch.equal(silent.rationale, p.model.blank(5, CPU)[1]) and not silent.chosen.any()
    spoken = p.sample(asked, SamplingConfig(), rng(0, "silent"))
    assert spoken.chosen.any(1).all() and spoken.codes.shape == silent.codes.shape
    given = p.sample(asked, SamplingConfig(), rng(0, "silent"), spoken.rationale)
    assert torch.equal(given.rationale, spoken.rationale) and not given.chosen.any()


def test_rationales_and_pictures_have_half_of_the_weight_each() -> None:
    chosen = torch.tensor([[True, True, False], [True, False, False]])
    text, image = token_shares(chosen, 4).split([3, 4], 1)
    assert torch.allclose(text[chosen], torch.tensor(1 / 6)) and torch.allclose(image, torch.tensor(1 / 16))
    assert (text[~chosen] == 0).all()
    text, image = token_shares(torch.zeros(2, 3, dtype=torch.bool), 4).split([3, 4], 1)
    assert text.sum() == 0 and image.sum().item() == pytest.approx(1)


def test_only_mixed_groups_are_kept_and_sampling_goes_on_until_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The inspector finds those of the first attempt right, and no others."""
    asked, drawn, said, draw = [], [], [], ReasonPipeline.sample

    def sampled(self: ReasonPipeline, prompts: list[str], *rest: object) -> Sampled:
        said.append(prompts), drawn.append(draw(self, prompts, *rest))
        return drawn[-1]

    monkeypatch.setattr(ReasonPipeline, "sample", sampled)
    monkeypatch.setattr(
        reasongen, "inspector_reward", lambda images, texts: torch.full((len(texts),), float(len(drawn) == 1))
    )

    def prompts(n: int, step: int, number: int) -> list[str]:
        asked.append((n, step, number))
        return texts(n, step, number)

    def sample(reward):
        asked.clear(), drawn.clear(), said.clear()
        return sample_groups(small_reasongen(), Rewards(reward), prompts, CONFIG, 7, rng(0, "groups"))

    samples, stats = sample(even)
    assert samples.rewards.shape == (3, 4) and len(samples.prompts) == 3 and len(samples.sampled.codes) == 12
    assert (samples.rewards.amax(1) == 1).all() and (samples.rewards.amin(1) == 0).all()
    assert [(step, number) for _, step, number in asked] == [(7, i) for i in range(len(asked))]
    assert asked[0][0] == 3 and all(1 <= n <= 3 for n, _, _ in asked)
    assert stats["groups"] == sum(n for n, _, _ in asked) and stats["mixed"] == 3

    def all_but_first(images: Tensor, prompts: list[str]) -> Tensor:
        """The first group of each call is refused; in all others one sample is accepted."""
        number = torch.arange(len(images))
        return ((number >= 4) & (number % 4 == 1)).float()

    samples, stats = sample(all_but_first)
    assert samples.rewards.tolist() == [[0, 1, 0, 0]] * 3
    assert [n for n, _, _ in asked] == [3, 2] and (stats["groups"], stats["mixed"]) == (5, 3)
    assert stats["reward"] == pytest.approx(3 / 20) and stats["right"] == pytest.approx(12 / 20)
    assert said == [[text for text in texts(*call) for _ in range(4)] for call in asked]
    words = torch.cat([sampled.chosen.sum(1) for sampled in drawn])  # (20)
    assert stats["words"] == pytest.approx(words.double().mean().item())

    def better_later(images: Tensor, prompts: list[str]) -> Tensor:
        """One group of the first call is mixed, and all of later ones: more than wanted."""
        number = torch.arange(len(images))
        return ((number % 4 == 1) & ((number < 4) | (len(asked) > 1))).float()

    samples, stats = sample(better_later)
    assert [n for n, _, _ in asked] == [3, 3] and stats["mixed"] == len(samples.prompts) == 3
    nothing, stats = sample(lambda images, prompts: torch.zeros(len(images)))
    assert nothing is None and stats["mixed"] == 0 and stats["reward"] == 0
    assert [(step, number) for _, step, number in asked] == [(7, i) for i in range(3)]  # max_resamples


def test_the_captioner_must_accept_the_rationale_as_well() -> None:
    """With a captioner a sample is rewarded where both accept it; it reads the rationales as written."""
    config, asked = ReasonRLConfig(prompts_per_iteration=2, group=4, max_resamples=1), []

    def second(images: Tensor, prompts: list[str]) -> Tensor:
        return (torch.arange(len(images)) % 2).float()

    def last(images: Tensor, rationales: list[str]) -> Tensor:
        asked.extend(rationales)
        return ACCEPT_WORD * (torch.arange(len(images)) % 4 == 3).float()

    p = small_reasongen()
    alone, _ = sample_groups(p, Rewards(second), texts, config, 0, rng(0, "read"))
    both, stats = sample_groups(p, Rewards(second, last), texts, config, 0, rng(0, "read"))
    assert alone.rewards.tolist() == [[0, 1, 0, 1]] * 2 and both.rewards.tolist() == [[0, 0, 0, 1]] * 2
    assert asked == p.rationales(both.sampled) and stats["reward"] == 0.25


@pytest.mark.slow
def test_rewarded_tokens_become_likelier_and_the_first_ratio_is_1() -> None:
    """A bandit: pictures that begin with one of eight forms, about half at first, are right; forty updates
    teach it.
    """
    p = small_reasongen()
    # temperature 4: an untrained model is sure of a token or two
    config = ReasonRLConfig(prompts_per_iteration=4, group=8, updates=1, beta=0.0, temperature=4.0)
    optimizer = torch.optim.AdamW(p.model.requires_grad_(True).parameters(), lr=2e-3)
    learner = Learner(p, small_reasongen().model, optimizer)
    asked = texts(4)
    each = [t for t in asked for _ in range(8)]
    at_first = p.sample(each * 8, config.sampling, rng(0, "first")).codes[:, 0] // 4
    liked = at_first.bincount(minlength=16).argsort(descending=True)[1::2]  # (8)
    shares = []
    for step in range(40):
        drawn = p.sample(each, config.sampling, rng(step, "bandit"))
        rewards = torch.isin(drawn.codes[:, 0] // 4, liked).float().view(4, 8)
        stats = update(learner, Samples(asked, drawn, rewards), config, rng(step))
        assert stats["first_ratio"] == 0 and stats["kl"] >= 0
        shares.append(rewards.mean().item())
    assert sum(shares[:5]) / 5 < 0.6 and sum(shares[-5:]) / 5 > 0.9


def test_without_advantage_kl_and_entropy_the_gradient_is_that_of_the_recalled_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "MAX_GRAD_NORM", 1e9)
    p = small_reasongen(rationale=64)
    config = ReasonRLConfig(
        prompts_per_iteration=2, group=4, updates=1, beta=0.0, recall=0.5, recall_pictures=20, recall_batch=8
    )
    known = make_examples(config.examples, WorldConfig(), p, Job(None, 0))
    drawn = p.sample([t for t in texts(2) for _ in range(4)], SamplingConfig(), rng(0))
    optimizer = torch.optim.SGD(p.model.requires_grad_(True).parameters(), lr=0.0)
    learner = Learner(p, copy.deepcopy(p.model), optimizer, examples=known)
    update(learner, Samples(texts(2), drawn, torch.ones(2, 4)), config, rng(7))
    found = [w.grad.clone() for w in p.model.parameters()]
    p.model.zero_grad()
    chance = rng(7)
    torch.randperm(2, generator=chance)  # the order of the groups is drawn before
    (0.5 * sft_loss(p.model, known, config.examples, chance)[0]).backward()
    torch.testing.assert_close(found, [w.grad for w in p.model.parameters()], rtol=1e-5, atol=1e-8)
    assert sum(g.abs().sum() for g in found) > 0


def test_tokens_that_were_not_chosen_have_no_gradient() -> None:
    p = small_reasongen()
    drawn = p.sample(texts(2) * 2, SamplingConfig(), rng(0, "chosen"))
    drawn = drawn._replace(chosen=torch.zeros_like(drawn.chosen))  # as if the rationales had been given
    samples = Samples(texts(2), drawn, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    optimizer = torch.optim.SGD(p.model.requires_grad_(True).parameters(), lr=0.0)
    learner = Learner(p, small_reasongen().model, optimizer)
    update(learner, samples, ReasonRLConfig(prompts_per_iteration=2, group=2, updates=1), rng(0))
    assert p.model.transformer.head.weight.grad.abs().sum() == 0
    assert p.model.forms.head[0].weight.grad.abs().sum() > 0


def test_a_share_has_the_advantages_of_its_own_groups() -> None:
    p, config = small_reasongen(), ReasonRLConfig(prompts_per_iteration=4, group=4, updates=2)
    drawn = p.sample([t for t in texts(4) for _ in range(4)], config.sampling, rng(0, "shares"))
    rewards = torch.tensor([[0.0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0]])
    learner = Learner(p, p.model, torch.optim.SGD(p.model.parameters(), lr=0.0))
    A, seen = group_advantage(rewards).flatten(), []
    ends = 0
    samples = Samples(texts(4), drawn, rewards)
    for (_, words, codes), chosen, batch in shares_of(learner, samples, config, rng(0)):
        alike = (codes[:, None] == drawn.codes).all(2)  # (m n*g)
        r = words.shape[1]
        wanted = drawn.chosen[alike.float().argmax(1), :r]
        assert torch.equal(chosen, wanted) and torch.equal(batch.weight[:, :r] > 0, wanted)
        ends += int((chosen & (words == p.model.config.boi)).sum())
        assert (alike.sum(1) == 1).all() and torch.equal(batch.advantage, A[alike.float().argmax(1)])
        seen += alike.float().argmax(1).tolist()
    assert sorted(seen) == [*range(16)] and seen != [*range(16)]
    assert ends > 0  # an end that the policy chose is learnt like its other tokens


def test_an_update_reports_the_means_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped is what is beyond either clip; the ratio is that of the first step."""
    each = (0.0, 1.0, 0.25, 0.5, 0.0, 2.0, 3.0), (0.0, 3.0, 0.0, 0.25, 9.0, 4.0, 7.0)
    given = iter([TokenStats(*values) for values in each])
    monkeypatch.setattr(reasongen, "token_step", lambda *_: next(given))
    p = small_reasongen()
    config = ReasonRLConfig(prompts_per_iteration=2, group=2, updates=2)
    drawn = p.sample([t for t in texts(2) for _ in range(2)], config.sampling, rng(0))
    learner = Learner(p, p.model, torch.optim.SGD(p.model.parameters(), lr=0.0))
    stats = update(learner, Samples(texts(2), drawn, torch.tensor([[0.0, 1.0]] * 2)), config, rng(0))
    assert [stats[k] for k in ("loss", "clipped", "kl", "grad_norm", "first_ratio")] == [2, 0.5, 3, 5, 0]


def test_training_logs_what_it_does_and_is_the_same_twice(tmp_path: Path) -> None:
    one, two = small_reasongen(), small_reasongen()
    run = Run(tmp_path / "one", {})
    train_reason_grpo(CONFIG, one, Rewards(even), texts, None, Job(run))
    rows = run.metrics("reason-grpo")
    assert len(rows) == 2 and all(0 <= r["right"] <= 1 and r["tokens"] > 0 for r in rows)
    assert all(r["first_ratio"] == 0 for r in rows)  # of the first of two steps; the second is away from it
    train_reason_grpo(CONFIG, two, Rewards(even), texts, None, Job(Run(tmp_path / "two", {})))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))
    assert not torch.equal(one.model.where, small_reasongen().model.where)


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"group": 1}, "at least 2"),
        ({"updates": 99}, "prompts_per_iteration must be at least updates = 99, got 16"),
        ({"max_resamples": 0}, "at least 1"),
        ({"recall": -1.0}, "recall must be .* got -1"),
        ({"entropy_bound": -1.0}, "bound"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_errors_name_the_bad_option(bad: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ReasonRLConfig(**bad)


def test_without_advantage_the_gradient_is_that_of_kl_and_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta KL to the model before RL, token by token, and alpha H, with torch's entropies: both added."""
    monkeypatch.setattr(training, "MAX_GRAD_NORM", 1e9)
    p = small_reasongen()
    before = shaken(copy.deepcopy(p.model), 0.02)
    config = ReasonRLConfig(prompts_per_iteration=2, group=4, updates=1, beta=0.3, temperature=2.0)
    drawn = p.sample([t for t in texts(2) for _ in range(4)], config.sampling, rng(0))
    controls = [AdaptiveEntropy(target, bound=1.0, lr=1e-3) for target in (0.0, 99.0)]
    for control, alpha in zip(controls, (0.7, -0.2)):
        control.psi.data.fill_(math.asinh(alpha))
    optimizer = torch.optim.SGD(p.model.requires_grad_(True).parameters(), lr=0.0)
    learner = Learner(p, before, optimizer, tuple(controls))
    stats = update(learner, Samples(texts(2), drawn, torch.ones(2, 4)), config, rng(0))
    found = [w.grad.clone() for w in p.model.parameters()]
    assert controls[0].alpha > 0.7 and controls[1].alpha < -0.2  # the entropy is above, and below, its target

    given = p.tokenizer([t for t in texts(2) for _ in range(4)]), drawn.rationale, drawn.codes
    text, forms, colors = p.model.choices(*given, config.sampling)
    H = [Categorical(logits=v).entropy() for v in (text[drawn.chosen], forms, colors)]
    log_r = [b - a for a, b in zip(*(m.log_probs(*given, config.sampling) for m in (p.model, before)))]
    kl = [(v.exp() - 1 - v).mean() for v in (log_r[0][drawn.chosen], log_r[1])]  # half of the weight each
    p.model.zero_grad()
    (0.3 * sum(kl) / 2 + 0.7 * H[0].mean() - 0.2 * (H[1] + H[2]).mean()).backward()
    torch.testing.assert_close(found, [w.grad for w in p.model.parameters()], rtol=1e-3, atol=1e-6)
    assert stats["kl"] == pytest.approx(sum(kl).item() / 2, rel=1e-4)
    assert stats["text_entropy"] == pytest.approx(H[0].mean().item(), rel=1e-4)


def test_each_weight_follows_the_entropy_of_its_own_tokens() -> None:
    told: list[tuple[str, float]] = []
    controls = [
        SimpleNamespace(alpha=0.0, step=lambda h, name=name: told.append((name, h)))
        for name in ("text", "image")
    ]
    config = ReasonRLConfig(prompts_per_iteration=2, group=2, updates=1, temperature=2.0)
    p = small_reasongen()
    drawn = p.sample([t for t in texts(2) for _ in range(2)], config.sampling, rng(0))
    optimizer = torch.optim.SGD(p.model.requires_grad_(True).parameters(), lr=0.0)
    learner = Learner(p, small_reasongen().model, optimizer, tuple(controls))
    stats = update(learner, Samples(texts(2), drawn, torch.tensor([[0.0, 1.0]] * 2)), config, rng(0))
    assert told == [("text", stats["text_entropy"]), ("image", stats["image_entropy"])]
    assert told[0][1] != told[1][1]


def test_the_reference_stays_what_the_model_was_before_rl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, start, distances = small_reasongen(), small_reasongen().model, []

    def watched(learner: Learner, *rest: object) -> dict[str, float]:
        pairs = zip(learner.reference.parameters(), start.parameters())
        distances.append(sum((a - b).abs().sum().item() for a, b in pairs))
        return update(learner, *rest)

    monkeypatch.setattr(reasongen, "update", watched)
    train_reason_grpo(CONFIG, p, Rewards(even), texts, None, Job(Run(tmp_path / "run", {})))
    assert distances == [0, 0] and not torch.equal(p.model.where, start.where)


def test_adamw_has_the_betas_of_stage_1_and_a_fifth_of_its_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict] = []
    monkeypatch.setattr(reasongen, "adamw", lambda _, **how: told.append(how) or stop())
    with pytest.raises(Stopped):
        train_reason_grpo(ReasonRLConfig(lr=0.1), small_reasongen(), None, texts, None, Job(None, 0))
    assert told == [{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 1e-2}]


def test_the_loop_hands_each_iteration_its_rate_noise_and_entropies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate, the random streams of a step, the targets of text and of image entropy, the pictures
    to recall; and what it adds up: calls of the reward, tokens of text and of pictures.  The second and third
    iteration are those of a resumed run.
    """
    p, given, drawn, begun, watched = small_reasongen(), [], [], [], []
    found = {"groups": 5, "words": 2.5, "reward": 0.5, "right": 0.0, "mixed": 3, "size": 1.0, "constant": 0.0}

    def sampled(pipe, rewards, ask, config, step: int, noise: torch.Generator):
        drawn.append(noise.initial_seed())
        return Samples(texts(3), None, torch.zeros(3, 4)), dict(found)

    def updated(learner: Learner, samples: Samples, config: ReasonRLConfig, noise: torch.Generator) -> dict:
        rates = {group["lr"] for group in learner.optimizer.param_groups}
        given.append((learner, rates, noise.initial_seed()))
        where, moments = learner.pipe.model.where, learner.optimizer.state.values()
        steps = max((int(v["step"]) for v in moments), default=0), *(int(c.steps) for c in learner.entropies)
        begun.append((where.mean().item(), learner.entropies[0].alpha, steps))
        where.sum().backward(), learner.optimizer.step(), where.data.fill_(len(given))
        for control, alpha in zip(learner.entropies, (0.001 * len(given), -0.002)):
            control.step(0.0), control.psi.data.fill_(math.asinh(alpha))
        if len(given) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 0.0}

    def counted(rule: ReasonRLConfig, run: Run, memory: dict, seen: dict) -> str:
        watched.append(memory.setdefault("seen", len(watched)))
        return "grey"

    for name, stub in (("sample_groups", sampled), ("update", updated), ("watch", counted)):
        monkeypatch.setattr(reasongen, name, stub)
    config, known = replace(CONFIG, iterations=3), object()
    with pytest.raises(Interrupted):
        train_reason_grpo(config, p, Rewards(even), texts, known, Job(Run(tmp_path / "run", {}), 5))
    run, p = Run(tmp_path / "run", {}, resume=True), small_reasongen()
    model = train_reason_grpo(config, p, Rewards(even), texts, known, Job(run, 5))
    assert model is p.model and not any(w.requires_grad for w in model.parameters())
    learners, rates, seeds = zip(*given)
    assert begun[0][1:] == (0, (0, 0, 0)) and watched == [0, 0, 0]
    assert begun[1:] == [(n, pytest.approx(0.001 * n), (n, n, n)) for n in (1, 2)]
    assert rates == tuple({1e-2 * training.lr_factor(step, 3)} for step in range(3)) and rates[0] != rates[2]
    assert drawn == [rng(5, "reason-grpo", step).initial_seed() for step in range(3)]
    assert list(seeds) == [rng(5, "update", step).initial_seed() for step in range(3)]
    assert [c.target for c in learners[0].entropies] == [config.text_entropy, config.image_entropy]
    assert {c.bound for c in learners[0].entropies} == {config.entropy_bound} and learners[
        0
    ].examples is known
    rows = run.metrics("reason-grpo")
    assert [row["reward_calls"] for row in rows] == [20, 40, 60] and rows[2]["collapse"] == "grey"
    assert [row["alpha_text"] for row in rows] == pytest.approx([0.001, 0.002, 0.003])
    assert [row["alpha_image"] for row in rows] == pytest.approx([-0.002] * 3)
    assert [row["tokens"] for row in rows] == [k * 20 * (2.5 + 64) for k in (1, 2, 3)]
    assert config.sampling.temperature == config.temperature != 1
    recalled = replace(config, bf16=True, recall_pictures=7, recall_batch=3).examples
    wanted = ReasonTraining(recombined=0.5, related_captions=0.4, pictures=7, batch=3, bf16=True)
    assert recalled == wanted


@pytest.mark.parametrize("part", ["picture", "rationale"])
@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        (torch.ones(2, 1), ValueError, r"a number for each of 2 pictures, got shape \(2, 1\)"),
        (torch.ones(()), ValueError, "a number for each of 2"),
        (torch.ones(3), ValueError, "a number for each of 2"),
        (None, ValueError, "got None"),
        (torch.tensor([1.0, torch.nan]), FloatingPointError, "'b' is not a finite number"),
        ([0.9, 1e300], FloatingPointError, "'b' is not a finite number"),
    ],
)
def test_a_reward_is_a_finite_number_a_sample(part: str, values: object, error: type, said: str) -> None:
    whole = {"picture": lambda images, texts: [1, 1.0], "rationale": lambda images, texts: torch.ones(2)}
    images, texts = torch.zeros(2, 3, 8, 8), ["a", "b"]
    assert Rewards(**whole)(images, texts, texts).tolist() == [1, 1]  # a list is as good
    with pytest.raises(error, match=said):
        Rewards(**(whole | {part: lambda images, texts: values}))(images, texts, texts)


@pytest.mark.parametrize(("bound", "terms"), [(0.0, 0), (5e-3, 2)])
def test_a_bound_of_zero_leaves_the_entropies_out(
    bound: float, terms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    some = Samples(texts(3), None, torch.zeros(3, 4)), {}
    monkeypatch.setattr(reasongen, "sample_groups", lambda *_: some)
    monkeypatch.setattr(
        reasongen, "update", lambda learner, *_: told.append(len(learner.entropies)) or stop()
    )
    config, run = replace(CONFIG, entropy_bound=bound), Run(tmp_path / "run", {})
    with pytest.raises(Stopped):
        train_reason_grpo(config, small_reasongen(), Rewards(even), texts, None, Job(run))
    assert told == [terms]


def test_true_pictures_are_recalled_and_a_picture_at_one_half_is_accepted_by_default() -> None:
    assert (ReasonRLConfig().recall, ReasonRLConfig().recall_batch) == (0.3, 48)  # docs/log.md, `--recall`
    judge = Rewards(lambda images, prompts: torch.tensor([0.5, 0.4999]))
    assert judge(torch.zeros(2, 3, 8, 8), ["a", "b"], ["", ""]).tolist() == [1, 0]
