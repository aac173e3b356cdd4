"""What others call the tensors that we have: one table for each published layout, as data.

    diffusers       UNet2DConditionModel, AutoencoderKL: the folders of Stable Diffusion
    transformers    CLIPModel, CLIPTextModel
    original        the single files of Stable Diffusion (latent-diffusion's module tree)
    OpenCLIP        both towers; the text tower is inside the original files of SD 2.x and SDXL

A table is a list of (regular expression, replacement), applied in order; a name that ends empty is dropped, and those are the
only tensors that we drop.  Two layouts also store some tensors in another shape: `original_autoencoder`, `open_clip`.
"""

from torch import Tensor

Table = list[tuple[str, str]]


# Shared by diffusers' UNet2DConditionModel and AutoencoderKL.
_DIFFUSERS_LEVELS: Table = [
    (r"\b(down|up|mid)_blocks?\.", r"\1."),
    (r"\bresnets\.(\d+)", r"layers.\1.res"),
    (r"\battentions\.(\d+)", r"layers.\1.attn"),
    (r"\b(?:down|up)samplers\.0\.", "resize."),
    (r"\bconv_shortcut\b", "skip"),
    (r"\bconv_norm_out\b", "norm_out"),
    (r"\bto_(q|k|v|out)(?:\.0)?\.", r"\1."),
]


# Inside a transformer block diffusers kept latent-diffusion's names.
_TRANSFORMER_BLOCK: Table = [
    (r"\btransformer_blocks\b", "blocks"),
    (r"\battn1\b", "self_attn"),
    (r"\battn2\b", "cross_attn"),
    (r"\bff\.net\.0\.proj\b", "ff.up"),
    (r"\bff\.net\.2\b", "ff.down"),
]


DIFFUSERS_UNET: Table = [
    *_DIFFUSERS_LEVELS,
    (r"\btime_emb_proj\b", "time"),
    (r"^(time|add)_embedding\.linear_", r"\1.fc"),
    (r"^add\.", "added."),
    *_TRANSFORMER_BLOCK,
]


DIFFUSERS_AUTOENCODER: Table = [
    # Older files, SD 1.5's among them, spell the attention so.
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
    *_DIFFUSERS_LEVELS,
    (r"\.attn\.(q|k|v|out)\.", r".attn.self_attn.\1."),
    (r"\bgroup_norm\b", "norm"),
]


TRANSFORMERS_CLIP: Table = [
    (r"^.*\bposition_ids$", ""),  # 0, 1, 2, ...: older files store the index, we need none
    (r"^(text|vision)_model\.", r"\1."),
    (r"\bembeddings\.class_embedding$", "class_token"),
    (r"\bembeddings\.(token|patch|position)_embedding\b", r"\1"),
    (r"\bencoder\.layers\b", "blocks"),
    (r"\bself_attn\.(\w+)_proj\b", r"attn.\1"),
    (r"\blayer_norm([12])\b", r"norm\1"),
    (r"\bmlp\.", ""),
    (r"\bpre_layrnorm\b", "norm_in"),  # sic
    (r"^vision\.post_layernorm\b", "image_norm"),
    (r"\bfinal_layer_norm\b", "norm_out"),
    (r"^visual_projection\b", "image_projection"),
]


# CLIPTextModel and CLIPTextModelWithProjection, for a TextEncoder alone.
TRANSFORMERS_CLIP_TEXT: Table = [*TRANSFORMERS_CLIP, (r"^text\.", "")]


