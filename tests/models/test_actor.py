"""RL-RIG's Actor: what it samples is what it scores, and what it reads."""

import pytest
import torch

from minireflect import rng
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.models.transformer import Actor, ActorConfig, questions
from minireflect.world.captions import PROMPT_LENGTH
from minireflect.world.captions import graph_vocabulary as vocabulary

from .test_transformer import loud

TOKENS = Tokenizer.of(vocabulary(), PROMPT_LENGTH)


def small_actor(seed: int = 0) -> Actor:
    return loud(
        Actor(ActorConfig(len(TOKENS), side=2, read=30, written=7, width=16, layers=1, heads=2)), seed
    )


def inputs(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = questions(TOKENS, [["a red ball", "two things"]] * b, [[True, False]] * b, 30)
    return torch.randn(b, 4, 2, 2, generator=rng(0, "latents")), ids


@torch.no_grad()
def test_the_mask_ends_with_the_end_token() -> None:
    actor = small_actor()
    latents, ids = inputs(64)
    out = actor.write(latents, ids, rng(0, "write"))
    assert (actor(latents, ids, out.ids)[out.chosen] > -20).all()
    ended = stopped_early = 0
    for row, mask in zip(out.ids.tolist(), out.chosen.tolist()):
        n = sum(mask)
        assert mask == [True] * n + [False] * (7 - n)  # a run from the first token on
        assert EOS not in row[: n - 1]  # ... up to the first end token, which the policy chose
        assert n == 7 or (row[n - 1] == EOS and set(row[n:]) <= {EOS})
        ended += row[n - 1] == EOS
        stopped_early += n < 7
    assert ended and stopped_early and stopped_early < 64


@torch.no_grad()
def test_tokens_come_from_the_distribution_that_scores_them() -> None:
    """The first token of 4,000 samples against its probabilities: within four standard errors."""
    actor = small_actor()
    latents, ids = inputs(1)
    latents, ids = latents.expand(4_000, -1, -1, -1), ids.expand(4_000, -1)
    first = actor.write(latents, ids, rng(1, "write")).ids[:, 0]
    p = actor.all_logits(latents[:1], ids[:1], torch.zeros(1, 7, dtype=torch.long))[0, 0].softmax(-1)
    share = torch.bincount(first, minlength=len(p)) / 4_000
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 4_000).sqrt() + 1e-4).all()


@torch.no_grad()
def test_without_a_generator_the_likeliest_token_is_written() -> None:
    actor = small_actor(2)
    latents, ids = inputs(3)
    out = actor.write(latents, ids, None)
    best = actor.all_logits(latents, ids, out.ids).argmax(-1)
    assert torch.equal(best[out.chosen], out.ids[out.chosen])


def test_the_actor_reads_what_is_unmet_first() -> None:
    ids = questions(TOKENS, [["a red ball", "a blue box", "two things"]], [[True, False, True]], 12)
    assert TOKENS.decode(ids) == ["no a blue box yes a red ball yes two things"]
    with pytest.raises(ValueError, match="12 words, at most 11 fit"):
        questions(TOKENS, [["a red ball"] * 3], [[True] * 3], 11)


def test_places_of_the_picture_begin_with_embeddings_of_their_own() -> None:
    torch.manual_seed(0)
    where = Actor(ActorConfig(len(TOKENS))).where
    assert where.std().item() == pytest.approx(1.0, rel=0.1) and len(where.unique(dim=0)) == 64


@torch.no_grad()
def test_each_place_of_the_picture_has_a_vector_of_its_own() -> None:
    """It is added to what the place looks like: at all places it acts as the bias does."""
    actor = small_actor()
    latents, ids = inputs(2)
    before, v = actor.read(latents, ids), torch.randn(16, generator=rng(0, "v"))
    actor.where += v
    moved = actor.read(latents, ids)
    actor.look.bias -= v
    torch.testing.assert_close(actor.read(latents, ids), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved, before)
