"""Text to token ids and back.

    Tokenizer       one token per word of the synthetic world (about ninety); any other word is an error
    BytePairs       CLIP's byte-pair encoding, with the vocabulary of a real checkpoint

Both turn b prompts into ids (b t): begin token, words, end token, padding.
"""

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..disk import read_json, read_text
from ..ranges import Natural, Refusal, expect, quote
from ..world.prompts import split

BOS, EOS = 0, 1  # begin and end of a sentence; EOS is also the padding, as in CLIP


class PromptError(Refusal):
    """A prompt or vocabulary that cannot be used; the message is one sentence for the user."""


def up_to(ids: Tensor, end: int) -> Tensor:
    """Mask of the tokens up to and including the first `end`.  Shapes: ids (b t) -> (b t) bool"""
    ends = (ids == end).int()
    return ends.cumsum(1) - ends == 0


def trim(ids: Tensor, end: int) -> Tensor:
    """Remove the last columns, where all rows are past their first `end`.  Shapes: ids (b t) -> (b t')"""
    return ids[:, : int(up_to(ids, end).sum(1).max())]


class Tokenizer:
    """One token per word: `words` have the ids 2, 3, ...  Prompts are padded to `length` tokens."""

    def __init__(self, words: list[str], length: int) -> None:
        self.words, self.length = words, length
        self.ids = {word: i for i, word in enumerate(words, start=2)}

    @classmethod
    def of(cls, texts: Iterable[str], length: int) -> "Tokenizer":
        """A tokenizer whose vocabulary is the words of these texts, sorted."""
        return cls(sorted({word for text in texts for word in split(text)}), length)

    def __len__(self) -> int:
        return len(self.words) + 2

    def __call__(self, prompts: list[str]) -> Tensor:
        """BOS, the words, EOS, padding (EOS).  Raises PromptError as `encode`.  -> (b length)"""
        return F.pad(self.encode(prompts, self.length - 1), (1, 0), value=BOS)

    def encode(self, texts: list[str], length: int, end: int = EOS) -> Tensor:
        """The words of each text, then `end`, then padding (EOS), without BOS.  -> (b length)

        Raises PromptError on an unknown word, or when a text with its end token is longer than `length`.
        """
        ids = torch.full((len(texts), length), EOS)
        for row, text in zip(ids, texts):
            words = split(text)
            if unknown := [w for w in words if w not in self.ids]:
                hints = ", ".join(map(self._hint, [*dict.fromkeys(unknown)][:3]))
                raise PromptError(f"not in this model's vocabulary: {hints}, in {quote(text)}")
            if len(words) >= length:
                raise PromptError(f"the text has {len(words)} words, at most {length - 1} fit: {quote(text)}")
            row[: len(words) + 1] = torch.tensor([*(self.ids[w] for w in words), end])
        return ids

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of b rows of ids, without BOS, EOS and ids beyond the vocabulary (BOI).

        Shapes: ids (b t)
        """
        return [" ".join(self.words[i - 2] for i in row if EOS < i < len(self)) for row in ids.tolist()]

    def _hint(self, word: str) -> str:
        near = difflib.get_close_matches(word[:40], self.words, n=3, cutoff=0.5)
        return quote(word) + (f" (nearest: {', '.join(near)})" if near else "")


# CLIP's own pattern: special tokens, contractions, runs of letters, single digits, runs of anything else
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BEGIN_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
SPECIAL = ("pad_token", "additional_special_tokens", "extra_special_tokens")  # keys of special tokens


class BytePairs:
    """CLIP's byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021, section 2.4).

    `folder` must hold `vocab.json` and `merges.txt`, or else `tokenizer.json`.  `pad` is the padding token;
    None = the one that the folder states.  Prompts are cut to `length` tokens, with a warning.
    Raises PromptError when the vocabulary is missing or broken, and ImportError without the `tokenizers`
    library.
    """

    def __init__(self, folder: str | Path, length: int = 77, pad: str | None = None) -> None:
        folder, self.length = Path(folder), length
        self._engine = _engine(folder)
        tokens = (BEGIN_TEXT, END_TEXT, pad or next(iter(_special(folder, "pad_token")), END_TEXT))
        ids = [self._engine.token_to_id(token) for token in tokens]
        if None in ids:
            raise PromptError(f"the vocabulary in {folder} has no token {tokens[ids.index(None)]}")
        self.bos, self.eos, self.pad = ids

    def __len__(self) -> int:
        return 1 + max(self._engine.get_vocab().values())

    def __call__(self, prompts: list[str]) -> Tensor:
        """Begin token, the tokens of the words, end token, padding.  -> (b length)

        Raises PromptError when a prompt is not valid Unicode.
        """
        ids = torch.full((len(prompts), self.length), self.pad)
        limit = self.length - 2  # without begin and end
        if broken := [p for p in prompts if p != p.encode(errors="replace").decode()]:
            raise PromptError(f"the prompt {quote(broken[0])} is not valid Unicode text")
        for row, found in zip(ids, self._engine.encode_batch(prompts, add_special_tokens=False)):
            words = found.ids[:limit]
            if lost := found.tokens[limit:]:
                text = "".join(lost).replace("</w>", " ").strip()
                warnings.warn(f"a prompt has more than {limit} tokens; ignored: {quote(text)}", stacklevel=2)
            row[: len(words) + 2] = torch.tensor([self.bos, *words, self.eos])
        return ids


class TwoBytePairs(NamedTuple):
    """SDXL's two tokenizers: same words, different padding.  Gives the ids of the first, then the second."""

    first: BytePairs
    second: BytePairs

    @property
    def length(self) -> int:
        return self.first.length + self.second.length

    def __call__(self, prompts: list[str]) -> Tensor:
        """-> (b length), where length is the sum of both"""
        return torch.cat([self.first(prompts), self.second(prompts)], dim=1)


