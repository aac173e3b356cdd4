"""From prompts to pictures: tokenizer, text encoder, UNet, autoencoder and noise schedule in one object.

    pipe = load_pipeline()    # the shipped weights; or the path of a run folder or of Stable Diffusion
    images = pipe.generate(["a big wooden ball on the left of a water tank"], generator=rng(0, "noise"))

`ReasonPipeline` is the counterpart for ReasonGen-R1.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .diffusion.reflection import ReflectionConfig, condition_guided_forward, reflect
from .diffusion.sample import EpsFn, denoise, evaluations, guided, last
from .diffusion.schedule import Schedule, StepTable
from .models.autoencoder import Autoencoder, Codec
from .models.clip import TextEncoder, TwoTextEncoders
from .models.reasongen import ReasonGen, Sampled, SamplingConfig
from .models.tokenizer import BytePairs, NoVocabulary, PromptError, Tokenizer, TwoBytePairs
from .models.unet import Added, UNet
from .parallel import gather, rows, spread
from .ranges import Checked, Count, Refusal, Share, Weight, expect, finite, floats, quote
from .streams import normal, sent


class ReasonPipeline(NamedTuple):
    """ReasonGen-R1: a transformer that samples a rationale and then the tokens of a picture."""

    model: ReasonGen
    tokenizer: Tokenizer
    codec: Codec  # image tokens to pixels and back
    writes_rationale: bool = True  # False: every rationale is only BOI, which is given and not sampled

    def sample(
        self, prompts: list[str], sampling: SamplingConfig, generator: Generator, given: Tensor | None = None
    ) -> Sampled:
        """Sample a rationale and a picture for each prompt, or only the picture if `given` has rationales.

        Shapes: b prompts, given (b r) ids that end in BOI.  Raises PromptError on unknown words.
        """
        device = next(self.model.parameters()).device
        ids = sent(self.tokenizer(prompts), device)
        if given is None and not self.writes_rationale:
            given = self.model.blank(len(prompts), device)[1]
        own, n = rows(len(prompts)), len(prompts)
        mine = self.model.sample(ids[own], sampling, generator, given if given is None else given[own], n)
        return Sampled(*(gather(v, n) for v in mine))

    def pictures(self, codes: Tensor) -> Tensor:
        """Decode image tokens.  Shapes: codes (b n) -> (b 3 64 64) in [-1, 1]"""
        return self.codec.pictures(codes)

    def rationales(self, sampled: Sampled) -> list[str]:
        """The rationales as text; an empty string where none was written.  -> b"""
        return self.tokenizer.decode(sampled.rationale)


# images (b 3 h w) in [-1, 1], b prompts -> (b), by convention the probability that the picture is right
Reward = Callable[[Tensor, list[str]], Tensor]


def scored(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Compute a reward, in float32 on the CPU.  Shapes: images (b 3 h w), b prompts -> (b)

    Raises Refusal if the reward does not give one number per picture, FloatingPointError if a number is not
    finite.
    """
    given = reward(images.clone(), [*prompts])  # copies, as a reward may change them
    try:
        values = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, 0)
    if values.shape != (len(prompts),) or values.is_complex() or values.layout != torch.strided:
        got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else quote(given)
        raise Refusal(f"a reward must give a number for each of {len(prompts)} pictures, got {got}")
    values = values.float().clone()  # autograd needs a copy if inference mode made it
    if (bad := (~values.isfinite()).nonzero()).numel():
        of = quote(prompts[bad[0]])
        raise FloatingPointError(f"the reward of a picture of {of} is not a finite number")
    return values


# A picture with at least this reward is accepted: it is more likely right than wrong.
ACCEPT = 0.5

# How a refused picture is turned into noise: re-noise it in 5 steps without the prompt, replace a quarter
# of the variance by new noise, and take the negative. Of the wrong pictures of the base, 0.62 are right when
# sampled from it, 0.44 from new noise, and 0.18 from their own noise (scripts/measure.py memory).
OPPOSITE = ReflectionConfig(w_renoise=0.0, steps=5, fresh_noise=0.5, wrong="opposite")


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """The settings of DDIM sampling."""

    # denoising steps of a picture
    steps: Count = 20
    # scale w of classifier-free guidance; 1 uses only the prompt, at half the cost of other values above 0
    guidance: Weight = 1.0
    # share of DDPM's step noise, in [0, 1]; 0 is deterministic
    eta: Share = 1.0

    @property
    def cost(self) -> int:
        """UNet evaluations per picture."""
        return self.steps * evaluations(self.guidance)


