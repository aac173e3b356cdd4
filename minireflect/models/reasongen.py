"""ReasonGen-R1's model, small: one transformer that reads a prompt, writes a rationale, and draws the picture as tokens.

    prompt (p tokens) · rationale, then BOI (r tokens) · n image tokens, row by row          arXiv 2505.24875, section 3

In a batch prompts and rationales are filled up to one length; what fills up is seen by nobody.  BOI, begin of image, is
the switch from thinking to drawing: the model chooses it and is trained to.  Its two kinds of tokens have a vocabulary each: at a text position
only text can come, at an image position only image tokens.

An image token is two choices, a form and then its colours:  log pi(token) = log pi(form | before) + log pi(colours | before, form).

What it reads for a form or for colours, and what it compares a state with to choose one, are made from the codeword by small networks (Janus'
"aligner", arXiv 2410.13848, for the first; it has a row for each in the second).  Words that look alike are then read alike, also those that training
has hardly seen; and what is read for a token is the sum of what is read for its form and for its colours.

Log-probabilities are those of the distribution that was sampled from, temperature, top-k, top-p and guidance included.

Shapes: b batch, p r n tokens of prompt, rationale and picture, v words, f forms and k colours of c numbers, d width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..world.prompts import split
from .tokenizer import BOS, EOS, Tokenizer
from .transformer import Cache, RMSNorm, Transformer, TransformerConfig

SHARPNESS = 3.0  # std of the weights that first see a codeword; neighbours in the codebook are some 0.2 apart, and have to be told from each other


@dataclass(frozen=True)
class ReasonGenConfig:
    vocabulary: int  # v, word ids, BOS and EOS included
    forms: int  # f, words of the picture's first codebook
    colors: int  # k, of the second
    dimensions: int = 8  # c, of a codeword
    prompt: int = 44  # p; ours take 28, and a rationale for a prompt 44
    rationale: int = 44  # r, BOI included; the longest of ours takes 43
    side: int = 8  # of the grid of image tokens, n = side^2
    width: int = 96
    layers: int = 4
    heads: int = 4
    hidden: int = 264  # of the MLP

    @property
    def codes(self) -> int:
        """How many image tokens there are; a token is form * colors + colour."""
        return self.forms * self.colors

    @property
    def boi(self) -> int:
        """The id of BOI, the first after the words."""
        return self.vocabulary

    @property
    def transformer(self) -> TransformerConfig:
        length = self.prompt + self.rationale + self.side**2
        return TransformerConfig(
            self.vocabulary + 1, length, self.width, self.layers, self.heads, self.hidden
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # only the k likeliest; 0 = all
    top_p: float = 1.0  # only the likeliest that together have this probability; 1 = all
    guidance: float = 1.0  # w of forms and colours: uncond + w (cond - uncond), in logits; 1 = none

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be positive, got {self.temperature}; top_k 1 takes the likeliest"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k {self.top_k} must be 0 or more, and top_p {self.top_p} in (0, 1]")


def sampled_from(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Log-probabilities of the distribution that tokens are drawn from: -inf where none can be.  Shapes: logits (... v) -> (... v)

    Temperature first, then top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751): the smallest set whose probability reaches it.
    """
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p < 1:
        ranked, order = logits.sort(-1, descending=True)
        share = ranked.softmax(-1)
        beyond = share.cumsum(-1) - share >= config.top_p  # what stands before it is enough
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits.log_softmax(-1)


class Drawn(NamedTuple):
    """What was written and drawn."""

    words: Tensor  # (b r) the rationale, BOI after its last word, then EOS
    chosen: Tensor  # (b r) bool: the words that the model chose, BOI included unless it was forced
    codes: Tensor  # (b n) image tokens, in [0, f*k)
    words_log_prob: Tensor  # (b r) nats, 0 where nothing was chosen
    codes_log_prob: Tensor  # (b n) nats


class Choices(NamedTuple):
    """What is said of every position, as logits or as log-probabilities."""

    text: Tensor  # (b r v+1)
    forms: Tensor  # (b n f)
    colors: Tensor  # (b n k) given the form that was chosen


class Rows(NamedTuple):
    """What the transformer knows a codebook's words by."""

    read: Tensor  # (f d) or (k d): what is read for each
    heads: Tensor  # (f d) or (k d): what a state is compared with for each


