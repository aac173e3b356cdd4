"""Measuring ReasonGen-R1: an untrained model, the shipped one, and codebooks."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import minireflect.evaluate_reason as evaluate_reason_file
from minireflect.checkpoints.ours import load_reasongen
from minireflect.evaluate import EvaluationConfig, Table
from minireflect.evaluate_reason import (
    another_of_its_kind,
    codec_table,
    evaluate_reason,
    evaluation_prompts,
    table_row,
)
from minireflect.models.reasongen import Sampled, SamplingConfig
from minireflect.rl.rewards import reward_beside
from minireflect.world.captions import rationale
from minireflect.world.laws import render
from minireflect.world.prompts import TASKS, sample_scene
from minireflect.world.published import geneval_scores
from minireflect.world.scenes import ARRANGEMENT
from tests.small import small_reasongen


def even(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that accepts about half of all pictures, by their far decimals."""
    return (1e4 * images.mean((1, 2, 3)).double() % 1 > 0.5).float()


@pytest.mark.slow
def test_an_untrained_model_is_measured_as_what_it_is() -> None:
    """Noise for pictures and sentences: nothing is right, promised or kept, and best-of-N costs N times the
    tokens.
    """
    config = EvaluationConfig(pictures=12, batch=16)
    score = evaluate_reason(small_reasongen(), even, config)
    assert score["geneval"] == dict.fromkeys([*TASKS, "overall"], 0.0)
    assert score["physical"] == score["unconventional"] == score["planned"] == score["kept"] == 0
    assert score["unreadable"] == 1
    assert 0.2 < score["accepted"] < 0.8 and score["fooled"] == 1 and 64 < score["tokens"] <= 64 + 5
    assert score["parts"] == {key: [0, 0, 0] for key in score["parts"]} and len(score["parts"]) == 6 + 8 + 8
    best = evaluate_reason(small_reasongen(), even, config, best_of=3)
    assert best["accepted"] > score["accepted"] and 2.8 < best["tokens"] / score["tokens"] < 3.2
    head = Table("model", {"one": table_row(score), "best of 3": table_row(best)}).cells[0]
    assert head == [
        "model",
        *TASKS,
        "overall",
        "physical",
        "unconventional",
        "accepted",
        "fooled",
        "unreadable",
        "planned",
        "kept",
        "tokens",
    ]


def test_pictures_and_rationales_made_by_hand_are_measured_as_what_they_are() -> None:
    """Of 24 prompts every second picture is right, the others blank; rationales are in turns of this scene,
    of no grammar, and of a scene of another law.  The second of two tries has the higher reward; it accepts
    the first nine pictures.
    """
    config, draw, tries, scored = EvaluationConfig(pictures=8, batch=24), random.Random(0), [], []
    scenes = [p.scene(draw) for p in evaluation_prompts(config)]
    foreign = [next(s for s in scenes if s.law not in (of.law, ARRANGEMENT)) for of in scenes]
    said = [(rationale(a), "so the so", rationale(b))[i % 3] for i, (a, b) in enumerate(zip(scenes, foreign))]
    even, first = torch.arange(24).view(-1, 1, 1, 1) % 2 == 0, torch.arange(24) < 9
    right = torch.where(even, torch.stack([*map(render, scenes)]), 1.0)

    def sample(part: list[str], sampling: SamplingConfig, noise: torch.Generator) -> Sampled:
        tries.append(noise.initial_seed())
        ids = torch.full((24, 64), len(tries))
        return Sampled(ids[:, :5], (torch.arange(5) < 3).expand(24, 5), ids)

    def reward(images: Tensor, texts: list[str]) -> Tensor:
        scored.append(images)
        return torch.where(first, 0.6, 0.4) if len(scored) == 2 else torch.full((24,), 0.3)

    pipe = SimpleNamespace(
        sample=sample,
        pictures=lambda codes: right if codes[0, 0] == 2 else torch.ones(24, 3, 64, 64),
        rationales=lambda sampled: said if sampled.codes[0, 0] == 2 else [""] * 24,
    )
    found = evaluate_reason(pipe, reward, config, best_of=2)
    assert len(scored) == len({*tries}) == 2
    assert found["physical"] == found["unconventional"] == found["unreadable"] == 1 / 2
    assert found["planned"] == 8 / 24 and found["kept"] == 4 / 16
    assert found["accepted"] == 9 / 24 and found["fooled"] == pytest.approx(4 / 9)
    assert found["tokens"] == 2 * (3 + 64)