@dataclass
class LatentDiffusion:
    """A latent diffusion model: networks, schedule and sampling.

    Images are (b 3 h w) in [-1, 1]; latents are (b 4 h/8 w/8).
    """

    tokenizer: Tokenizer | BytePairs | TwoBytePairs | NoVocabulary
    text_encoder: TextEncoder | TwoTextEncoders
    unet: UNet
    autoencoder: Autoencoder
    schedule: Schedule
    image_size: int | tuple[int, int] = 64  # in pixels: side of a square, or (height, width)
    zero_null: bool = False  # embed the empty prompt as zeros, without the text encoder (SDXL)
    micro_batch: int = 0  # rows that a network evaluates at once, to save memory; 0 = all
    negative: str = ""  # negative prompt of classifier-free guidance
    # last blocks of the text encoder to skip, for prompts but not for the negative prompt (as diffusers)
    clip_skip: int = 0

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return next(self.unet.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        height, width = (side // self.autoencoder.config.factor for side in self.sides)
        return (self.autoencoder.config.latent_channels, height, width)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    def to(self, device: torch.device | str) -> "LatentDiffusion":
        """Move the networks to a device; on a GPU in the format channels_last, for fast convolutions."""
        device = chosen_device(device)
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        for part in (self.text_encoder, self.unet, self.autoencoder):
            part.to(device, memory_format=layout)
        return self

    def eval(self) -> "LatentDiffusion":
        """Set all networks to evaluation mode, without gradients."""
        for part in (self.text_encoder, self.unet, self.autoencoder):
            part.eval().requires_grad_(False)
        return self

    def embed(self, prompts: list[str]) -> Tensor:
        """Embed prompts.  Shapes: b prompts -> (b t d).  Raises PromptError on unknown words."""
        return self.text_encoder(sent(self.tokenizer(prompts), self.device), self.clip_skip)

    def null(self) -> Tensor:
        """The embedding of the negative or empty prompt, for guidance.  -> (1 t d)"""
        null = self.text_encoder(sent(self.tokenizer([self.negative]), self.device))
        return torch.zeros_like(null) if self.zero_null and not self.negative else null

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Evaluate the UNet in its own precision.  -> its output in float32

        SDXL's UNet has two more inputs: the pooled prompt, which is the last row of `context` (see
        `TwoTextEncoders`), and the sizes of the picture: original size, no crop, target size.
        Shapes: x (b c h w), t () or (b), context (b t d) -> (b c h w)
        """
        dtype, added = next(self.unet.parameters()).dtype, ()
        if isinstance(self.text_encoder, TwoTextEncoders):
            sides, width = self.sides, self.text_encoder.second.config.projection
            sizes = sent(torch.tensor([*sides, 0, 0, *sides]), x.device).expand(len(x), -1)  # (b 6)
            added, context = (Added(context[:, -1, :width].to(dtype), sizes),), context[:, :-1]
        return self.unet(x.to(dtype), t, context.to(dtype), *added).float()

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw start latents x_T: unit noise times `Schedule.start`, drawn on the device of the generator.

        -> (n 4 h/8 w/8)
        """
        return self.schedule.start * normal((n, *self.latent_shape), generator, self.device)

    def table(self, steps: int) -> StepTable:
        """The noise levels of a sampling with this number of steps.  Raises ValueError on too many."""
        return self.schedule.table(steps)

    def eps(self, prompts: list[str] | Tensor, shared: bool = True) -> Callable[[float], EpsFn]:
        """The epsilon functions of prompts or of their embedding (b t d).  -> a function of the guidance w

        With `shared`, several processes evaluate a share of the rows each, without gradients.
        """
        with torch.no_grad():
            cond = self.embed(prompts) if isinstance(prompts, list) else prompts
        m = self.micro_batch or len(cond)

        def make_eps(w: float) -> EpsFn:
            with torch.no_grad():
                null = cond[:1] if w == 1 else self.null()  # guidance 1 does not use it

            def eps(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
                each = zip(x.split(m), t.split(m), cond.split(m), strict=True)
                return torch.cat([guided(self.predict, c, null, w, self.schedule)(x, t) for x, t, c in each])

            each = partial(spread, eps, unit=self.micro_batch or 1) if shared else eps
            return lambda x, t: each(x, t.expand(len(x)), cond)

        return make_eps

    def generate(
        self, prompts: list[str], steps: int = SamplerConfig.steps, guidance: float = SamplerConfig.guidance,
        eta: float = SamplerConfig.eta, rounds: int = 0, latents: Tensor | None = None,
        generator: Generator | None = None, reward: Reward | None = None,
    ) -> Tensor:  # fmt: skip
        """Sample a picture for each prompt, and reflect `rounds` times.  -> (b 3 h w) in [-1, 1]

        With a reward, such as `load_reward()`, refused pictures are sampled again (`selected_rounds`).
        Without a reward, all pictures are sampled again (`blind_rounds`). `latents` (b 4 h/8 w/8) is the unit
        start noise; by default it is drawn from `generator`, as is the step noise for eta > 0. Raises
        PromptError on an empty list or unknown words, ValueError on wrong shapes and numbers out of range.
        """
        if not (prompts := expect(prompts, list[str], "prompts")):
            raise PromptError("there is no prompt")
        reflection = replace(OPPOSITE, rounds=rounds) if reward else ReflectionConfig(rounds, steps=steps)
        sampler = SamplerConfig(steps, guidance, eta)
        generator = expect(generator, Generator | None, "generator") or Generator().manual_seed(0)
        note_guidance(guidance)
        start = self.schedule.start
        expect(reward, Callable | None, "reward")
        if latents is not None:
            floats(latents, " ".join(map(str, (len(prompts), *self.latent_shape))), "latents")
        x_T = self.noise(len(prompts), generator) if latents is None else start * latents.to(self.device)
        if reward and rounds:
            *_, images = self.selected_rounds(prompts, reward, x_T, sampler, reflection, generator)
            return images
        *_, x_0 = self.blind_rounds(prompts, x_T, sampler, reflection, generator)
        return self.decode(x_0)

    def blind_rounds(
        self, prompts: list[str], x_T: Tensor, sampler: SamplerConfig, reflection: ReflectionConfig,
        generator: Generator,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Blind reflection, as in SRRL's released code: K rounds without a reward, and a last sampling.

        Rounds 0 .. K-1 are sampled at `reflection.w_denoise` without step noise and turned back into noise;
        the last round uses `sampler`. Yields the clean latents of K + 1 rounds, to be decoded.
        Shapes: b prompts, x_T (b 4 h/8 w/8); yields (b 4 h/8 w/8)
        """
        make_eps, table, back = self.eps(prompts), self.table(sampler.steps), self.table(reflection.steps)
        for _ in range(reflection.rounds):
            x_0, x_T = condition_guided_forward(make_eps, x_T, table, back, reflection, generator)
            yield x_0
        yield last(denoise(make_eps(sampler.guidance), x_T, table, sampler.eta, generator))

    @torch.no_grad()
    def selected_rounds(
        self, prompts: list[str], reward: Reward, x_T: Tensor, sampler: SamplerConfig,
        reflection: ReflectionConfig, generator: Generator,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Reflection with a reward: sample all prompts, then sample refused pictures again, up to K times.

        K is `reflection.rounds`. A prompt is finished when its picture has a reward of at least ACCEPT;
        otherwise the picture with its highest reward is kept. Yields the best pictures so far after each of
        the K + 1 rounds. Each sampled picture is scored once.
        Shapes: b prompts, x_T (b 4 h/8 w/8); yields (b 3 h w)
        """
        table, back, context = self.table(sampler.steps), self.table(reflection.steps), self.embed(prompts)

        def eps_of(rows: Tensor, w: float = reflection.w_renoise) -> EpsFn:
            return self.eps(context[sent(rows, self.device)])(w)

        def sampled_from(x_T: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x_0 = last(denoise(eps_of(rows, sampler.guidance), x_T, table, sampler.eta, generator))
            images = self.decode(x_0)
            return x_0, images, scored(reward, images, [prompts[i] for i in rows.tolist()])

        x_0, images, values = sampled_from(x_T, torch.arange(len(prompts)))
        yield images
        for _ in range(reflection.rounds):
            rows, x_T = reflect(eps_of, x_0, values >= ACCEPT, back, reflection, generator)
            if len(rows):
                sampled, seen, found = sampled_from(x_T, rows)
                better = (found > values[rows]).nonzero().flatten()
                at, kept, of = (sent(v, self.device) for v in (rows, rows[better], better))
                x_0 = x_0.index_copy(0, at, sampled)  # the latest picture is re-noised, not the best
                images = images.index_copy(0, kept, seen[of])
                values = values.index_copy(0, rows[better], found[better])
            yield images

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents.  Shapes: latents (b 4 h/8 w/8) -> images (b 3 h w) in [-1, 1]

        Raises FloatingPointError if a picture is not finite.
        """

        def pictures(x: Tensor) -> Tensor:
            return torch.cat([self.autoencoder.decode(part) for part in x.split(self.micro_batch or len(x))])

        floats(latents, f"b {self.autoencoder.config.latent_channels} h w", "latents")
        images = spread(pictures, latents, unit=self.micro_batch or 1)
        half = next(self.unet.parameters()).dtype == torch.float16
        finite(images, f"a picture{', as float16 may overflow (--precision bf16),' if half else ''}")
        return images.clamp(-1, 1)


def chosen_device(name: str | None) -> torch.device:
    """The device of this name, or the best available one.  Raises Refusal if the device is not available."""
    try:
        return torch.empty(0, device=name or best_device()).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refusal(f"torch cannot use the device {name} on this machine; omit --device") from error


def note_guidance(*scales: float) -> None:
    """Warn if a scale is 0, which ignores the prompt."""
    if 0 in scales:
        warnings.warn("guidance 0 ignores the prompt; guidance 1 samples without guidance", stacklevel=3)


def best_device() -> str:
    """The first available device of cuda, mps and cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
