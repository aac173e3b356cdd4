"""ReasonGen-R1's model, small: one transformer that reads a prompt, writes a rationale, and draws the picture as tokens.

    prompt (p tokens) · rationale, then BOI (r tokens) · n image tokens, row by row          arXiv 2505.24875, section 3

In a batch prompts and rationales are filled up to one length; what fills up is seen by nobody.  BOI, begin of image, is
the switch from thinking to drawing: the model chooses it and is trained to.  Its two kinds of tokens have a vocabulary each: at a text position
only text can come, at an image position only image tokens.

What it reads for an image token, and what it compares a state with to choose one, are made from the codeword by two small networks (Janus'
"aligner", arXiv 2410.13848, for the first; it has a row for each in the second).  Words that look alike are then read alike, also those that training
has hardly seen.

Log-probabilities are those of the distribution that was sampled from, temperature, top-k, top-p and guidance included.

Shapes: b batch, p r n tokens of prompt, rationale and picture, v words, k codewords of c numbers, d width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .tokenizer import BOS, EOS
from .transformer import Cache, RMSNorm, Transformer, TransformerConfig

SHARPNESS = 3.0  # std of the weights that first see a codeword; neighbours in the codebook are some 0.2 apart, and have to be told from each other


@dataclass(frozen=True)
class ReasonGenConfig:
    vocabulary: int  # v, word ids, BOS and EOS included
    codes: int  # k, words of the picture's codebook
    dimensions: int = 8  # c, of a codeword
    prompt: int = 44  # p; ours take 28, and a rationale for a prompt 44
    rationale: int = 44  # r, BOI included; the longest of ours takes 43
    side: int = 8  # of the grid of image tokens, n = side^2
    width: int = 96
    layers: int = 4
    heads: int = 4
    hidden: int = 264  # of the MLP

    @property
    def boi(self) -> int:
        """The id of BOI, the first after the words; image tokens follow it."""
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
    guidance: float = 1.0  # w of image tokens: uncond + w (cond - uncond), in logits; 1 = none

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
    codes: Tensor  # (b n) image tokens, in [0, k)
    words_log_prob: Tensor  # (b r) nats, 0 where nothing was chosen
    codes_log_prob: Tensor  # (b n) nats


class ReasonGen(nn.Module):
    """`codebook` (k c): the codewords of what turns its image tokens into pictures, each of length 1."""

    codebook: Tensor

    def __init__(self, config: ReasonGenConfig, codebook: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        if codebook is None:  # weights will bring theirs
            codebook = F.normalize(torch.randn(config.codes, config.dimensions), dim=-1)  # (k c)
        self.register_buffer("codebook", codebook.detach().clone())
        d, m = config.width, config.hidden
        self.aligner = nn.Sequential(nn.Linear(config.dimensions, m), nn.SiLU(), nn.Linear(m, d), RMSNorm(d))
        self.image_head = nn.Sequential(nn.Linear(config.dimensions, m), nn.SiLU(), nn.Linear(m, d))
        for network in (self.aligner, self.image_head):
            nn.init.normal_(network[0].weight, std=SHARPNESS)
        self.where = nn.Parameter(torch.randn(config.side**2, config.width))  # (n d) a place in the picture

    def code_rows(self) -> Tensor:
        """What is read for each image token, its place aside.  -> (k d)"""
        return self.aligner(self.codebook)

    def code_heads(self) -> Tensor:
        """What a state is compared with for each image token.  -> (k d)"""
        return self.image_head(self.codebook)

    def place(self, rows: Tensor, start: int = 0) -> Tensor:
        """Image tokens with their places, of which the first is `start`.  Shapes: rows (b m d) -> (b m d)"""
        return rows + self.where[start : start + rows.shape[1]]

    def rows(self, prompts: Tensor, words: Tensor, codes: Tensor) -> Tensor:
        """What the transformer reads: everything but the last image token.  Shapes: prompts (b p), words (b r), codes (b n) -> (b p+r+n-1 d)"""
        text = self.transformer.embed(torch.cat([prompts, words], 1))
        return torch.cat([text, self.place(self.code_rows()[codes[:, :-1]])], 1)

    def valid(self, prompts: Tensor, words: Tensor, images: int) -> Tensor:
        """Which of the tokens only fill up.  Shapes: prompts (b p), words (b r) -> (b p+r+images) bool"""
        pixels = torch.ones(len(prompts), images, dtype=torch.bool, device=prompts.device)
        return torch.cat([up_to(prompts, EOS), up_to(words, self.config.boi), pixels], 1)

    def forward(self, prompts: Tensor, words: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every word of the rationale and every token of the picture, given all that stands before.

        Shapes: prompts (b p), words (b r), codes (b n) -> (b r v+1), (b n k)
        """
        p, r = prompts.shape[1], words.shape[1]
        valid = self.valid(prompts, words, codes.shape[1] - 1)  # (b p+r+n-1)
        hidden = self.transformer(self.rows(prompts, words, codes), valid=valid)  # (b p+r+n-1 d)
        first = last_of(hidden[:, :p], valid[:, :p])  # (b 1 d) after the prompt
        start = last_of(hidden[:, p : p + r], valid[:, p : p + r])  # (b 1 d) after BOI
        text = torch.cat([first, hidden[:, p : p + r - 1]], 1)  # (b r d): what stands before each word
        image = torch.cat([start, hidden[:, p + r :]], 1)  # (b n d)
        return self.transformer.head(text), image @ self.code_heads().T

    def log_probs(
        self, prompts: Tensor, words: Tensor, codes: Tensor, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of given words and image tokens, in nats, under what they would be sampled from.

        Shapes: prompts (b p), words (b r), codes (b n) -> (b r), (b n)
        """
        text, image = self.distributions(prompts, words, codes, sampling)
        return text.gather(2, words[..., None])[..., 0], image.gather(2, codes[..., None])[..., 0]

    def distributions(
        self, prompts: Tensor, words: Tensor, codes: Tensor, sampling: SamplingConfig
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens at each position.  -> (b r v+1), (b n k)"""
        text, image = self(prompts, words, codes)
        if sampling.guidance != 1:
            blank = self.blank(len(prompts), prompts.device)
            image = guide(image, self(*blank, codes)[1], sampling.guidance)
        return sampled_from(text.float(), sampling), sampled_from(image.float(), sampling)

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
        rows, heads = self.code_rows(), self.code_heads()  # (k d) each
        codes = torch.empty(b, n, dtype=torch.long, device=hidden.device)
        log_probs = torch.empty(b, n, device=hidden.device)
        for i in range(n):
            logits = hidden[:, 0] @ heads.T  # (b k)
            if guided:
                logits = guide(logits, without[:, 0] @ heads.T, sampling.guidance)
            log_prob = sampled_from(logits.float(), sampling)
            codes[:, i] = pick(log_prob, generator)
            log_probs[:, i] = log_prob.gather(1, codes[:, i : i + 1])[:, 0]
            if i + 1 < n:
                row = self.place(rows[codes[:, i : i + 1]], i)  # (b 1 d)
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
    """Classifier-free guidance in logits, as Janus has it: uncond + w (cond - uncond).  Shapes: (... k), (... k) -> (... k)"""
    return without + w * (logits - without)


def pick(log_prob: Tensor, generator: Generator) -> Tensor:
    """A token for each row.  Shapes: log_prob (b v) -> (b)"""
    return torch.multinomial(log_prob.exp().cpu(), 1, generator=generator)[:, 0].to(log_prob.device)
