"""The decoder-only transformer against Llama's in transformers, with and without its cache; and the Actor that writes with it."""

import pytest
import torch

from minireflect import rng
from minireflect.models.actor import Actor, ActorConfig, questions, read_out, write_down
from minireflect.models.tokenizer import EOS, Tokenizer
from minireflect.models.transformer import Transformer, TransformerConfig
from minireflect.world.captions import PROMPT_LENGTH
from minireflect.world.captions import graph_vocabulary as vocabulary

from .llama import llama

CONFIG = TransformerConfig(vocabulary=17, length=23, width=24, layers=2, heads=3, hidden=40)
TOKENS = Tokenizer.of(vocabulary(), PROMPT_LENGTH)


def loud(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of std 0.3: with 0.02 every token is as likely as any other, and a mistake would not show."""
    noise = rng(seed, "loud")
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=noise) + (p.ndim == 1))
    return module.eval()


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.head(model(model.embed(ids)))


@torch.no_grad()
def test_the_same_weights_give_llamas_logits() -> None:
    ours = loud(Transformer(CONFIG))
    theirs = llama(ours, attention="eager")
    ids = torch.randint(17, (5, 19), generator=rng(0, "ids"))
    assert (
        logits(ours, ids) - theirs(ids).logits
    ).abs().max() < 1e-4  # float32 sums in another order, logits up to 10


@torch.no_grad()
def test_the_cache_changes_nothing() -> None:
    model = loud(Transformer(CONFIG))
    ids = torch.randint(17, (3, 20), generator=rng(1, "ids"))
    whole = logits(model, ids)
    for cuts in ([1] * 20, [7, 1, 5, 7], [20]):
        cache, parts = model.cache(3), []
        for part in ids.split(cuts, 1):
            parts.append(model.head(model(model.embed(part), cache)))
        assert cache.used == 20
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_what_fills_up_changes_nothing() -> None:
    """Three sequences of 9, 6 and 4 tokens in one batch, gaps in the middle and at the end: each as if it stood alone, cached or not."""
    model = loud(Transformer(CONFIG))
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[0, 9:], valid[1, 2:5], valid[1, 9:], valid[2, 1:4], valid[2, 7:] = False, False, False, False, False
    ids = torch.randint(17, (3, 12), generator=rng(3, "ids"))
    whole = model.head(model(model.embed(ids), valid=valid))
    for row, counts, found in zip(ids, valid, whole):
        alone = logits(model, row[counts][None])[0]
        assert (found[counts] - alone).abs().max() < 1e-5
    cache, parts = model.cache(3), []
    for part, counts in zip(ids.split([5, 1, 4, 1, 1], 1), valid.split([5, 1, 4, 1, 1], 1)):
        parts.append(model.head(model(model.embed(part), cache, counts)))
    assert (torch.cat(parts, 1) - whole)[valid].abs().max() < 1e-5
    late, rest = (
        model.cache(3),
        torch.ones(3, 4, dtype=torch.bool),
    )  # tokens without a mask after some with one
    first = model.head(model(model.embed(ids[:, :8]), late, valid[:, :8]))
    second = model.head(model(model.embed(ids[:, 8:]), late))
    together = model.head(model(model.embed(ids), valid=torch.cat([valid[:, :8], rest], 1)))
    assert (torch.cat([first, second], 1) - together)[:, 8:].abs().max() < 1e-5


@torch.no_grad()
def test_no_token_sees_what_follows_it() -> None:
    model = loud(Transformer(CONFIG))
    ids = torch.randint(17, (2, 11), generator=rng(2, "ids"))
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 17
    a, b = logits(model, ids), logits(model, other)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6], b[:, 6])


def test_too_long_a_sequence_is_named() -> None:
    model = Transformer(CONFIG)
    with pytest.raises(ValueError, match="24 tokens, but the transformer reads 23"):
        model(torch.zeros(1, 24, 24))
    with pytest.raises(ValueError, match="even multiple"):
        TransformerConfig(5, 5, width=9, heads=3)


def small_actor(seed: int = 0) -> Actor:
    return loud(
        Actor(ActorConfig(len(TOKENS), side=2, read=30, written=7, width=16, layers=1, heads=2)), seed
    )


def inputs(b: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = questions(TOKENS, [["a red ball", "two things"]] * b, [[True, False]] * b, 30)
    return torch.randn(b, 4, 2, 2, generator=rng(0, "latents")), ids


@torch.no_grad()
def test_what_was_written_scores_as_it_was_sampled_and_the_mask_ends_with_the_end() -> None:
    actor = small_actor()
    latents, ids = inputs(64)
    out = actor.write(latents, ids, rng(0, "write"))
    scored = actor(latents, ids, out.ids)
    assert (scored - out.log_prob)[out.mask].abs().max() < 1e-4  # the cache sums in another order
    assert (out.log_prob[~out.mask] == 0).all()
    ended = stopped_early = 0
    for row, mask in zip(out.ids.tolist(), out.mask.tolist()):
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
    assert torch.equal(best[out.mask], out.ids[out.mask])


def test_edits_survive_the_way_through_tokens() -> None:
    edits = ["a red ball at the top left", "", "two things"]
    ids, mask = write_down(TOKENS, edits, 9)
    assert read_out(TOKENS, ids) == edits
    assert mask.sum(1).tolist() == [8, 1, 3]  # the words and the end
    assert all(row[n - 1] == EOS for row, n in zip(ids.tolist(), [8, 1, 3]))


def test_the_actor_reads_what_is_unmet_first() -> None:
    ids = questions(TOKENS, [["a red ball", "a blue box", "two things"]], [[True, False, True]], 12)
    assert read_out(TOKENS, ids) == ["no a blue box yes a red ball yes two things"]
    with pytest.raises(ValueError, match="12 words, at most 11 fit"):
        questions(TOKENS, [["a red ball"] * 3], [[True] * 3], 11)
