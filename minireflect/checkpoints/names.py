"""Tables that translate the tensor names of published layouts to ours.

    diffusers       UNet2DConditionModel, AutoencoderKL: the folders of Stable Diffusion
    transformers    CLIPModel, CLIPTextModel
    original        the single files of Stable Diffusion (latent-diffusion's module tree)
    OpenCLIP        both encoders; the original files of SD 2.x and SDXL contain its text encoder

A table is a list of (regular expression, replacement) pairs, applied in order.  A tensor is dropped if its
new name is empty, and only then.  For each kind of network, a function recognises the layout, reshapes
tensors where layouts differ, and returns (tensors, table, configuration values that the layout implies).
"""

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from ..ranges import Refusal

Tensors = dict[str, Tensor]
Table = Sequence[tuple[str, str | Callable[[re.Match], str]]]
Read = tuple[Tensors, Table, dict]


def count(tensors: Tensors, pattern: str) -> int:
    """1 + the largest number that the pattern's group matches at the start of a name; 0 without a match.

    Raises Refusal when this is more than the number of tensors.
    """
    found = 1 + max((int(m[1][:9]) for name in tensors if (m := re.match(pattern, name))), default=-1)
    if found > len(tensors):
        raise Refusal(f"a tensor name has the number {found - 1}, but there are only {len(tensors)} tensors")
    return found


