"""RL-RIG's Actor: reads a picture and what the Checker says of it, and writes an edit prompt token by token.

    picture's latents (one row each) · no requirement · ... · yes requirement · ... · BOS · edit prompt · EOS

Wang et al. 2026, arXiv 2602.19974, where it is a vision-language model of billions of parameters.  It is the
policy of phase 1: `forward` scores tokens under the distribution that `write` samples them from, EOS
included.

Shapes: b batch, s rows that are read (picture and requirements), t tokens of the edit prompt, v vocabulary.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Generator, Tensor, nn

from .tokenizer import BOS, EOS, Tokenizer
from .transformer import SampledText, SamplingConfig, Transformer, TransformerConfig

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

    def all_logits(self, latents: Tensor, ids: Tensor, written: Tensor) -> Tensor:
        """Logits of every possible token at each place of given edit prompts.

        Shapes: latents (b c h w), ids (b n), written (b t) -> (b t v)
        """
        begin = torch.full_like(written[:, :1], BOS)
        before = self.transformer.embed(torch.cat([begin, written[:, :-1]], 1))  # (b t d)
        rows = self.read(latents, ids)
        hidden = self.transformer(torch.cat([rows, before], 1))  # (b s+t d)
        return self.transformer.head(hidden[:, rows.shape[1] :]).float()

    def forward(self, latents: Tensor, ids: Tensor, written: Tensor) -> Tensor:
        """Log-probability of every token of given edit prompts, in nats.

        Shapes: latents (b c h w), ids (b n), written (b t) -> (b t)
        """
        log_prob = self.all_logits(latents, ids, written).log_softmax(-1)  # (b t v)
        return torch.gather(log_prob, 2, written[..., None])[..., 0]

    @torch.no_grad()
    def write(self, latents: Tensor, ids: Tensor, generator: Generator | None) -> SampledText:
        """Sample an edit prompt for each picture; without a generator, take the likeliest token each time.

        Shapes: latents (b c h w), ids (b n)
        """
        cache = self.transformer.cache(len(latents))
        begin = torch.full_like(ids[:, :1], BOS)
        rows = torch.cat([self.read(latents, ids), self.transformer.embed(begin)], 1)  # (b s+1 d)
        hidden = self.transformer(rows, cache)[:, -1:]  # (b 1 d)
        choose = SamplingConfig().chooser(generator)
        return self.transformer.sample(hidden, cache, choose, EOS, self.config.written)


def questions(tokenizer: Tokenizer, asked: list[list[str]], answers: list[list[bool]], length: int) -> Tensor:
    """The Checker's answers as the Actor reads them: "no a red ball left of a blue box yes a red ball ...".

    Unmet requirements come first, and every answer before its requirement, so that the words after it are
    read with the answer known.
    -> (b length).  Raises PromptError when they take more tokens.
    """
    rows = [sorted(zip(*row), key=lambda pair: pair[0]) for row in zip(answers, asked)]
    texts = [" ".join(f"{ANSWERS[met]} {requirement}" for met, requirement in row) for row in rows]
    return tokenizer.encode(texts, length + 1)[:, :-1]  # no end: what follows is a token of its own
