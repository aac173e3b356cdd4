"""Low-rank adapters: a layer's weights are frozen, and a low-rank difference to them is learnt.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1

    y = W x + (alpha / r) B A x,     A (r in) random, B (out r) zero: at the start nothing changes

    add_lora(unet, LoRAConfig(rank=4))          q, k, v and out of every attention learn, all else is frozen
    save_lora("lora.safetensors", unet)         as diffusers' pipe.load_lora_weights reads it
    load_lora(unet, "lora.safetensors")         ours, diffusers', or peft's

Differs from peft: the layer itself gets the adapter, without a wrapper around it, so that no weight changes
its name.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..ranges import Checked, Count, Positive


@dataclass(frozen=True)
class LoRAConfig(Checked):
    # r, of the two matrices
    rank: Count = 4
    # the difference is scaled by alpha / rank; None = rank, that is by 1
    alpha: Positive | None = None
    # ends of the names of linear layers, such as "cross_attn.q" or "ff.up"
    targets: tuple[str, ...] = ("q", "k", "v", "out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ValueError("targets is empty: name the layers that are to learn, such as q k v out")


class LoRALinear(nn.Linear):
    """A linear layer with an adapter.  `scale` 0 turns the adapter off.

    `lora.A` and `lora.B` are float32 whatever the layer's precision: small steps would vanish in half.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float, generator: Generator | None) -> None:
        nn.Module.__init__(self)  # takes over the layer's own tensors, makes none
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = scale
        bound = self.in_features**-0.5  # as peft, and as every nn.Linear
        A = torch.empty(rank, self.in_features).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(self.out_features, rank)
        self.lora = nn.ParameterDict({"A": A, "B": B}).to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (b t d) -> (b t e)"""
        y = F.linear(x, self.weight, self.bias)  # (b t e)
        if self.scale == 0:
            return y
        return y + self.scale * F.linear(F.linear(x, self.lora.A.to(x.dtype)), self.lora.B.to(x.dtype))


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(module: nn.Module, config: LoRAConfig, generator: Generator | None = None) -> nn.Module:
    """Give an adapter to every linear layer whose name ends in a target, and freeze all else.

    A is drawn with `generator`, on the CPU, or without one with the global one.  Raises ValueError when a
    target names no layer.
    """
    ends = tuple(f".{t}" for t in config.targets)
    chosen = {n: m for n, m in module.named_modules() if f".{n}".endswith(ends)}
    for target, end in zip(config.targets, ends):
        if not any(f".{n}".endswith(end) for n in chosen):
            raise ValueError(f"no layer's name ends in {target!r}; try q, k, v, out, ff.up or ff.down")
    scale = (config.alpha or config.rank) / config.rank
    install(module, {name: (config.rank, scale) for name in chosen}, generator)
    return module


def install(module: nn.Module, layers: dict[str, tuple[int, float]], generator: Generator | None) -> None:
    """Freeze the module, and give the named layers adapters of (rank, alpha / rank).

    Raises ValueError when it has adapters already, or when a layer is not linear.
    """
    if lora_layers(module):
        raise ValueError("this network has LoRA already; merge_lora or remove_lora it first")
    module.requires_grad_(False)
    for name, (rank, scale) in layers.items():
        layer = module.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}; LoRA goes on linear layers")
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, LoRALinear(layer, rank, scale, generator))


def adapters(module: nn.Module) -> nn.ModuleDict:
    """The adapters as one module, to save, resume and optimise; empty without LoRA."""
    return nn.ModuleDict({name.replace(".", "/"): layer.lora for name, layer in lora_layers(module).items()})


@torch.no_grad()
def merge_lora(module: nn.Module) -> nn.Module:
    """Fold every adapter into its layer, which becomes an ordinary one with weight W + (alpha / r) B A."""
    for layer in lora_layers(module).values():
        delta = layer.scale * layer.lora.B.double() @ layer.lora.A.double()
        merged = (layer.weight.double() + delta).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return remove_lora(module)


def remove_lora(module: nn.Module) -> nn.Module:
    """The network as it was before `add_lora`: the same layers, without their adapters."""
    for name, layer in lora_layers(module).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, plain)
    return module
