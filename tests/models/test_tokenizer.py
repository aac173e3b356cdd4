"""Text to ids and back, and where a text ends."""

import pytest
import torch

from minireflect.models.reasongen import ReasonGenConfig
from minireflect.models.tokenizer import BOS, EOS, PromptError, Tokenizer, trim, up_to
from minireflect.streams import choices
from minireflect.world.captions import rationale, read_rationale
from minireflect.world.prompts import draw_prompts, split
from tests.small import REASON_WORDS as WORDS

TOKENS = Tokenizer.of(["a red ball at the top left", "two things"], 10)


def test_texts_come_back_from_their_ids() -> None:
    texts = ["a red ball at the top left", "", "two things"]
    ids = TOKENS.encode(texts, 9)
    assert ids.shape == (3, 9) and TOKENS.decode(ids) == texts
    assert up_to(ids, EOS).sum(1).tolist() == [8, 1, 3]  # the words and the end
    assert all(row[n - 1] == EOS for row, n in zip(ids.tolist(), [8, 1, 3]))
    assert TOKENS.decode(TOKENS(texts)) == texts and torch.equal(TOKENS(texts)[:, 1:], ids)
    assert (TOKENS(texts)[:, 0] == BOS).all()


def test_a_text_may_end_in_another_token() -> None:
    end = len(TOKENS)  # beyond the vocabulary, as BOI
    ids = TOKENS.encode(["two things", "a ball"], 5, end)
    assert [row.index(end) for row in ids.tolist()] == [2, 2] and TOKENS.decode(ids) == [
        "two things",
        "a ball",
    ]
    assert (ids[:, 3:] == EOS).all()


def test_unknown_words_and_long_texts_are_named() -> None:
    with pytest.raises(PromptError, match=r"this model's vocabulary: 'bal' \(nearest: ball"):
        TOKENS(["a red bal"])
    with pytest.raises(PromptError, match="3 words, at most 2 fit: 'a red ball'"):
        TOKENS.encode(["a red ball"], 3)
    assert TOKENS.encode(["a red ball"], 4).shape == (1, 4)


def test_a_text_counts_up_to_its_first_end() -> None:
    ids = torch.tensor([[3, 1, 1, 1], [3, 4, 1, 5], [1, 3, 3, 1]])
    assert up_to(ids, 1).sum(1).tolist() == [2, 3, 1]
    assert trim(ids, 1).shape == (3, 3) and torch.equal(trim(ids, 1), ids[:, :3])
    assert up_to(torch.tensor([[3, 4]]), 1).all()  # no end: all of it


def test_rationales_go_through_tokens_and_back() -> None:
    config = ReasonGenConfig(len(WORDS), 8, 4)
    draw = choices(0, "words")
    scenes = [
        p.scene(draw)
        for k in ("physical", "unconventional", "arrangement")
        for p in draw_prompts(k, "train", 60, draw)
    ]
    written = [rationale(s, rng=draw) for s in scenes]
    ids = WORDS.encode(written, config.rationale, config.boi)
    assert ids.shape == (180, config.rationale) and ((ids == config.boi).sum(1) == 1).all()
    assert [read_rationale(t) for t in WORDS.decode(ids)] == [read_rationale(t) for t in written]
    mask = up_to(ids, config.boi)
    for row, counts in zip(ids.tolist(), mask.tolist()):
        end = row.index(config.boi)
        assert counts == [i <= end for i in range(len(row))] and set(row[end + 1 :]) <= {EOS}
    with pytest.raises(ValueError, match="at most 2 fit"):
        WORDS.encode(["a red ball"], 3, config.boi)


def test_a_tex_command_is_no_word() -> None:
    assert split("a red candle $\\frac{$ in air's glow") == ["a", "red", "candle", "in", "air's", "glow"]
