"""ReasonGen-R1's transformer: what it samples is what it scores, words and image tokens apart, guidance and cache included."""

import pytest
import torch
from torch import Tensor

from minireflect import rng
from minireflect.models.reasongen import (
    Drawn,
    ReasonGen,
    ReasonGenConfig,
    SamplingConfig,
    guide,
    pick,
    sampled_from,
    trim,
    up_to,
)
from minireflect.models.tokenizer import BOS, EOS

SIZES = ReasonGenConfig(
    vocabulary=12, forms=6, colors=4, prompt=5, rationale=7, side=3, width=32, layers=2, heads=2, hidden=48
)
WAYS = {
    "plain": SamplingConfig(),
    "cool": SamplingConfig(temperature=0.7, top_k=9),
    "guided": SamplingConfig(top_p=0.9, guidance=2.5),
}


def model(seed: int = 0) -> ReasonGen:
    torch.manual_seed(seed)
    return ReasonGen(SIZES).eval()


def prompts(b: int = 6) -> Tensor:
    ids = torch.randint(2, 12, (b, 5), generator=rng(0, "prompts"))
    ids[:, 0], ids[:, -1] = BOS, EOS
    return ids


@pytest.mark.parametrize("way", WAYS)
def test_what_was_sampled_scores_as_it_was_sampled(way: str) -> None:
    """Log-probabilities from the cache, token by token, against one pass over the whole sequence."""
    net, sampling = model(), WAYS[way]
    out = net.write(prompts(), sampling, rng(0, "write"))
    with torch.no_grad():
        words, codes = net.log_probs(prompts(), out.words, out.codes, sampling)
    torch.testing.assert_close(out.words_log_prob[out.chosen], words[out.chosen], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.codes_log_prob, codes, atol=1e-5, rtol=0)
    assert (out.words_log_prob[~out.chosen] == 0).all()
    again = net.log_probs(prompts(), out.words, out.codes, sampling)
    assert torch.equal(again[1], codes)  # the very same numbers under the same batch shape


def test_thinking_ends_with_the_switch_and_only_what_was_chosen_counts() -> None:
    net = model()
    with torch.no_grad():
        net.transformer.head.weight[SIZES.boi] *= 0
    out = net.write(prompts(64), SamplingConfig(temperature=2.0), rng(0, "switch"))
    assert ((out.words == SIZES.boi).sum(1) == 1).all()
    ends = (out.words == SIZES.boi).int().argmax(1)
    for row, chosen, end in zip(out.words, out.chosen, ends.tolist()):
        assert (row[end + 1 :] == EOS).all()
        forced = end == SIZES.rationale - 1
        assert chosen.tolist() == [i <= end and not (forced and i == end) for i in range(SIZES.rationale)]
    assert {2, SIZES.rationale - 1} <= set(ends.tolist())  # some stop early, and some are stopped


