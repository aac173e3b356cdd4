"""SRRL: rewards that rise, runs that go on exactly, recipes and options."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minireflect.methods import srrl
from minireflect.methods.learn import Learner, UpdateStats
from minireflect.methods.rollout import Rollout, rollout
from minireflect.methods.srrl import SRRLConfig, mended, recipe, report, train_srrl
from minireflect.run import Interrupted, Job, Run
from minireflect.streams import rng
from tests.methods.common import CONFIG, plus
from tests.small import TEXTS, brightness, four_texts, nothing, small_pipeline


def test_mended_counts_only_what_was_refused() -> None:
    out = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, group=2), 0, 0)
    before = out.rounds[0]._replace(rewards=torch.tensor([[0.1, 0.2], [0.1, 0.9], [0.4, 0.3], [0.0, 0.0]]))
    after = out.rounds[1]._replace(rewards=torch.tensor([[0.0, 0.6], [0.0, 0.0], [0.1, 0.1], [0.5, 0.0]]))
    assert mended(before, after, 0.5) == pytest.approx(2 / 3)
    few = torch.tensor([0, 2, 3])  # the accepted prompt was not drawn again
    assert mended(before, after._replace(rows=few, rewards=after.rewards[few]), 0.5) == pytest.approx(2 / 3)
    assert mended(before._replace(rewards=before.rewards + 1), after, 0.5) is None


def test_the_log_of_an_iteration_by_hand() -> None:
    out, verdicts = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, group=2), 0, 0), []
    first, second = [[0.1, 0.2], [0.3, 0.3], [0.9, 0.0], [0.6, 0.6]], [[0.7, 0.0]] * 3 + [[0.7, 0.7]]
    now = torch.tensor([first, second])  # (k n g)
    out.rounds = [r._replace(rewards=v) for r, v in zip(out.rounds, now)]

    def inspector(images: Tensor, asked: list[str]) -> Tensor:
        verdicts.append(asked)
        return torch.full((8,), len(verdicts) / 4)

    row = report(out, UpdateStats(1.0, 2.0, 3.0, 4, 5), inspector, 0.5)
    assert row["reward"] == pytest.approx(now.mean().item())
    assert row["reward_se"] == pytest.approx(now.std().item() / 4)
    assert row["reward_by_round"] == pytest.approx(now.mean((1, 2)).tolist())
    assert row["right"] == pytest.approx(0.375) and row["right_by_round"] == pytest.approx([0.25, 0.5])
    assert verdicts == [[text for text in TEXTS for _ in range(2)]] * 2
    assert row["pictures_by_round"] == [8, 8] and row["flat_groups"] == 3 and row["mended"] == [1.0]
    for i, r in enumerate(out.rounds):
        x = r.x_T.flatten(1)
        assert row["latent_mean"][i] == pytest.approx(x.mean(1).mean().item(), abs=1e-6)
        assert row["latent_std"][i] == pytest.approx(x.std(1, correction=0).mean().item(), rel=1e-5)
    stats = UpdateStats(1.0, 2.0, 3.0, 4, 5)
    out.rounds *= 2  # the third mends what the second did not accept, which is nothing
    assert report(out, stats, None, 0.5)["mended"] == [1.0, None, 1.0]
    out.rounds = [out.rounds[0]._replace(rows=torch.tensor([0]), rewards=torch.tensor([[0.3]]))]
    assert report(out, stats, None, 0.5)["reward_se"] is None  # one picture has no spread


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "advantage"), [("select", "history"), ("blind", "group")])
def test_the_reward_rises_with_ppo(tmp_path: Path, mode: str, advantage: str) -> None:
    config = replace(CONFIG, iterations=25, group=8, mode=mode, advantage=advantage, lr=3e-3, clip_range=0.1)
    run = Run(tmp_path / "run", {})
    train_srrl(config, small_pipeline(), brightness, four_texts, nothing, Job(run))
    assert rises([row["reward"] for row in run.metrics("srrl")])


def rises(rewards: list[float]) -> bool:
    """Each of the last five stands above each of the first five, which of 252 orders of chance is one."""
    return min(rewards[-5:]) > max(rewards[:5])


class Gaussian(torch.nn.Module):
    """The exact noise prediction for latents from N(mu, 1), of which mu is learnt: a policy whose optimum is
    known.
    """

    def __init__(self, schedule) -> None:
        super().__init__()
        self.abar = schedule.abar
        self.mu = torch.nn.Parameter(torch.zeros(4, 4, 4))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        abar = self.abar[t].expand(len(x)).view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x - abar.sqrt() * self.mu)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["select", "blind"])
def test_the_reward_rises_with_regression(tmp_path: Path, mode: str) -> None:
    config = replace(
        CONFIG, objective="regress", iterations=25, group=16, mode=mode, lr=0.03, updates=8, replay=4,
        anchor_below=0,
    )  # fmt: skip
    pipe = small_pipeline()
    pipe = replace(pipe, unet=Gaussian(pipe.schedule))
    pipe.decode = lambda x: x[:, :3]  # the latents' first channels are the picture
    run = Run(tmp_path / "run", {})
    train_srrl(config, pipe, plus, four_texts, nothing, Job(run))
    assert rises([row["reward"] for row in run.metrics("srrl")])
    mu = pipe.unet.mu.detach()
    assert mu[:3].mean() > max(0.1, mu[3].mean())  # what is seen moves up, what is not seen need not


@pytest.mark.parametrize(
    "objective", ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ppo", "regress"))]
)
def test_two_steps_resumed_for_two_equal_four_bit_for_bit(tmp_path: Path, objective: str) -> None:
    """With rounds of some prompts, so that pictures leave the replay by their age."""
    config = replace(CONFIG, iterations=4, objective=objective, advantage="history", replay=2)
    config = replace(config, redraw="refused", accept=0.12 if objective == "regress" else -0.2)
    reward = plus if objective == "regress" else brightness  # the regression asks for a probability
    whole = Run(tmp_path / "whole", {})
    expected, cost = train_srrl(config, small_pipeline(), reward, four_texts, nothing, Job(whole))

    part = Run(tmp_path / "part", {})

    def stop_at_two(step: int) -> tuple[list[str], list[str]]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does: this step is finished and saved
        return four_texts(step)

    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train_srrl(config, small_pipeline(), reward, stop_at_two, nothing, Job(part))
    again = Run(tmp_path / "part", {}, resume=True)
    resumed, cost_again = train_srrl(config, small_pipeline(), reward, four_texts, nothing, Job(again))
    for (name, a), b in zip(expected.unet.state_dict().items(), resumed.unet.state_dict().values()):
        assert torch.equal(a, b), name
    assert cost == cost_again
    assert whole.metrics("srrl") == again.metrics("srrl")
    assert 4 * 16 < cost.rewards < 4 * 32


def test_ppo_without_a_step_that_it_can_train_is_refused(tmp_path: Path) -> None:
    """The only step of one lands on the picture, and draws next to no noise."""
    config, run = replace(CONFIG, objective="ppo", steps=1), Run(tmp_path / "run", {})
    with pytest.raises(ValueError, match="with steps 1 no step draws enough noise for ppo"):
        train_srrl(config, small_pipeline(), brightness, four_texts, nothing, Job(run))


def test_bad_configurations_are_refused_with_the_numbers() -> None:
    for field, value, message in (
        ("rounds", -1, "rounds must be at least 0"),
        ("suffixes", (9,), "between 1 and steps = 4"),
        ("clip_range", 0.0, "clip"),
        ("fresh_noise", 1.5, "fresh_noise"),
        ("anchor_below", 1000, "anchor_below"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **{field: value})
    few = "advantage group needs two pictures of a prompt or more, got one; try --group 4"
    for one in ({"rounds": 0}, {"mode": "blind"}):
        with pytest.raises(ValueError, match=few):
            replace(CONFIG, group=1, **one)
    assert replace(CONFIG, group=1, rounds=0, objective="regress").advantage == "group"  # it reads none
    for other in ({"kl": 0.1}, {"ratio": "guard"}):
        with pytest.raises(ValueError, match="has no effect with objective regress; use objective ppo"):
            replace(CONFIG, objective="regress", **other)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_recipes_are_what_their_papers_do(checkpoint: bool) -> None:
    srrl, ddpo, grpo = (recipe(name, checkpoint) for name in ("srrl", "ddpo", "grpo"))
    assert srrl.rounds > 0 == ddpo.rounds == grpo.rounds
    assert (srrl == SRRLConfig()) == (not checkpoint)
    assert (ddpo.objective, ddpo.advantage, ddpo.pull) == ("ppo", "history", 0)
    assert (grpo.objective, grpo.advantage) == ("grpo", "group") and srrl.objective == "grpo"
    assert srrl.pull == grpo.pull > 0
    paper = recipe("paper", checkpoint)
    assert (paper.objective, paper.mode, paper.w_renoise, paper.suffixes) == ("ppo", "blind", 0.1, (1, 5, 9))
    # the released SRRL: 20 steps at guidance 5, re-noised in 20 with 0.1; five branches, two passes over each
    assert (paper.steps, paper.guidance, paper.renoise_steps, paper.group) == (20, 5.0, 20, 5)
    assert (paper.renormalise, paper.fresh_noise, paper.pull) == (False, 0.0, 0.0)
    assert paper.updates == ddpo.updates == 2 and ddpo.steps == 20
    assert not checkpoint or paper.clip_range == ddpo.clip_range == 1e-4
    assert ddpo.group == grpo.group == 4 and srrl.wrong == "opposite"
    assert (srrl.renoise_steps, srrl.w_renoise, srrl.fresh_noise**2, srrl.renormalise) == (5, 0, 0.25, True)
    if checkpoint:  # rewards have no value that means accepted, and differ little
        assert srrl.redraw == "all" and srrl.std_floor == grpo.std_floor == 1e-3
    else:
        assert srrl.redraw == "refused" and paper.lr == ddpo.lr == 3e-5
        assert ddpo.prompts_per_iteration * 4 == pytest.approx(srrl.prompts_per_iteration * 1.3, rel=0.05)
    with pytest.raises(ValueError, match="'dpo' is not one of srrl, paper, ddpo, grpo"):
        recipe("dpo")


def test_every_iteration_has_its_own_noise_rate_and_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loop hands to the learner: the reward's values and not the inspector's, the schedule of the
    learning rate, a random stream of the step, the history of the iterations before; and what it adds up.
    """
    given, known, watched = [], [], []

    def noted(learner: Learner, out: Rollout, factor: float, noise: torch.Generator) -> UpdateStats:
        given.append((learner, out, factor, noise.initial_seed()))
        known.append(learner.history.past("a"))
        learner.history.add(["a"], torch.tensor([float(len(known))]))
        return UpdateStats(0.0, 0.0, 0.0, 3, 7)

    def counted(rule: SRRLConfig, run: Run, memory: dict, seen: dict) -> None:
        watched.append(memory.setdefault("seen", len(watched)))

    monkeypatch.setattr(srrl, "learn", noted), monkeypatch.setattr(srrl, "watch", counted)
    config = replace(CONFIG, objective="grpo", iterations=4, cooldown=0.5, replay=3)
    run = Run(tmp_path / "run", {})
    draw = lambda step: (TEXTS, [f"{step} {text[2]}" for text in TEXTS])  # noqa: E731
    pipe, cost = train_srrl(config, small_pipeline(), brightness, draw, nothing, Job(run, 5))
    learners, outs, factors, seeds = zip(*given)
    assert watched == [0] * 4  # all are compared with the first
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1 / 2])
    assert seeds == tuple(rng(5, "update", step).initial_seed() for step in range(4))
    assert known == [[], [1], [1, 2], [1, 2, 3]]
    assert [out.families for out in outs] == [draw(step)[1] for step in range(4)]
    for out in outs:
        for r in out.rounds:
            torch.testing.assert_close(r.rewards.flatten(), brightness(r.images, []))
    starts = torch.stack([out.rounds[0].x_T for out in outs])
    assert torch.equal(starts, torch.stack([pipe.noise(4, rng(5, "start", step)) for step in range(4)]))
    assert (
        len(learners[0].networks["replay"].values) == 3 * 4 * 4 * 2
    )  # iterations, prompts, branches, rounds
    assert cost.trained == 28 and cost.rewards == 4 * 32 and cost.unet == sum(out.cost.unet for out in outs)
    last = run.metrics("srrl")[-1]
    assert (last["updates_total"], last["reward_calls"]) == (12, 128)
    assert last["unet_evaluations"] == cost.unet + 28 and last["right"] == 0


