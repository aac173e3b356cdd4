"""RL-RIG's loop: generate, reflect, edit (Wang et al. 2026, arXiv 2602.19974).

    x = Diffuser(graph)
    for k in 1 .. K:
        v = Checker(x, graph);  done if all requirements are met
        a = Actor(x, graph, v)                                          an edit prompt: what is to be where
        x' = Denoise(Invert(x, t*), graph with a)                       the Inverse Diffuser: back to level t*, then on under the edit prompt
        x = x' unless the Checker likes x better                        keep-best: an edit can hurt

Differs from the paper, whose code is not public: the Inverse Diffuser is the Diffuser itself, its inversion `renoise` and its drawing
`denoise`; it reads the graph's sentence and the edit prompt after it. All noise at t* is new by default (SDEdit, Meng et al. 2021, arXiv
2108.01073), because a picture that DDIM inverts hardly lets anything be moved (docs/log.md); `fresh_noise` below 1 inverts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..diffusion.reflection import ReflectionConfig, renoise_to
from ..diffusion.sample import Trajectory, collect, denoise, last
from ..diffusion.schedule import StepTable
from ..models.actor import Actor, questions, read_out
from ..models.tokenizer import Tokenizer
from ..pipeline import LatentDiffusion
from ..rl.checker import Answers, Checker
from ..streams import choices
from ..world.edits import edit_prompt, plan
from ..world.graph import SceneGraph
from .rollout import evaluations


@dataclass(frozen=True)
class LoopConfig:
    rounds: int = 3  # K, edits at most; 0 draws once
    t_star: float = (
        0.9  # t*, share of the steps that an edit goes back; 0 changes nothing, 1 is all the way to noise
    )
    steps: int = 20  # of drawing a picture
    guidance: float = 1.0  # w of drawing
    edit_guidance: float = 2.0  # w of editing
    w_invert: float = 0.0  # guidance of the inversion; 0 = no prompt at all
    fresh_noise: float = 1.0  # share of new noise in the picture at t*; 1 = SDEdit, which inverts nothing
    eta: float = 1.0  # step noise, 1 = as much as DDPM

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.steps < 1:
            raise ValueError(f"rounds {self.rounds} must be 0 or more, and steps {self.steps} at least 1")
        if not 0 <= self.t_star <= 1:
            raise ValueError(f"t_star {self.t_star} is a share of the steps, in [0, 1]")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if self.edited:
            self.reflection  # noqa: B018  raises on a share of fresh noise out of range

    @property
    def edited(self) -> int:
        """Steps of an edit, in each direction."""
        return round(self.t_star * self.steps)

    @property
    def reflection(self) -> ReflectionConfig:
        return ReflectionConfig(
            steps=self.steps, level=self.t_star, w_renoise=self.w_invert, fresh_noise=self.fresh_noise
        )

    @property
    def draw_cost(self) -> int:
        """UNet evaluations of a picture drawn."""
        return self.steps * evaluations(self.guidance)

    @property
    def edit_cost(self) -> int:
        """UNet evaluations of a picture edited."""
        back = 0 if self.fresh_noise == 1 else evaluations(self.w_invert)
        return self.edited * (back + evaluations(self.edit_guidance))


Act = Callable[
    [Tensor, list[SceneGraph], Answers, Generator], list[str]
]  # latents (b c h w), b graphs -> b edit prompts


def scripted_actor(
    latents: Tensor, graphs: list[SceneGraph], answers: Answers, generator: Generator
) -> list[str]:
    """Plans a layout of the graph without a look at the picture, and names the places of what the Checker misses."""
    draw = choices(int(torch.randint(2**31, (), generator=generator)), "script")
    return [plan(g, met, draw) for g, met in zip(graphs, answers.met.tolist())]


def silent_actor(
    latents: Tensor, graphs: list[SceneGraph], answers: Answers, generator: Generator
) -> list[str]:
    """Says nothing: the edit reads the graph's sentence once more."""
    return [""] * len(graphs)


def ask(actor: Actor, tokenizer: Tokenizer, graphs: list[SceneGraph], answers: Answers) -> Tensor:
    """What an Actor reads about pictures of these graphs.  -> (b s) token ids"""
    asked = [[r.words for r in g.requirements] for g in graphs]
    said = [row[: len(a)] for row, a in zip(answers.met.tolist(), asked)]
    return questions(tokenizer, asked, said, actor.config.read).to(answers.probability.device)


def learned_actor(actor: Actor, tokenizer: Tokenizer) -> Act:
    """The Actor as the loop calls it."""

    def act(latents: Tensor, graphs: list[SceneGraph], answers: Answers, generator: Generator) -> list[str]:
        written = actor.write(latents, ask(actor, tokenizer, graphs, answers), generator)
        return read_out(tokenizer, written.ids)

    return act


def prompts_of(graphs: list[SceneGraph], edits: list[str]) -> list[str]:
    """What the Inverse Diffuser reads."""
    return [edit_prompt(g, [e] if e else []) for g, e in zip(graphs, edits)]


@torch.no_grad()
def draw(pipe: LatentDiffusion, graphs: list[SceneGraph], config: LoopConfig, generator: Generator) -> Tensor:
    """The Diffuser.  -> (b c h w) latents"""
    eps = pipe.eps([g.sentence for g in graphs])(config.guidance)
    x_T = pipe.noise(len(graphs), generator)
    return last(denoise(eps, x_T, pipe.table(config.steps), config.eta, generator))