def test_a_picture_depends_on_its_own_rationale_and_on_no_filling() -> None:
    """Alone or beside longer ones, trimmed or not: the same logits."""
    net, out = model(), written()
    text, *image = net(prompts(), out.words, out.codes)
    mask = up_to(out.words, SIZES.boi)
    assert 1 < mask.sum(1).min() < mask.sum(1).max()
    for i in range(6):
        alone = trim(prompts()[i : i + 1], EOS), trim(out.words[i : i + 1], SIZES.boi), out.codes[i : i + 1]
        one_text, *one_image = net(*alone)
        for one, among in zip(one_image, image):
            torch.testing.assert_close(one[0], among[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(one_text[0], text[i, mask[i]], atol=1e-5, rtol=0)


def test_a_given_rationale_is_drawn_and_not_scored() -> None:
    net = model()
    words = net.blank(6, torch.device("cpu"))[1]
    out = net.write(prompts(), SamplingConfig(), rng(0, "given"), words)
    assert torch.equal(out.words, words) and not out.chosen.any() and out.codes.shape == (6, 9)
    assert out.codes.min() >= 0 and out.codes.max() < SIZES.codes


@pytest.mark.parametrize("book", ["forms", "colors"])
def test_words_with_one_codeword_are_one_word(book: str) -> None:
    """Two forms (colours) of the same codeword are as likely as each other everywhere, and read alike; others are not."""
    net, out = model(), written()
    vectors = getattr(net, book).vectors
    vectors[1] = vectors[3]
    said = net(prompts(), out.words, out.codes)
    logits = getattr(said, book)
    torch.testing.assert_close(logits[..., 1], logits[..., 3], atol=1e-5, rtol=0)
    assert (logits[..., 1] - logits[..., 2]).abs().max() > 1e-2
    assert said.text.shape[2] == SIZES.vocabulary + 1  # words and BOI
    assert said.forms.shape == (6, 9, 6) and said.colors.shape == (6, 9, 4)
    step = SIZES.colors if book == "forms" else 1
    number = net.split(out.codes)[book == "colors"]
    codes = out.codes + torch.where(number == 1, 2 * step, torch.where(number == 3, -2 * step, 0))
    assert not torch.equal(codes, out.codes)
    for after, before in zip(net(prompts(), out.words, codes), said):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_the_probabilities_of_a_tokens_pairs_sum_to_1() -> None:
    """Whatever stands before it: of all forms times colours one comes."""
    net, out = model(), written()
    for i in (0, 4, 8):
        every = torch.arange(SIZES.codes)
        codes = out.codes[:1].repeat(SIZES.codes, 1)
        codes[:, i] = every
        given = prompts()[:1].repeat(SIZES.codes, 1), out.words[:1].repeat(SIZES.codes, 1), codes
        with torch.no_grad():
            log_prob = net.log_probs(*given, WAYS["guided"])[1][:, i]
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
        with torch.no_grad():
            colors = net(*given).colors[:, i].view(SIZES.forms, SIZES.colors, SIZES.colors)
        assert (colors[0] - colors[1]).abs().max() > 1e-3  # colours know their form
        torch.testing.assert_close(colors[:, 0], colors[:, 1], atol=1e-5, rtol=0)  # and not themselves


def test_nothing_sees_what_follows_it() -> None:
    net, out = model(), written()
    said = net(prompts(), out.words, out.codes)
    for i in range(SIZES.side**2 - 1):
        codes = out.codes.clone()
        codes[:, i] = (codes[:, i] + SIZES.colors + 1) % SIZES.codes  # another form, and other colours
        other = net(prompts(), out.words, codes)
        torch.testing.assert_close(other.text, said.text, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.forms[:, : i + 1], said.forms[:, : i + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(other.colors[:, :i], said.colors[:, :i], atol=1e-6, rtol=0)
        for after, before in zip(other[1:], said[1:]):
            assert (after[:, i + 1] - before[:, i + 1]).abs().max() > 1e-3


def written() -> Drawn:
    return model().write(prompts(), SamplingConfig(), rng(0, "written"))


@pytest.mark.parametrize(
    "top_k, top_p, temperature", [(0, 1.0, 1.0), (5, 1.0, 0.5), (0, 0.8, 1.3), (6, 0.6, 0.9)]
)
def test_the_distribution_is_that_of_transformers_warpers(
    top_k: int, top_p: float, temperature: float
) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(50, 16, generator=rng(0, "logits"))
    wanted = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = warpers.TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = warpers.TopPLogitsWarper(top_p)(None, wanted)
    found = sampled_from(logits, SamplingConfig(temperature, top_k, top_p))
    torch.testing.assert_close(found, wanted.log_softmax(-1))
    assert torch.isfinite(found).sum(1).min() >= 1


def test_tokens_come_as_often_as_their_probability_says() -> None:
    log_prob = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    share = torch.bincount(pick(log_prob, rng(0, "pick")), minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)  # 4 standard errors


def test_guidance_1_is_the_model_and_0_the_blank_one() -> None:
    a, b = torch.randn(2, 4, 8, generator=rng(0, "guide")).unbind()
    torch.testing.assert_close(guide(a, b, 1.0), a)
    assert torch.equal(guide(a, b, 0.0), b)


@pytest.mark.parametrize(
    "bad, named", [({"temperature": 0.0}, "top_k 1 takes the likeliest"), ({"top_p": 0.0}, r"in \(0, 1\]"), ({"top_k": -1}, "0 or more")]
)  # fmt: skip
def test_bad_sampling_is_named(bad: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**bad)