def original_unet(levels: int, res_blocks: int) -> Table:
    """latent-diffusion counts the blocks of all levels through; where a level begins depends on the size of the network."""
    down, up = (
        res_blocks + 1,
        res_blocks + 1,
    )  # entries per level: on the way down the last is the change of resolution
    table: Table = [
        (r"^time_embed\.0\.", "time.fc1."),
        (r"^time_embed\.2\.", "time.fc2."),
        (r"^label_emb\.0\.0\.", "added.fc1."),
        (r"^label_emb\.0\.2\.", "added.fc2."),
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^out\.0\.", "norm_out."),
        (r"^out\.2\.", "conv_out."),
        (r"^middle_block\.0\.", "mid.layers.0.res."),
        (r"^middle_block\.1\.", "mid.layers.0.attn."),
        (r"^middle_block\.2\.", "mid.layers.1.res."),
    ]
    for i in range(levels):
        table += [
            (rf"^input_blocks\.{1 + i * down + j}\.", f"down.{i}.layers.{j}.") for j in range(res_blocks)
        ]
        table += [(rf"^input_blocks\.{1 + i * down + res_blocks}\.0\.op\.", f"down.{i}.resize.conv.")]
        table += [(rf"^output_blocks\.{i * up + j}\.", f"up.{i}.layers.{j}.") for j in range(up)]
    return [
        *table,
        (
            r"^(up\.\d+)\.layers\.\d+\.[12]\.conv\.",
            r"\1.resize.conv.",
        ),  # behind the residual block, or the attention
        (r"\.layers\.(\d+)\.0\.", r".layers.\1.res."),
        (r"\.layers\.(\d+)\.1\.", r".layers.\1.attn."),
        (r"\bin_layers\.0\b", "norm1"),
        (r"\bin_layers\.2\b", "conv1"),
        (r"\bemb_layers\.1\b", "time"),
        (r"\bout_layers\.0\b", "norm2"),
        (r"\bout_layers\.3\b", "conv2"),
        (r"\bskip_connection\b", "skip"),
        (r"\bto_(q|k|v|out)(?:\.0)?\.", r"\1."),
        *_TRANSFORMER_BLOCK,
    ]


def original_autoencoder(tensors: dict[str, Tensor], levels: int) -> tuple[dict[str, Tensor], Table]:
    """The tensors with the attention's 1x1 convolutions as the linear layers that they are, and the table for their names."""
    attention = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")
    tensors = {
        name: t.flatten(1) if ".attn_1." in name and name.endswith(attention) else t
        for name, t in tensors.items()
    }
    table: Table = [
        (r"^loss\..*$", ""),  # the discriminator that the autoencoder was trained against
        (r"\bdown\.(\d+)\.block\.(\d+)\.", r"down.\1.layers.\2.res."),
        (r"\bdown\.(\d+)\.downsample\.", r"down.\1.resize."),
        # decoder.up counts from the finest level, we in the order of the way
        *[(rf"\bup\.{i}\.block\.(\d+)\.", rf"UP.{levels - 1 - i}.layers.\1.res.") for i in range(levels)],
        *[(rf"\bup\.{i}\.upsample\.", f"UP.{levels - 1 - i}.resize.") for i in range(levels)],
        (r"\bUP\.", "up."),
        (r"\bmid\.block_1\.", "mid.layers.0.res."),
        (r"\bmid\.block_2\.", "mid.layers.1.res."),
        (r"\bmid\.attn_1\.norm\.", "mid.layers.0.attn.norm."),
        (r"\bmid\.attn_1\.proj_out\.", "mid.layers.0.attn.self_attn.out."),
        (r"\bmid\.attn_1\.", "mid.layers.0.attn.self_attn."),
        (r"\bnin_shortcut\b", "skip"),
    ]
    return tensors, table


OPEN_CLIP: Table = [
    (r"^attn_mask$", ""),
    (r"^visual\.proj$", "image_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.class_embedding$", "vision.class_token"),
    (r"^visual\.conv1\.", "vision.patch."),
    (r"^visual\.", "vision."),
    (r"\bpositional_embedding$", "position.weight"),
    (r"^token_embedding\.", "token."),
    (r"\btransformer\.resblocks\.", "blocks."),
    (r"\bln_([12])\b", r"norm\1"),
    (r"\bln_pre\b", "norm_in"),
    (r"^vision\.ln_post\b", "image_norm"),
    (r"\bln_final\b", "norm_out"),
    (r"\battn\.out_proj\b", "attn.out"),
    (r"\bmlp\.c_fc\b", "fc1"),
    (r"\bmlp\.c_proj\b", "fc2"),
    (r"^(token|position|blocks|norm_out)\.", r"text.\1."),
]


OPEN_CLIP_TEXT: Table = [*OPEN_CLIP, (r"^text\.", ""), (r"^logit_scale$", "")]


def open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value, which OpenCLIP keeps in one tensor, as three; its projections, kept as (d e), as linear layers (e d)."""
    split: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if name in ("text_projection", "visual.proj"):
            split[name] = t.T
        elif ".attn.in_proj_" in name:
            head, kind = name.split("in_proj_")
            split |= {f"{head}{part}.{kind}": third for part, third in zip("qkv", t.chunk(3))}
        else:
            split[name] = t
    return split
