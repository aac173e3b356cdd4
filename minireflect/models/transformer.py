"""A decoder-only transformer with a key-value cache and sampling; and RL-RIG's Actor, which is built on it.

    Vaswani et al. 2017; rotary positions: Su et al. 2021, arXiv 2104.09864; RMSNorm: Zhang & Sennrich 2019;
    SwiGLU: Shazeer 2020.  With the same weights it gives the outputs of Llama (Touvron et al. 2023).

    x = x + attention(norm(x))          each token attends to itself and to the tokens before it
    x = x + mlp(norm(x))

The cache stores the keys and values of all previous tokens, so that the network only processes the new token.
Sequences of different lengths can share a batch: padding is marked as not valid, no token attends to it, and
positions are counted without it.

The Actor reads a picture and the Checker's answers about it, and writes an edit prompt token by token (Wang
et al. 2026, arXiv 2602.19974, who use a vision-language model with billions of parameters):

    one row per latent pixel · no REQUIREMENT · ... · yes REQUIREMENT · ... · BOS · edit prompt · EOS

It is the policy in phase 1 of RL-RIG: `forward` returns the log-probabilities of tokens, EOS included, under
the distribution from which `write` samples.

Shapes: b batch, t tokens, u tokens with the cached ones, d width, n heads, v vocabulary.  For the Actor: s
input rows (picture and requirements), t tokens of the edit prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

from ..parallel import rows
from ..ranges import Checked, Depth, Natural, Range, Size, Weight, finite
from ..streams import sent
from .tokenizer import BOS, EOS, Tokenizer

Temperature = Annotated[float, Range(1e-3)]  # logits may overflow at smaller temperatures


@dataclass(frozen=True)
class TransformerConfig(Checked):
    vocabulary: Size  # number of token ids
    length: Size  # longest sequence, in tokens
    width: Size = 96
    layers: Depth = 3
    heads: Size = 4
    hidden: Size = 256  # width inside the MLP; Llama has 8/3 of the width

    def require(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")


class Cache:
    """Keys and values of all previous tokens, per layer, in memory for `config.length` tokens."""

    def __init__(self, config: TransformerConfig, batch: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.heads, config.length, config.width // config.heads)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.valid = torch.ones(batch, config.length, dtype=torch.bool, device=like.device)
        self.used, self.padded = 0, False  # number of cached tokens; whether some of them are padding

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return them with all previous ones.

        Shapes: k, v (b n t d/n) -> (b n u d/n), (b n u d/n)
        """
        end = self.used + k.shape[2]
        self.keys[layer, :, :, self.used : end], self.values[layer, :, :, self.used : end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b t d) -> (b t d)"""
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)  # as in Llama


def rotation(length: int, width: int) -> Tensor:
    """cos and sin of the rotary angles.  -> (2 length width); columns i and i + width/2 are equal"""
    frequency = 10_000.0 ** -(torch.arange(0, width, 2) / width)  # (width/2); Su et al. 2021, section 3.2.2
    angle = (torch.arange(length)[:, None] * frequency).repeat(1, 2)  # (length width)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions (i, i + d/2) by its angle.

    cos and sin may also be (b 1 t d), where positions differ between the sequences.
    Shapes: x (b n t d), cos (t d), sin (t d) -> (b n t d)
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class CausalAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor, i: int, rotary: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Layer i.  `rotary` is cos and sin for `rotate`; no mask: each token attends to all earlier tokens.

        Shapes: x (b t d), rotary (2 t d/n) or (2 b 1 t d/n), mask (t u) or (b 1 t u) bool -> (b t d)
        """
        q, k, v = (rearrange(f(x), "b t (n d) -> b n t d", n=self.heads) for f in (self.q, self.k, self.v))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.add(i, k, v)
        causal = mask is None and q.shape[2] > 1
        with torch.autocast(x.device.type, enabled=False):  # the gradient in bf16 is slow on CPUs
            y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, is_causal=causal)
        return self.out(rearrange(y, "b n t d -> b t (n d)"))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, h = config.width, config.hidden
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.attn = CausalAttention(config)
        self.gate, self.up = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor, *shared: object) -> Tensor:
        """`shared` are the other arguments of `CausalAttention`.  Shapes: x (b t d) -> (b t d)"""
        x = x + self.attn(self.norm1(x), *shared)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def pick(log_prob: Tensor, generator: Generator | None, all_rows: int | None = None) -> Tensor:
    """Sample a token for each row; without a generator, take the most probable token.

    `all_rows` is the number of rows over all processes (parallel.py).  Every process draws the noise of all
    rows, on the CPU, and uses that of its own.
    Shapes: log_prob (b v) -> (b)
    """
    if generator is None:
        return log_prob.argmax(-1)
    noise = torch.empty(all_rows or len(log_prob), log_prob.shape[1]).exponential_(generator=generator)
    noise = noise[rows(all_rows)] if all_rows else noise
    # with exponential noise E, argmax(p / E) has the distribution p, as in torch.multinomial
    return (log_prob.exp() / sent(noise, log_prob.device)).argmax(-1)


