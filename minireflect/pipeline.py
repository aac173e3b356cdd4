"""Prompts to pictures: tokenizer + text encoder + UNet + autoencoder + noise schedule under one roof.

    pipe = load_pipeline()                                  # the shipped weights; or a run folder of train.py;
                                                            # or Stable Diffusion, a folder or a file: checkpoints.py
    images = pipe.generate(["a big wooden ball on the left of a water tank"], generator=rng(0, "noise"))

Weights are safetensors files that carry their network's configuration; the vocabulary travels with the text encoder.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .diffusion.reflection import ACCEPT, OPPOSITE, ReflectionConfig, reflect, renoise_to
from .diffusion.sample import EpsFn, denoise, guided, last
from .diffusion.schedule import Schedule, StepTable
from .models.autoencoder import Autoencoder
from .models.clip import TextEncoder, TwoTextEncoders
from .models.reasongen import ReasonGen, Sampled, SamplingConfig
from .models.tokenizer import BytePairs, NoVocabulary, PromptError, Tokenizer, TwoBytePairs
from .models.unet import Added, UNet
from .models.vq import Codec


class ReasonPipeline(NamedTuple):
    """ReasonGen-R1: one transformer that writes a rationale and then samples the picture's tokens."""

    model: ReasonGen
    tokenizer: Tokenizer
    codec: Codec  # image tokens to pixels and back
    writes_rationale: bool = True  # False: every rationale is empty, BOI alone, given and not chosen

    def sample(
        self,
        prompts: list[str],
        sampling: SamplingConfig,
        generator: Generator,
        rationale: Tensor | None = None,
    ) -> Sampled:
        """A rationale and a picture for each prompt; with given rationales only the picture.

        Shapes: b prompts, rationale (b r) ids that end in BOI.  Raises PromptError on unknown words.
        """
        device = next(self.model.parameters()).device
        ids = self.tokenizer(prompts).to(device)
        if rationale is None and not self.writes_rationale:
            rationale = self.model.blank(len(prompts), device)[1]
        return self.model.sample(ids, sampling, generator, rationale)

    def pictures(self, codes: Tensor) -> Tensor:
        """Decode image tokens.  Shapes: codes (b n) -> (b 3 64 64) in [-1, 1]"""
        return self.codec.pictures(codes)

    def rationales(self, sampled: Sampled) -> list[str]:
        """The rationales as text; an empty string where none was written.  -> b"""
        return self.tokenizer.decode(sampled.rationale)


Judge = Callable[
    [Tensor, list[str]], Tensor
]  # images (b 3 h w), b prompts -> (b), a probability to be right: rl/rewards.py


@dataclass(frozen=True)
class SamplerConfig:
    steps: int = 20  # network evaluations of a picture, without guidance
    guidance: float = 1.0  # w: 1 = the prompt alone, at half the cost of any other value
    eta: float = 1.0  # 1 = as much fresh noise as DDPM, 0 = deterministic
    spacing: str = "leading"  # of the time steps: leading, trailing, linspace

    def __post_init__(self) -> None:
        if self.guidance < 0:
            raise ValueError(f"guidance must not be negative, got {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")


