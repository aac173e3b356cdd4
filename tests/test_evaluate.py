"""Measuring laws: fixed prompts and noise, intervals, tables for a terminal and for a page."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from minireflect import evaluate as measuring
from minireflect import load_pipeline, load_reward
from minireflect.evaluate import (
    WIDTH,
    EvaluationConfig,
    Table,
    evaluate,
    evaluate_rewards,
    fixed_batches,
    interval,
    law_table,
    off_reward,
    sample_and_score,
    score,
    wilson,
)
from minireflect.evaluate_graphs import evaluation_graphs, loop_bars
from minireflect.evaluate_reason import evaluation_prompts, table_row
from minireflect.pipeline import SamplerConfig
from minireflect.streams import choices
from minireflect.world.laws import render
from minireflect.world.layout import pair_split
from minireflect.world.prompts import draw_prompts, prompt_set
from minireflect.world.scenes import SPLITS
from tests.small import TEXTS, Stopped, brightness, small_pipeline, stop


@pytest.mark.slow
def test_evaluation_is_fixed_and_its_table_has_every_law() -> None:
    pipe = load_pipeline()
    config = EvaluationConfig(pictures=16, batch=16)
    one, two = (evaluate(pipe, load_reward(), SamplerConfig(steps=2), config) for _ in range(2))
    assert one == two
    text = law_table({"base": one}).markdown
    assert text.startswith("| test prompts | base |\n|---|---|\n| physical: right by the inspector | ")
    assert all(law in text for law in one["physical"]["by_law"]) and len(one["physical"]["by_law"]) == 8


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_and_graphs_are_of_the_split_that_is_asked_for(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(
        measuring, "sample_and_score", lambda pipe, reward, texts, *_: told.extend(texts) or stop()
    )
    config = EvaluationConfig(pictures=40, split=split)
    for kind in ("physical", "unconventional"):
        with pytest.raises(Stopped):
            evaluate(None, None, SamplerConfig(), config, (kind,))
        assert {*told} <= {p.text for p in prompt_set(kind, split)} and len(told) == 40
        told.clear()
    assert {p.text for p in evaluation_prompts(config)[40:80]} <= {
        p.text for p in prompt_set("physical", split)
    }
    for graph in evaluation_graphs(replace(config, pictures=10)):
        pairs = {pair_split(graph.entities[s], graph.entities[o]) for s, _, o in graph.relations}
        assert pairs - {"train"} == {split} - {"train"}


def test_another_seed_asks_for_other_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(measuring, "sample_and_score", lambda a, b, texts, *_: told.append(texts) or stop())
    for seed in (1, 2):
        with pytest.raises(Stopped):
            evaluate(None, None, SamplerConfig(), EvaluationConfig(pictures=40, seed=seed))
    assert told[0] != told[1]
    graphs, prompts = (
        [f(EvaluationConfig(pictures=10, seed=seed)) for seed in (1, 2)]
        for f in (evaluation_graphs, evaluation_prompts)
    )
    assert graphs[0] != graphs[1] and prompts[0] != prompts[1]


def test_a_checkpoints_reward_has_the_standard_error_of_its_mean() -> None:
    pipe, config = small_pipeline(), EvaluationConfig(pictures=4, batch=3)
    images, found = evaluate_rewards(pipe, brightness, TEXTS, SamplerConfig(steps=2), config)
    values = images.mean((1, 2, 3))
    assert found["reward"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert found["reward_se"] == pytest.approx(values.std().item() / 2, rel=1e-3)


def test_a_score_of_renders_is_perfect_and_of_noise_nothing() -> None:
    draw = choices(0, "score")
    for kind, groups in (("unconventional", 8), ("arrangement", 6)):
        prompts = draw_prompts(kind, "test", 16, draw)
        images = torch.stack([render(p.scene(draw)) for p in prompts])
        found = score(images, prompts, torch.full((16,), 0.25))
        assert (
            found["accuracy"] == 1
            and found["unreadable"] == 0
            and found["reward"] == 0.25
            and found["diversity"] > 0
        )
        assert found["by_law"] == dict.fromkeys(found["by_law"], 1.0) and len(found["by_law"]) == groups
        noise = score(torch.rand_like(images) * 2 - 1, prompts, torch.zeros(16))
        assert noise["accuracy"] == 0 and noise["unreadable"] == 1


def test_intervals_are_clustered_by_prompt_and_diversity_is_in_units_of_pixels() -> None:
    """Two pictures of each of three prompts of a law, black or white, none of them right.  Of 15 pairs nine
    differ, by 2 in every pixel.
    """
    pool = [p for p in prompt_set("physical", "test") if p.law == "shadow"]
    prompts = [p for p in pool[:3] for _ in range(2)]
    images = torch.tensor([1.0, -1.0] * 3).view(6, 1, 1, 1).expand(6, 3, 64, 64)
    found = score(images, prompts, torch.zeros(6))
    assert found["interval"] == found["intervals"]["shadow"] == wilson(0.0, 3)
    assert found["diversity"] == pytest.approx(2 * 9 / 15)


def test_edges_are_the_mean_difference_of_neighbours() -> None:
    stripes = torch.ones(1, 3, 4, 4)
    stripes[..., ::2] = -1  # neighbours in a row differ by 2, in a column by 0
    assert off_reward(stripes) == {"brightness": 0.0, "edges": 1.0}


def test_batches_share_their_noise_between_models_and_nothing_else() -> None:
    config = EvaluationConfig(pictures=5, batch=2)
    runs = [
        [
            (part, noise(k).initial_seed())
            for part, noise in fixed_batches("abcde", config, "label", "x")
            for k in (0, 1)
        ]
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and [part for part, _ in runs[0]] == ["ab", "ab", "cd", "cd", "e", "e"]
    assert len({seed for _, seed in runs[0]}) == 6


def test_pictures_are_sampled_as_the_sampler_says() -> None:
    pipe, config = small_pipeline(), EvaluationConfig(pictures=4, batch=4)
    images, _ = sample_and_score(pipe, brightness, TEXTS, SamplerConfig(3, 2.0, 0.0), config, "x")
    ((_, noise),) = fixed_batches(TEXTS, config, "", "x")
    assert torch.equal(images, pipe.generate(TEXTS, 3, 2.0, 0.0, generator=noise()))


def test_the_interval_of_a_share_is_wilsons() -> None:
    for right, n in ((0, 8), (5, 8), (100, 256), (256, 256)):
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def drawn(prompts: int, n: int, share: float, alike: float, draw: np.random.Generator) -> tuple:
    """Verdicts on n pictures of random prompts, with beta-distributed shares, and the prompts."""
    own = draw.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), prompts)
    asked = draw.integers(prompts, size=n)
    return torch.tensor((draw.random(n) < own[asked]).astype(float)), asked.tolist()


@pytest.mark.parametrize(("prompts", "n", "share"), [(22, 256, 0.5), (45, 256, 0.8), (4, 32, 0.8)])
def test_the_interval_clustered_by_prompt_covers_the_share_of_all_prompts(prompts, n, share) -> None:
    """In at least 19 of 20 draws, about; Wilson's, for independent pictures, far less often."""
    draw, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        right, asked = drawn(prompts, n, share, 0.3, draw)
        low, high = interval(right, asked)
        assert -1e-9 < low < right.mean() + 1e-9 and right.mean() - 1e-9 < high < 1 + 1e-9
        covered += low <= share <= high
        low, high = wilson(right.mean().item(), n)
        naive += low <= share <= high
    assert covered > 0.92 * 400 and naive < 0.85 * 400