Choose = Callable[[Tensor], Tensor]  # logits (b v) -> token ids (b)


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """The distribution from which the next token is sampled."""

    # divides the logits; for greedy decoding use top_k 1
    temperature: Temperature = 1.0
    # sample from the k most probable tokens only; 0 = all
    top_k: Natural = 0
    # sample from the smallest set of tokens with at least this total probability; 1 = all
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    # guidance scale w of image tokens: logits are uncond + w (cond - uncond); 1 = no guidance
    guidance: Weight = 1.0

    def chooser(self, generator: Generator | None, all_rows: int | None = None) -> Choose:
        """A function that samples token ids from logits; the arguments are those of `pick`.

        Its attribute `total` is the sum of all logits.  Callers check once, after the last token, that it is
        finite, because each check waits for a GPU.
        """

        def choose(logits: Tensor) -> Tensor:
            choose.total = choose.total + logits.sum()
            return pick(self.log_probs(logits), generator, all_rows)

        choose.total = 0.0
        return choose

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the distribution that tokens are sampled from; -inf for excluded tokens.

        Applies the temperature, then top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751).  Guidance is
        applied to the logits before this.
        Shapes: logits (... v) -> (... v)
        """
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ranked, order = logits.sort(-1, descending=True)
            share = ranked.softmax(-1)
            beyond = share.cumsum(-1) - share >= self.top_p  # more probable tokens alone reach top_p
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        return logits.log_softmax(-1)


class SampledText(NamedTuple):
    """Texts sampled by `Transformer.sample`."""

    ids: Tensor  # (b t) tokens, the end token included; padding is EOS
    chosen: Tensor  # (b t) bool: True where the model sampled the id; False for a forced end and padding
    hidden: Tensor  # (b 1 d) the state at each text's last token


class Transformer(nn.Module):
    """Maps input rows (embeddings) to states.

    `embed` maps token ids to rows, and `head` maps states to logits.  Callers may also pass rows of their
    own, such as those of a picture.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        rotary = rotation(config.length, config.width // config.heads)
        self.register_buffer("rotary", rotary, persistent=False)
        for name, weight in self.named_parameters():  # as in GPT-2, with larger stds for a small width
            if weight.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                std = config.width**-0.5 * ((2 * config.layers) ** -0.5 if last else 1)
                nn.init.normal_(weight, std=1.0 if name.startswith("embed") else std)

    def cache(self, batch: int) -> Cache:
        """An empty cache for `batch` sequences."""
        return Cache(self.config, batch, self.head.weight)

    def forward(self, x: Tensor, cache: Cache | None = None, valid: Tensor | None = None) -> Tensor:
        """The normalised states after the last block.

        With a cache, x continues the cached sequences and is added to the cache.  `valid` is False where x is
        padding; None = no padding.  Raises ValueError when a sequence is longer than `config.length`.
        Shapes: x (b t d), valid (b t) bool -> (b t d)
        """
        start = cache.used if cache is not None else 0
        end = start + x.shape[1]
        if end > self.config.length:
            raise ValueError(f"a sequence has {end} tokens, but the longest allowed is {self.config.length}")
        if cache is not None and (valid is not None or cache.padded):
            cache.padded = True
            cache.valid[:, start:end] = True if valid is None else valid
            valid = cache.valid[:, :end]  # (b u)
        mask, rotary = None, self.rotary[:, start:end]  # (2 t d/n)
        if valid is not None or (start and end - start > 1):
            # each new token attends to all cached tokens, and to new tokens up to itself
            mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)  # (t u)
        if valid is not None:  # padding attends to itself only: a softmax over no tokens is not finite
            mask = (mask & valid[:, None, None]) | mask.new_ones(mask.shape).tril(start).triu(start)
            at = (valid.cumsum(1) - 1).clamp(min=0)[:, start:]  # (b t) positions
            rotary = self.rotary[:, at][:, :, None]  # (2 b 1 t d/n)
        for i, block in enumerate(self.blocks):
            x = block(x, i, rotary, mask, cache)  # (b t d)
        if cache is not None:
            cache.used = end
        return self.norm_out(x)

    @torch.no_grad()
    def sample(
        self, hidden: Tensor, cache: Cache, choose: Choose, end: int, length: int, forced: bool = False
    ) -> SampledText:
        """Sample a text of at most `length` tokens for each row, up to its first `end`.

        `hidden` is the state at the last cached token.  With `forced`, a text that reaches the length limit
        ends with `end`; `chosen` is False for this token.
        Shapes: hidden (b 1 d)
        """
        b = len(hidden)
        ids = torch.full((b, length), EOS, device=hidden.device)
        chosen = torch.zeros(b, length, dtype=torch.bool, device=hidden.device)
        unfinished = torch.ones(b, dtype=torch.bool, device=hidden.device)  # texts that have not ended
        last = hidden
        for i in range(length):
            if forced and i == length - 1:
                token = torch.full((b,), end, device=hidden.device)
            else:
                token, chosen[:, i] = choose(self.head(hidden)[:, 0].float()), unfinished  # (b)
            ids[:, i] = torch.where(unfinished, token, ids[:, i])
            hidden = self(self.embed(ids[:, i : i + 1]), cache, unfinished[:, None])
            last = torch.where(unfinished[:, None, None], hidden, last)
            # no early exit when all have ended: it would wait for the GPU and change the noise of later draws
            unfinished = unfinished & (ids[:, i] != end)
        return SampledText(ids, chosen, last)


