"""Tensor names of the published layouts, translated to ours: one table for each layout, as data.

    diffusers       UNet2DConditionModel, AutoencoderKL: the folders of Stable Diffusion
    transformers    CLIPModel, CLIPTextModel
    original        the single files of Stable Diffusion (latent-diffusion's module tree)
    OpenCLIP        both encoders; the original files of SD 2.x and SDXL hold its text encoder

A table is a list of (regular expression, replacement), applied in order.  A name that ends empty is dropped;
no other tensor is.  What a layout also stores in another shape, or tells of the configuration, is the
business of its function: tensors -> (tensors, table, configuration).
"""

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from ..ranges import Refusal

Tensors = dict[str, Tensor]
Table = Sequence[tuple[str, str | Callable[[re.Match], str]]]
Read = tuple[Tensors, Table, dict]


def count(tensors: Tensors, pattern: str) -> int:
    """One more than the largest number that the pattern's group finds at the start of a name; else 0."""
    found = 1 + max((int(m[1][:9]) for name in tensors if (m := re.match(pattern, name))), default=-1)
    if found > len(tensors):
        raise Refusal(f"the name of a tensor counts to {found}, and there are {len(tensors)} tensors")
    return found


# fmt: off
# Shared by diffusers' UNet2DConditionModel and AutoencoderKL.
_DIFFUSERS_LEVELS: Table = [
    (r"\b(down|up|mid)_blocks?\.", r"\1."), (r"\b(?:down|up)samplers\.0\.", "resize."),
    (r"\bresnets\.(\d+)", r"layers.\1.res"), (r"\battentions\.(\d+)", r"layers.\1.attn"),
    (r"\bconv_shortcut\b", "skip"), (r"\bconv_norm_out\b", "norm_out"),
    (r"\bto_(q|k|v|out)(?:\.0)?\.", r"\1."),
]

# Inside a transformer block diffusers kept latent-diffusion's names.
_TRANSFORMER_BLOCK: Table = [
    (r"\btransformer_blocks\b", "blocks"), (r"\battn1\b", "self_attn"), (r"\battn2\b", "cross_attn"),
    (r"\bff\.net\.0\.proj\b", "ff.up"), (r"\bff\.net\.2\b", "ff.down"),
]

DIFFUSERS_UNET: Table = [
    *_DIFFUSERS_LEVELS, *_TRANSFORMER_BLOCK,
    (r"\btime_emb_proj\b", "time"), (r"^(time|add)_embedding\.linear_", r"\1.fc"), (r"^add\.", "added."),
]

