"""Text to ids and back, and where a text ends."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from minireflect.models.reasongen import ReasonGenConfig
from minireflect.models.tokenizer import BOS, EOS, BytePairs, PromptError, Tokenizer, trim, up_to
from minireflect.streams import choices
from minireflect.world.captions import rationale, read_rationale
from minireflect.world.prompts import draw_prompts, split
from tests.parity.checkpoints import vocabulary
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


# --- CLIP's vocabulary --------------------------------------------------------------------------------------
@pytest.fixture(params=["merges", "json"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A vocabulary in each of its two forms, in which <my-cat> is learnt."""
    vocabulary(tmp_path)
    if request.param == "json":
        theirs(tmp_path).save_pretrained(tmp_path)
        for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            (tmp_path / name).unlink(missing_ok=True)
    return tmp_path


def theirs(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


TEXT = "a <my-cat> rides! <your-cat>"
N = 567  # tokens of the small vocabulary
FLAGS = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
SAID = [
    ("added_tokens.json", {"<my-cat>": N, "<your-cat>": N + 1}, [N, N + 1]),
    ("tokenizer_config.json", {"added_tokens_decoder": {str(N): {"content": "<my-cat>", **FLAGS}}}, [N]),
    ("tokenizer_config.json", {"additional_special_tokens": ["<my-cat>", "<your-cat>"]},
     [N, N + 1]),
    ("special_tokens_map.json", {"additional_special_tokens": ["<my-cat>"]}, [N]),
    ("tokenizer_config.json", {"extra_special_tokens": {"cat_token": "<my-cat>"}}, [N]),
    ("tokenizer_config.json", {"extra_special_tokens": ["<my-cat>"]}, [N]),
    ("tokenizer_config.json", {"pad_token": "!"}, [0]),
    ("special_tokens_map.json", {"bos_token": "<|startoftext|>", "unk_token": "<|endoftext|>"}, []),
]  # fmt: skip


@pytest.mark.parametrize(("file", "said", "there"), SAID)
def test_added_tokens_are_read_as_in_transformers(file: str, said: dict, there: list, folder: Path) -> None:
    (folder / file).write_text(json.dumps(said))
    found = BytePairs(folder)([TEXT])[0].tolist()
    assert [i for i in found if i >= N or i == 0][: len(there)] == there
    if "tokens.json" not in file:  # transformers 5 does not read added_tokens.json
        expected = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)(TEXT).input_ids
        assert found[: len(expected)] == expected


MISPLACED = [
    ("added_tokens.json", {"<my-cat>": N + 5}, f"'<my-cat>' needs the id {N + 5}, but gets {N}"),
    ("added_tokens.json", {"<my-cat>": True}, "<my-cat> must be a whole number, got True"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<my-cat>"}}}, "'x'"),
    ("tokenizer_config.json", {"added_tokens_decoder": {str(N): {}}}, f"added token {N} must be a text"),
    ("tokenizer_config.json", {"additional_special_tokens": "<my-cat>"}, "additional_special_tokens"),
    ("tokenizer_config.json", {"extra_special_tokens": [5]}, "extra_special_tokens in .* a text, got 5"),
    ("special_tokens_map.json", {"pad_token": ["!"]}, "pad_token in .* must be a text"),
]


@pytest.mark.parametrize(("file", "said", "told"), MISPLACED)
def test_added_tokens_that_cannot_be_read_are_named(file: str, said: dict, told: str, folder: Path) -> None:
    (folder / file).write_text(json.dumps(said))
    with pytest.raises(PromptError, match=told):
        BytePairs(folder)


@pytest.mark.parametrize("folder", ["json"], indirect=True)
def test_tokenizer_json_states_the_vocabulary_and_nothing_else(folder: Path) -> None:
    """transformers 5 makes CLIP's tokenizer from the vocabulary and the merges, whatever else is there."""
    path, expected = folder / "tokenizer.json", BytePairs(folder)([TEXT])
    whole = json.loads(path.read_text("utf-8"))
    odd = {"dropout": 0.9, "ignore_merges": True, "end_of_word_suffix": None, "type": "WordLevel"}
    model = {"model": whole["model"] | odd}
    for change in (model, {"pre_tokenizer": None}, {"normalizer": None}):
        path.write_text(json.dumps(whole | change), "utf-8")
        assert torch.equal(BytePairs(folder)([TEXT]), expected)
    side = dict(direction="Left", strategy="BatchLongest", pad_to_multiple_of=None, pad_id=0, pad_type_id=0)
    path.write_text(json.dumps(whole | {"padding": side | {"pad_token": "!"}}), "utf-8")
    with pytest.raises(PromptError, match=r"tokenizer.json asks for padding on the left, which is refused"):
        BytePairs(folder)
    path.write_text(json.dumps(whole), "utf-8")
    vocabulary(folder, ["quite another text"])
    with pytest.raises(PromptError, match=r"vocab.json and tokenizer.json have other ids for "):
        BytePairs(folder)


def changed(lines: list[str], ids: dict) -> dict[str, tuple[list[str], dict, str]]:
    """Damaged merges and ids, and what is said of them."""
    made, last = lines[-1].replace(" ", ""), list(ids)[-1]
    return {
        "half": (lines[: len(lines) // 2], ids, "none of its merges gives its token"),
        "the last is lost": (lines[:-1], ids, f"none of its merges gives its token '{made}'"),
        "cut": ([*lines[:-1], lines[-1].split(" ")[0]], ids, "a merge must be two words"),
        "three words": ([*lines, "a b c"], ids, "a merge must be two words, got 'a b c'"),
        "two spaces": ([*lines[:-1], lines[-1].replace(" ", "  ")], ids, "a merge must be two words"),
        "comment": ([*lines, "# the end"], ids, "a merge must be two words, got '# the end'"),
        "a bool": (lines, ids | {last: True}, "must be a whole number, got True"),
        "negative": (lines, ids | {last: -1}, "must be at least 0, got -1"),
        "a text": (lines, ids | {last: "5"}, "must be a whole number, got '5'"),
        "twice": (lines, ids | {last: 7}, "two tokens have the id 7"),
    }


@pytest.mark.parametrize("what", changed(["a b"], {"a": 0}))
def test_damaged_vocabularies_are_named(what: str, folder: Path) -> None:
    single = folder / "tokenizer.json"
    if single.is_file():
        whole = json.loads(single.read_text("utf-8"))
        lines = [" ".join(pair) for pair in whole["model"]["merges"]]
        lines, ids, told = changed(lines, whole["model"]["vocab"])[what]
        whole["model"] |= {"vocab": ids, "merges": [line.split(" ") for line in lines]}
        single.write_text(json.dumps(whole), "utf-8")
    else:
        header, *lines = (folder / "merges.txt").read_text("utf-8").strip().split("\n")
        ids = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines, ids, told = changed(lines, ids)[what]
        (folder / "merges.txt").write_text("\n".join([header, *lines, ""]), "utf-8")
        (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    with pytest.raises(PromptError, match=told):
        BytePairs(folder)


def test_a_vocabulary_of_windows_and_without_a_version_is_read(tmp_path: Path) -> None:
    expected = BytePairs(vocabulary(tmp_path))(["a photo of a cat"])
    header, _, lines = (tmp_path / "merges.txt").read_text("utf-8").partition("\n")
    for text in (lines, f"{header}\n{lines}".replace("\n", "\r\n"), f"{header}\n{lines}\n\n"):
        (tmp_path / "merges.txt").write_bytes(text.encode())
        assert torch.equal(BytePairs(tmp_path)(["a photo of a cat"]), expected)