@torch.no_grad()
def invert(
    pipe: LatentDiffusion, x0: Tensor, prompts: list[str], config: LoopConfig, generator: Generator
) -> tuple[Tensor, StepTable]:
    """A picture back to level t*, and the steps that lead on from there; at t* = 0 the picture and no steps.

    Shapes: x0 (b c h w), b prompts -> (b c h w)
    """
    table = pipe.table(config.steps)
    if not config.edited:
        return x0, table[len(table) :]
    eps = pipe.eps(prompts)(config.w_invert)
    return renoise_to(eps, x0, table, config.reflection, generator), config.reflection.tail(table)


@torch.no_grad()
def edit(
    pipe: LatentDiffusion, x0: Tensor, prompts: list[str], config: LoopConfig, generator: Generator
) -> Trajectory:
    """The Inverse Diffuser: invert to level t*, draw on under the prompts.  Shapes: x0 (b c h w), b prompts"""
    x, tail = invert(pipe, x0, prompts, config, generator)
    return collect(x, denoise(pipe.eps(prompts)(config.edit_guidance), x, tail, config.eta, generator))


class Look(NamedTuple):
    """Where a loop stands after a round."""

    latents: Tensor  # (b c h w) the best so far
    images: Tensor  # (b 3 h w)
    answers: Answers  # of the checker, about them
    evaluations: Tensor  # (b) UNet evaluations spent on each picture so far
    calls: Tensor  # (b) of the checker, one a picture
    rows: Tensor  # (n) which pictures this round tried anew; none in round 0
    edits: list[str]  # n edit prompts
    tried: Tensor  # (n 3 h w) what came of it, kept or not
    said: Answers  # of the checker, about those


def first_look(
    diffuser: LatentDiffusion,
    checker: Checker,
    graphs: list[SceneGraph],
    config: LoopConfig,
    generator: Generator,
) -> Look:
    """Round 0: what the Diffuser draws."""
    x0 = draw(diffuser, graphs, config, generator)
    images = diffuser.decode(x0)
    answers = checker(images, graphs)
    spent = torch.full((len(graphs),), config.draw_cost), torch.ones(len(graphs), dtype=torch.long)
    none = torch.arange(0, device=x0.device)
    return Look(x0, images, answers, *spent, none, [], images[:0], answers.rows(none))


def keep_best(
    look: Look, rows: Tensor, edits: list[str], drawn: Tensor, tried: Tensor, said: Answers, cost: int
) -> Look:
    """The guard: what is new replaces what was there unless the checker likes it less.

    Shapes: rows (n), n edits, drawn (n c h w), tried (n 3 h w)
    """
    better = said.score >= look.answers.score[rows]  # (n) bool
    latents, images = look.latents.clone(), look.images.clone()
    probability = look.answers.probability.clone()
    kept = rows[better]
    latents[kept], images[kept] = drawn[better], tried[better]
    probability[kept, : said.probability.shape[1]] = said.probability[better]
    evaluations, calls = look.evaluations.clone(), look.calls.clone()
    evaluations[rows.cpu()] += cost
    calls[rows.cpu()] += 1
    answers = Answers(probability, look.answers.asked)
    return Look(latents, images, answers, evaluations, calls, rows, edits, tried, said)


@torch.no_grad()
def reflect_and_edit(
    diffuser: LatentDiffusion,
    editor: LatentDiffusion,
    checker: Checker,
    act: Act,
    graphs: list[SceneGraph],
    config: LoopConfig,
    generator: Generator,
) -> Iterator[Look]:
    """The loop; yields round 0 and every round that had something to edit.  A picture that meets its goal is left alone."""
    look = first_look(diffuser, checker, graphs, config, generator)
    yield look
    for _ in range(config.rounds):
        rows = (~look.answers.met.all(1)).nonzero().flatten()  # (n)
        if not len(rows):
            return
        asked = [graphs[i] for i in rows.tolist()]
        edits = act(look.latents[rows], asked, look.answers.rows(rows), generator)
        prompts = prompts_of(asked, edits)
        drawn = edit(editor, look.latents[rows], prompts, config, generator).latents[:, -1]
        tried = editor.decode(drawn)
        look = keep_best(look, rows, edits, drawn, tried, checker(tried, asked), config.edit_cost)
        yield look


@torch.no_grad()
def redraw(
    diffuser: LatentDiffusion,
    checker: Checker,
    graphs: list[SceneGraph],
    config: LoopConfig,
    generator: Generator,
    patient: bool,
) -> Iterator[Look]:
    """The controls: `rounds` more pictures from new noise, of which the checker's favourite is kept.

    Best-of-N draws all of them; with `patient`, repeated generation: only what is not accepted is drawn again.
    """
    look = first_look(diffuser, checker, graphs, config, generator)
    yield look
    for _ in range(config.rounds):
        rows = torch.arange(len(graphs), device=look.latents.device)
        if patient:
            rows = (~look.answers.met.all(1)).nonzero().flatten()
        if not len(rows):
            return
        asked = [graphs[i] for i in rows.tolist()]
        drawn = draw(diffuser, asked, config, generator)
        tried = diffuser.decode(drawn)
        said = checker(tried, asked)
        look = keep_best(look, rows, [""] * len(rows), drawn, tried, said, config.draw_cost)
        yield look