@dataclass
class LatentDiffusion:
    """The parts, and how to draw with them.  Images are (b 3 h w) in [-1, 1], latents (b 4 h/8 w/8)."""

    tokenizer: Tokenizer | BytePairs | TwoBytePairs | NoVocabulary
    text_encoder: TextEncoder | TwoTextEncoders
    unet: UNet
    autoencoder: Autoencoder
    schedule: Schedule
    image_size: int = 64  # pixels
    zero_null: bool = False  # the empty prompt is all zeros, not what the encoder makes of it (SDXL)
    micro_batch: int = 0  # pictures that go through a network at once, where more do not fit; 0 = all

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.image_size // self.autoencoder.config.factor
        return (self.autoencoder.config.latent_channels, side, side)

    def to(self, device: torch.device | str) -> "LatentDiffusion":
        on_gpu = (
            torch.device(device).type == "cuda"
        )  # whose convolutions want the channels of a pixel side by side
        layout = torch.channels_last if on_gpu else torch.preserve_format
        for part in (self.text_encoder, self.unet, self.autoencoder):
            part.to(device, memory_format=layout)
        return self

    def eval(self) -> "LatentDiffusion":
        for part in (self.text_encoder, self.unet, self.autoencoder):
            part.eval().requires_grad_(False)
        return self

    def embed(self, prompts: list[str]) -> Tensor:
        """Shapes: b prompts -> (b t d).  Raises PromptError on unknown words."""
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    def null(self) -> Tensor:
        """The empty prompt, which guidance leads away from.  -> (1 t d)"""
        null = self.embed([""])
        return torch.zeros_like(null) if self.zero_null else null

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """What the UNet says, computed in its precision and returned in float32.

        SDXL also wants the pooled prompt, the last row of its context (see `TwoTextEncoders`), and is told that the picture is
        of the size that it was trained on, and not cropped.
        Shapes: x (b c h w), t () or (b), context (b t d) -> (b c h w)
        """
        dtype, added = next(self.unet.parameters()).dtype, ()
        if isinstance(self.text_encoder, TwoTextEncoders):
            side, width = self.image_size, self.text_encoder.second.config.projection
            sizes = torch.tensor([side, side, 0, 0, side, side], device=x.device).expand(len(x), -1)  # (b 6)
            added, context = (Added(context[:, -1, :width].to(dtype), sizes),), context[:, :-1]
        return self.unet(x.to(dtype), t, context.to(dtype), *added).float()

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Start latents x_T ~ N(0, I), drawn on the CPU so that every device sees the same.  -> (n 4 h/8 w/8)"""
        return torch.randn(n, *self.latent_shape, generator=generator).to(self.device)

    def table(self, steps: int, spacing: str = "leading") -> StepTable:
        return self.schedule.table(steps, spacing)

    def eps(self, prompts: list[str] | Tensor) -> Callable[[float], EpsFn]:
        """For prompts (or their embedding (b t d)): the epsilon function at each guidance w, `micro_batch` pictures at once."""
        with torch.no_grad():
            cond = self.embed(prompts) if isinstance(prompts, list) else prompts
            null = self.null()
        m = self.micro_batch
        if not m or len(cond) <= m:
            return lambda w: guided(self.predict, cond, null, w, self.schedule)

        def make_eps(w: float) -> EpsFn:
            parts = [guided(self.predict, c, null, w, self.schedule) for c in cond.split(m)]

            def eps(x: Tensor, t: Tensor) -> Tensor:
                each = zip(parts, x.split(m), t.expand(len(x)).split(m))
                return torch.cat([part(x_part, t_part) for part, x_part, t_part in each])  # (b c h w)

            return eps

        return make_eps

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        steps: int = SamplerConfig.steps,
        guidance: float = SamplerConfig.guidance,
        eta: float = SamplerConfig.eta,
        rounds: int = 0,
        latents: Tensor | None = None,
        generator: torch.Generator | None = None,
        judge: Judge | None = None,
    ) -> Tensor:
        """Draw a picture for each prompt, and reflect `rounds` times.

        With a judge, such as `load_reward()`, what it refuses is drawn again, see `judged_rounds`. Without one, every picture
        is turned back into noise before the last drawing, right or wrong (SRRL's blind mode). `latents` (b 4 h/8 w/8) are the start noise; without them it comes from `generator`, which also gives the
        step noise for eta > 0.  Raises PromptError on an empty list or unknown words, ValueError on numbers out of
        range.  -> (b 3 h w) in [-1, 1]
        """
        if not prompts:
            raise PromptError("there is no prompt")
        if rounds < 0:
            raise ValueError(f"rounds must be 0 or more, got {rounds}")
        sampler = SamplerConfig(steps, guidance, eta)
        generator = generator or torch.Generator().manual_seed(0)
        x = self.noise(len(prompts), generator) if latents is None else latents.to(self.device)
        if tuple(x.shape) != (len(prompts), *self.latent_shape):
            raise ValueError(
                f"latents of shape {tuple(x.shape)}, but {len(prompts)} prompts need {self.latent_shape} each"
            )
        make_eps, table = self.eps(prompts), self.table(sampler.steps, sampler.spacing)
        if judge and rounds:
            *_, images = self.judged_rounds(prompts, judge, rounds, sampler, x, generator)
            return images
        if rounds:
            *_, final = reflect(make_eps, x, table, ReflectionConfig(rounds=rounds, steps=steps), generator)
            x = final.x_T
        return self.decode(last(denoise(make_eps(guidance), x, table, eta, generator)))

    @torch.no_grad()
    def judged_rounds(
        self,
        prompts: list[str],
        judge: Judge,
        rounds: int,
        sampler: SamplerConfig,
        x_T: Tensor,
        generator: torch.Generator,
        redraw: ReflectionConfig = OPPOSITE,
    ) -> Iterator[Tensor]:
        """Draw, then draw again what the judge refuses, `rounds` times at most, from the opposite of its noise.

        A picture that the judge gives ACCEPT or more is done. The opposite, as the noise of a wrong picture would repeat it:
        see `renoise_to`. Of what is never accepted, the picture that the judge liked best is kept. Yields the best so far
        after every round, rounds + 1 times; each drawn picture is judged once.
        Shapes: b prompts, x_T (b 4 h/8 w/8); yields (b 3 h w)
        """
        table, back = self.table(sampler.steps, sampler.spacing), self.table(redraw.steps)
        x_0 = last(denoise(self.eps(prompts)(sampler.guidance), x_T, table, sampler.eta, generator))
        images = self.decode(x_0)
        values = judge(images, prompts)  # (b)
        yield images
        for _ in range(rounds):
            rows = (values < ACCEPT).nonzero().flatten()  # (n) refused so far
            if len(rows):
                asked = [prompts[i] for i in rows.tolist()]
                make_eps, sign = self.eps(asked), -torch.ones(len(rows), device=x_0.device)
                x = renoise_to(make_eps(redraw.w_renoise), x_0[rows], back, redraw, generator, sign)
                drawn = last(denoise(make_eps(sampler.guidance), x, table, sampler.eta, generator))
                seen = self.decode(drawn)
                says = judge(seen, asked)  # (n)
                better = says > values[rows]
                x_0, images, values = x_0.clone(), images.clone(), values.clone()
                x_0[rows] = drawn  # what comes next avoids the latest, not the best
                images[rows[better]], values[rows[better]] = seen[better], says[better]
            yield images

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Shapes: latents (b 4 h/8 w/8) -> images (b 3 h w) in [-1, 1].  Raises FloatingPointError on a picture that is not finite."""
        parts = latents.split(self.micro_batch or len(latents))
        images = torch.cat([self.autoencoder.decode(part).clamp(-1, 1) for part in parts])
        if not images.isfinite().all():
            raise FloatingPointError(
                "a decoded picture is not finite; draw in float32 or bfloat16 (--precision), as float16 may overflow"
            )
        return images


def best_device() -> str:
    """cuda, mps or cpu: the first of them that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
