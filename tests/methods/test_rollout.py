"""What an iteration samples: rounds, branches, and the noise that they start from."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minireflect.diffusion import reflection
from minireflect.diffusion.reflection import ReflectionConfig
from minireflect.diffusion.sample import denoise, last, renoise
from minireflect.methods.rollout import rollout
from minireflect.streams import rng
from tests.methods.common import CONFIG, REFUSED, likes_the_first_and_third
from tests.small import TEXTS, brightness, small_pipeline


@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("mode", ["select", "blind"])
@pytest.mark.parametrize("w_renoise", [0.0, 0.1])
def test_rounds_branches_and_costs(mode: str, rounds: int, w_renoise: float) -> None:
    config = replace(CONFIG, mode=mode, rounds=rounds, w_renoise=w_renoise, renoise_steps=3)
    out = rollout(small_pipeline(), TEXTS, brightness, config, 0, 0)
    drawn = rounds + 1 if mode == "select" else 1
    assert len(out.rounds) == drawn and out.cost.rewards == drawn * 16
    n, g, s = 4, 4, 4
    back = config.renoise_steps * (2 if w_renoise else 1)  # guided: two evaluations
    reflecting = rounds * n * (back + (0 if mode == "select" else s * 2))  # blind draws too, guided
    assert out.cost.unet == drawn * n * g * s + reflecting
    for round_ in out.rounds:
        assert round_.path.latents.shape == (16, 5, 4, 4, 4) and round_.rewards.shape == (4, 4)
        assert round_.path.latents.dtype == torch.float32


def test_select_renoises_the_picture_that_the_reward_prefers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(eps, x0, *rest):
        seen.append(x0)
        return x0

    monkeypatch.setattr(reflection, "renoise_to", spy)
    out = rollout(small_pipeline(), TEXTS, brightness, CONFIG, 0, 0)
    best = out.rounds[0].rewards.argmax(1)
    final = out.rounds[0].path.latents[:, -1].view(4, 4, 4, 4, 4)
    assert torch.equal(seen[0], final[torch.arange(4), best])
    assert torch.equal(out.rounds[1].x_T, seen[0])  # and the next round starts from what came of it


def test_pictures_are_renoised_with_a_guidance_and_steps_of_their_own() -> None:
    config = replace(
        CONFIG, guidance=3.0, w_renoise=0.5, renoise_steps=3, group=1, fresh_noise=0.0, wrong="repeat",
        renormalise=False, advantage="shrunk",
    )  # fmt: skip
    pipe = small_pipeline()
    first, second = rollout(pipe, TEXTS, brightness, config, 0, 0).rounds
    back = last(renoise(pipe.eps(TEXTS)(0.5), first.path.latents[:, -1], pipe.schedule.table(3)))
    torch.testing.assert_close(second.x_T, back, atol=1e-5, rtol=1e-5)


def test_what_the_reward_refuses_is_drawn_again_from_the_opposite_noise() -> None:
    """The same noise with another sign, or another noise, for the prompts whose best picture is below
    `accept`.
    """
    config = replace(CONFIG, fresh_noise=0.0, wrong="repeat")
    first, again = rollout(small_pipeline(), TEXTS, brightness, config, 0, 0).rounds
    best = first.rewards.amax(1)
    accept = best.sort().values[2].item()  # two are refused, two accepted
    refused = best < accept
    for wrong in ("opposite", "fresh"):
        _, second = rollout(
            small_pipeline(), TEXTS, brightness, replace(config, wrong=wrong, accept=accept), 0, 0
        ).rounds
        assert torch.equal(second.x_T[~refused], again.x_T[~refused])
        if wrong == "opposite":
            assert torch.equal(second.x_T[refused], -again.x_T[refused])
        else:
            alike = torch.cosine_similarity(second.x_T[refused].flatten(1), again.x_T[refused].flatten(1))
            assert alike.abs().max() < 0.5  # 64 numbers: chance gives 0.125


def test_accepted_prompts_are_not_drawn_again() -> None:
    """Round by round only what was refused goes on, with its own prompt and picture, and only that is paid
    for.
    """
    config = replace(REFUSED, fresh_noise=0.0)
    asked = []

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(prompts)
        pleased = 10 * (len(asked) == 3)  # by the third round: there is no fourth
        return likes_the_first_and_third(images, prompts) + pleased

    out = rollout(small_pipeline(), TEXTS, judge, config, 0, 0)
    assert [r.rows.tolist() for r in out.rounds] == [[0, 1, 2, 3], [1, 3], [1, 3]]
    assert asked[1] == [TEXTS[i] for i in (1, 3) for _ in range(4)] == out.texts_of(out.rounds[1])
    assert torch.equal(out.context_of(out.rounds[1]), out.context[[1, 3]].repeat_interleave(4, 0))
    assert out.cost.rewards == 8 * 4 and out.cost.unet == 8 * 4 * 4 + 4 * config.renoise_steps
    everybody = replace(config, rounds=1, redraw="all")
    alone = rollout(small_pipeline(), TEXTS, likes_the_first_and_third, everybody, 0, 0).rounds[1]
    assert torch.allclose(out.rounds[1].x_T, alone.x_T[[1, 3]], atol=1e-5)  # nobody is mistaken for another


def test_rollout_keeps_no_graph_even_when_the_policy_is_trainable() -> None:
    pipe = small_pipeline()
    pipe.unet.requires_grad_(True)
    for mode in ("select", "blind"):
        out = rollout(pipe, TEXTS, brightness, replace(CONFIG, mode=mode), 0, 0)
        assert not any(
            t.requires_grad for r in out.rounds for t in (r.x_T, r.path.latents, r.path.log_probs, r.images)
        )


def test_drawing_leaves_the_global_stream_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rollout(small_pipeline_keeping_state(), TEXTS, brightness, CONFIG, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def small_pipeline_keeping_state():
    state = torch.get_rng_state()
    pipe = small_pipeline()
    torch.set_rng_state(state)
    return pipe


def test_branches_share_their_prefix_and_part_after_it() -> None:
    config = replace(CONFIG, suffixes=(1, 3), rounds=0)
    for step, suffix in ((0, 1), (1, 3), (2, 1)):
        round_ = rollout(small_pipeline(), TEXTS, brightness, config, 0, step).rounds[0]
        assert len(round_.table) == suffix and round_.path.latents.shape[1] == suffix + 1
        groups = round_.path.latents.view(4, 4, suffix + 1, 4, 4, 4)
        assert torch.equal(groups[:, 0, 0], groups[:, 3, 0]) and not torch.equal(
            groups[:, 0, -1], groups[:, 3, -1]
        )


def test_without_rounds_every_branch_has_its_own_start() -> None:
    """As in DDPO; branches that share a prefix, or reflect, share their start."""
    alone = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, rounds=0), 0, 0).rounds[0]
    assert len(alone.x_T) == 16 and len(alone.x_T.flatten(1).unique(dim=0)) == 16
    assert torch.equal(alone.path.latents[:, 0], alone.x_T)
    for change in (
        {"rounds": 1},
        {"rounds": 0, "suffixes": (4,)},
        {"rounds": 0, "group": 1, "objective": "regress"},
    ):
        first = rollout(small_pipeline(), TEXTS, brightness, replace(CONFIG, **change), 0, 0).rounds[0]
        assert len(first.x_T) == 4


def test_every_place_that_draws_has_a_stream_of_its_own() -> None:
    """No noise is the same twice: of the start, of reflection and of branches, over rounds and iterations.  A
    network that predicts nothing leaves them bare: x_prev - mean is a step's noise.
    """
    pipe = small_pipeline()
    torch.nn.init.zeros_(pipe.unet.conv_out.weight), torch.nn.init.zeros_(pipe.unet.conv_out.bias)
    config = replace(CONFIG, rounds=2, group=2, fresh_noise=1.0, wrong="fresh")
    seen = []
    for step in range(2):
        for round_ in rollout(pipe, TEXTS, brightness, config, 0, step).rounds:
            drawn = round_.path.latents[:, 1:] - round_.path.means  # (n*g s c h w)
            seen += [*round_.x_T, *(drawn / round_.sigmas.view(1, -1, 1, 1, 1)).flatten(0, 1)]
    noises = torch.stack(seen).flatten(1)  # (2*3*(4 + 8*4) 64)
    alike = torch.corrcoef(noises) - torch.eye(len(noises))
    assert len(noises) == 216 and alike.abs().max() < 0.7  # chance: 0.125 each, six of them are 0.75


def test_a_picture_is_renoised_with_its_own_prompt_in_later_rounds_too() -> None:
    how = {"w_renoise": 0.5, "fresh_noise": 0.0, "wrong": "repeat", "renormalise": False, "rounds": 2}
    pipe, config = small_pipeline(), replace(REFUSED, **how)
    _, second, third = rollout(pipe, TEXTS, likes_the_first_and_third, config, 0, 0).rounds
    best = second.path.latents[second.rewards.argmax(1) + torch.tensor([0, config.group]), -1]
    back = last(renoise(pipe.eps([TEXTS[1], TEXTS[3]])(0.5), best, pipe.table(config.renoise_steps)))
    assert third.rows.tolist() == [1, 3]
    torch.testing.assert_close(third.x_T, back, atol=1e-5, rtol=1e-5)


def test_branches_follow_ddim_with_their_own_prompt_guidance_and_noise() -> None:
    """By equation 12, after the two steps that a group shares, in rounds of four prompts and of two."""
    pipe, config = small_pipeline(), replace(REFUSED, suffixes=(2,), guidance=3.0, rounds=1, group=3)
    table = pipe.schedule.table(4)
    for k, r in enumerate(rollout(pipe, TEXTS, likes_the_first_and_third, config, 5, 0).rounds):
        texts, x = [TEXTS[i] for i in ((0, 1, 2, 3), (1, 3))[k]], r.path.latents
        shared = denoise(pipe.eps(texts)(3.0), r.x_T, table[:2], 1.0, rng(5, "branch", 0, k))
        torch.testing.assert_close(x[::3, 0], last(shared))
        cond, null = (pipe.embed([t for t in v for _ in range(3)]) for v in (texts, [""] * len(texts)))
        for i, j in ((0, 2), (1, 3)):  # of the branch, of the table
            a, b, sigma = table.abar[j], table.abar_prev[j], table.sigma(1.0)[j]
            eps = [pipe.unet(x[:, i], table.t[j].expand(len(x)), c) for c in (null, cond)]
            eps = eps[0] + 3 * (eps[1] - eps[0])
            mean = b.sqrt() * (x[:, i] - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - sigma**2).sqrt() * eps
            torch.testing.assert_close(r.path.means[:, i], mean, rtol=1e-4, atol=1e-4)
            assert r.sigmas[i] == sigma and ((x[:, i + 1] - mean) / sigma).std() == pytest.approx(1, abs=0.15)
        torch.testing.assert_close(r.images, pipe.decode(x[:, -1]))


def test_the_options_of_reflection_are_handed_on() -> None:
    how = {"rounds": 2, "w_renoise": 0.3, "renormalise": False, "fresh_noise": 0.6, "wrong": "fresh"}
    how |= {"redraw": "all"}
    assert replace(CONFIG, renoise_steps=7, **how).reflection == ReflectionConfig(steps=7, **how)


def test_blind_rounds_have_new_noise_each() -> None:
    config = replace(CONFIG, mode="blind", fresh_noise=1.0)
    one, two = (rollout(small_pipeline(), TEXTS, brightness, replace(config, rounds=n), 0, 0) for n in (1, 2))
    assert not torch.equal(one.rounds[0].x_T, two.rounds[0].x_T)
