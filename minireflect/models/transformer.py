"""A decoder-only transformer: what comes next, given all that came before.  RL-RIG's Actor writes with it.

    Vaswani et al. 2017; rotary positions: Su et al. 2021, arXiv 2104.09864; RMSNorm: Zhang & Sennrich 2019; SwiGLU: Shazeer 2020.
    These are Llama's layers (Touvron et al. 2023, arXiv 2302.13971), and give its numbers with its weights.

    x = x + attention(norm(x))          each token looks at itself and at what stands before it
    x = x + mlp(norm(x))

A cache keeps the keys and values of what was read, so that every new token costs one row in place of the whole sequence.
Sequences of different lengths share a batch: what fills up is marked as not valid, is seen by nobody, and takes no position.

Shapes: b batch, t tokens, d width, n heads, v vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

EPS = 1e-6  # of RMSNorm, Llama's


BASE = 10_000.0  # of the rotary frequencies (Su et al. 2021, section 3.2.2)


@dataclass(frozen=True)
class TransformerConfig:
    vocabulary: int  # number of token ids
    length: int  # longest sequence, in tokens
    width: int = 96
    layers: int = 3
    heads: int = 4
    hidden: int = 256  # of the MLP; Llama takes 8/3 of the width

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} is not an even multiple of heads {self.heads}")


class Cache:
    """Keys and values of the tokens read so far, layer by layer; room for `length` tokens is taken at once."""

    def __init__(self, config: TransformerConfig, batch: int, like: Tensor) -> None:
        shape = (config.layers, batch, config.heads, config.length, config.width // config.heads)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.valid = torch.ones(batch, config.length, dtype=torch.bool, device=like.device)
        self.used, self.filled = 0, False  # tokens so far; whether some are not valid

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: k, v (b n t d/n) -> all keys and values so far, (b n used+t d/n) each"""
        end = self.used + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"a sequence of {end} tokens, but the transformer reads {self.keys.shape[3]}")
        self.keys[layer, :, :, self.used : end], self.values[layer, :, :, self.used : end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b t d) -> (b t d)"""
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def rotation(length: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle of every position and pair of dimensions.  -> (length width) each"""
    frequency = BASE ** -(torch.arange(0, width, 2) / width)  # (width/2)
    angle = torch.arange(length)[:, None] * frequency  # (length width/2)
    return torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of dimensions (i, i + width/2) by its angle; cos and sin may also be (b 1 t d), an angle for each sequence.

    Shapes: x (b n t d), cos (t d), sin (t d) -> (b n t d)
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


class CausalAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.out = nn.Linear(d, d, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, layer: int, cache: Cache | None
    ) -> Tensor:
        """Without a mask each token sees itself and all before.  Shapes: x (b t d), cos and sin as `rotate`, mask (t u) or (b 1 t u) -> (b t d)"""
        q, k, v = (rearrange(f(x), "b t (n d) -> b n t d", n=self.heads) for f in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.add(layer, k, v)
        causal = mask is None and q.shape[2] > 1
        with torch.autocast(x.device.type, enabled=False):  # its gradient in bf16 is slow on CPUs
            y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, is_causal=causal)
        return self.out(rearrange(y, "b n t d -> b t (n d)"))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, h = config.width, config.hidden
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.attn = CausalAttention(config)
        self.gate, self.up, self.down = (
            nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False), nn.Linear(h, d, bias=False),
        )  # fmt: skip

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, layer: int, cache: Cache | None
    ) -> Tensor:
        """Shapes: x (b t d) -> (b t d)"""
        x = x + self.attn(self.norm1(x), cos, sin, mask, layer, cache)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """Embedded tokens to the logits of the next; `embed` turns ids into what `forward` takes, others may add their own rows."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm_out = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        cos, sin = rotation(config.length, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False), self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():  # GPT-2's scheme, with stds that suit a small width
            if weight.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                std = config.width**-0.5 * ((2 * config.layers) ** -0.5 if last else 1)
                nn.init.normal_(weight, std=1.0 if name.startswith("embed") else std)

    def cache(self, batch: int) -> Cache:
        return Cache(self.config, batch, self.head.weight)

    def forward(self, x: Tensor, cache: Cache | None = None, valid: Tensor | None = None) -> Tensor:
        """The last states, of which `head` makes logits; with a cache, x goes on where it ended.

        `valid` says which of x are tokens and which only fill up; without it all are.
        Raises ValueError on more tokens than the configuration's length.
        Shapes: x (b t d), valid (b t) bool -> (b t d)
        """
        start = cache.used if cache is not None else 0
        end = start + x.shape[1]
        if end > self.config.length:
            raise ValueError(f"a sequence of {end} tokens, but the transformer reads {self.config.length}")
        if cache is not None and (valid is not None or cache.filled):
            cache.filled = True
            cache.valid[:, start:end] = True if valid is None else valid
            valid = cache.valid[:, :end]  # (b u), of all so far
        mask, cos, sin = None, self.cos[start:end], self.sin[start:end]  # (t d/n)
        if valid is not None or (start and end - start > 1):
            # new tokens see the old ones, and of the new those before
            mask = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)  # (t u)
        if valid is not None:
            mask = (mask & valid[:, None, None]) | mask.new_ones(mask.shape).tril(start).triu(start)  # itself
            at = (valid.cumsum(1) - 1).clamp(min=0)[:, start:]  # (b t) positions
            cos, sin = self.cos[at][:, None], self.sin[at][:, None]  # (b 1 t d/n)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, i, cache)  # (b t d)
        if cache is not None:
            cache.used = end
        return self.norm_out(x)