def test_the_interval_agrees_with_a_bootstrap_over_prompts() -> None:
    draw = np.random.default_rng(1)
    right, asked = drawn(60, 600, 0.6, 0.3, draw)
    of = [right[[i for i, a in enumerate(asked) if a == p]] for p in set(asked)]
    again = [torch.cat([of[i] for i in draw.integers(len(of), size=len(of))]).mean() for _ in range(2_000)]
    assert interval(right, asked) == pytest.approx(np.quantile(again, (0.025, 0.975)), abs=0.02)


def test_an_interval_of_one_picture_a_prompt_is_nearly_wilsons_and_pictures_of_one_count_once() -> None:
    right = torch.tensor([1.0] * 300 + [0.0] * 100)
    assert interval(right, range(400)) == pytest.approx(wilson(0.75, 400), abs=2e-3)
    assert interval(right, ["a"] * 400) == wilson(0.75, 1)
    assert interval(right[:300], [i % 5 for i in range(300)]) == wilson(1.0, 5)


@pytest.mark.parametrize(("right", "pictures"), [([1, 1, 1, 0, 0, 0], 3), ([1, 0, 0, 1, 1, 0], 6)])
def test_the_interval_of_three_prompts_by_hand(right: list[float], pictures: int) -> None:
    """The variance of the share over prompts is 3/2 (1 + 0 + 1) / 6^2 = 1/12, that of three pictures.  Where
    prompts are more alike than chance, that of six.  Student's t of two degrees is 4.303.
    """
    wanted = wilson(0.5, pictures * (1.959964 / 4.302653) ** 2)
    assert interval(torch.tensor(right).float(), ["a", "a", "b", "b", "c", "c"]) == pytest.approx(wanted)


