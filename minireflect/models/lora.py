"""Low-rank adapters (LoRA): the weight W of a layer is frozen, and a low-rank update B A is learnt.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1

    y = W x + (alpha / r) B A x,     A (r in) random, B (out r) zero: the initial output is unchanged

    add_lora(unet, LoRAConfig(rank=4))          train q, k, v and out of every attention, freeze all else
    save_lora("lora.safetensors", unet)         write the format of diffusers' pipe.load_lora_weights
    load_lora(unet, "lora.safetensors")         read a file of minireflect, diffusers or peft

Differs from peft: a hook adds the adapter to the layer's output.  There is no wrapper module, so all weights
keep their names.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..ranges import Checked, Count, Positive, expect


@dataclass(frozen=True)
class LoRAConfig(Checked):
    # rank r of the matrices A and B
    rank: Count = 4
    # the update B A is scaled by alpha / rank; None = the rank, for a scale of 1
    alpha: Positive | None = None
    # name endings of the linear layers that are trained, such as "cross_attn.q" or "ff.up"
    targets: tuple[str, ...] = ("q", "k", "v", "out")

    def require(self) -> None:
        if not self.targets:
            raise ValueError("targets is empty: name the layers to train, such as q k v out")


Adapted = nn.Linear | nn.Conv2d  # layers that can have an adapter; convolutions must be 1x1


def takes_lora(layer: nn.Module | None) -> bool:
    """Whether a layer can have an adapter: it is linear, or a 1x1 convolution."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))


def add_update(layer: Adapted, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """Forward hook that adds the adapter's update to the layer's output: y + scale B A x."""
    if layer.scale == 0:
        return y
    apply, x = F.linear if layer.weight.ndim == 2 else F.conv2d, inputs[0]
    A, B = (m.to(x.dtype).view(*m.shape, *layer.weight.shape[2:]) for m in (layer.lora.A, layer.lora.B))
    return y + layer.scale * apply(apply(x, A), B)


def lora_layers(module: nn.Module) -> dict[str, Adapted]:
    """The layers that have an adapter, by name.  Raises ValueError if `module` is no network."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"a LoRA is of one network, such as pipe.unet, not of a {type(module).__name__}")
    return {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora")}


def add_lora(module: nn.Module, config: LoRAConfig, generator: Generator | None = None) -> nn.Module:
    """Add an adapter to every layer whose name ends in a target, and freeze all other weights.

    A is drawn on the CPU from `generator`, or from torch's global generator if there is none.  Raises
    ValueError when no layer's name ends in a target, and as `install`.
    """
    expect(config, LoRAConfig, "config"), lora_layers(module)
    ends = tuple(f".{t}" for t in config.targets)
    chosen = [n for n, _ in module.named_modules() if f".{n}".endswith(ends)]
    for target, end in zip(config.targets, ends):
        if not any(f".{n}".endswith(end) for n in chosen):
            raise ValueError(f"no layer's name ends in {target!r}; try q, k, v, out, ff.up or ff.down")
    scale = (config.alpha or config.rank) / config.rank
    install(module, {name: (config.rank, scale) for name in chosen}, generator)
    return module


def install(module: nn.Module, layers: dict[str, tuple[int, float]], generator: Generator | None) -> None:
    """Freeze the module and add an adapter to each named layer: layer name -> (rank, alpha / rank).

    A and B are always float32, because small updates would be lost in half precision.  A scale (alpha / rank)
    of 0 turns an adapter off.  Raises ValueError when the module already has adapters, or when a layer is
    neither linear nor a 1x1 convolution.
    """
    if lora_layers(module):
        raise ValueError("this network already has LoRA adapters: call merge_lora or remove_lora first")
    module.requires_grad_(False)
    for name, (rank, scale) in layers.items():
        layer = module.get_submodule(name)
        if not takes_lora(layer):
            kind = type(layer).__name__
            raise ValueError(f"{name} is a {kind}; LoRA needs a linear layer or a 1x1 convolution")
        width_out, width_in = layer.weight.shape[:2]
        bound = width_in**-0.5  # as in peft and nn.Linear
        A = torch.empty(rank, width_in).uniform_(-bound, bound, generator=generator)
        layer.lora = nn.ParameterDict({"A": A, "B": torch.zeros(width_out, rank)}).to(layer.weight.device)
        layer.scale, layer.hook = scale, layer.register_forward_hook(add_update)


def adapters(module: nn.Module) -> nn.ModuleDict:
    """All adapters of a module as one module, for the optimiser and the saved state; empty without LoRA."""
    return nn.ModuleDict({name.replace(".", "/"): layer.lora for name, layer in lora_layers(module).items()})


@torch.no_grad()
def merge_lora(module: nn.Module) -> nn.Module:
    """Set the weight of every adapted layer to W + (alpha / r) B A, and remove the adapters."""
    for layer in lora_layers(module).values():
        delta = layer.scale * layer.lora.B @ layer.lora.A  # float32, as Apple's GPUs have no float64
        merged = (layer.weight.float() + delta.view(layer.weight.shape)).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return remove_lora(module)


def remove_lora(module: nn.Module) -> nn.Module:
    """Remove all adapters, so that the outputs are those before `add_lora`; all weights stay frozen."""
    for layer in lora_layers(module).values():
        layer.hook.remove()
        del layer.lora, layer.scale, layer.hook
    return module
