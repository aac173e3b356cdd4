"""ReasonGen-R1: what stage 1 learns from."""

import pytest
from torch import Tensor

from minireflect.models.reasongen import ReasonGenConfig
from minireflect.models.tokenizer import EOS, up_to
from minireflect.streams import choices
from minireflect.world.prompts import draw_prompts
from minireflect.world.rationales import rationale, read_rationale
from tests.small import REASON_WORDS as WORDS


def even(images: Tensor, prompts: list[str]) -> Tensor:
    """A judge that likes about half of all pictures, by their far decimals."""
    return (1e4 * images.mean((1, 2, 3)).double() % 1 > 0.5).float()


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
