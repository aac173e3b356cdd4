"""Rewards: functions (images, prompts) -> one number for each picture.

    matcher_reward     learned: the probability that the picture fulfils the prompt.  RL maximises it.
    caption_reward     learned: the probability of the least likely word of a rationale, given the picture.
    inspector_reward   exact: 1 if the inspector reads what the prompt asks for, else 0.  For measuring only.
    clip_reward        for real pictures: CLIP's cosine of picture and prompt (SRRL); PickScore, HPS v2.
    aesthetic_reward   for real pictures: LAION's head on CLIP's features of the picture.
    incompressibility  for real pictures: size as a JPEG file; compressibility is minus that.  These are the
                       first tasks of DDPO, and need no weights.
    weighted           the sum of several rewards, each normalised within its group.

Shapes: images (b 3 h w) in [-1, 1], b prompts -> (b)

RL-RIG's reward is the share of a graph's requirements that the picture meets, according to a learned Checker:

    C(x, G)_j = 1 if p_j >= 0.5        for each requirement g_j of the graph
    f(x)      = (1/n) sum_j C_j        RL-RIG, equation 2

The judge is a second network of the same class, with another seed and size.  It is only used for measuring.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.ours import RIG, load_module, or_shipped, weights_folder, words_of
from ..models.clip import CLIP, Matcher
from ..models.tokenizer import EOS, BytePairs, Tokenizer, trim, up_to
from ..pipeline import Reward, chosen_device, scored
from ..ranges import Refusal, all_finite, expect, finite, floats, quote
from ..world.canvas import to_pixels
from ..world.graphs import SceneGraph
from ..world.inspector import inspect_all
from ..world.prompts import Prompt, split, understand

# Smallest caption_reward of an accepted rationale.  It must be below 1/12: with four objects in any order and
# three styles, even a correct word may have a probability of only 1/12.
ACCEPT_WORD = 0.05
MET = 0.5  # smallest probability of the Checker for a requirement that counts as met


def matcher_reward(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Reward:
    """The matcher's probability that the picture fulfils the prompt, in [0, 1]."""

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        device = next(matcher.parameters()).device
        ids = tokenizer(expect(prompts, list[str], "prompts")).to(device)
        images = floats(images, f"{len(prompts)} 3 h w", "images").to(device).float()
        parts = [matcher(x, y) for x, y in zip(images.split(batch), ids.split(batch))]
        return finite(torch.sigmoid(torch.cat(parts).float()), "the learned reward of a picture")

    return reward


def caption_reward(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Reward:
    """The smallest probability among the words of a rationale and its end token, in [0, 1].

    It is 0 for a rationale that is empty, is too long, or has unknown words.
    """

    @torch.no_grad()
    def reward(images: Tensor, rationales: list[str]) -> Tensor:
        words = [split(text) for text in rationales]
        readable = [0 < len(w) <= tokenizer.length - 2 and tokenizer.ids.keys() >= {*w} for w in words]
        images = images.to(next(matcher.parameters()).device)
        rows = torch.tensor(readable, device=images.device).nonzero().flatten()
        least = torch.zeros(len(images), device=images.device)
        for part in rows.split(batch) if len(rows) else ():
            ids = trim(tokenizer([rationales[i] for i in part.tolist()]), EOS).to(images.device)  # (m t)
            logits = matcher.describe(matcher.vision(images[part]), matcher.text(ids))  # (m t v)
            after = ids[:, 1:]  # (m t-1)
            each = logits[:, :-1].float().softmax(-1).gather(2, after[..., None])[..., 0]  # (m t-1)
            least[part] = each.where(up_to(after, EOS), 1.0).amin(1)
        return finite(least, "the captioner's reward of a rationale")

    return reward


def load_matcher(path: Path, device: torch.device | str) -> tuple[Matcher, Tokenizer]:
    """A matcher and its tokenizer, from a file of weights."""
    matcher, about = load_module(path, Matcher)
    return matcher.to(device), words_of(path, about, matcher.config.length, matcher.config.vocabulary)


def load_reward(path: str | Path | None = None, device: torch.device | str = "cpu") -> Reward:
    """The learned reward of a run or of a folder of weights; None for the shipped one."""
    return matcher_reward(*load_matcher(weights_folder(path) / "reward.safetensors", chosen_device(device)))


def reward_beside(folder: str | Path, device: torch.device | str = "cpu") -> Reward:
    """The learned reward in a folder of weights; the shipped one if the folder has none."""
    return load_reward(or_shipped(folder, "reward"), device)


def load_captioner(path: str | Path, device: torch.device | str = "cpu") -> Reward:
    """The captioner in a folder of weights, as a reward of rationales."""
    return caption_reward(*load_matcher(Path(path) / "captioner.safetensors", device))


def inspector_reward(images: Tensor, prompts: list[str]) -> Tensor:
    """1 if the inspector reads what the prompt asks for, else 0.

    Raises ValueError if a text is not a prompt of the world.
    """
    meant = [understand(p) for p in prompts]
    if None in meant:
        raise ValueError(f"expected a prompt of the synthetic world, got {quote(prompts[meant.index(None)])}")
    return verdicts(images, meant)


def verdicts(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """1 if the inspector's reading of the picture fulfils the prompt, else 0.

    Shapes: images (b 3 64 64), b prompts -> (b)
    """
    return torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, inspect_all(images))])