def test_a_table_is_aligned_in_a_terminal_and_folded_where_it_does_not_fit() -> None:
    table = Table("rows", {"one": {"a": 0.5, "words": "x"}, "another": {"a": 12.25, "words": "y"}})
    assert str(table) == "rows         a  words\none      0.500      x\nanother   12.2      y"
    assert (
        table.markdown == "| rows | a | words |\n|---|---|---|\n| one | 0.500 | x |\n| another | 12.2 | y |"
    )
    wide = Table("rows", {"one": {f"column {i:02}": i / 100 for i in range(30)}})
    lines = str(wide).splitlines()
    assert max(map(len, lines)) <= WIDTH and str(wide).count("0.") == 30 and str(wide).count("one") == 4


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EvaluationConfig(pictures=0)


def test_scores_of_a_changed_metrics_file_are_named() -> None:
    """Loops, kinds of prompts, and rationales: a key that is missing, or a value that is no number."""
    loop = {"sg_iou": 0.5, "right": 0.5, "evaluations": 20.0}
    for key in loop:
        for wrong in (None, [0.5], {"x": 1}, "much"):
            with pytest.raises(ValueError, match=f"{key} of raw must be a number, got"):
                loop_bars({"raw": loop | {key: wrong}})
        with pytest.raises(ValueError, match=f"{key} of raw must be a text or a number, got None"):
            str(Table("graphs", {"whole": loop, "raw": {k: v for k, v in loop.items() if k != key}}))
    kind = {"accuracy": 0.5, "interval": (0.4, 0.6), "by_law": {}, "reward": 0.5, "unreadable": 0.0}
    with pytest.raises(ValueError, match="the score of base, physical, has no diversity, intervals"):
        law_table({"base": {"physical": kind}})
    for wrong in ({}, {"geneval": 0.5}):
        with pytest.raises(ValueError, match="geneval must be an object, got"):
            table_row(wrong)


def test_by_default_256_test_prompts_of_each_kind_are_measured_by_seed_1000(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The seed of a training is 0, so its prompts and noise are others; the kinds are drawn independently."""
    told, objects = [], []
    monkeypatch.setattr(measuring, "draw_prompts", lambda *given: told.append(given) or draw_prompts(*given))
    monkeypatch.setattr(
        measuring, "sample_and_score", lambda _, __, texts, *___: (torch.zeros(len(texts), 3, 1, 1), None)
    )
    monkeypatch.setattr(
        measuring, "score", lambda _, prompts, __: objects.append([p.objects for p in prompts])
    )
    evaluate(None, None, SamplerConfig(), EvaluationConfig())
    assert EvaluationConfig().seed == 1_000
    assert [given[:3] for given in told] == [("physical", "test", 256), ("unconventional", "test", 256)]
    assert sum(one == two for one, two in zip(*objects)) < 128


def test_the_interval_of_a_law_is_of_its_own_pictures() -> None:
    draw = choices(0, "score")
    prompts = [
        [p for p in prompt_set("physical", "test") if p.law == law][:3] for law in ("shadow", "gravity")
    ]
    images = torch.stack([render(p.scene(draw)) for p in prompts[0]] + [torch.ones(3, 64, 64)] * 3)
    found = score(images, prompts[0] + prompts[1], torch.zeros(6))
    assert found["by_law"] == {"shadow": 1, "gravity": 0}
    assert found["intervals"] == {"shadow": wilson(1.0, 3), "gravity": wilson(0.0, 3)}
