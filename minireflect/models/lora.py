"""Low-rank adapters: a layer's weights are frozen, and a low-rank difference to them is learnt.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1

    y = W x + (alpha / r) B A x,     A (r in) random, B (out r) zero: at the start nothing changes

    add_lora(unet, LoRAConfig(rank=4))          q, k, v and out of every attention learn, all else is frozen
    save_lora("lora.safetensors", unet)         as diffusers' pipe.load_lora_weights reads it
    load_lora(unet, "lora.safetensors")         ours, diffusers', or peft's

Differs from peft: the layer itself gets the adapter, as a hook on its output and without a wrapper around it,
so that no weight changes its name.
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


Adapted = nn.Linear | nn.Conv2d  # the layers that can have an adapter; of convolutions those of 1x1


def takes_lora(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def add_difference(layer: Adapted, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """The layer's output with the difference that its adapter makes: y + scale B A x."""
    if layer.scale == 0:
        return y
    apply, x = F.linear if layer.weight.ndim == 2 else F.conv2d, inputs[0]
    A, B = (m.to(x.dtype).view(*m.shape, *layer.weight.shape[2:]) for m in (layer.lora.A, layer.lora.B))
    return y + layer.scale * apply(apply(x, A), B)


def lora_layers(module: nn.Module) -> dict[str, Adapted]:
    """The layers with an adapter, by name."""
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora")}


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
    """Freeze the module, and give the named layers adapters `lora` of (rank, alpha / rank).

    A and B are float32 whatever the layer's precision: small steps would vanish in half.  A scale of 0 turns
    an adapter off.  Raises ValueError when the module has adapters already, or when a layer is neither linear
    nor a 1x1 convolution.
    """
    if lora_layers(module):
        raise ValueError("this network has LoRA already; merge_lora or remove_lora it first")
    module.requires_grad_(False)
    for name, (rank, scale) in layers.items():
        layer = module.get_submodule(name)
        if not takes_lora(layer):
            raise ValueError(f"{name} is a {type(layer).__name__}; LoRA goes on linear layers")
        width_out, width_in = layer.weight.shape[:2]
        bound = width_in**-0.5  # as peft, and as every nn.Linear
        A = torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator)
        layer.lora = nn.ParameterDict({"A": A, "B": torch.zeros(width_out, rank)}).to(layer.weight.device)
        layer.scale, layer.hook = scale, layer.register_forward_hook(add_difference)


def adapters(module: nn.Module) -> nn.ModuleDict:
    """The adapters as one module, to save, resume and optimise; empty without LoRA."""
    return nn.ModuleDict({name.replace(".", "/"): layer.lora for name, layer in lora_layers(module).items()})


@torch.no_grad()
def merge_lora(module: nn.Module) -> nn.Module:
    """Fold every adapter into its layer, whose weight becomes W + (alpha / r) B A."""
    for layer in lora_layers(module).values():
        delta = layer.scale * layer.lora.B @ layer.lora.A  # float32: Apple's GPUs have no float64
        merged = (layer.weight.float() + delta.view(layer.weight.shape)).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return remove_lora(module)


def remove_lora(module: nn.Module) -> nn.Module:
    """The network as it was before `add_lora`: the same layers, without their adapters."""
    for layer in lora_layers(module).values():
        layer.hook.remove()
        del layer.lora, layer.scale, layer.hook
    return module
