"""ReasonGen-R1's model: where rationales end, what every token depends on, guidance."""

import pytest
import torch
from torch import Tensor

from minireflect import rng
from minireflect.models.reasongen import ReasonGen, ReasonGenConfig, Sampled, SamplingConfig, guide
from minireflect.models.tokenizer import BOS, EOS, trim, up_to

SIZES = ReasonGenConfig(
    vocabulary=12, forms=6, colors=4, prompt=5, rationale=7, side=3, width=32, layers=2, heads=2, hidden=48
)
CODES = 24  # forms times colours
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
    ids[::2, 3] = EOS  # a word shorter
    return ids


def test_a_rationale_ends_in_boi_which_is_chosen_unless_forced() -> None:
    net = model()
    with torch.no_grad():
        net.transformer.head.weight[SIZES.boi] *= 0
    out = net.sample(prompts(64), SamplingConfig(temperature=2.0), rng(0, "switch"))
    assert ((out.rationale == SIZES.boi).sum(1) == 1).all()
    ends = (out.rationale == SIZES.boi).int().argmax(1)
    for row, chosen, end in zip(out.rationale, out.chosen, ends.tolist()):
        assert (row[end + 1 :] == EOS).all()
        forced = end == SIZES.rationale - 1
        assert chosen.tolist() == [i <= end and not (forced and i == end) for i in range(SIZES.rationale)]
    assert {2, SIZES.rationale - 1} <= set(ends.tolist())  # some stop early, and some are stopped


def test_logits_depend_on_no_padding() -> None:
    """Alone or beside longer ones, trimmed or not: the same logits."""
    net, out = model(), written()
    text, *image = net(prompts(), out.rationale, out.codes)
    mask = up_to(out.rationale, SIZES.boi)
    assert 1 < mask.sum(1).min() < mask.sum(1).max()
    for i in range(6):
        alone = (
            trim(prompts()[i : i + 1], EOS),
            trim(out.rationale[i : i + 1], SIZES.boi),
            out.codes[i : i + 1],
        )
        one_text, *one_image = net(*alone)
        for one, among in zip(one_image, image):
            torch.testing.assert_close(one[0], among[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(one_text[0], text[i, mask[i]], atol=1e-5, rtol=0)


def test_a_given_rationale_is_kept_and_not_chosen() -> None:
    net = model()
    words = net.blank(6, torch.device("cpu"))[1]
    out = net.sample(prompts(), SamplingConfig(), rng(0, "given"), words)
    assert torch.equal(out.rationale, words) and not out.chosen.any() and out.codes.shape == (6, 9)
    assert out.codes.min() >= 0 and out.codes.max() < CODES


@pytest.mark.parametrize("book", ["forms", "colors"])
def test_equal_codebook_entries_are_interchangeable(book: str) -> None:
    """Two forms (colours) of equal entries are equally likely everywhere, and have the same embedding; others
    are not.
    """
    net, out = model(), written()
    vectors = getattr(net, book).vectors
    vectors[1] = vectors[3]
    said = net(prompts(), out.rationale, out.codes)
    logits = getattr(said, book)
    torch.testing.assert_close(logits[..., 1], logits[..., 3], atol=1e-5, rtol=0)
    assert (logits[..., 1] - logits[..., 2]).abs().max() > 1e-2
    assert said.text.shape[2] == SIZES.vocabulary + 1  # words and BOI
    assert said.forms.shape == (6, 9, 6) and said.colors.shape == (6, 9, 4)
    step = SIZES.colors if book == "forms" else 1
    number = net.split(out.codes)[book == "colors"]
    codes = out.codes + torch.where(number == 1, 2 * step, torch.where(number == 3, -2 * step, 0))
    assert not torch.equal(codes, out.codes)
    for after, before in zip(net(prompts(), out.rationale, codes), said):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_probabilities_of_all_image_tokens_sum_to_1() -> None:
    """Over all forms times colours, at three places."""
    net, out = model(), written()
    for i in (0, 4, 8):
        every = torch.arange(CODES)
        codes = out.codes[:1].repeat(CODES, 1)
        codes[:, i] = every
        given = prompts()[:1].repeat(CODES, 1), out.rationale[:1].repeat(CODES, 1), codes
        with torch.no_grad():
            log_prob = net.log_probs(*given, WAYS["guided"])[1][:, i]
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)
        with torch.no_grad():
            colors = net(*given).colors[:, i].view(SIZES.forms, SIZES.colors, SIZES.colors)
        assert (colors[0] - colors[1]).abs().max() > 1e-3  # colours know their form
        torch.testing.assert_close(colors[:, 0], colors[:, 1], atol=1e-5, rtol=0)  # and not themselves


def test_no_token_depends_on_later_ones() -> None:
    net, out = model(), written()
    said = net(prompts(), out.rationale, out.codes)
    for i in range(SIZES.side**2 - 1):
        codes = out.codes.clone()
        codes[:, i] = (codes[:, i] + SIZES.colors + 1) % CODES  # another form, and other colours
        other = net(prompts(), out.rationale, codes)
        torch.testing.assert_close(other.text, said.text, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.forms[:, : i + 1], said.forms[:, : i + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(other.colors[:, :i], said.colors[:, :i], atol=1e-6, rtol=0)
        for after, before in zip(other[1:], said[1:]):
            assert (after[:, i + 1] - before[:, i + 1]).abs().max() > 1e-3


def written() -> Sampled:
    return model().sample(prompts(), SamplingConfig(), rng(0, "written"))


def test_guidance_1_is_the_conditional_and_0_the_unconditional_model() -> None:
    a, b = torch.randn(2, 4, 8, generator=rng(0, "guide")).unbind()
    torch.testing.assert_close(guide(a, b, 1.0), a)
    assert torch.equal(guide(a, b, 0.0), b)


def test_codebooks_and_positions_begin_wide() -> None:
    """Neighbouring entries differ by 0.2 only, and positions by nothing but their embeddings."""
    net = model()
    for book in (net.forms, net.colors):
        for network in (book.aligner, book.head):
            assert network[0].weight.std().item() == pytest.approx(3.0, rel=0.2)
    assert net.where.std().item() == pytest.approx(1.0, rel=0.2)
