"""ReasonGen-R1's model, small: a transformer that reads a prompt, then writes a rationale and image tokens.

    prompt (p tokens) · rationale, then BOI (r tokens) · n image tokens, row by row

In a batch prompts and rationales are padded to one length; padding is attended to by no token.  BOI, begin of
image, switches from text to image tokens; the model chooses it and is trained to.  Text and image tokens have
a vocabulary each: at a text position only text can be sampled, at an image position only image tokens.

An image token is two choices, a form and then its colours:

    log pi(token) = log pi(form | before) + log pi(colours | before, form)

Small networks make, from each codebook entry, the embedding that is read for it and the vector that a state
is compared with to choose it (Janus' "aligner", arXiv 2410.13848, is the first of these; for the second Janus
learns a free vector per entry).  Similar entries then have similar embeddings, also those that training has
hardly seen; the embedding of a token is the sum of its form's and its colours'.

Log-probabilities are those of the distribution that was sampled from, temperature, top-k, top-p and guidance
included.

arXiv 2505.24875, section 3.  Shapes: b batch, p r n tokens of prompt, rationale and picture, v words, f forms
and k colours of c dimensions, d width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..ranges import Checked, Depth, Size
from .tokenizer import BOS, EOS, trim, up_to
from .transformer import Cache, Choose, RMSNorm, SampledText, SamplingConfig, Transformer, TransformerConfig

# std of the first weights on a codebook entry: neighbouring entries differ by about 0.2
SHARPNESS = 3.0

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ReasonGenConfig(Checked):
    vocabulary: Size  # v, word ids, BOS and EOS included
    forms: Size  # f, entries of the picture's first codebook
    colors: Size  # k, of the second
    dimensions: Size = 8  # c, of a codebook entry
    prompt: Size = 44  # p; the longest prompt has 28, a rationale as prompt 44
    rationale: Size = 44  # r, BOI included; the longest of ours takes 43
    side: Size = 8  # of the grid of image tokens, n = side^2
    width: Size = 96
    layers: Depth = 4
    heads: Size = 4
    hidden: Size = 264  # of the MLP

    @property
    def boi(self) -> int:
        """The id of BOI, the first after the words."""
        return self.vocabulary

    @property
    def transformer(self) -> TransformerConfig:
        length = self.prompt + self.rationale + self.side**2
        sizes = (self.width, self.layers, self.heads, self.hidden)
        return TransformerConfig(self.vocabulary + 1, length, *sizes)


class Sampled(NamedTuple):
    """Rationales and pictures as tokens."""

    rationale: Tensor  # (b r) ids, BOI after the last word, then padding (EOS)
    chosen: Tensor  # (b r) bool: the ids that the model chose, BOI included unless it was forced
    codes: Tensor  # (b n) image tokens, in [0, f*k)


class Choices(NamedTuple):
    """The prediction at every position, as logits or as log-probabilities."""

    text: Tensor  # (b r v+1)
    forms: Tensor  # (b n f)
    colors: Tensor  # (b n k) given the form that was chosen


class Entries(NamedTuple):
    """A codebook in the transformer's width."""

    read: Tensor  # (f d) or (k d): the embedding of each entry
    heads: Tensor  # (f d) or (k d): what a state is compared with to choose it


class Codebook(nn.Module):
    """One codebook: `vectors` (f c) or (k c), each of length 1; networks with m hidden units, d the width."""

    def __init__(self, vectors: Tensor, d: int, m: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.detach().clone())
        c = vectors.shape[1]
        self.aligner = nn.Sequential(nn.Linear(c, m), nn.SiLU(), nn.Linear(m, d), RMSNorm(d))
        self.head = nn.Sequential(nn.Linear(c, m), nn.SiLU(), nn.Linear(m, d))
        for network in (self.aligner, self.head):
            nn.init.normal_(network[0].weight, std=SHARPNESS)

    def forward(self) -> Entries:
        return Entries(self.aligner(self.vectors), self.head(self.vectors))