class Codebook(nn.Module):
    """The words of one codebook.  `vectors` (f c) or (k c), each of length 1."""

    vectors: Tensor

    def __init__(self, vectors: Tensor, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.detach().clone())
        c = vectors.shape[1]
        self.aligner = nn.Sequential(
            nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, width), RMSNorm(width)
        )
        self.head = nn.Sequential(nn.Linear(c, hidden), nn.SiLU(), nn.Linear(hidden, width))
        for network in (self.aligner, self.head):
            nn.init.normal_(network[0].weight, std=SHARPNESS)

    def forward(self) -> Rows:
        return Rows(self.aligner(self.vectors), self.head(self.vectors))


class ReasonGen(nn.Module):
    """`codebooks` (f c), (k c): those of what turns its image tokens into pictures."""

    def __init__(self, config: ReasonGenConfig, codebooks: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        d, m = config.width, config.hidden
        if codebooks is None:  # weights will bring theirs
            codebooks = tuple(
                F.normalize(torch.randn(k, config.dimensions), dim=-1) for k in (config.forms, config.colors)
            )
        self.forms, self.colors = (Codebook(book, d, m) for book in codebooks)
        self.then = nn.Sequential(nn.Linear(2 * d, m), nn.SiLU(), nn.Linear(m, d))
        self.where = nn.Parameter(torch.randn(config.side**2, config.width))  # (n d) a place in the picture

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Forms and colours of image tokens.  Shapes: codes (...) -> (...), (...)"""
        return codes // self.config.colors, codes % self.config.colors

    def having(self, hidden: Tensor, form: Tensor) -> Tensor:
        """A state that knows the form it has chosen, and chooses colours.  Shapes: hidden (... d), form (... d) -> (... d)"""
        return hidden + self.then(torch.cat([hidden, form], -1))

    def place(self, rows: Tensor, start: int = 0) -> Tensor:
        """Image tokens with their places, of which the first is `start`.  Shapes: rows (b m d) -> (b m d)"""
        return rows + self.where[start : start + rows.shape[1]]

    def rows(self, prompts: Tensor, words: Tensor, codes: Tensor, forms: Rows, colors: Rows) -> Tensor:
        """What the transformer reads: everything but the last image token.  Shapes: prompts (b p), words (b r), codes (b n) -> (b p+r+n-1 d)"""
        text = self.transformer.embed(torch.cat([prompts, words], 1))
        form, color = self.split(codes[:, :-1])
        return torch.cat([text, self.place(forms.read[form] + colors.read[color])], 1)

    def valid(self, prompts: Tensor, words: Tensor, images: int) -> Tensor:
        """Which of the tokens only fill up.  Shapes: prompts (b p), words (b r) -> (b p+r+images) bool"""
        pixels = torch.ones(len(prompts), images, dtype=torch.bool, device=prompts.device)
        return torch.cat([up_to(prompts, EOS), up_to(words, self.config.boi), pixels], 1)

    def forward(self, prompts: Tensor, words: Tensor, codes: Tensor) -> Choices:
        """Logits of every word of the rationale and of the forms and colours of the picture, given all that stands before.

        Shapes: prompts (b p), words (b r), codes (b n)
        """
        p, r = prompts.shape[1], words.shape[1]
        forms, colors = self.forms(), self.colors()
        valid = self.valid(prompts, words, codes.shape[1] - 1)  # (b p+r+n-1)
        rows = self.rows(prompts, words, codes, forms, colors)
        hidden = self.transformer(rows, valid=valid)  # (b p+r+n-1 d)
        first = last_of(hidden[:, :p], valid[:, :p])  # (b 1 d) after the prompt
        start = last_of(hidden[:, p : p + r], valid[:, p : p + r])  # (b 1 d) after BOI
        text = torch.cat([first, hidden[:, p : p + r - 1]], 1)  # (b r d): what stands before each word
        image = torch.cat([start, hidden[:, p + r :]], 1)  # (b n d)
        informed = self.having(image, forms.read[self.split(codes)[0]])  # (b n d)
        return Choices(self.transformer.head(text), image @ forms.heads.T, informed @ colors.heads.T)

    def log_probs(
        self, prompts: Tensor, words: Tensor, codes: Tensor, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of given words and image tokens, in nats, under what they would be sampled from.

        Shapes: prompts (b p), words (b r), codes (b n) -> (b r), (b n)
        """
        return self.chosen(self.distributions(prompts, words, codes, sampling), words, codes)

    def chosen(self, log_probs: Choices, words: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the tokens that were chosen.  Shapes: words (b r), codes (b n) -> (b r), (b n)"""
        form, color = self.split(codes)
        text, forms, colors = (
            values.gather(2, ids[..., None])[..., 0] for values, ids in zip(log_probs, (words, form, color))
        )
        return text, forms + colors

    def distributions(
        self, prompts: Tensor, words: Tensor, codes: Tensor, sampling: SamplingConfig
    ) -> Choices:
        """Log-probabilities of all words, forms and colours at each position."""
        text, *image = self(prompts, words, codes)
        if sampling.guidance != 1:
            blank = self.blank(len(prompts), prompts.device)
            without = self(*blank, codes)[1:]
            image = [guide(*pair, sampling.guidance) for pair in zip(image, without)]
        return Choices(*(sampled_from(logits.float(), sampling) for logits in (text, *image)))

    def blank(self, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The prompt and rationale of the unconditional half, both empty.  -> (b p), (b r)"""
        prompts = torch.full((b, self.config.prompt), EOS, device=device)
        words = torch.full((b, self.config.rationale), EOS, device=device)
        prompts[:, 0], words[:, 0] = BOS, self.config.boi
        return prompts, words

    @torch.no_grad()
    def write(
        self, prompts: Tensor, sampling: SamplingConfig, generator: Generator, words: Tensor | None = None
    ) -> Drawn:
        """Think, then draw.  With given `words`, which end in BOI, only draw.

        Shapes: prompts (b p), words (b r)
        """
        prompts = trim(prompts, EOS)
        cache, valid = self.transformer.cache(len(prompts)), up_to(prompts, EOS)
        hidden = last_of(self.transformer(self.transformer.embed(prompts), cache, valid), valid)  # (b 1 d)
        if words is None:
            words, chosen, words_log_prob, hidden = self.think(hidden, cache, sampling, generator)
        else:
            chosen = torch.zeros_like(words, dtype=torch.bool)
            words_log_prob = torch.zeros(words.shape, device=words.device)
            read = trim(words, self.config.boi)
            valid = up_to(read, self.config.boi)
            hidden = last_of(self.transformer(self.transformer.embed(read), cache, valid), valid)
        codes, codes_log_prob = self.draw(hidden, cache, sampling, generator)
        return Drawn(words, chosen, codes, words_log_prob, codes_log_prob)

    def think(
        self, hidden: Tensor, cache: Cache, sampling: SamplingConfig, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write the rationales; whoever is not done before the last place gets BOI there without having chosen it.

        Shapes: hidden (b 1 d) after the prompts -> words (b r), chosen (b r), log-probabilities (b r), hidden (b 1 d)
        """
        b, r, boi = len(hidden), self.config.rationale, self.config.boi
        words = torch.full((b, r), EOS, device=hidden.device)
        chosen = torch.zeros(b, r, dtype=torch.bool, device=hidden.device)
        log_probs = torch.zeros(b, r, device=hidden.device)
        going = torch.ones(b, dtype=torch.bool, device=hidden.device)  # (b) who has not said BOI yet
        after = hidden  # (b 1 d) of BOI
        for i in range(r):
            if i == r - 1:
                words[going, i] = boi
            else:
                log_prob = sampled_from(self.transformer.head(hidden)[:, 0].float(), sampling)  # (b v+1)
                token = pick(log_prob, generator)  # (b)
                words[going, i], chosen[:, i] = token[going], going
                log_probs[going, i] = log_prob.gather(1, token[:, None])[going, 0]
            hidden = self.transformer(self.transformer.embed(words[:, i : i + 1]), cache, going[:, None])
            after = torch.where(going[:, None, None], hidden, after)
            going = going & (words[:, i] != boi)
            if not going.any():
                break
        return words, chosen, log_probs, after

    def draw(
        self, hidden: Tensor, cache: Cache, sampling: SamplingConfig, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw the picture, row by row.  Shapes: hidden (b 1 d) after BOI -> (b n) image tokens, (b n) log-probabilities"""
        b, n = len(hidden), self.config.side**2
        guided = sampling.guidance != 1
        if guided:  # the unconditional half goes along with a cache of its own
            other = self.transformer.cache(b)
            start = torch.tensor([BOS, EOS, self.config.boi], device=hidden.device).expand(b, 3)
            without = self.transformer(self.transformer.embed(start), other)[:, -1:]  # (b 1 d)
        forms, colors = self.forms(), self.colors()
        codes = torch.empty(b, n, dtype=torch.long, device=hidden.device)
        log_probs = torch.empty(b, n, device=hidden.device)

        def choose(states: list[Tensor], heads: Tensor) -> tuple[Tensor, Tensor]:
            """A word of a codebook for each picture, and its log-probability.  -> (b), (b)"""
            logits = [state @ heads.T for state in states]
            logits = guide(*logits, sampling.guidance) if guided else logits[0]
            log_prob = sampled_from(logits.float(), sampling)
            ids = pick(log_prob, generator)
            return ids, log_prob.gather(1, ids[:, None])[:, 0]

        for i in range(n):
            states = [hidden[:, 0], without[:, 0]] if guided else [hidden[:, 0]]  # (b d) each
            form, form_log_prob = choose(states, forms.heads)
            read = forms.read[form]  # (b d)
            color, color_log_prob = choose([self.having(s, read) for s in states], colors.heads)
            codes[:, i] = form * self.config.colors + color
            log_probs[:, i] = form_log_prob + color_log_prob
            if i + 1 < n:
                row = self.place((read + colors.read[color])[:, None], i)  # (b 1 d)
                hidden = self.transformer(row, cache)
                if guided:
                    without = self.transformer(row, other)
        return codes, log_probs


def up_to(ids: Tensor, end: int) -> Tensor:
    """Which tokens count: all up to the first `end`, itself included.  Shapes: ids (b t) -> (b t) bool"""
    ends = (ids == end).int()
    return ends.cumsum(1) - ends == 0


def trim(ids: Tensor, end: int) -> Tensor:
    """Without the last columns, where every row has ended.  Shapes: ids (b t) -> (b t')"""
    return ids[:, : int(up_to(ids, end).sum(1).max())]


def last_of(hidden: Tensor, valid: Tensor) -> Tensor:
    """The state of the last token that counts.  Shapes: hidden (b t d), valid (b t) -> (b 1 d)"""
    at = valid.sum(1) - 1  # (b)
    return hidden[torch.arange(len(hidden), device=hidden.device), at][:, None]


def guide(logits: Tensor, without: Tensor, w: float) -> Tensor:
    """Classifier-free guidance in logits, as Janus has it: uncond + w (cond - uncond).  Shapes: (... f), (... f) -> (... f)"""
    return without + w * (logits - without)


def pick(log_prob: Tensor, generator: Generator) -> Tensor:
    """A token for each row.  Shapes: log_prob (b v) -> (b)"""
    return torch.multinomial(log_prob.exp().cpu(), 1, generator=generator)[:, 0].to(log_prob.device)


def as_words(tokenizer: Tokenizer, rationales: list[str], config: ReasonGenConfig) -> Tensor:
    """Rationales as they are written: words, BOI, EOS to fill up; an empty one is BOI alone.  -> (b r)

    Raises ValueError when one is too long.
    """
    rows = torch.full((len(rationales), config.rationale), EOS)
    for row, text in zip(rows, rationales):
        ids = [tokenizer.ids[w] for w in split(text)] + [config.boi]
        if len(ids) > config.rationale:
            raise ValueError(
                f"a rationale of {len(ids) - 1} words, at most {config.rationale - 1} fit: {text!r}"
            )
        row[: len(ids)] = torch.tensor(ids)
    return rows


def as_text(tokenizer: Tokenizer, words: Tensor) -> list[str]:
    """Rationales as text, up to BOI.  Shapes: words (b r)"""
    return [
        " ".join(tokenizer.words[i - 2] for i in row if EOS < i < len(tokenizer)) for row in words.tolist()
    ]
