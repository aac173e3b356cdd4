"""The decoder-only transformer: its cache, its padding, its order; and the loop and the distribution that
tokens are sampled from.
"""

import pytest
import torch
import torch.nn.functional as F

from minireflect import rng
from minireflect.models.tokenizer import EOS
from minireflect.models.transformer import RMSNorm, SamplingConfig, Transformer, TransformerConfig, pick

CONFIG = TransformerConfig(vocabulary=17, length=23, width=24, layers=2, heads=3, hidden=40)


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
def test_padding_changes_nothing() -> None:
    """Three sequences of 9, 6 and 4 tokens in one batch, padding in the middle and at the end: each as if
    alone, cached or not.
    """
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
def test_no_token_attends_to_later_ones() -> None:
    model = loud(Transformer(CONFIG))
    ids = torch.randint(17, (2, 11), generator=rng(2, "ids"))
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 17
    a, b = logits(model, ids), logits(model, other)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6], b[:, 6])


def test_too_long_a_sequence_is_named() -> None:
    model = Transformer(CONFIG)
    with pytest.raises(ValueError, match="24 tokens, but the longest allowed is 23"):
        model(torch.zeros(1, 24, 24))
    with pytest.raises(ValueError, match="even multiple"):
        TransformerConfig(5, 5, width=9, heads=3)


@torch.no_grad()
@pytest.mark.parametrize("forced", [False, True])
def test_sampling_stops_at_the_end_token_or_the_limit(forced: bool) -> None:
    """Ids, mask and last state of 64 texts; with `forced`, a text at the limit is closed with an end that is
    not `chosen`.
    """
    model, end, limit = loud(Transformer(CONFIG)), 5, 6
    begin, cache = torch.randint(6, 17, (64, 3), generator=rng(0, "begin")), model.cache(64)
    hidden = model(model.embed(begin), cache)[:, -1:]
    sampling = SamplingConfig(temperature=20.0)
    out = model.sample(hidden, cache, sampling.chooser(rng(0, "write")), end, limit, forced)
    lengths = []
    for row, chosen, last, first in zip(out.ids.tolist(), out.chosen.tolist(), out.hidden[:, 0], begin):
        n = row.index(end) + 1 if end in row else limit
        closed = forced and n == limit
        assert chosen == [i < n - closed for i in range(limit)] and set(row[n:]) <= {EOS}
        alone = torch.cat([first, torch.tensor(row[:n])])[None]
        assert (model(model.embed(alone))[0, -1] - last).abs().max() < 1e-4  # as if the text stood alone
        lengths.append(n)
    assert min(lengths) < limit and lengths.count(limit) > 1
    assert not forced or (out.ids == end).any(1).all()


@torch.no_grad()
def test_sampled_tokens_are_those_that_a_pass_without_cache_gives() -> None:
    """The likeliest tokens, one by one, without cache and mask."""
    model = loud(Transformer(CONFIG))
    ids, cache = torch.randint(17, (4, 3), generator=rng(0, "begin")), model.cache(4)
    out = model.sample(model(model.embed(ids), cache)[:, -1:], cache, SamplingConfig().chooser(None), 99, 5)
    for i in range(5):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(out.ids[:, i], ids[:, -1])


def test_tokens_come_as_often_as_their_probability_says() -> None:
    log_prob = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    share = torch.bincount(pick(log_prob, rng(0, "pick")), minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)  # 4 standard errors


def test_top_k_and_top_p_keep_the_likeliest_tokens() -> None:
    log_prob = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for config, kept in (
        (SamplingConfig(top_k=3), 3),
        (SamplingConfig(top_p=0.8), 2),
        (SamplingConfig(top_p=0.81), 3),
    ):
        found = config.log_probs(log_prob).exp()
        wanted = torch.tensor([0.5, 0.3, 0.15, 0.05]) * (torch.arange(4) < kept)
        torch.testing.assert_close(found[0], wanted / wanted.sum())
    half = SamplingConfig(top_p=0.5).log_probs(torch.zeros(1, 4)).exp()  # two of four reach it exactly
    assert sorted(half[0].tolist()) == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    "bad, named",
    [
        ({"temperature": 0.0}, "temperature must be at least 0.001, got 0.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
    ],
)
def test_bad_sampling_is_named(bad: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**bad)


def test_the_norm_is_rms_norm_with_llamas_eps() -> None:
    """Against torch's; at rows of size 1e-3 the eps of 1e-6 halves the square."""
    norm, x = loud(RMSNorm(24)), torch.randn(3, 5, 24, generator=rng(0, "norm"))
    for size in (1e-3, 1.0):
        torch.testing.assert_close(norm(size * x), F.rms_norm(size * x, (24,), norm.weight, eps=1e-6))


def test_weights_begin_with_the_stds_of_gpt_2s_scheme() -> None:
    """1 / sqrt(width); divided by the root of the number of branches, two a layer, where a branch ends."""
    torch.manual_seed(0)
    weights = dict(Transformer(TransformerConfig(300, 8, width=64, layers=8, hidden=128)).named_parameters())
    for name, weight in weights.items():
        ends = 16**-0.5 if name.endswith(("attn.out.weight", "down.weight")) else 1
        wanted = 0.0 if weight.ndim == 1 else 1.0 if name == "embed.weight" else ends / 8
        assert weight.std().item() == pytest.approx(wanted, rel=0.05), name
