"""RL-RIG: the loop, its guard and its costs; both phases of Reflection-GRPO; the Checker's answers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minireflect import rng
from minireflect.diffusion.schedule import Schedule, ScheduleConfig
from minireflect.methods import learn
from minireflect.methods.learn import LearnConfig
from minireflect.methods.rlrig import (
    LoopConfig,
    Parts,
    RLRIGConfig,
    attempts,
    draw,
    edit,
    graphs_of,
    load_parts,
    loop_of,
    prompts_of,
    redraw,
    reflect_and_edit,
    scripted_actor,
    silent_actor,
    train_actor_grpo,
    train_editor,
    update_actor,
)
from minireflect.models.actor import Actor, ActorConfig
from minireflect.models.autoencoder import Autoencoder, AutoencoderConfig
from minireflect.models.clip import TextConfig, TextEncoder
from minireflect.models.matcher import CrossBlock, Matcher, MatcherConfig
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.models.unet import UNet, UNetConfig
from minireflect.pipeline import LatentDiffusion
from minireflect.rl.checker import Answers, load_checker, matcher_checker
from minireflect.run import Run
from minireflect.streams import choices
from minireflect.world.captions import PROMPT_LENGTH
from minireflect.world.captions import graph_vocabulary as vocabulary
from minireflect.world.graphs import SceneGraph, parse_graph
from minireflect.world.layout import sample_graph, sample_picture
from minireflect.world.render import render

TOKENS = Tokenizer.of(vocabulary(), PROMPT_LENGTH)
LOOP = LoopConfig(rounds=2, steps=4, t_star=0.5, fresh_noise=0.5, edit_guidance=1.0)
GRAPHS = [
    parse_graph(t) for t in ("red ball on blue box", "green block left of yellow cone", "two red balls")
]


def pipeline(seed: int = 0) -> LatentDiffusion:
    torch.manual_seed(seed)
    text = TextEncoder(TextConfig(len(TOKENS), EOS, PROMPT_LENGTH, width=16, layers=1, heads=2))
    unet = UNet(UNetConfig((16, 16), (1, 0), 0, 16, res_blocks=1, heads=2, groups=4))
    for p in unet.parameters():  # the output layer starts at zero; a policy must depend on its input
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    autoencoder = Autoencoder(AutoencoderConfig((8, 8, 8, 8), res_blocks=1, groups=4))
    return LatentDiffusion(TOKENS, text, unet, autoencoder, Schedule(ScheduleConfig())).eval()


class Counting(torch.nn.Module):
    """A UNet that counts the pictures that go through it."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet, self.count = unet, 0

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.count += len(x)
        return self.unet(x, t, context)


def fickle_checker(images: Tensor, graphs: list[SceneGraph]) -> Answers:
    """One requirement is never met, the other in about half of the pictures, by their far decimals."""
    met = (1e4 * images.mean((1, 2, 3)).double() % 1 > 0.5).float()
    return Answers(torch.stack([0.1 * met, met], 1), torch.ones(len(graphs), 2, dtype=torch.bool))


def saying(*probability: float):
    """A checker that says the same of every picture."""

    def check(images: Tensor, graphs: list[SceneGraph]) -> Answers:
        p = torch.tensor(probability).expand(len(graphs), -1)
        return Answers(p, torch.ones_like(p, dtype=torch.bool))

    return check


def small_parts(checker=fickle_checker) -> Parts:
    diffuser = pipeline()
    actor = Actor(ActorConfig(len(TOKENS), width=16, layers=1, heads=2, written=6)).eval()
    return Parts(diffuser, replace(diffuser, unet=pipeline(1).unet), checker, actor)


def test_an_edit_at_t_star_0_returns_the_picture() -> None:
    pipe = pipeline()
    x0 = pipe.noise(3, rng(0, "x"))
    path = edit(pipe, x0, ["a red ball"] * 3, replace(LOOP, t_star=0.0), rng(0, "edit"))
    assert torch.equal(path.latents[:, -1], x0) and path.log_probs.shape == (3, 0)
    assert replace(LOOP, t_star=0.0).edit_cost == 0
    moved = edit(pipe, x0, ["a red ball"] * 3, LOOP, rng(0, "edit")).latents[:, -1]
    assert not torch.equal(moved, x0)