def test_each_kind_of_prompt_is_counted_by_itself() -> None:
    """Of eight pictures of each kind four, two and six are right; all rationales state what is asked for."""
    config, draw = EvaluationConfig(pictures=8, batch=24), random.Random(0)
    prompts = evaluation_prompts(config)
    scenes = [p.scene(draw) for p in prompts]
    right = torch.tensor([i % 8 < (4, 2, 6)[i // 8] for i in range(24)])
    images = torch.where(right.view(-1, 1, 1, 1), torch.stack([*map(render, scenes)]), 1.0)
    ids = torch.zeros(24, 64, dtype=torch.long)
    pipe = SimpleNamespace(
        sample=lambda *_: Sampled(ids, ids > 0, ids),
        pictures=lambda _: images,
        rationales=lambda _: [*map(rationale, scenes)],
    )
    found = evaluate_reason(pipe, lambda x, _: torch.ones(len(x)), config)
    assert [p.kind for p in prompts[::8]] == ["arrangement", "physical", "unconventional"]
    assert (found["physical"], found["unconventional"]) == (2 / 8, 6 / 8)
    seen = [s.objects if ok else () for s, ok in zip(scenes[:8], right)]
    assert found["geneval"] == geneval_scores(seen, prompts[:8]) and found["geneval"]["overall"] > 0
    assert found["planned"] == 1 and found["kept"] == 12 / 24 == 1 - found["fooled"]
    for name, (ok, planned, kept) in found["parts"].items():
        rows = [i for i, p in enumerate(prompts) if name == (p.task or f"{p.kind} {p.law}")]
        assert ok == kept == right[rows].float().mean() and planned == 1


@pytest.mark.slow
def test_the_shipped_model_plans_what_is_asked_and_draws_what_it_planned() -> None:
    """Far below what it reaches, far above chance; 24 prompts of each kind, of training combinations."""
    config = EvaluationConfig(pictures=24, split="train")
    score = evaluate_reason(
        load_reasongen(), reward_beside("."), config, sampling=SamplingConfig(temperature=0.4)
    )
    assert (
        score["planned"] > 0.85 and score["kept"] > 0.6 and score["physical"] > 0.6 and score["fooled"] < 0.4
    )


def test_another_prompt_of_its_kind_is_another_and_of_the_same_law() -> None:
    for split in ("train", "test"):
        prompts = evaluation_prompts(EvaluationConfig(360, split))
        for i in range(0, len(prompts), 64):
            part = prompts[i : i + 64]
            pairs = [(p, part[j]) for p, j in zip(part, another_of_its_kind(part))]
            assert all(p.text != q.text and p.content != q.content and p.kind == q.kind for p, q in pairs)
            strangers = [(p, q) for p, q in pairs if p.group != q.group]
            for p, _ in strangers:  # only where the batch has nothing else of this task
                assert len({q.content for q in part if q.group == p.group and q.kind == p.kind}) == 1


def test_a_prompt_without_another_is_an_error() -> None:
    one = evaluation_prompts(EvaluationConfig(8))[:1]
    with pytest.raises(ValueError, match="no other arrangement prompt than"):
        another_of_its_kind(one * 5)


def test_renders_are_read_right_and_an_untrained_codebook_loses_all() -> None:
    table = codec_table(small_reasongen().codec, EvaluationConfig(pictures=6, batch=6))
    assert table.markdown.splitlines()[2] == "| as rendered | 1.000 | 1.000 | 1.000 | 0.0000 |"
    assert (
        torch.tensor([table.rows["through the codebook"][k] for k in ("arrangement", "physical")]).sum() == 0
    )


def test_a_picture_of_a_law_shows_no_objects_of_a_task() -> None:
    """The ball of a law is no ball on an empty page, so no task is fulfilled by it."""
    config = EvaluationConfig(pictures=24, batch=72, split="train")
    ball = sample_scene(0, "balance")
    assert ball.objects[0].name == "ball"
    assert any(p.text == "a ball" for p in evaluation_prompts(config)[:24])
    ids = torch.zeros(72, 4, dtype=torch.long)
    pipe = SimpleNamespace(
        sample=lambda *_: Sampled(ids, ids > 0, ids),
        pictures=lambda _: render(ball).expand(72, -1, -1, -1),
        rationales=lambda _: [""] * 72,
    )
    found = evaluate_reason(pipe, lambda x, _: torch.ones(len(x)), config)
    assert set(found["geneval"].values()) == {0.0}


def test_the_pictures_of_the_codecs_table_depend_on_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = evaluation_prompts(EvaluationConfig(pictures=2))
    monkeypatch.setattr(evaluate_reason_file, "evaluation_prompts", lambda _: prompts)
    drawn: list[Tensor] = []
    monkeypatch.setattr(evaluate_reason_file, "render", lambda s: drawn.append(render(s)) or drawn[-1])
    for seed in (1, 2):
        codec_table(small_reasongen().codec, EvaluationConfig(pictures=2, batch=6, seed=seed))
    assert not torch.equal(torch.stack(drawn[:6]), torch.stack(drawn[6:]))


def test_tables_are_sampled_at_the_temperature_that_the_documents_state() -> None:
    assert SamplingConfig(temperature=0.8) == evaluate_reason_file.SAMPLING