class ReasonGen(nn.Module):
    """`codebooks` (f c), (k c) are the codec's; without them random ones, for weights to be loaded."""

    def __init__(self, config: ReasonGenConfig, codebooks: Pair | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        d, m = config.width, config.hidden
        if codebooks is None:
            sizes = (config.forms, config.colors)
            codebooks = tuple(F.normalize(torch.randn(k, config.dimensions), dim=-1) for k in sizes)
        self.forms, self.colors = (Codebook(book, d, m) for book in codebooks)
        self.then = nn.Sequential(nn.Linear(2 * d, m), nn.SiLU(), nn.Linear(m, d))
        self.where = nn.Parameter(torch.randn(config.side**2, config.width))  # (n d) a place in the picture

    def split(self, codes: Tensor) -> Pair:
        """Forms and colours of image tokens.  Shapes: codes (...) -> (...), (...)"""
        return codes // self.config.colors, codes % self.config.colors

    def having(self, hidden: Tensor, form: Tensor) -> Tensor:
        """The state from which colours are chosen, given the form.

        Shapes: hidden (... d), form (... d) -> (... d)
        """
        return hidden + self.then(torch.cat([hidden, form], -1))

    def forward(self, prompts: Tensor, rationale: Tensor, codes: Tensor) -> Choices:
        """Logits of the rationale's ids and the picture's forms and colours, each given all tokens before it.

        Shapes: prompts (b p), rationale (b r), codes (b n)
        """
        p, r, n = prompts.shape[1], rationale.shape[1], codes.shape[1]
        forms, colors = self.forms(), self.colors()
        form, color = self.split(codes)  # (b n) each
        text = self.transformer.embed(torch.cat([prompts, rationale], 1))  # (b p+r d)
        pixels = (forms.read[form] + colors.read[color])[:, : n - 1] + self.where[: n - 1]  # (b n-1 d)
        seen = torch.ones(len(codes), n - 1, dtype=torch.bool, device=codes.device)
        valid = torch.cat([up_to(prompts, EOS), up_to(rationale, self.config.boi), seen], 1)  # (b p+r+n-1)
        hidden = self.transformer(torch.cat([text, pixels], 1), valid=valid)  # (b p+r+n-1 d)
        first = last_of(hidden[:, :p], valid[:, :p])  # (b 1 d) after the prompt
        start = last_of(hidden[:, p : p + r], valid[:, p : p + r])  # (b 1 d) after BOI
        before_text = torch.cat([first, hidden[:, p : p + r - 1]], 1)  # (b r d)
        image = torch.cat([start, hidden[:, p + r :]], 1)  # (b n d)
        informed = self.having(image, forms.read[form])  # (b n d)
        return Choices(self.transformer.head(before_text), image @ forms.heads.T, informed @ colors.heads.T)

    def choices(self, prompts: Tensor, rationale: Tensor, codes: Tensor, sampling: SamplingConfig) -> Choices:
        """Log-probabilities that `sample` uses at each position: of all words, forms and colours."""
        text, *image = self(prompts, rationale, codes)
        if sampling.guidance != 1:
            without = self(*self.blank(len(prompts), prompts.device), codes)[1:]
            image = [guide(*pair, sampling.guidance) for pair in zip(image, without)]
        return Choices(*(sampling.log_probs(logits.float()) for logits in (text, *image)))

    def chosen(self, log_probs: Choices, rationale: Tensor, codes: Tensor) -> Pair:
        """The log-probabilities of the given tokens.  Shapes: rationale (b r), codes (b n) -> (b r), (b n)"""
        ids = (rationale, *self.split(codes))
        text, forms, colors = (v.gather(2, i[..., None])[..., 0] for v, i in zip(log_probs, ids))
        return text, forms + colors

    def log_probs(self, prompts: Tensor, rationale: Tensor, codes: Tensor, sampling: SamplingConfig) -> Pair:
        """Log-probability that `sample` writes each of the given tokens, in nats.

        Shapes: prompts (b p), rationale (b r), codes (b n) -> (b r), (b n)
        """
        return self.chosen(self.choices(prompts, rationale, codes, sampling), rationale, codes)

    def blank(self, b: int, device: torch.device) -> Pair:
        """The prompt and rationale of the unconditional half, both empty.  -> (b p), (b r)"""
        prompts = torch.full((b, self.config.prompt), EOS, device=device)
        rationale = torch.full((b, self.config.rationale), EOS, device=device)
        prompts[:, 0], rationale[:, 0] = BOS, self.config.boi
        return prompts, rationale

    def read(self, ids: Tensor, end: int, cache: Cache) -> Tensor:
        """Append texts, each up to its `end`, to the cache.

        Shapes: ids (b t) -> the state after each (b 1 d)
        """
        ids = trim(ids, end)
        valid = up_to(ids, end)
        return last_of(self.transformer(self.transformer.embed(ids), cache, valid), valid)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, sampling: SamplingConfig, generator: Generator,
        rationale: Tensor | None = None, whole: int | None = None,
    ) -> Sampled:  # fmt: skip
        """Write a rationale and a picture for each prompt; only the picture where rationales are given.

        Given rationales end in BOI.  A rationale that reaches the length limit is closed with BOI; that token
        is not `chosen`, and masked from the loss.  `whole`: see `pick`.
        Shapes: prompts (b p), rationale (b r)
        """
        cache = self.transformer.cache(len(prompts))
        hidden, choose = self.read(prompts, EOS, cache), sampling.chooser(generator, whole)  # (b 1 d)
        if rationale is None:
            limits = self.config.boi, self.config.rationale
            text = self.transformer.sample(hidden, cache, choose, *limits, forced=True)
        else:
            chosen = torch.zeros_like(rationale, dtype=torch.bool)
            text = SampledText(rationale, chosen, self.read(rationale, self.config.boi, cache))
        codes = self.sample_codes(text.hidden, cache, choose, sampling.guidance)
        return Sampled(text.ids, text.chosen, codes)

    def sample_codes(self, hidden: Tensor, cache: Cache, choose: Choose, guidance: float) -> Tensor:
        """Write the picture, row by row: a form, then its colours.

        Shapes: hidden (b 1 d) after BOI -> (b n) image tokens
        """
        b, n = len(hidden), self.config.side**2
        branches = [(hidden, cache)]  # the conditional one; with guidance also the unconditional one
        if guidance != 1:
            other = self.transformer.cache(b)
            start = torch.tensor([BOS, EOS, self.config.boi], device=hidden.device).expand(b, 3)
            branches.append((self.transformer(self.transformer.embed(start), other)[:, -1:], other))
        forms, colors = self.forms(), self.colors()
        codes = torch.empty(b, n, dtype=torch.long, device=hidden.device)

        def entry(states: list[Tensor], heads: Tensor) -> Tensor:
            """A codebook entry for each picture.  Shapes: states (b d) each -> (b)"""
            logits = [state @ heads.T for state in states]
            return choose((guide(*logits, guidance) if guidance != 1 else logits[0]).float())

        for i in range(n):
            states = [state[:, 0] for state, _ in branches]  # (b d) each
            form = entry(states, forms.heads)
            read = forms.read[form]  # (b d)
            color = entry([self.having(state, read) for state in states], colors.heads)
            codes[:, i] = form * self.config.colors + color
            if i + 1 < n:
                row = (read + colors.read[color])[:, None] + self.where[i]  # (b 1 d)
                branches = [(self.transformer(row, c), c) for _, c in branches]
        return codes


def last_of(hidden: Tensor, valid: Tensor) -> Tensor:
    """The state of the last valid token.  Shapes: hidden (b t d), valid (b t) -> (b 1 d)"""
    at = valid.sum(1) - 1  # (b)
    return hidden[torch.arange(len(hidden), device=hidden.device), at][:, None]


def guide(logits: Tensor, without: Tensor, w: float) -> Tensor:
    """Classifier-free guidance in logits, as Janus has it: uncond + w (cond - uncond).

    Shapes: (... f), (... f) -> (... f)
    """
    return without + w * (logits - without)
