"""ReasonGen-R1: what stage 1 learns from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minireflect import rng
from minireflect.models.reasongen import ReasonGenConfig, SamplingConfig
from minireflect.models.tokenizer import EOS, trim, up_to
from minireflect.pretrain.sft import Lessons, ReasonTraining, lessons, shuffled, told_loss, train_reasongen
from minireflect.run import Run
from minireflect.streams import choices
from minireflect.world.data import WorldConfig
from minireflect.world.prompts import draw_prompts, understand
from minireflect.world.rationales import rationale, read_rationale
from tests.small import REASON_WORDS as WORDS
from tests.small import small_reasongen as painter


def even(images: Tensor, prompts: list[str]) -> Tensor:
    """A judge that likes about half of all pictures, by their far decimals."""
    return (1e4 * images.mean((1, 2, 3)).double() % 1 > 0.5).float()


def test_rationales_go_through_tokens_and_back() -> None:
    config = ReasonGenConfig(len(WORDS), 8, 4)
    draw = choices(0, "words")
    scenes = [p.scene(draw) for k in ("physical", "unconventional", "arrangement") for p in draw_prompts(k, "train", 60, draw)]  # fmt: skip
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


def test_shuffled_rationales_stay_in_their_law() -> None:
    thoughts, laws = (
        [f"{law} {i}" for law in "ab" for i in range(50)],
        [law for law in "ab" for _ in range(50)],
    )
    moved = shuffled(thoughts, laws, choices(0, "shuffle"))
    assert sorted(moved) == sorted(thoughts) and all(t.startswith(law) for t, law in zip(moved, laws))
    assert sum(a == b for a, b in zip(moved, thoughts)) < 10


def test_a_dense_caption_is_the_rationale_as_prompt() -> None:
    """With the same draws: where the prompt is dense it is that picture's rationale, and nothing is left to think."""
    p, none = painter(), torch.device("cpu")
    told = {
        dense: lessons(ReasonTraining(40, dense=dense), WorldConfig(), 0, WORDS, ReasonGenConfig(len(WORDS), 16, 4), p.codec, none)
        for dense in (0.0, 0.5, 1.0)
    }  # fmt: skip
    plain, mixed, dense = (
        [pair for pair in zip(WORDS.decode(t.prompts), WORDS.decode(t.words))]
        for t in told.values()
    )  # fmt: skip
    assert all(read_rationale(thought) and prompt != thought for prompt, thought in plain)
    assert dense == [(thought, "") for _, thought in plain]
    assert all(row in (a, b) for row, a, b in zip(mixed, plain, dense))
    assert 10 < sum(row == b for row, b in zip(mixed, dense)) < 30
    assert all(torch.equal(t.codes, told[0.0].codes) for t in told.values())
    with pytest.raises(ValueError, match=r"dense is 1\.5"):
        ReasonTraining(dense=1.5)
    with pytest.raises(ValueError, match="told is -1"):
        ReasonTraining(told=-1)


def test_a_rationale_learnt_without_its_picture_scores_as_it_does_with_it() -> None:
    """Words stand before the picture, so nothing of it counts; and only rationales have words to score, up to BOI."""
    p = painter()
    model = p.model.requires_grad_(True)
    sizes = ReasonGenConfig(len(WORDS), 16, 4)
    training = ReasonTraining(12, rationales="none", dense=0.5, told=64)
    data = lessons(training, WorldConfig(), 0, WORDS, sizes, p.codec, torch.device("cpu"))
    lengths = up_to(data.thoughts, sizes.boi).sum(1)
    data = Lessons(*(rows[torch.stack([lengths.argmin(), lengths.argmax()])] for rows in data))
    assert lengths.min() < lengths.max()
    loss = told_loss(model, data, training, torch.device("cpu"), rng(0, "test"))
    pick = torch.randint(2, (64,), generator=rng(0, "test"))
    given = trim(data.captions[pick], EOS), trim(data.thoughts[pick], sizes.boi)
    words, _ = model.log_probs(*given, data.codes[pick, :20], SamplingConfig())
    counted = up_to(given[1], sizes.boi)
    assert loss.item() == pytest.approx(-(words * counted).sum().item() / counted.sum().item(), rel=1e-5)
    loss.backward()
    drawing = [*model.forms.parameters(), *model.colors.parameters(), *model.then.parameters()]
    assert not any(w.grad is not None and w.grad.any() for w in drawing)


def test_bfloat16_learns_the_same_from_the_same(tmp_path: Path) -> None:
    """Multiplied with eight bits, kept in float32: losses within a hundredth, and not the very same."""
    losses = {}
    for bf16 in (False, True):
        training = ReasonTraining(24, steps=3, batch=8, lr=1e-3, dense=0.5, bf16=bf16)
        run = Run(tmp_path / str(bf16), {})
        codec = painter().codec
        model, _ = train_reasongen(training, WorldConfig(), 0, codec, run, torch.device("cpu"))
        assert all(w.dtype == torch.float32 for w in model.parameters())
        losses[bf16] = torch.tensor([row["loss"] for row in run.metrics("reason-sft")])
    assert not torch.equal(losses[True], losses[False])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=0)


def test_shares_out_of_range_are_named() -> None:
    for name in ("altered", "related"):
        with pytest.raises(ValueError, match=f"{name} is 1.5"):
            ReasonTraining(**{name: 1.5})


def test_examples_may_show_what_no_prompt_asks_for() -> None:
    codec, sizes = painter().codec, ReasonGenConfig(len(WORDS), 16, 4)
    training = ReasonTraining(40, arrangements=0.0, altered=1.0)
    data = lessons(training, WorldConfig(), 0, WORDS, sizes, codec, torch.device("cpu"))
    captions = WORDS.decode(data.captions)
    assert len(captions) == 40 and all(len(c.split()) > 4 and understand(c) is None for c in captions)