def clip_reward(clip: CLIP, tokenizer: BytePairs, scaled: bool = False, batch: int = 32) -> Reward:
    """CLIP's cosine of picture and prompt, in [-1, 1]; about 0.2 to 0.4 if they match (SRRL's code).

    scaled: multiply it by exp(logit_scale), about 100, as PickScore (Kirstain et al. 2023, arXiv 2305.01569)
        and HPS v2 (Wu et al. 2023, arXiv 2306.09341) do; they are CLIPs trained on human preferences.
    """

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        ids = tokenizer(prompts).to(clip.text_projection.weight.device)
        seen = image_features(clip, images, batch)  # (b e)
        read = torch.cat([clip.encode_text(part) for part in ids.split(batch)])  # (b e)
        scale = clip.logit_scale.exp().float() if scaled else 1.0
        values = (scale * (seen * read.float()).sum(1)).to(images.device)
        return finite(values, "CLIP's reward of a picture")

    return reward


def image_features(clip: CLIP, images: Tensor, batch: int) -> Tensor:
    """CLIP's normalised image embeddings.

    Pictures may have any size: the shorter side is resized to CLIP's, then the centre is cropped.
    Shapes: images (b 3 h w) -> (b e)
    """
    size, weight, found = clip.config.vision.size, clip.text_projection.weight, []
    height, width = images.shape[2:]
    shape = [round(side * size / min(height, width)) for side in (height, width)]
    top, left = ((side - size) // 2 for side in shape)
    for x in images.split(batch):
        x = F.interpolate(x.to(weight.device).float(), shape, mode="bicubic", antialias=True).clamp(-1, 1)
        found.append(clip.encode_image(x[..., top : top + size, left : left + size].to(weight.dtype)).float())
    return torch.cat(found)


def aesthetic_reward(clip: CLIP, head: dict[str, Tensor], source: str = "head", batch: int = 32) -> Reward:
    """LAION's aesthetic score, about 1 to 10: a linear head on the image embeddings of CLIP ViT-L/14.

    The prompts are not used.
    head: the tensors of its file, one linear layer (version 1), or five without activations (version 2).
    source: the name of the file, for messages.
    Raises Refusal if the tensors have other names or shapes, or numbers that are not finite.
    """
    names = {name.removesuffix("weight").removesuffix("bias") for name in head}
    layers = sorted(names, key=lambda name: (len(name), name))  # layers.10. comes after layers.2.
    sizes = [clip.config.width, *(head.get(f"{name}bias", torch.empty(0)).numel() for name in layers)]
    each = [*zip(layers, sizes, sizes[1:])]
    wanted = {f"{name}weight": (o, i) for name, i, o in each} | {f"{name}bias": (o,) for name, _, o in each}
    found = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if found != wanted or sizes[-1] != 1:
        raise Refusal(f"{source} is no aesthetic head from {sizes[0]} numbers to one; it has {quote(found)}")
    if not all(tensor.is_floating_point() and all_finite(tensor) for tensor in head.values()):
        raise Refusal(f"{source} is no aesthetic head: its tensors are not finite floating-point numbers")

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        x = image_features(clip, images, batch)
        for name in layers:
            x = F.linear(x, head[f"{name}weight"].to(x), head[f"{name}bias"].to(x))
        return x[:, 0].to(images.device)

    return reward


def weighted(rewards: list[tuple[float, Reward]]) -> Reward:
    """The weighted sum of several rewards, each normalised over the pictures of a prompt.

    Without the normalisation, the reward with the largest spread would dominate the sum.  The attribute
    `plain` of the result is the weighted sum without normalisation, for measuring.
    """
    if len(rewards) == 1 and rewards[0][0] == 1:
        return rewards[0][1]

    def normalised(values: Tensor, prompts: list[str]) -> Tensor:
        values = values.clone()
        for prompt in dict.fromkeys(prompts):
            rows = [i for i, other in enumerate(prompts) if other == prompt]
            spread = values[rows].std() if len(rows) > 1 else 0.0
            values[rows] = (values[rows] - values[rows].mean()) / (spread + 1e-6)
        return values

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        return sum(w * normalised(scored(each, images, prompts), prompts) for w, each in rewards)

    reward.plain = lambda images, prompts: sum(w * scored(each, images, prompts) for w, each in rewards)
    return reward


def incompressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Kilobytes of the picture as a JPEG (DDPO, section 5.1).  This reward favours detail and noise."""
    from PIL import Image

    sizes = []
    for picture in to_pixels(images):  # (h w 3)
        Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=95)  # as in DDPO's code
        sizes.append(len(file.getvalue()) / 1000)
    return torch.tensor(sizes, device=images.device)


def compressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the kilobytes of the picture as a JPEG.  This reward favours plain surfaces."""
    return -incompressibility(images, prompts)


# --------------------------------------------------------------------------------------- RL-RIG's Checker
class Answers(NamedTuple):
    """The Checker's answers about b pictures and up to r requirements; shorter graphs are padded."""

    probability: Tensor  # (b r) in [0, 1]; 1 in the padding
    asked: Tensor  # (b r) bool, False in the padding

    @property
    def met(self) -> Tensor:
        """Whether each requirement is met.  -> (b r) bool, True in the padding"""
        return self.probability >= MET

    @property
    def share(self) -> Tensor:
        """f(x), the share of the requirements that are met.  -> (b) in [0, 1]"""
        return (self.met & self.asked).sum(1) / self.asked.sum(1)

    @property
    def score(self) -> Tensor:
        """The value that `keep_best` compares: f(x), with ties decided by the mean probability.  -> (b)"""
        return self.share + 1e-3 * ((self.probability * self.asked).sum(1) / self.asked.sum(1))

    def rows(self, rows: Tensor) -> "Answers":
        return Answers(self.probability[rows], self.asked[rows])


Checker = Callable[[Tensor, list[SceneGraph]], Answers]  # images (b 3 h w), b graphs


def matcher_checker(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Checker:
    """A Checker from its network.  It encodes each picture once for all requirements of its graph."""

    @torch.no_grad()
    def check(images: Tensor, graphs: list[SceneGraph]) -> Answers:
        asked = [[r.words for r in g.requirements] for g in graphs]
        most = max(map(len, asked))
        real = torch.tensor([[j < len(row) for j in range(most)] for row in asked], device=images.device)
        # rows are padded with their first requirement; the answers to the padding are discarded
        texts = [text for row in asked for text in row + row[:1] * (most - len(row))]
        ids = trim(tokenizer(texts), EOS).to(images.device)  # (b*r t)
        parts = zip(images.split(batch), ids.split(batch * most))
        logits = [matcher.match(matcher.vision(x), matcher.text(y), y) for x, y in parts]
        probability = finite(torch.sigmoid(torch.cat(logits).float()), "the Checker's answer").view_as(real)
        return Answers(probability.masked_fill(~real, 1.0), real)

    return check


def load_checker(
    folder: str | Path = RIG, name: str = "checker", device: torch.device | str = "cpu"
) -> Checker:
    """The "checker" or the "judge" of RL-RIG, from a folder of weights; the default is the shipped one."""
    return matcher_checker(*load_matcher(Path(folder) / f"{name}.safetensors", device))