def test_a_picture_that_meets_its_goal_is_not_edited() -> None:
    diffuser, editor = pipeline(), pipeline(1)
    editor.unet = Counting(editor.unet)

    def never(*_: object) -> list[str]:
        raise AssertionError("the Actor was asked about a picture that is right")

    looks = list(reflect_and_edit(diffuser, editor, saying(0.9, 0.5), never, GRAPHS, LOOP, rng(0)))
    assert len(looks) == 1 and editor.unet.count == 0
    assert looks[0].evaluations.tolist() == [4, 4, 4] and looks[0].calls.tolist() == [1, 1, 1]


def test_only_what_is_wrong_is_edited() -> None:
    def checker(images: Tensor, graphs: list[SceneGraph]) -> Answers:
        ok = torch.tensor([[0.9 if g is GRAPHS[0] else 0.1, 0.9] for g in graphs])
        return Answers(ok, torch.ones_like(ok, dtype=torch.bool))

    first, *later = reflect_and_edit(pipeline(), pipeline(1), checker, silent_actor, GRAPHS, LOOP, rng(0))
    assert len(later) == 2
    for look in later:
        assert look.rows.tolist() == [1, 2]
        assert torch.equal(look.latents[0], first.latents[0])
        assert not torch.equal(look.latents[1:], first.latents[1:])


def test_an_edit_that_hurts_is_not_kept() -> None:
    said = iter([[0.4, 0.9], [0.4, 0.8], [0.1, 0.95]])

    def worse(images: Tensor, graphs: list[SceneGraph]) -> Answers:
        p = torch.tensor(next(said)).expand(len(graphs), -1)
        return Answers(p, torch.ones_like(p, dtype=torch.bool))

    looks = list(reflect_and_edit(pipeline(), pipeline(1), worse, silent_actor, GRAPHS, LOOP, rng(0)))
    assert len(looks) == 3
    for look in looks[1:]:
        assert torch.equal(look.latents, looks[0].latents) and torch.equal(look.images, looks[0].images)
        assert not torch.equal(look.tried, look.images)
    assert torch.equal(looks[2].answers.probability, looks[0].answers.probability)


@pytest.mark.parametrize(
    "loop",
    [
        LOOP,
        replace(LOOP, fresh_noise=1.0),
        replace(LOOP, guidance=2.0, w_invert=0.5),
        replace(LOOP, edit_guidance=2.0),
    ],
)
def test_the_costs_are_what_a_counting_network_counts(loop: LoopConfig) -> None:
    diffuser = pipeline()
    diffuser.unet = Counting(diffuser.unet)
    for looks in (
        reflect_and_edit(diffuser, diffuser, fickle_checker, silent_actor, GRAPHS, loop, rng(0)),
        redraw(diffuser, fickle_checker, GRAPHS, loop, rng(0), patient=True),
        redraw(diffuser, saying(0.9), GRAPHS, loop, rng(0), patient=False),
        redraw(diffuser, saying(0.9), GRAPHS, loop, rng(0), patient=True),
    ):
        diffuser.unet.count = 0
        *_, last = looks
        assert int(last.evaluations.sum()) == diffuser.unet.count


def test_sdedit_mixes_the_picture_with_noise_alone() -> None:
    """fresh_noise 1: x_t = sqrt(abar) x0 + sqrt(1 - abar) n, whatever the network says."""
    from minireflect.diffusion.reflection import ReflectionConfig, renoise_to

    pipe, n = pipeline(), 2_000
    x0 = torch.full((n, 4, 1, 1), 3.0)
    config = ReflectionConfig(steps=4, strength=0.5, fresh_noise=1.0)

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("SDEdit asks no network")

    x = renoise_to(never, x0, pipe.table(4), config, rng(0, "sdedit"))
    abar = config.tail(pipe.table(4)).abar[0].item()
    assert abs(x.mean().item() - 3 * abar**0.5) < 4 * ((1 - abar) / (4 * n)) ** 0.5
    assert abs(x.var().item() - (1 - abar)) < 4 * (1 - abar) * (2 / (4 * n)) ** 0.5


