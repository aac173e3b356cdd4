"""Weights on disk and into modules: safetensors files, rename tables as data, a loader strict both ways.

    save_weights(path, unet.state_dict(), {"config": ...})
    load_into(unet, read_weights(path))                                      # ours
    load_into(unet, read_weights(theirs), DIFFUSERS_UNET, source=theirs)     # a published checkpoint

Strict means: every tensor of the module is filled, every tensor of the file is used, every shape agrees;
otherwise nothing is written and the error names them one by one. A loader that skips what it does not know
gives a network that is part pretrained, part random, and draws fog.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Table = list[
    tuple[str, str]
]  # (regular expression, replacement), applied in order; a name that ends empty is dropped

SHOWN = 10  # names listed per kind of mismatch, before "and 123 more"


class WeightsError(ValueError):
    """A file of weights that cannot be read, or does not fit the module."""


# --- files --------------------------------------------------------------------------------------------------


def save_weights(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, durable: bool = True
) -> None:
    """Write a safetensors file so that at any moment `path` holds the old file or the new one, never a part.

    `durable` waits for the disk, so that this holds through a power cut too, not only through a kill.
    """
    path = Path(path)
    # In the same folder, since a rename is atomic only within a disk.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the bytes first, then the name: a power cut must not swap the two
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    _check_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings saved beside the tensors; empty if there are none."""
    _check_file(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file: {error}") from error


def _check_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise WeightsError(f"{path} is not there, or not a file")


# --- names --------------------------------------------------------------------------------------------------

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

DIFFUSERS_UNET: Table = [
    *_DIFFUSERS_LEVELS,
    (r"\btime_emb_proj\b", "time"),
    (r"^(time|add)_embedding\.linear_", r"\1.fc"),
    (r"^add\.", "added."),
    (r"\btransformer_blocks\b", "blocks"),
    (r"\battn1\b", "self_attn"),
    (r"\battn2\b", "cross_attn"),
    (r"\bff\.net\.0\.proj\b", "ff.up"),
    (r"\bff\.net\.2\b", "ff.down"),
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
    (r"\b(?:final_layer_norm|post_layernorm)\b", "norm_out"),
    (r"^visual_projection\b", "image_projection"),
]

# CLIPTextModel and CLIPTextModelWithProjection, for a TextEncoder alone.
TRANSFORMERS_CLIP_TEXT: Table = [*TRANSFORMERS_CLIP, (r"^text\.", "")]


def new_names(names: Iterable[str], table: Table) -> dict[str, str]:
    """Old name -> new name. Two that become one are an error: one of the tensors would be lost."""
    new: dict[str, str] = {}
    taken: dict[str, str] = {}
    for old in names:
        name = old
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        if not name:
            continue
        if name in taken:
            raise WeightsError(f"{taken[name]} and {old} would both be renamed {name}")
        new[old] = name
        taken[name] = old
    return new


def rename(tensors: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The same tensors under the names that the table gives them."""
    return {name: tensors[old] for old, name in new_names(tensors, table).items()}


# --- modules ------------------------------------------------------------------------------------------------


def load_into(
    module: nn.Module,
    tensors: dict[str, Tensor],
    rename: Table | None = None,
    source: str | Path = "the weights",
) -> None:
    """Fill the module, in its own precision, or raise a WeightsError and leave it as it was.

    A module on the meta device takes the tensors themselves: a real checkpoint is never in memory twice.
    """
    names = new_names(tensors, [] if rename is None else rename)
    found = {name: tensors[old] for old, name in names.items()}
    expected = module.state_dict()
    if not found.keys() & expected.keys():
        some = ", ".join(list(found)[:3]) or "no tensors at all"
        raise WeightsError(
            f"nothing in {source} matches {type(module).__name__}: "
            f"it has {some}, expected {next(iter(expected))}"
        )

    original = {name: old for old, name in names.items()}
    missing = [f"missing {name} {tuple(t.shape)}" for name, t in expected.items() if name not in found]
    extra = [
        f"extra {original[name]} {tuple(t.shape)}" + (f" (renamed {name})" if original[name] != name else "")
        for name, t in found.items()
        if name not in expected
    ]
    misshapen = [
        f"misshapen {name}: expected {tuple(t.shape)}, found {tuple(found[name].shape)}"
        for name, t in expected.items()
        if name in found and found[name].shape != t.shape
    ]
    if missing or extra or misshapen:
        lines = [line for kind in (missing, extra, misshapen) for line in _shortened(kind)]
        raise WeightsError(
            f"{source} does not fit {type(module).__name__} "
            f"({len(missing)} missing, {len(extra)} extra, {len(misshapen)} misshapen):\n  "
            + "\n  ".join(lines)
        )

    on_meta = any(t.is_meta for t in expected.values())
    module.load_state_dict({name: t.to(expected[name].dtype) for name, t in found.items()}, assign=on_meta)


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"... and {rest} more {lines[0].split()[0]}"]