class NoVocabulary(NamedTuple):
    """Takes the place of the tokenizer of a checkpoint that has none; every call raises PromptError."""

    source: str | Path
    length: int

    def __call__(self, prompts: list[str]) -> Tensor:
        how = "give the folder of vocab.json and merges.txt, or tokenizer.json, as tokenizer or --tokenizer"
        raise PromptError(f"{self.source} has no vocabulary for prompts: {how}")


def _engine(folder: Path) -> "tokenizers.Tokenizer":  # noqa: F821  imported below: an optional dependency
    """The tokenizer of the `tokenizers` library with a folder's vocabulary and CLIP's preprocessing."""
    try:
        from tokenizers import Regex, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Engine
    except ImportError as error:
        raise ImportError("checkpoints need tokenizers: pip install 'minireflect[checkpoints]'") from error

    try:
        ids, pairs, is_single = _vocabulary(folder)
        model = models.BPE(ids, pairs, unk_token=END_TEXT, end_of_word_suffix="</w>")
        engine = Engine.from_str(read_text(folder / "tokenizer.json")) if is_single else Engine(model)
        engine.no_padding(), engine.no_truncation()
        engine.model = model  # as in transformers, tokenizer.json states only the vocabulary
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        engine.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
        engine.add_special_tokens([t for t in (BEGIN_TEXT, END_TEXT) if t in ids])
        made = {"".join(pair) for pair in pairs} | _add_tokens(engine, folder)
        if lost := [t for t in ids if len(t.removesuffix("</w>")) > 1 and t not in made]:
            raise Refusal(f"none of its merges gives its token {quote(lost[0])}")
        return engine
    except BaseException as error:  # the library raises bare exceptions, and panics
        if isinstance(error, KeyboardInterrupt | PromptError):
            raise
        why = error if isinstance(error, Refusal) else quote(str(error))
        raise PromptError(f"the vocabulary in {folder} cannot be read: {why}") from error


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, ...]], bool]:
    """The id of each token, the merges in their order, and whether they are those of tokenizer.json.

    Raises PromptError if there are none, and Refusal if an id or a merge is damaged.
    """
    vocabulary, merges, single = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    whole = _json(single)
    model = expect(whole.get("model") or {}, dict, f"model in {single}")
    theirs = expect(model.get("vocab") or {}, dict, f"vocab in {single}")
    if is_single := not (vocabulary.is_file() and merges.is_file()):
        if not single.is_file():
            raise PromptError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")
        ids, lines = theirs, model.get("merges")
    else:
        ids, lines = _json(vocabulary), read_text(merges).split("\n")
        lines = [line.removesuffix("\r") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    ids, lines = expect(ids, dict[str, Natural], "vocab"), expect(lines, list, "merges")
    if left := [key for key in ("padding", "truncation") if "'Left'" in str(whole.get(key))]:
        raise Refusal(f"{single} asks for {left[0]} on the left, which is refused")
    if odd := [token for token, i in ids.items() if theirs.get(token, i) != i]:
        raise Refusal(f"{vocabulary.name} and {single.name} have other ids for {quote(odd[0])}")
    pairs = [tuple(line.split(" ") if isinstance(line, str) else line) for line in lines]
    if odd := [pair for pair in pairs if len(pair) != 2 or not all(pair)]:
        raise Refusal(f"a merge must be two words, got {quote(' '.join(odd[0]))}")
    if twice := [i for i, n in Counter(ids.values()).items() if n > 1]:
        raise Refusal(f"two tokens have the id {twice[0]}")
    return ids, pairs, is_single


def _add_tokens(engine: "tokenizers.Tokenizer", folder: Path) -> set[str]:  # noqa: F821
    """Add the tokens, such as learnt words, that transformers stores outside of the vocabulary.

    -> all tokens that were added, also by tokenizer.json
    """
    stated = _json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    added = [(expect(about.get("content"), str, f"added token {i}"), int(i)) for i, about in stated.items()]
    added += expect(_json(folder / "added_tokens.json"), dict[str, Natural], "added_tokens.json").items()
    known = {token.content for token in engine.get_added_tokens_decoder().values()}
    for token, i in sorted(added, key=lambda pair: pair[1]):
        if token not in known:
            engine.add_special_tokens([token])
        if (found := engine.token_to_id(token)) != i:
            raise Refusal(f"the added token {quote(token)} needs the id {i}, but gets {found}")
    special = [t for key in SPECIAL for t in _special(folder, key)]
    engine.add_special_tokens(special)
    return {*known, *dict(added), *special}


def _special(folder: Path, key: str) -> list[str]:
    """The special tokens that a folder states under a key."""
    found = []
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if value := _json(file).get(key):
            many = [value] if key == "pad_token" else [*value.values()] if isinstance(value, dict) else value
            many = expect(many, list, f"{key} in {file}")
            texts = [each.get("content") if isinstance(each, dict) else each for each in many]
            found += expect(texts, list[str], f"{key} in {file}")
    return found


def _json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}