def test_the_editor_reads_the_sentence_and_the_edit() -> None:
    assert prompts_of(GRAPHS[:2], ["a red ball at the top", ""]) == [
        "a red ball on a blue box with a red ball at the top",
        "a green block left of a yellow cone",
    ]


def test_the_script_speaks_of_what_is_unmet_in_words_that_the_editor_knows() -> None:
    answers = Answers(torch.tensor([[0.9, 0.2, 0.3, 0.9]]), torch.ones(1, 4, dtype=torch.bool))
    for seed in range(5):
        (said,) = scripted_actor(torch.zeros(1, 4, 8, 8), GRAPHS[:1], answers, rng(seed))
        ball, box = said.split(" and ")  # both ends of the relation that does not hold, as it tells them
        assert "red ball" in ball and "blue box" in box
        TOKENS(prompts_of(GRAPHS[:1], [said]))  # raises on an unknown word


def test_answers_count_only_what_is_asked() -> None:
    p = torch.tensor([[0.9, 0.4, 0.6], [0.9, 0.9, 1.0]])
    asked = torch.tensor([[True, True, True], [True, True, False]])
    answers = Answers(p, asked)
    assert answers.share.tolist() == pytest.approx([2 / 3, 1.0])
    assert answers.all_hold.tolist() == pytest.approx([0.9 * 0.4 * 0.6, 0.81])
    assert answers.score[0].item() == pytest.approx(2 / 3 + 1e-3 * 1.9 / 3)


# ----------------------------------------------------------------------------------------------------------
# training

CONFIG = RLRIGConfig(
    LOOP,
    rounds=2, graphs=3, group=3, actor_iterations=1, editor_iterations=1, actor_lr=1e-2,
    editor=LearnConfig(updates=2, batch=4, lr=1e-2),
)  # fmt: skip


def small_matcher(fused: bool) -> Matcher:
    torch.manual_seed(0)
    sizes = MatcherConfig(
        len(TOKENS), EOS, PROMPT_LENGTH, 16, 1, heads=2, stem=(8, 8), fused=fused, init_std=1.0
    )
    return Matcher(sizes).eval()


@pytest.mark.parametrize("fused", [False, True])
def test_every_question_is_answered_as_if_it_were_the_only_one(fused: bool) -> None:
    matcher = small_matcher(fused)
    images = torch.randn(3, 3, 64, 64, generator=rng(0, "images"))
    answers = matcher_checker(matcher, TOKENS, batch=2)(images, GRAPHS)
    for i, graph in enumerate(GRAPHS):
        n = len(graph.requirements)
        assert answers.asked[i].tolist() == [j < n for j in range(answers.asked.shape[1])]
        assert (answers.probability[i, n:] == 1).all()
        for requirement, p in zip(graph.requirements, answers.probability[i]):
            alone = torch.sigmoid(matcher(images[i : i + 1], TOKENS([requirement.words])))
            torch.testing.assert_close(p[None], alone, atol=1e-5, rtol=0)
    assert answers.probability[answers.asked].std() > 1e-3  # it does depend on what is asked


def test_fused_words_hear_what_the_words_before_them_saw() -> None:
    """What a word has seen reaches the next block of later words only if they look at each other there."""
    x, patches = torch.randn(1, 3, 16, generator=rng(0, "x")), torch.randn(1, 4, 16, generator=rng(0, "p"))
    other = torch.cat([-x[:, :1], x[:, 1:]], 1)
    torch.manual_seed(0)
    for fused in (False, True):
        block = CrossBlock(16, 2, fused)
        moved = (block(other, patches) - block(x, patches)).abs().amax((0, 2))  # (t)
        assert moved[0] > 1e-3 and bool((moved[1:] > 1e-4).all()) is fused
        late = torch.cat([x[:, :-1], -x[:, -1:]], 1)
        assert torch.equal(block(late, patches)[:, :-1], block(x, patches)[:, :-1])  # and never the other way


