"""RL-RIG's Actor: looks at a picture and at what the Checker said of it, and writes an edit prompt token by token.

    picture's latents (one row each) · no requirement · ... · yes requirement · ... · begin · edit prompt · end

Wang et al. 2026, arXiv 2602.19974, where it is a vision-language model of billions.  A policy: its log-probabilities are those of the
distribution that the tokens were sampled from, the end token included.

Shapes: b batch, s rows that are read (picture and requirements), t tokens that are written, v vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Generator, Tensor, nn

from .tokenizer import BOS, EOS, Tokenizer
from .transformer import Transformer, TransformerConfig

ANSWERS = ("no", "yes")


@dataclass(frozen=True)
class ActorConfig:
    vocabulary: int  # number of token ids
    latent_channels: int = 4
    side: int = 8  # of the latents
    read: int = 60  # tokens of requirements and answers; four things with four relations take 59
    written: int = 16  # tokens of an edit prompt, its end included; two places take as many
    width: int = 96
    layers: int = 3
    heads: int = 4

    @property
    def transformer(self) -> TransformerConfig:
        length = self.side**2 + self.read + 1 + self.written
        return TransformerConfig(self.vocabulary, length, self.width, self.layers, self.heads)


class Written(NamedTuple):
    """Edit prompts as they were sampled."""

    ids: Tensor  # (b t) tokens; what follows the end is EOS
    mask: Tensor  # (b t) bool: the tokens that the policy chose, its end token included
    log_prob: Tensor  # (b t) nats, 0 outside the mask


class Actor(nn.Module):
    def __init__(self, config: ActorConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        self.look = nn.Linear(config.latent_channels, config.width)
        self.where = nn.Parameter(torch.randn(config.side**2, config.width))

    def read(self, latents: Tensor, ids: Tensor) -> Tensor:
        """Picture and requirements as rows.  Shapes: latents (b c h w), ids (b n) -> (b s d)"""
        picture = self.look(rearrange(latents, "b c h w -> b (h w) c")) + self.where
        return torch.cat([picture, self.transformer.embed(ids)], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Shapes: hidden (b t d) -> (b t v)"""
        return self.transformer.head(hidden)

    def forward(self, latents: Tensor, ids: Tensor, written: Tensor) -> Tensor:
        """Log-probability of every token of given edit prompts, in nats.

        Shapes: latents (b c h w), ids (b n), written (b t) -> (b t)
        """
        logits = self.all_logits(latents, ids, written)  # (b t v)
        return torch.gather(logits.log_softmax(-1), 2, written[..., None])[..., 0]

    def all_logits(self, latents: Tensor, ids: Tensor, written: Tensor) -> Tensor:
        """What the policy thought of every possible token at each place.  Shapes: written (b t) -> (b t v)"""
        begin = torch.full_like(written[:, :1], BOS)
        before = self.transformer.embed(torch.cat([begin, written[:, :-1]], 1))  # (b t d)
        rows = self.read(latents, ids)
        hidden = self.transformer(torch.cat([rows, before], 1))  # (b s+t d)
        return self.logits(hidden[:, rows.shape[1] :]).float()

    @torch.no_grad()
    def write(self, latents: Tensor, ids: Tensor, generator: Generator | None) -> Written:
        """Sample an edit prompt for each picture; without a generator, the likeliest token each time.

        Shapes: latents (b c h w), ids (b n)
        """
        b, t = len(latents), self.config.written
        cache = self.transformer.cache(b)
        begin = torch.full((b, 1), BOS, device=ids.device)
        rows = torch.cat([self.read(latents, ids), self.transformer.embed(begin)], 1)  # (b s+1 d)
        written = torch.full((b, t), EOS, device=ids.device)
        mask = torch.zeros(b, t, dtype=torch.bool, device=ids.device)
        log_probs = torch.zeros(b, t, device=ids.device)
        going = torch.ones(b, dtype=torch.bool, device=ids.device)
        for i in range(t):
            hidden = self.transformer(rows, cache)[:, -1:]  # (b 1 d)
            log_prob = self.logits(hidden)[:, 0].float().log_softmax(-1)  # (b v)
            if generator is None:
                token = log_prob.argmax(-1)
            else:
                token = torch.multinomial(log_prob.exp().cpu(), 1, generator=generator)[:, 0].to(ids.device)
            chosen = torch.where(going, token, EOS)  # (b)
            written[:, i], mask[:, i] = chosen, going
            log_probs[:, i] = torch.where(going, log_prob.gather(1, chosen[:, None])[:, 0], 0.0)
            going = going & (chosen != EOS)
            if not going.any():
                break
            rows = self.transformer.embed(chosen[:, None])
        return Written(written, mask, log_probs)


def questions(
    tokenizer: Tokenizer, requirements: list[list[str]], answers: list[list[bool]], length: int
) -> Tensor:
    """What the Actor reads about each picture, as tokens: "no a red ball left of a blue box yes a red ball yes a blue box ...".

    What is unmet comes first, and every answer before its requirement, so that the words after it are read with it in mind.
    -> (b length).  Raises ValueError when they are too long.
    """
    rows = [sorted(zip(said, asked), key=lambda r: r[0]) for asked, said in zip(requirements, answers)]
    texts = [" ".join(f"{ANSWERS[a]} {r}" for a, r in row) for row in rows]
    ids = Tokenizer(tokenizer.words, length + 2)(texts)  # (b length+2) begin and end included
    return ids[:, 1:-1]


def write_down(tokenizer: Tokenizer, edits: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Given edit prompts as the Actor would have written them.  -> ids (b length), mask (b length) bool, end token included"""
    ids = Tokenizer(tokenizer.words, length + 1)(edits)[:, 1:]  # (b length) without the begin
    words = (ids != EOS).sum(1)
    mask = torch.arange(length)[None] <= words[:, None]
    return ids, mask


def read_out(tokenizer: Tokenizer, ids: Tensor) -> list[str]:
    """The edit prompts as text.  Shapes: ids (b t)"""
    return [" ".join(tokenizer.words[i - 2] for i in row if i > EOS) for row in ids.tolist()]