@pytest.mark.parametrize(("group", "flat"), [(2, {"flat": 0.25}), (1, {})])
def test_signs_of_a_collapse_are_those_of_the_first_round(
    group: int, flat: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own pictures, before any is drawn again.  One group of four is flat; a group of a single
    branch is no sign.
    """
    outs, watched, stats = [], [], UpdateStats(0.0, 0.0, 0.0, 1, 1, 0.25, 0.5)
    monkeypatch.setattr(srrl, "learn", lambda learner, out, *_: outs.append(out) or stats)
    monkeypatch.setattr(srrl, "watch", lambda rule, run, memory, seen: watched.append(seen) or "grey")
    asked = []

    def flat_for_the_first(images: Tensor, prompts: list[str]) -> Tensor:
        """In the first round; in the second for all."""
        asked.append(prompts)
        flat = torch.tensor([p == TEXTS[0] or len(asked) > 1 for p in prompts])
        return torch.where(flat, 0.5, brightness(images, prompts))

    shown, told, found = [], [], srrl.statistics
    monkeypatch.setattr(Run, "show", lambda self, stage, step, images: shown.append(images))
    monkeypatch.setattr(srrl, "statistics", lambda *given: told.append(given[2]) or found(*given))
    config, run = replace(CONFIG, iterations=1, group=group), Run(tmp_path / "run", {})
    inspector = nothing if group > 1 else None
    train_srrl(config, small_pipeline(), flat_for_the_first, four_texts, inspector, Job(run))
    first, last = outs[0].rounds
    assert told == [group > 1] and shown[0] is first.images  # without an inspector nothing is read
    sizes = [r.path.latents[:, -1].double().abs().mean().item() for r in (first, last)]
    pale = (first.images.double().std((2, 3)) < 0.05).all(1).double().mean().item()
    wanted = {"size": sizes[0], "constant": pale, "clip_high": 0.25, "clip_low": 0.5} | flat
    assert watched == [pytest.approx(wanted, rel=1e-5)] and sizes[0] != pytest.approx(sizes[1], rel=1e-4)
    (row,) = run.metrics("srrl")
    assert row["collapse"] == "grey" and row["x0_size"] == watched[0]["size"]