DIFFUSERS_AUTOENCODER: Table = [
    # Older files, SD 1.5's among them, spell the attention so.
    (r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    *_DIFFUSERS_LEVELS,
    (r"\.attn\.(q|k|v|out)\.", r".attn.self_attn.\1."), (r"\bgroup_norm\b", "norm"),
]

TRANSFORMERS_CLIP: Table = [
    (r"^.*\bposition_ids$", ""),  # 0, 1, 2, ...: older files store the index, we need none
    (r"^(text|vision)_model\.", r"\1."), (r"\bembeddings\.class_embedding$", "class_token"),
    (r"\bembeddings\.(token|patch|position)_embedding\b", r"\1"),
    (r"\bencoder\.layers\b", "blocks"), (r"\bself_attn\.(\w+)_proj\b", r"attn.\1"),
    (r"\blayer_norm([12])\b", r"norm\1"), (r"\bmlp\.", ""),
    (r"\bpre_layrnorm\b", "norm_in"), (r"^vision\.post_layernorm\b", "image_norm"),  # layrnorm: sic
    (r"\bfinal_layer_norm\b", "norm_out"), (r"^visual_projection\b", "image_projection"),
]

# CLIPTextModel and CLIPTextModelWithProjection, for a TextEncoder alone; NovelAI's has no text_model.
TRANSFORMERS_CLIP_TEXT: Table = [
    (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."), (r"^logit_scale$", ""),
    (r"\bself_attn\.to_(q|k|v|out)\b", r"self_attn.\1_proj"),  # of old LoRA files
    *TRANSFORMERS_CLIP, (r"^text\.", ""),
]

_ORIGINAL_UNET: Table = [
    (r"^time_embed\.0\.", "time.fc1."), (r"^time_embed\.2\.", "time.fc2."),
    (r"^label_emb\.0\.0\.", "added.fc1."), (r"^label_emb\.0\.2\.", "added.fc2."),
    (r"^input_blocks\.0\.0\.", "conv_in."), (r"^out\.0\.", "norm_out."), (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid.layers.0.res."), (r"^middle_block\.1\.", "mid.layers.0.attn."),
    (r"^middle_block\.2\.", "mid.layers.1.res."),
    # after the residual block, or the attention
    (r"^(up\.\d+)\.layers\.\d+\.[12]\.conv\.", r"\1.resize.conv."),
    (r"\.layers\.(\d+)\.0\.", r".layers.\1.res."), (r"\.layers\.(\d+)\.1\.", r".layers.\1.attn."),
    (r"\bin_layers\.0\b", "norm1"), (r"\bin_layers\.2\b", "conv1"), (r"\bemb_layers\.1\b", "time"),
    (r"\bout_layers\.0\b", "norm2"), (r"\bout_layers\.3\b", "conv2"), (r"\bskip_connection\b", "skip"),
    (r"\bto_(q|k|v|out)(?:\.0)?\.", r"\1."), *_TRANSFORMER_BLOCK,
]

_ORIGINAL_AUTOENCODER: Table = [
    (r"^loss\..*$", ""),  # the discriminator of the training
    (r"\b(down|up)\.(\d+)\.block\.(\d+)\.", r"\1.\2.layers.\3.res."),
    (r"\b(down|up)\.(\d+)\.(?:down|up)sample\.", r"\1.\2.resize."),
    (r"\bmid\.block_1\.", "mid.layers.0.res."), (r"\bmid\.block_2\.", "mid.layers.1.res."),
    (r"\bmid\.attn_1\.(?:group_)?norm\.", "mid.layers.0.attn.norm."),
    (r"\bmid\.attn_1\.(?:proj_out|proj_attn|to_out\.0)\.", "mid.layers.0.attn.self_attn.out."),
    (r"\bmid\.attn_1\.(?:to_)?(q|k|v)(?:uery|ey|alue)?\.", r"mid.layers.0.attn.self_attn.\1."),
    (r"\bnin_shortcut\b", "skip"),
]

OPEN_CLIP: Table = [
    # of OpenAI's programs: sizes, and the mask of attention
    (r"^(attn_mask|input_resolution|context_length|vocab_size)$", ""),
    (r"^visual\.proj$", "image_projection.weight"),
    (r"^text_projection$", "text_projection.weight"), (r"^visual\.class_embedding$", "vision.class_token"),
    (r"^visual\.conv1\.", "vision.patch."), (r"^visual\.", "vision."),
    (r"\bpositional_embedding$", "position.weight"), (r"^token_embedding\.", "token."),
    (r"\btransformer\.resblocks\.", "blocks."), (r"\bln_([12])\b", r"norm\1"), (r"\bln_pre\b", "norm_in"),
    (r"^vision\.ln_post\b", "image_norm"), (r"\bln_final\b", "norm_out"), (r"\battn\.out_proj\b", "attn.out"),
    (r"\bmlp\.c_fc\b", "fc1"), (r"\bmlp\.c_proj\b", "fc2"),
    (r"^(token|position|blocks|norm_out)\.", r"text.\1."),
]
# fmt: on

OPEN_CLIP_TEXT: Table = [*OPEN_CLIP, (r"^text\.", ""), (r"^(.*\bposition_ids|logit_scale)$", "")]


def original_unet(tensors: Tensors) -> Read:
    """latent-diffusion numbers the blocks of all levels consecutively, so the table depends on the sizes."""
    levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
    return tensors, numbered(count(tensors, r"input_blocks\.(\d+)\.") // levels), {}


def numbered(n: int) -> Table:
    """The table of an original UNet with `n` blocks a level; on the way down the last one resizes."""

    def down(m: re.Match) -> str:
        level, block = divmod(int(m[1]) - 1, n)
        return f"down.{level}." + ("resize.conv." if m[2] else f"layers.{block}.")

    def up(m: re.Match) -> str:
        level, block = divmod(int(m[1]), n)
        return f"up.{level}.layers.{block}."

    return [
        (r"^input_blocks\.([1-9]\d*)\.(0\.op\.)?", down),
        (r"^output_blocks\.(\d+)\.", up),
        *_ORIGINAL_UNET,
    ]


def autoencoder(tensors: Tensors) -> Read:
    """diffusers' or the original names; in both the attention's 1x1 convolutions become linear layers."""
    attention = [n for n in tensors if ("attn_1." in n or ".attentions." in n) and tensors[n].ndim == 4]
    tensors = tensors | {name: tensors[name].flatten(1) for name in attention}
    if any(".down_blocks." in name for name in tensors):
        return tensors, DIFFUSERS_AUTOENCODER, {}
    last = count(tensors, r"encoder\.down\.(\d+)\.") - 1
    # decoder.up is numbered from the finest level, ours in the order of computation
    swap = [(rf"\bup\.{i}\.", f"UP.{last - i}.") for i in range(last + 1)]
    return tensors, [*swap, (r"\bUP\.", "up."), *_ORIGINAL_AUTOENCODER], {}


def open_clip(tensors: Tensors) -> Tensors:
    """Query, key and value, one tensor in OpenCLIP, as three; projections (d e) as linear layers (e d)."""
    found = dict(tensors)
    for name, t in tensors.items():
        if name in ("text_projection", "visual.proj"):
            found[name] = t.T
        elif ".attn.in_proj_" in name:
            head, kind = name.split("in_proj_")
            found |= {f"{head}{part}.{kind}": third for part, third in zip("qkv", found.pop(name).chunk(3))}
    return found


def original_text(tensors: Tensors) -> Read:
    """A text encoder of SDXL: OpenAI's CLIP-L in transformers' names, or OpenCLIP's bigG."""
    if "positional_embedding" in tensors:
        return open_clip(tensors), OPEN_CLIP_TEXT, {"hidden_act": "gelu"}
    return tensors, TRANSFORMERS_CLIP_TEXT, {"hidden_act": "quick_gelu"}


def original_only_text(tensors: Tensors) -> Read:
    """The text encoder of SD 1.x or SD 2.x; SD 2.x never uses the last of OpenCLIP's 24 blocks.

    Files that were made from a diffusers folder have 23 blocks, and use all of them.
    """
    n = count(tensors, r"transformer\.resblocks\.(\d+)\.")
    found, table, known = original_text(tensors)
    whole = n == 24 or (n not in (0, 23) and "text_projection" in tensors)
    if not whole:
        return found, table, known
    found.pop("text_projection", None)
    return found, table, known | {"num_hidden_layers": n - 1}
