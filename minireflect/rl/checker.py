"""RL-RIG's Checker: a small visual question answerer, (picture, one requirement) -> probability that it is met.

    C(x, G)_j = 1 if p_j >= 0.5            of each requirement g_j of the graph
    f(x)      = (1/n) sum_j C_j            the reward of the loop: the share of requirements that are met (RL-RIG, their Eq. 2)

It is learned and can be fooled; the inspector, which cannot, stays outside.  So does the judge, a second one with another seed and size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoints.ours import RIG
from ..models.matcher import Matcher
from ..models.tokenizer import EOS, Tokenizer, trim
from ..world.graphs import SceneGraph
from .rewards import load_matcher

MET = 0.5  # probability from which a requirement counts as met


class Answers(NamedTuple):
    """What a checker says of pictures; rows of graphs with fewer requirements are filled up."""

    probability: Tensor  # (b r) in [0, 1]; 1 where nothing is asked
    asked: Tensor  # (b r) bool

    @property
    def met(self) -> Tensor:
        """-> (b r) bool; true where nothing is asked"""
        return self.probability >= MET

    @property
    def share(self) -> Tensor:
        """f(x), the share of requirements that are met.  -> (b) in [0, 1]"""
        return (self.met & self.asked).sum(1) / self.asked.sum(1)

    @property
    def all_hold(self) -> Tensor:
        """The probability that all are met, were they independent.  -> (b) in [0, 1]"""
        return self.probability.prod(1)

    @property
    def score(self) -> Tensor:
        """f(x) and, between pictures with the same share, the mean probability; what keep-best compares.  -> (b)"""
        mean = (self.probability * self.asked).sum(1) / self.asked.sum(1)
        return self.share + 1e-3 * mean

    def rows(self, rows: Tensor) -> "Answers":
        return Answers(self.probability[rows], self.asked[rows])


Checker = Callable[[Tensor, list[SceneGraph]], Answers]  # images (b 3 h w), b graphs


def matcher_checker(matcher: Matcher, tokenizer: Tokenizer, batch: int = 256) -> Checker:
    """A checker from its network; each picture is looked at once, whatever is asked of it."""

    @torch.no_grad()
    def check(images: Tensor, graphs: list[SceneGraph]) -> Answers:
        most = max(len(g.requirements) for g in graphs)
        asked = torch.zeros(len(graphs), most, dtype=torch.bool)
        words = []
        for row, graph in zip(
            asked, graphs
        ):  # rows are filled up with their first question, which nobody hears answered
            texts = [r.words for r in graph.requirements]
            row[: len(texts)] = True
            words += texts + texts[:1] * (most - len(texts))
        ids = trim(tokenizer(words), EOS).to(images.device)  # (b*r t)
        logits = [
            matcher.match(matcher.vision(part), matcher.text(rows), rows)
            for part, rows in zip(images.split(batch), ids.split(batch * most))
        ]
        asked = asked.to(images.device)
        probability = torch.sigmoid(torch.cat(logits).float()).view_as(asked)
        return Answers(probability.masked_fill(~asked, 1.0), asked)

    return check


def load_checker(
    folder: str | Path = RIG, name: str = "checker", device: torch.device | str = "cpu"
) -> Checker:
    """The checker of a run of RL-RIG or the shipped one; or, by name, the held-out "judge"."""
    return matcher_checker(*load_matcher(Path(folder) / f"{name}.safetensors", device))
