"""Rewards: reward(images, prompts) -> one number a picture.

    match_reward     learned; the probability that the sentence holds for the picture.  What RL climbs, and can fool.
    caption_reward   learned; how likely the least likely word of a rationale is, given the picture and the words before it.
    inspector_reward exact; 1 where the inspector reads what the prompt asks for, else 0.  The witness: never trained on,
                     and a reward only where a study wants to see the ceiling.
    clip_reward      for real pictures: CLIP's cosine of picture and prompt, SRRL's reward (there ViT-H/14)
    incompressibility, compressibility
                     for real pictures: kilobytes as JPEG, and minus that; DDPO's first tasks, which need no weights

Shapes: images (b 3 h w) in [-1, 1], b prompts -> (b)
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import encode_jpeg

from ..checkpoints.ours import load_module, or_shipped, weights_folder
from ..models.clip import CLIP
from ..models.matcher import Matcher, MatcherConfig
from ..models.tokenizer import EOS, BytePairs, Tokenizer, trim, up_to
from ..pipeline import Reward
from ..world.inspector import inspect_all
from ..world.prompts import Prompt, split, understand

# caption_reward from which a picture shows what its rationale says: among four objects in any order and three
# styles, even a right first word has a probability of only a twelfth
ACCEPT_WORD = 0.05


def match_reward(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Reward:
    """The learned reward: the matcher's probability, in [0, 1]."""

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        device = next(matcher.parameters()).device
        images, ids = images.to(device), tokenizer(prompts).to(device)
        parts = [matcher(x, y) for x, y in zip(images.split(batch), ids.split(batch))]
        return torch.sigmoid(torch.cat(parts).float())

    return reward


def load_reward(path: str | Path | None = None, device: torch.device | str = "cpu") -> Reward:
    """The learned reward of a run, or the shipped one; it brings its own vocabulary."""
    matcher, about = load_module(weights_folder(path) / "reward.safetensors", Matcher, MatcherConfig)
    return match_reward(matcher.to(device), Tokenizer(about["words"].split(), matcher.config.length))


def caption_reward(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Reward:
    """The least probability of a word of a rationale, its end included, in [0, 1]; 0 for one that is empty, too long, or has unknown words."""

    @torch.no_grad()
    def reward(images: Tensor, rationales: list[str]) -> Tensor:
        known = [
            0 < len(w := split(t)) <= tokenizer.length - 2 and tokenizer.ids.keys() >= {*w}
            for t in rationales
        ]
        images = images.to(next(matcher.parameters()).device)
        rows = torch.tensor(known, device=images.device).nonzero().flatten()
        least = torch.zeros(len(images), device=images.device)
        for part in rows.split(batch) if len(rows) else ():
            ids = trim(tokenizer([rationales[i] for i in part.tolist()]), EOS).to(images.device)  # (m t)
            logits = matcher.describe(matcher.vision(images[part]), matcher.text(ids))  # (m t v)
            after = ids[:, 1:]  # (m t-1)
            each = logits[:, :-1].float().softmax(-1).gather(2, after[..., None])[..., 0]  # (m t-1)
            least[part] = each.where(up_to(after, EOS), 1.0).amin(1)
        return least

    return reward


def load_captioner(path: str | Path, device: torch.device | str = "cpu") -> Reward:
    """A trained captioner as a reward; it brings its own vocabulary."""
    matcher, about = load_module(Path(path) / "captioner.safetensors", Matcher, MatcherConfig)
    return caption_reward(matcher.to(device), Tokenizer(about["words"].split(), matcher.config.length))


def inspector_reward(images: Tensor, prompts: list[str]) -> Tensor:
    """The exact verdict.  Raises ValueError for a prompt whose meaning the world does not know."""
    meant = [understand(p) for p in prompts]
    if None in meant:
        raise ValueError(f"the inspector cannot tell what fulfils {prompts[meant.index(None)]!r}")
    return verdicts(images, meant)


def verdicts(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """1 where the inspector's reading fulfils the prompt, else 0.  Shapes: images (b 3 64 64), b prompts -> (b)"""
    readings = inspect_all(images)
    return torch.tensor([float(p.fulfilled_by(r)) for p, r in zip(prompts, readings)])


def clip_reward(clip: CLIP, tokenizer: BytePairs, batch: int = 32) -> Reward:
    """CLIP's cosine between a picture and its prompt, in [-1, 1]; about 0.2 to 0.4 where they fit (E6 of SRRL's code)."""
    size = clip.config.vision.size

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        weight = clip.text_projection.weight
        ids = tokenizer(prompts).to(weight.device)
        values = []
        for x, y in zip(images.split(batch), ids.split(batch)):
            x = F.interpolate(
                x.to(weight.device).float(), (size, size), mode="bicubic", antialias=True
            ).clamp(-1, 1)
            values.append((clip.encode_image(x.to(weight.dtype)) * clip.encode_text(y)).sum(1))  # (b)
        return torch.cat(values).float().to(images.device)

    return reward


QUALITY = 95  # of the JPEG, as in DDPO's code


def incompressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Kilobytes of the picture as a JPEG (Black et al. 2023, section 5.1): the policy learns detail and noise."""
    pictures = ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()  # (b 3 h w)
    sizes = [len(encode_jpeg(picture, QUALITY)) / 1000 for picture in pictures]
    return torch.tensor(sizes, device=images.device)


def compressibility(images: Tensor, prompts: list[str]) -> Tensor:
    """Minus the kilobytes of the picture as a JPEG: the policy learns blank walls."""
    return -incompressibility(images, prompts)


def judge_of(folder: str | Path, device: torch.device | str = "cpu") -> Reward:
    """The folder's, else the shipped one."""
    return load_reward(or_shipped(folder, "reward"), device)
