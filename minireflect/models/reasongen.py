"""ReasonGen-R1's model, small: a transformer that reads a prompt, then writes a rationale and image tokens.

    prompt (p tokens) · rationale, then BOI (r tokens) · n image tokens, row by row

Within a batch, prompts and rationales are padded to the same length; no token attends to padding.  BOI (begin
of image) ends the rationale; the model learns to sample it.  Text and image tokens have separate
vocabularies: only text tokens can be sampled at text positions, and only image tokens at image positions.

An image token is sampled in two steps, first a form and then its colours:

    log pi(token) = log pi(form | before) + log pi(colours | before, form)

For each codebook entry, one small network computes its input embedding, and another computes the weights of
its logit.  Entries that are similar thus have similar embeddings, even those that are rare in training.  The
first network is the "aligner" of Janus (arXiv 2410.13848); in place of the second, Janus learns one free
vector for each entry.  The embedding of an image token is the sum of the embeddings of form and colours.

Log-probabilities refer to the distribution that tokens are sampled from, so they include temperature, top-k,
top-p and guidance.

arXiv 2505.24875, section 3.  Shapes: b batch; p, r, n tokens of prompt, rationale and picture; v words, f
forms, k colours; c dimensions of a codebook entry, d width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..ranges import Checked, Depth, Size, finite
from .tokenizer import BOS, EOS, trim, up_to
from .transformer import Cache, Choose, RMSNorm, SampledText, SamplingConfig, Transformer, TransformerConfig

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ReasonGenConfig(Checked):
    vocabulary: Size  # v, number of text token ids, BOS and EOS included and BOI not
    forms: Size  # f, entries of the form codebook
    colors: Size  # k, entries of the colour codebook
    dimensions: Size = 8  # c, dimensions of a codebook entry
    prompt: Size = 44  # p, longest prompt in tokens; ours have up to 28, a rationale as prompt 44
    rationale: Size = 44  # r, longest rationale in tokens, BOI included; ours have up to 43
    side: Size = 8  # side of the grid of image tokens, n = side^2
    width: Size = 96
    layers: Depth = 4
    heads: Size = 4
    hidden: Size = 264  # width inside the MLPs

    @property
    def boi(self) -> int:
        """The id of BOI, which follows those of the words."""
        return self.vocabulary

    @property
    def transformer(self) -> TransformerConfig:
        n = self.prompt + self.rationale + self.side**2  # longest sequence
        return TransformerConfig(self.vocabulary + 1, n, self.width, self.layers, self.heads, self.hidden)


class Sampled(NamedTuple):
    """Rationales and pictures as tokens."""

    rationale: Tensor  # (b r) ids: words, BOI, then padding (EOS)
    chosen: Tensor  # (b r) bool: True where the model sampled the id; False for a forced BOI and padding
    codes: Tensor  # (b n) image tokens, in [0, f*k)


class Choices(NamedTuple):
    """The predictions at all positions, as logits or as log-probabilities."""

    text: Tensor  # (b r v+1)
    forms: Tensor  # (b n f)
    colors: Tensor  # (b n k) given the form of the same token


class Entries(NamedTuple):
    """Each entry of a codebook, mapped to the width of the transformer."""

    embeddings: Tensor  # (f d) or (k d): input embedding of each entry
    heads: Tensor  # (f d) or (k d): output weights of each entry; its logit is the dot product with a state


class Codebook(nn.Module):
    """A frozen codebook `vectors` (f c) or (k c), of length 1, and two networks with `m` hidden units."""

    def __init__(self, vectors: Tensor, d: int, m: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.detach().clone())
        c = vectors.shape[1]
        self.aligner = nn.Sequential(nn.Linear(c, m), nn.SiLU(), nn.Linear(m, d), RMSNorm(d))
        self.head = nn.Sequential(nn.Linear(c, m), nn.SiLU(), nn.Linear(m, d))
        for network in (self.aligner, self.head):
            nn.init.normal_(network[0].weight, std=3.0)  # large, as neighbouring entries differ by only 0.2

    def forward(self) -> Entries:
        return Entries(self.aligner(self.vectors), self.head(self.vectors))


class ReasonGen(nn.Module):
    """The transformer with embeddings and heads for image tokens.

    `codebooks` are those of the codec, forms (f c) and colours (k c).  None: random ones, to be overwritten
    when weights are loaded.
    """

    def __init__(self, config: ReasonGenConfig, codebooks: Pair | None = None) -> None:
        super().__init__()
        self.config = config
        d, m = config.width, config.hidden
        self.transformer = Transformer(config.transformer)
        if codebooks is None:
            sizes = (config.forms, config.colors)
            codebooks = tuple(F.normalize(torch.randn(k, config.dimensions), dim=-1) for k in sizes)
        self.forms, self.colors = (Codebook(book, d, m) for book in codebooks)
        self.then = nn.Sequential(nn.Linear(2 * d, m), nn.SiLU(), nn.Linear(m, d))
        self.where = nn.Parameter(torch.randn(config.side**2, config.width))  # (n d) position embeddings

    def split(self, codes: Tensor) -> Pair:
        """The forms and the colours of image tokens.  Shapes: codes (...) -> (...), (...)"""
        return codes // self.config.colors, codes % self.config.colors

    def given_form(self, hidden: Tensor, form: Tensor) -> Tensor:
        """The state that predicts the colours, from a state and the embedding of the form.

        Shapes: hidden (... d), form (... d) -> (... d)
        """
        return hidden + self.then(torch.cat([hidden, form], -1))

    def forward(self, prompts: Tensor, rationale: Tensor, codes: Tensor) -> Choices:
        """Logits at every position of rationale and picture, given the tokens before that position.

        Shapes: prompts (b p), rationale (b r), codes (b n)
        """
        p, r, n = prompts.shape[1], rationale.shape[1], codes.shape[1]
        forms, colors = self.forms(), self.colors()
        form, color = self.split(codes)  # (b n) each
        text = self.transformer.embed(torch.cat([prompts, rationale], 1))  # (b p+r d)
        pixels = (forms.embeddings[form] + colors.embeddings[color])[:, : n - 1] + self.where[: n - 1]
        seen = torch.ones(len(codes), n - 1, dtype=torch.bool, device=codes.device)
        valid = torch.cat([up_to(prompts, EOS), up_to(rationale, self.config.boi), seen], 1)  # (b p+r+n-1)
        hidden = self.transformer(torch.cat([text, pixels], 1), valid=valid)  # (b p+r+n-1 d)
        first = last_of(hidden[:, :p], valid[:, :p])  # (b 1 d) after the prompt
        start = last_of(hidden[:, p : p + r], valid[:, p : p + r])  # (b 1 d) after BOI
        before_text = torch.cat([first, hidden[:, p : p + r - 1]], 1)  # (b r d)
        image = torch.cat([start, hidden[:, p + r :]], 1)  # (b n d)
        informed = self.given_form(image, forms.embeddings[form])  # (b n d)
        return Choices(self.transformer.head(before_text), image @ forms.heads.T, informed @ colors.heads.T)

    def choices(self, prompts: Tensor, rationale: Tensor, codes: Tensor, sampling: SamplingConfig) -> Choices:
        """Log-probabilities of all words, forms and colours, from which `sample` draws at each position."""
        text, *image = self(prompts, rationale, codes)
        if sampling.guidance != 1:
            without = self(*self.blank(len(prompts), prompts.device), codes)[1:]
            image = [guide(*pair, sampling.guidance) for pair in zip(image, without)]
        return Choices(*(sampling.log_probs(logits.float()) for logits in (text, *image)))

    def chosen(self, log_probs: Choices, rationale: Tensor, codes: Tensor) -> Pair:
        """Select the log-probabilities of the given tokens.

        Shapes: rationale (b r), codes (b n) -> (b r), (b n)
        """
        ids = (rationale, *self.split(codes))
        text, forms, colors = (v.gather(2, i[..., None])[..., 0] for v, i in zip(log_probs, ids))
        return text, forms + colors

    def log_probs(self, prompts: Tensor, rationale: Tensor, codes: Tensor, sampling: SamplingConfig) -> Pair:
        """Log-probability of each given token under the distribution of `sample`, in nats.

        Shapes: prompts (b p), rationale (b r), codes (b n) -> (b r), (b n)
        """
        return self.chosen(self.choices(prompts, rationale, codes, sampling), rationale, codes)

    def blank(self, b: int, device: torch.device) -> Pair:
        """Empty prompts and rationales, the unconditional input of guidance.  -> (b p), (b r)"""
        prompts = torch.full((b, self.config.prompt), EOS, device=device)
        rationale = torch.full((b, self.config.rationale), EOS, device=device)
        prompts[:, 0], rationale[:, 0] = BOS, self.config.boi
        return prompts, rationale

    def read(self, ids: Tensor, end: int, cache: Cache) -> Tensor:
        """Append each text, up to its first `end`, to the cache.  -> the state at `end`

        Shapes: ids (b t) -> (b 1 d)
        """
        ids = trim(ids, end)
        valid = up_to(ids, end)
        return last_of(self.transformer(self.transformer.embed(ids), cache, valid), valid)

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, sampling: SamplingConfig, generator: Generator,
        rationale: Tensor | None = None, all_rows: int | None = None,
    ) -> Sampled:  # fmt: skip
        """Sample a rationale and a picture for each prompt; with given rationales, only the picture.

        Given rationales must end in BOI.  A sampled rationale that reaches the length limit is closed with
        BOI; as `chosen` is False there, the loss leaves this token out.  `all_rows` is explained at `pick`.
        Raises FloatingPointError when a logit is not finite.
        Shapes: prompts (b p), rationale (b r)
        """
        cache, boi = self.transformer.cache(len(prompts)), self.config.boi
        hidden, choose = self.read(prompts, EOS, cache), sampling.chooser(generator, all_rows)  # (b 1 d)
        if rationale is None:
            text = self.transformer.sample(hidden, cache, choose, boi, self.config.rationale, forced=True)
        else:
            chosen = torch.zeros_like(rationale, dtype=torch.bool)
            text = SampledText(rationale, chosen, self.read(rationale, boi, cache))
        codes = self.sample_codes(text.hidden, cache, choose, sampling.guidance)
        finite(choose.total, "a logit of a sampled rationale or picture")
        return Sampled(text.ids, text.chosen, codes)

    def sample_codes(self, hidden: Tensor, cache: Cache, choose: Choose, guidance: float) -> Tensor:
        """Sample the image tokens row by row: for each a form, then its colours.

        Shapes: hidden (b 1 d), the state at BOI -> (b n)
        """
        b, n = len(hidden), self.config.side**2
        branches = [(hidden, cache)]  # the conditional branch; guidance adds the unconditional one
        if guidance != 1:
            other = self.transformer.cache(b)
            start = torch.tensor([BOS, EOS, self.config.boi], device=hidden.device).expand(b, 3)
            branches.append((self.transformer(self.transformer.embed(start), other)[:, -1:], other))
        forms, colors = self.forms(), self.colors()
        codes = torch.empty(b, n, dtype=torch.long, device=hidden.device)

        def entry(states: list[Tensor], heads: Tensor) -> Tensor:
            """Sample a codebook entry for each picture.  Shapes: states (b d) each -> (b)"""
            logits = [state @ heads.T for state in states]
            return choose((guide(*logits, guidance) if guidance != 1 else logits[0]).float())

        for i in range(n):
            states = [state[:, 0] for state, _ in branches]  # (b d) each
            form = entry(states, forms.heads)
            embedded = forms.embeddings[form]  # (b d)
            color = entry([self.given_form(state, embedded) for state in states], colors.heads)
            codes[:, i] = form * self.config.colors + color
            if i + 1 < n:
                row = (embedded + colors.embeddings[color])[:, None] + self.where[i]  # (b 1 d)
                branches = [(self.transformer(row, c), c) for _, c in branches]
        return codes


def last_of(hidden: Tensor, valid: Tensor) -> Tensor:
    """The state of the last valid token of each row.  Shapes: hidden (b t d), valid (b t) -> (b 1 d)"""
    return hidden[torch.arange(len(hidden), device=hidden.device), valid.sum(1) - 1][:, None]


def guide(logits: Tensor, without: Tensor, w: float) -> Tensor:
    """Classifier-free guidance on logits, as in Janus: uncond + w (cond - uncond); `without` is uncond.

    Shapes: (... f), (... f) -> (... f)
    """
    return without + w * (logits - without)
