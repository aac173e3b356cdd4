"""RL-RIG's Checker: a learned question answerer, (picture, requirement) -> probability that it is met.

    C(x, G)_j = 1 if p_j >= 0.5        for each requirement g_j of the graph
    f(x)      = (1/n) sum_j C_j        the loop's reward: the share of requirements met (RL-RIG, equation 2)

It is learned and can be fooled.  The inspector is exact and is not trained on; the judge is a second network
with another seed and size, which only measures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.ours import RIG
from ..models.clip import Matcher
from ..models.tokenizer import EOS, Tokenizer, trim
from ..world.graphs import SceneGraph
from .rewards import load_matcher

MET = 0.5  # probability from which a requirement counts as met


class Answers(NamedTuple):
    """Answers about b pictures; graphs with fewer than r requirements are padded."""

    probability: Tensor  # (b r) in [0, 1]; 1 in the padding
    asked: Tensor  # (b r) bool, False in the padding

    @property
    def met(self) -> Tensor:
        """-> (b r) bool, True in the padding"""
        return self.probability >= MET

    @property
    def share(self) -> Tensor:
        """f(x), the share of requirements that are met.  -> (b) in [0, 1]"""
        return (self.met & self.asked).sum(1) / self.asked.sum(1)

    @property
    def all_hold(self) -> Tensor:
        """The probability that all requirements are met, as if they were independent.  -> (b) in [0, 1]"""
        return self.probability.prod(1)

    @property
    def score(self) -> Tensor:
        """What keep-best compares: f(x), then between equal shares the mean probability.  -> (b)"""
        mean = (self.probability * self.asked).sum(1) / self.asked.sum(1)
        return self.share + 1e-3 * mean

    def rows(self, rows: Tensor) -> "Answers":
        return Answers(self.probability[rows], self.asked[rows])


Checker = Callable[[Tensor, list[SceneGraph]], Answers]  # images (b 3 h w), b graphs


def matcher_checker(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Checker:
    """A Checker from its network, which encodes each picture once for all of its questions."""

    @torch.no_grad()
    def check(images: Tensor, graphs: list[SceneGraph]) -> Answers:
        asked = [[r.words for r in g.requirements] for g in graphs]
        most = max(map(len, asked))
        real = torch.tensor([[j < len(row) for j in range(most)] for row in asked], device=images.device)
        # rows are padded with their first question; those answers are not used
        texts = [text for row in asked for text in row + row[:1] * (most - len(row))]
        ids = trim(tokenizer(texts), EOS).to(images.device)  # (b*r t)
        parts = zip(images.split(batch), ids.split(batch * most))
        logits = [matcher.match(matcher.vision(x), matcher.text(y), y) for x, y in parts]
        probability = torch.sigmoid(torch.cat(logits).float()).view_as(real)
        return Answers(probability.masked_fill(~real, 1.0), real)

    return check


def load_checker(
    folder: str | Path = RIG, name: str = "checker", device: torch.device | str = "cpu"
) -> Checker:
    """The "checker" of a run of RL-RIG, by default the shipped one, or the "judge"."""
    return matcher_checker(*load_matcher(Path(folder) / f"{name}.safetensors", device))
