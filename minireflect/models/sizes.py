"""Sizes read off the tensors of a checkpoint, under our names: what a configuration file must tell is only what no shape can.

A tensor's shape gives channels, depths and widths.  The number of attention heads, of groups in a norm, or the scale of the latents
it does not give: those stand in a part's config.json, or are what the family was published with.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from .autoencoder import AutoencoderConfig
from .clip import TextConfig
from .unet import UNetConfig
from .weights import WeightsError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """What the tensors of a family do not tell; configuration files, where there are any, know better."""

    name: str
    heads: int | None  # of the UNet's attention: a number for all levels ...
    head_width: int | None  # ... or channels for each
    scaling_factor: float  # of the latents: 1 / their standard deviation
    image_size: int  # pixels
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"


SD1 = Family("SD 1.x", heads=8, head_width=None, scaling_factor=0.18215, image_size=512)
SD2 = Family("SD 2.x", heads=None, head_width=64, scaling_factor=0.18215, image_size=768, prediction="v")
SDXL = Family("SDXL", heads=None, head_width=64, scaling_factor=0.13025, image_size=1024)


class Part(NamedTuple):
    """A network's tensors under our names, and where they came from."""

    tensors: Tensors
    config: dict  # the part's config.json, or what else is known
    source: str  # for error messages


def count(tensors: Tensors, pattern: str) -> int:
    """How many numbers a place in the names counts up to."""
    return 1 + max((int(m[1]) for name in tensors if (m := re.match(pattern, name))), default=-1)


def need(tensors: Tensors, name: str, source: str) -> Tensor:
    if name not in tensors:
        raise WeightsError(
            f"missing {name} in {source}, which has {', '.join(list(tensors)[:3]) or 'no tensors'}"
        )
    return tensors[name]


# What a configuration may ask for that our UNet does not do; all published SD 1.x, 2.x and SDXL agree on these.
ASSUMED = {
    "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "norm_eps": 1e-5,
    "class_embed_type": None, "resnet_time_scale_shift": "default", "mid_block_scale_factor": 1, "downsample_padding": 1,
    "dual_cross_attention": False, "only_cross_attention": False, "time_embedding_type": "positional",
    "encoder_hid_dim": None, "timestep_post_act": None,
}  # fmt: skip


def unet_sizes(part: Part, family: Family) -> UNetConfig:
    """The configuration of a UNet from its tensors; heads and groups from config.json, or as the family has them."""
    tensors, config, source = part
    for key, value in ASSUMED.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{source} asks for {key} = {config[key]!r}; this UNet does {value!r} only")
    conv_in = need(tensors, "conv_in.weight", source)
    if conv_in.shape[1] != 4:
        raise WeightsError(
            f"{source} reads {conv_in.shape[1]} channels, as for inpainting; only text to image (4) is supported"
        )
    levels = count(tensors, r"down\.(\d+)\.")
    channels = tuple(
        need(tensors, f"down.{i}.layers.0.res.conv1.weight", source).shape[0] for i in range(levels)
    )
    depths = tuple(count(tensors, rf"down\.{i}\.layers\.0\.attn\.blocks\.(\d+)\.") for i in range(levels))
    context = next((t.shape[1] for n, t in tensors.items() if n.endswith("cross_attn.k.weight")), 0)
    linear = next((t.ndim == 2 for n, t in tensors.items() if n.endswith("attn.proj_in.weight")), False)
    heads, head_width = family.heads, family.head_width
    stated = config.get("num_attention_heads") or config.get("attention_head_dim")  # heads, despite its name
    if isinstance(stated, int):
        heads, head_width = stated, None
    elif stated:
        widths = {c // h for c, h in zip(channels, stated)}
        if len(widths) > 1:
            raise WeightsError(f"{source}: heads {stated} at channels {channels} are of several widths")
        heads, head_width = None, widths.pop()
    pooled, size_width = None, config.get("addition_time_embed_dim") or 256
    if "added.fc1.weight" in tensors:
        pooled = tensors["added.fc1.weight"].shape[1] - 6 * size_width
    return UNetConfig(
        channels, depths, count(tensors, r"mid\.layers\.0\.attn\.blocks\.(\d+)\."), context,
        count(tensors, r"down\.0\.layers\.(\d+)\."), heads, head_width, linear, conv_in.shape[1],
        need(tensors, "conv_out.weight", source).shape[0], config.get("norm_num_groups") or 32, pooled, 6, size_width,
    )  # fmt: skip


def autoencoder_sizes(part: Part, family: Family) -> AutoencoderConfig:
    tensors, config, source = part
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    return AutoencoderConfig(
        tuple(need(tensors, f"encoder.down.{i}.layers.0.res.conv1.weight", source).shape[0] for i in range(levels)),
        count(tensors, r"encoder\.down\.0\.layers\.(\d+)\."),
        config.get("norm_num_groups") or 32,
        need(tensors, "encoder.conv_in.weight", source).shape[1],
        need(tensors, "post_quant_conv.weight", source).shape[0],
        config.get("scaling_factor") or family.scaling_factor,
        "encoder.mid.layers.0.attn.norm.weight" in tensors,
    )  # fmt: skip


def text_sizes(
    tensors: Tensors, config: dict, source: str, penultimate: bool, prefix: str = ""
) -> TextConfig:
    """`penultimate` is SDXL's habit, and is not written down anywhere in a checkpoint."""
    vocabulary, width = need(tensors, f"{prefix}token.weight", source).shape
    eos = config.get("eos_token_id", vocabulary - 1)
    projection = tensors.get("text_projection.weight") if not prefix else None
    activation = config.get("hidden_act", "quick_gelu")  # transformers' own default
    if activation not in ("quick_gelu", "gelu"):
        raise WeightsError(f"{source} asks for hidden_act = {activation!r}; expected quick_gelu or gelu")
    return TextConfig(
        vocabulary,
        vocabulary - 1
        if eos == 2
        else eos,  # 2: a mistake in the files of that time, which the libraries know as such
        len(need(tensors, f"{prefix}position.weight", source)),
        width,
        count(tensors, re.escape(prefix) + r"blocks\.(\d+)\."),
        config.get("num_attention_heads") or width // 64,  # 64 channels a head in all published text towers
        activation == "quick_gelu",
        penultimate,
        None if projection is None else projection.shape[0],
    )