def weights(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("objective", ["regress", "ppo"])
def test_each_phase_trains_its_own_network_alone(
    tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn, "MIN_SIGMA", 0.0), monkeypatch.setattr(learn, "TRAINED", 1.0)
    parts = small_parts()
    editor = replace(CONFIG.editor, objective=objective)
    config = replace(CONFIG, editor=editor)
    before = [
        weights(m) for m in (parts.actor, parts.editor.unet, parts.diffuser.unet, parts.editor.text_encoder)
    ]
    run = Run(tmp_path / "run", {})
    train_actor_grpo(config, 0, parts, run)
    after = [
        weights(m) for m in (parts.actor, parts.editor.unet, parts.diffuser.unet, parts.editor.text_encoder)
    ]
    assert [same(a, b) for a, b in zip(before, after)] == [False, True, True, True]
    train_editor(config, 0, parts, run)
    end = [
        weights(m) for m in (parts.actor, parts.editor.unet, parts.diffuser.unet, parts.editor.text_encoder)
    ]
    assert [same(a, b) for a, b in zip(after, end)] == [True, False, True, True]
    row = run.metrics("phase-2")[0]
    assert row["first_ratio"] == 0 and row["updates"] == 2
    assert run.metrics("phase-1")[0]["first_ratio"] == 0


def test_a_group_shares_its_edit_prompt_in_phase_2_only() -> None:
    parts, g = small_parts(), CONFIG.group
    for shared in (True, False):
        done = attempts(parts, GRAPHS, CONFIG, shared, rng(0, "attempts"))
        assert len(done) == CONFIG.rounds == 2
        for a in done:
            n = len(a.graphs)
            assert a.path.latents.shape == (n * g, LOOP.edited + 1, 4, 8, 8)
            assert a.rewards.shape == (n, g) and len(a.prompts) == n * g
            assert len(a.written.ids) == (n if shared else n * g)
            groups = [set(a.prompts[i * g : i * g + g]) for i in range(n)]
            assert all(len(s) == 1 for s in groups) == shared
            assert not torch.equal(a.path.latents[0, -1], a.path.latents[1, -1])  # their noise differs


def test_the_best_of_a_group_goes_on_to_the_next_round() -> None:
    done = attempts(small_parts(), GRAPHS, CONFIG, True, rng(3, "attempts"))
    g = CONFIG.group
    for a, b in zip(done, done[1:]):
        score = a.after.score.view(-1, g)
        for i in range(len(a.graphs)):
            best = a.path.latents[i * g + int(score[i].argmax()), -1]
            wanted = best if score[i].max() >= a.before.score[i] else a.latents[i]
            assert torch.equal(b.latents[i], wanted)


def test_phase_1_makes_rewarded_words_likelier() -> None:
    """A bandit: edits that say "red" are rewarded, whatever the picture; forty iterations teach it."""
    parts, red = small_parts(), TOKENS.ids["red"]
    config = replace(CONFIG, rounds=1, group=16, actor_lr=1e-3, beta=0.0)
    reference, actor = small_parts().actor, parts.actor.requires_grad_(True)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=config.actor_lr)
    (seen,) = attempts(parts, GRAPHS, config, False, rng(0, "bandit"))
    states = seen.latents.repeat_interleave(16, 0), seen.read.repeat_interleave(16, 0)
    shares = []
    for step in range(40):
        written = actor.write(*states, rng(step, "bandit"))
        won = (written.ids == red).any(1, keepdim=True).float()  # (n*g 1)
        rewarded = seen._replace(written=written, after=Answers(won, torch.ones_like(won, dtype=torch.bool)))
        stats = update_actor(actor, reference, optimizer, [rewarded], config)
        assert stats.first_ratio == 0
        shares.append(won.mean().item())
    assert sum(shares[:5]) / 5 < 0.35 and sum(shares[-5:]) / 5 > 0.7