def inside(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with the prefix; the prefix is removed."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


UNET_PREFIX = "model.diffusion_model."
ORIGINAL = {  # prefix of the names in an original file -> name of the part's folder in diffusers
    UNET_PREFIX: "unet", "first_stage_model.": "vae", "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder", "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}  # fmt: skip


# --- tables -------------------------------------------------------------------------------------------------
def words(text: str, backwards: bool = False) -> Table:
    """A table from pairs of words, their name and ours; `backwards` makes one from our names to theirs.

    A word matches between word boundaries.  In the first word of a pair, a dot is a literal dot, # is any
    number, and the rest is a regular expression.  Each # in the second word is the next group of the first.
    """
    rules = []
    for old, new in zip(text.split()[backwards::2], text.split()[not backwards :: 2]):
        start, *rest = new.split("#")
        numbered = "".join(rf"\{i}{part}" for i, part in enumerate(rest, 1))
        rules.append((rf"\b{old.replace('.', '[.]').replace('#', '([0-9]+)')}\b", start + numbered))
    return rules


_QKV = "to_q q  to_k k  to_v v  to_out.0 out  to_out out "
# Shared by diffusers' UNet2DConditionModel and AutoencoderKL.
_LEVELS = f"""{_QKV} down_blocks down  up_blocks up  mid_block mid  downsamplers.0 resize  upsamplers.0 resize
    resnets.# layers.#.res  attentions.# layers.#.attn  conv_shortcut skip  conv_norm_out norm_out """
# diffusers and latent-diffusion use the same names inside a transformer block.
_BLOCK = "ff.net.0.proj ff.up  ff.net.2 ff.down  transformer_blocks blocks  attn1 self_attn  attn2 cross_attn"
_UNET = f"""time_embedding.linear_# time.fc#  add_embedding.linear_# added.fc#  time_emb_proj time
    {_BLOCK} {_LEVELS}"""
DIFFUSERS_UNET, TO_DIFFUSERS = words(_UNET), words(_UNET, backwards=True)

# Older files, such as those of SD 1.5, have other names for the attention layers.
DIFFUSERS_AUTOENCODER = words(f"""query q  key k  value v  proj_attn out  group_norm norm  {_LEVELS}
    attn.(q|k|v|out) attn.self_attn.#""")

TRANSFORMERS_CLIP: Table = [
    (r"^.*\bposition_ids$", ""),  # older files store the positions 0, 1, 2, ...; they are not needed
    *words(r"""text_model text  vision_model vision  vision.post_layernorm image_norm  pre_layrnorm norm_in
        final_layer_norm norm_out  layer_norm# norm#  embeddings.class_embedding class_token
        embeddings.(token|patch|position)_embedding #  encoder.layers blocks  self_attn.(\w+)_proj attn.#
        mlp.(fc#) #  visual_projection image_projection"""),
]

# For a TextEncoder: CLIPTextModel, CLIPTextModelWithProjection, and old LoRA files (self_attn.to_q).
TRANSFORMERS_CLIP_TEXT: Table = [
    (r"^logit_scale$", ""), *words("self_attn.to_(q|k|v|out) attn.#"), *TRANSFORMERS_CLIP, (r"^text\.", ""),
]  # fmt: skip

# A level's upsampling follows its last residual block (index 1), or its last attention (index 2).
_ORIGINAL_UNET = words(rf"""time_embed.0 time.fc1  time_embed.2 time.fc2
    label_emb.0.0 added.fc1  label_emb.0.2 added.fc2  input_blocks.0.0 conv_in  out.0 norm_out  out.2 conv_out
    middle_block.0 mid.layers.0.res  middle_block.1 mid.layers.0.attn  middle_block.2 mid.layers.1.res
    up.#.layers.\d+.[12].conv up.#.resize.conv  layers.#.0 layers.#.res  layers.#.1 layers.#.attn
    in_layers.0 norm1  in_layers.2 conv1  emb_layers.1 time  out_layers.0 norm2  out_layers.3 conv2
    skip_connection skip  {_BLOCK} {_QKV}""")

_ORIGINAL_AUTOENCODER: Table = [
    (r"^loss\..*$", ""),  # the discriminator, used in training only
    *words("""(down|up).#.block.# #.#.layers.#.res  (down|up).#.(?:down|up)sample #.#.resize
        mid.block_1 mid.layers.0.res  mid.block_2 mid.layers.1.res  mid.attn_1 mid.layers.0.attn
        attn.(?:group_)?norm attn.norm  attn.(?:proj_out|proj_attn|to_out.0) attn.self_attn.out
        attn.(?:to_)?(q|k|v)(?:uery|ey|alue)? attn.self_attn.#  nin_shortcut skip"""),
]

OPEN_CLIP: Table = [
    # sizes and the attention mask, which OpenAI's files contain
    (r"^(attn_mask|input_resolution|context_length|vocab_size)$", ""),
    *words("""visual.proj image_projection.weight  text_projection$ text_projection.weight
        visual.class_embedding vision.class_token  visual.conv1 vision.patch  visual.ln_post image_norm
        visual vision  positional_embedding position.weight  token_embedding token
        transformer.resblocks blocks  ln_# norm#  ln_pre norm_in  ln_final norm_out  attn.out_proj attn.out
        mlp.c_fc fc1  mlp.c_proj fc2  ^(token|position|blocks|norm_out) text.#"""),
]
OPEN_CLIP_TEXT: Table = [*OPEN_CLIP, (r"^text\.", ""), (r"^(.*\bposition_ids|logit_scale)$", "")]


def numbered(n: int) -> Table:
    """The table of an original UNet with `n` blocks per level; on the way down, the last one downsamples."""

    def ours(m: re.Match) -> str:
        way, first = {"in": ("down", 1), "out": ("up", 0)}[m[1]]  # input_blocks.0 is conv_in
        level, block = divmod(int(m[2]) - first, n)
        return f"{way}.{level}." + ("resize.conv." if m[3] else f"layers.{block}.")

    return [(r"^(?!input_blocks\.0\.)(in|out)put_blocks\.(\d+)\.(0\.op\.)?", ours), *_ORIGINAL_UNET]


# --- a function for each kind of network --------------------------------------------------------------------
def unet(tensors: Tensors) -> Read:
    """A UNet with diffusers' names, or with the original names, which number the blocks of all levels."""
    if not (blocks := count(tensors, r"input_blocks\.(\d+)\.")):
        return tensors, DIFFUSERS_UNET, {}
    return tensors, numbered(blocks // (1 + sum(name.endswith(".0.op.weight") for name in tensors))), {}


def autoencoder(tensors: Tensors) -> Read:
    """An autoencoder with diffusers' or the original names; the file may contain a whole checkpoint.

    Attention weights that are stored as 1x1 convolutions become linear layers.
    """
    tensors = inside(tensors, "first_stage_model.") or tensors
    attention = [n for n in tensors if ("attn_1." in n or ".attentions." in n) and tensors[n].ndim == 4]
    tensors = tensors | {name: tensors[name].flatten(1) for name in attention}
    if any(".down_blocks." in name for name in tensors):
        return tensors, DIFFUSERS_AUTOENCODER, {}
    last = count(tensors, r"encoder\.down\.(\d+)\.") - 1
    # original decoders number the levels from the finest; ours count in the order of computation
    return tensors, [(r"\bup\.(\d+)\.", lambda m: f"up.{last - int(m[1])}."), *_ORIGINAL_AUTOENCODER], {}


def open_clip(tensors: Tensors) -> Tensors:
    """Split OpenCLIP's joint tensor of query, key and value; transpose projections (d e) to (e d)."""
    found = dict(tensors)
    for name, t in tensors.items():
        if name in ("text_projection", "visual.proj"):
            found[name] = t.T
        elif ".attn.in_proj_" in name:
            head, kind = name.split("in_proj_")
            found |= {f"{head}{part}.{kind}": third for part, third in zip("qkv", found.pop(name).chunk(3))}
    return found


def text(tensors: Tensors) -> Read:
    """A text encoder with the names of transformers or of OpenCLIP."""
    if "positional_embedding" in tensors:
        return open_clip(tensors), OPEN_CLIP_TEXT, {"hidden_act": "gelu"}
    return tensors, TRANSFORMERS_CLIP_TEXT, {"hidden_act": "quick_gelu"}


def first_text(tensors: Tensors) -> Read:
    """The first text encoder of a single file.  SD 2.x does not use the last of OpenCLIP's 24 blocks.

    Single files that were converted from a diffusers folder have 23 blocks, and all of them are used.
    """
    n = count(tensors, r"transformer\.resblocks\.(\d+)\.")
    found, table, known = text(tensors)
    if n == 24 or (n not in (0, 23) and "text_projection" in tensors):
        found.pop("text_projection", None)
        known["num_hidden_layers"] = n - 1
    return found, table, known