# --- the Actor of RL-RIG ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ActorConfig(Checked):
    vocabulary: Size  # number of token ids
    latent_channels: Size = 4
    side: Size = 8  # side of the latents
    read: Size = 60  # tokens of answers and requirements; four things with four relations have 59
    written: Size = 16  # longest edit prompt in tokens, EOS included; one that names two places has 16
    width: Size = 96
    layers: Depth = 3
    heads: Size = 4

    @property
    def transformer(self) -> TransformerConfig:
        length = self.side**2 + self.read + 1 + self.written
        return TransformerConfig(self.vocabulary, length, self.width, self.layers, self.heads)


class Actor(nn.Module):
    """A policy that writes edit prompts, given a picture and the Checker's answers."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        self.look = nn.Linear(config.latent_channels, config.width)
        self.where = nn.Parameter(torch.randn(config.side**2, config.width))

    def read(self, latents: Tensor, ids: Tensor) -> Tensor:
        """The input rows of picture and requirements.  Shapes: latents (b c h w), ids (b n) -> (b s d)"""
        picture = self.look(rearrange(latents, "b c h w -> b (h w) c")) + self.where
        return torch.cat([picture, self.transformer.embed(ids)], 1)

    def all_logits(self, latents: Tensor, ids: Tensor, written: Tensor) -> Tensor:
        """Logits of all tokens at each position of the given edit prompts.

        Shapes: latents (b c h w), ids (b n), written (b t) -> (b t v)
        """
        begin = torch.full_like(written[:, :1], BOS)
        before = self.transformer.embed(torch.cat([begin, written[:, :-1]], 1))  # (b t d)
        rows = self.read(latents, ids)
        hidden = self.transformer(torch.cat([rows, before], 1))  # (b s+t d)
        return self.transformer.head(hidden[:, rows.shape[1] :]).float()

    def forward(self, latents: Tensor, ids: Tensor, written: Tensor) -> Tensor:
        """Log-probability of each token of the given edit prompts, in nats.

        Shapes: latents (b c h w), ids (b n), written (b t) -> (b t)
        """
        return self.all_logits(latents, ids, written).log_softmax(-1).gather(2, written[..., None])[..., 0]

    @torch.no_grad()
    def write(self, latents: Tensor, ids: Tensor, generator: Generator | None) -> SampledText:
        """Sample an edit prompt for each picture; without a generator, always take the most probable token.

        Raises FloatingPointError when a logit is not finite.
        Shapes: latents (b c h w), ids (b n)
        """
        cache = self.transformer.cache(len(latents))
        choose = SamplingConfig().chooser(generator)
        begin = torch.full_like(ids[:, :1], BOS)
        rows = torch.cat([self.read(latents, ids), self.transformer.embed(begin)], 1)  # (b s+1 d)
        hidden = self.transformer(rows, cache)[:, -1:]  # (b 1 d)
        text = self.transformer.sample(hidden, cache, choose, EOS, self.config.written)
        finite(choose.total, "a logit of a sampled edit prompt")
        return text


def questions(tokenizer: Tokenizer, asked: list[list[str]], answers: list[list[bool]], length: int) -> Tensor:
    """Ids of the Checker's answers for the Actor: "no a red ball left of a blue box yes a red ball ...".

    Unmet requirements come first.  Each answer precedes its requirement, so that the causal attention of the
    requirement's words includes the answer.
    -> (b length).  Raises PromptError when a row needs more tokens.
    """
    rows = [sorted(zip(*row), key=lambda pair: pair[0]) for row in zip(answers, asked)]
    texts = [" ".join(f"{'yes' if met else 'no'} {requirement}" for met, requirement in row) for row in rows]
    return tokenizer.encode(texts, length + 1)[:, :-1]  # without the end token: BOS follows