def test_equal_rewards_teach_nothing() -> None:
    parts = small_parts()
    done = attempts(parts, GRAPHS, CONFIG, False, rng(0, "flat"))
    flat = [a._replace(after=Answers(torch.ones_like(a.after.probability), a.after.asked)) for a in done]
    actor = parts.actor.requires_grad_(True)
    optimizer = torch.optim.SGD(actor.parameters(), lr=1.0)
    before = weights(actor)
    stats = update_actor(actor, small_parts().actor, optimizer, flat, replace(CONFIG, beta=0.0))
    assert same(before, weights(actor)) and stats.flat_groups == sum(len(a.graphs) for a in flat)


def test_bad_options_are_named() -> None:
    for bad, words in (
        ({"t_star": 1.5}, "t_star 1.5"),
        ({"rounds": -1}, "rounds -1"),
        ({"fresh_noise": 2.0}, "fresh_noise"),
        ({"eta": -0.1}, "eta"),
    ):
        with pytest.raises(ValueError, match=words):
            LoopConfig(**bad)
    with pytest.raises(ValueError, match="at least 2"):
        RLRIGConfig(group=1)
    with pytest.raises(ValueError, match="step noise"):
        RLRIGConfig(LoopConfig(eta=0.0))


def test_graphs_of_an_iteration_are_of_the_training_split_and_differ() -> None:
    assert graphs_of(0, 0, CONFIG) == graphs_of(0, 0, CONFIG) != graphs_of(0, 1, CONFIG)


def test_drawing_depends_on_the_noise_alone() -> None:
    pipe = pipeline()
    a, b = (draw(pipe, GRAPHS, LOOP, rng(s, "draw")) for s in (0, 0))
    assert torch.equal(a, b) and not torch.equal(a, draw(pipe, GRAPHS, LOOP, rng(1, "draw")))


# ------------------------------------------------------------------------------------------------------- the
# Checker


def test_a_held_out_graph_is_never_trained_on() -> None:
    chance = random.Random(0)
    trained = {g.triples for g in (sample_graph(chance) for _ in range(300))}
    assert not trained & {sample_graph(chance, "held-out").triples for _ in range(100)}


@pytest.mark.parametrize("name", ["checker", "judge"])
def test_the_shipped_networks_answer_about_held_out_scenes(name: str) -> None:
    """Half of the requirements are true, half are another graph's; 97 % is what 2,000 questions measure
    (docs/log.md).
    """
    check, draw = load_checker(name=name), choices(3, "held-out")
    pictures = [sample_picture(draw, "held-out") for _ in range(60)]
    images = torch.stack([render(scene) for _, scene in pictures])
    graphs = [g for g, _ in pictures]
    right = []
    for asked in (graphs, graphs[1:] + graphs[:1]):
        answers = check(images, asked)
        for (_, scene), graph, met in zip(pictures, asked, answers.met):
            right += [
                r.met_by(scene.objects) == bool(said) for r, said in zip(graph.requirements, met.tolist())
            ]
    assert len(right) > 400 and sum(right) / len(right) > 0.94


def test_the_shipped_loop_keeps_what_is_right_and_edits_the_rest() -> None:
    parts, graphs = load_parts(), graphs_of(5, 0, replace(CONFIG, graphs=12))
    first, *later = loop_of(parts, LoopConfig(rounds=1))(graphs, rng(0, "shipped"))
    accepted = first.answers.met.all(1)
    assert later and torch.equal(later[-1].images[accepted], first.images[accepted])
    assert (later[-1].answers.score >= first.answers.score).all()
    assert all(edit.count(" at the ") >= 1 for edit in later[-1].edits)  # it names places
