"""Words to numbers, one token a word: the world speaks with about ninety of them.

Real checkpoints come with a byte-pair tokenizer of their own; this one says so when it does not know a word.
"""

import difflib
import re
from collections.abc import Iterable

import torch
from torch import Tensor

BOS, EOS = 0, 1  # begin and end of a sentence; the end also fills up, as in CLIP


class PromptError(ValueError):
    """A prompt that cannot be drawn; the message is one sentence for the user."""


class Tokenizer:
    """`words` in a fixed order are the tokens from 2 on."""

    def __init__(self, words: list[str], length: int) -> None:
        self.words, self.length = words, length
        self.ids = {word: i for i, word in enumerate(words, start=2)}

    @classmethod
    def of(cls, texts: Iterable[str], length: int) -> "Tokenizer":
        """The tokenizer that knows the words of these texts."""
        return cls(sorted({word for text in texts for word in split(text)}), length)

    def __len__(self) -> int:
        return len(self.words) + 2

    def __call__(self, prompts: list[str]) -> Tensor:
        """Shapes: b prompts -> (b t) token ids.  Raises PromptError on a word that it does not know."""
        ids = torch.full((len(prompts), self.length), EOS)
        for row, prompt in zip(ids, prompts):
            words = split(prompt)
            if unknown := [w for w in words if w not in self.ids]:
                raise PromptError(self._explain(prompt, unknown))
            if len(words) > self.length - 2:
                raise PromptError(
                    f"the prompt has {len(words)} words, at most {self.length - 2} fit: {prompt!r}"
                )
            row[: len(words) + 1] = torch.tensor([BOS, *(self.ids[w] for w in words)])
        return ids

    def _explain(self, prompt: str, unknown: list[str]) -> str:
        hints = []
        for word in dict.fromkeys(unknown):
            near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.5)
            hints.append(f"{word!r}" + (f" (nearest: {', '.join(near)})" if near else ""))
        return f"this model's world has no word for {', '.join(hints)} in {prompt!r}"


def split(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())
