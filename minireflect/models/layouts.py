"""Where the parts of a published checkpoint lie, and their tensors under our names.

    a diffusers folder      model_index.json, and a folder for each part with config.json and its weights
    an original file        all parts in one, told apart by prefixes; no configuration, no vocabulary

What becomes of them is the business of checkpoints.py.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from . import names
from .sizes import SD1, SD2, SDXL, Family, Part, Tensors, count
from .tokenizer import BytePairs, NoVocabulary, TwoBytePairs
from .weights import WeightsError, new_names, read_weights, tensor_shapes

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model", "open_clip_pytorch_model")
ENDINGS = (  # safetensors before torch files, full precision before half, in several parts before one
    ".safetensors.index.json", ".safetensors", ".safetensors.index.fp16.json", ".fp16.safetensors",
    ".bin.index.json", ".bin", ".bin.index.fp16.json", ".fp16.bin",
)  # fmt: skip


def weights_file(folder: Path) -> Path:
    """The file with a part's tensors, or the index of several.  Raises WeightsError when there is none."""
    for ending in ENDINGS:
        for stem in STEMS:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    raise WeightsError(
        f"there are no weights in {folder}: expected {STEMS[0]}{ENDINGS[1]}, or another of its names and endings"
    )


def read_json(path: Path) -> dict:
    """A configuration file; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} holds a {type(values).__name__}, expected a configuration")
    return values


DIFFUSERS_TABLES = {
    "unet": names.DIFFUSERS_UNET,
    "vae": names.DIFFUSERS_AUTOENCODER,
    "text_encoder": names.TRANSFORMERS_CLIP_TEXT,
    "text_encoder_2": names.TRANSFORMERS_CLIP_TEXT,
}

AnyTokenizer = BytePairs | TwoBytePairs | NoVocabulary
ReadTokenizer = Callable[[Family, int], AnyTokenizer]  # of prompts of so many tokens


def parts_of_folder(path: Path, tokenizer: str | Path | None) -> tuple[dict[str, Part], ReadTokenizer]:
    """A folder as diffusers writes it."""
    index = read_json(path / "model_index.json")
    if not index:
        raise WeightsError(f"{path} is not a diffusers folder: model_index.json is missing")
    parts = {"index": Part({}, index, "model_index.json")}
    for part, table in DIFFUSERS_TABLES.items():
        if (index.get(part) or [None])[0] is None and not (path / part).is_dir():
            continue
        file = weights_file(path / part)
        tensors = names_as_ours(read_weights(file), table, file)
        parts[part] = Part(tensors, read_json(path / part / "config.json"), str(file))
    for part in ("unet", "vae"):
        if part not in parts:
            raise WeightsError(f"{path} has no folder {part}: not a checkpoint of Stable Diffusion")
    if "text_encoder" not in parts and "text_encoder_2" not in parts:
        raise WeightsError(f"{path} has no folder text_encoder: not a checkpoint of Stable Diffusion")
    parts["scheduler"] = Part({}, read_json(path / "scheduler" / "scheduler_config.json"), "scheduler")

    def read(family: Family, length: int) -> AnyTokenizer:
        if tokenizer is not None:
            return _tokenizer_for(family, Path(tokenizer), length)
        if not (path / "tokenizer").is_dir():
            return _no_vocabulary(path, family, length)
        first = BytePairs(path / "tokenizer", length)
        return first if family is not SDXL else TwoBytePairs(first, BytePairs(path / "tokenizer_2", length))

    return parts, read


def _no_vocabulary(path: Path, family: Family, length: int) -> NoVocabulary:
    return NoVocabulary(path, 2 * length if family is SDXL else length)


# Beside the networks, original files hold the schedule's tables (computed here) and a running average of the UNet
# (which the weights of published files already are).
LEFT_OUT = r"^(model_ema\.|denoiser\.|model\.diffusion_model$|(alphas|betas|sqrt|log_one_minus|posterior|lvlb)\w*$|logvar$|scale_factor$|v_pred$|ztsnr$)"
PREFIXES = {  # of the parts of an original file; the layout of a text encoder follows from its names
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}  # fmt: skip


def parts_of_file(path: Path, tokenizer: str | Path | None) -> tuple[dict[str, Part], ReadTokenizer]:
    """An original file: all parts in one, with prefixes."""
    shapes = tensor_shapes(path)
    prefixes = tuple(p for several in PREFIXES.values() for p in several)
    if not any(name.startswith(PREFIXES["unet"]) for name in shapes):
        some = ", ".join(list(shapes)[:3]) or "no tensors at all"
        raise WeightsError(
            f"{path} is not an original file of Stable Diffusion: it has {some}, expected model.diffusion_model..."
        )
    strange = [n for n in shapes if not n.startswith(prefixes) and not re.match(LEFT_OUT, n)]
    if strange:
        raise WeightsError(
            f"{path} has {len(strange)} tensors that belong to no part: {', '.join(strange[:10])}"
        )
    parts: dict[str, Part] = {}
    for part, several in PREFIXES.items():
        for prefix in several:
            if not any(name.startswith(prefix) for name in shapes):
                continue
            source = f"{path} ({prefix}*)"
            ours, config = _original(part, read_weights(path, prefix), source)
            parts[part] = Part(ours, config, source)
    for part in ("unet", "vae"):
        if part not in parts:
            raise WeightsError(f"{path} has no {part}: expected tensors {PREFIXES[part][0]}...")
    if "text_encoder" not in parts and "text_encoder_2" not in parts:
        raise WeightsError(f"{path} has no text encoder: expected tensors {PREFIXES['text_encoder'][0]}...")
    about = path.with_suffix(".yaml")  # published beside the file, where it is
    known = {"prediction_type": "v_prediction"} if "v_pred" in shapes else {}
    if about.is_file() and (
        stated := re.search(r"parameterization:\s*[\"']?(eps|v)\b", about.read_text("utf-8"))
    ):
        known = {"prediction_type": "v_prediction" if stated[1] == "v" else "epsilon"}
    parts["scheduler"] = Part({}, known, str(about))

    def read(family: Family, length: int) -> AnyTokenizer:
        for folder in [Path(tokenizer)] if tokenizer else [path.parent / "tokenizer", path.parent]:
            if tokenizer or any((folder / n).is_file() for n in ("tokenizer.json", "vocab.json")):
                return _tokenizer_for(family, folder, length)
        return _no_vocabulary(path, family, length)

    return parts, read


def _tokenizer_for(family: Family, folder: Path, length: int) -> BytePairs | TwoBytePairs:
    """OpenCLIP's encoders fill up with "!", the token 0, and OpenAI's with end-of-text."""
    if family is SD2:
        return BytePairs(folder, length, pad="!")
    end = BytePairs(folder, length, pad="<|endoftext|>")
    return end if family is SD1 else TwoBytePairs(end, BytePairs(folder, length, pad="!"))


def _original(part: str, tensors: Tensors, source: str) -> tuple[Tensors, dict]:
    """The tensors of a part of an original file under our names, and what its layout tells of its configuration."""
    if part == "unet":
        levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)
        blocks = count(tensors, r"input_blocks\.(\d+)\.")
        return names_as_ours(tensors, names.original_unet(levels, blocks // levels - 1), source), {}
    if part == "vae":
        levels = count(tensors, r"encoder\.down\.(\d+)\.")
        tensors, table = names.original_autoencoder(tensors, levels)
        return names_as_ours(tensors, table, source), {}
    if any(name.startswith("text_model.") for name in tensors):  # OpenAI's CLIP-L, in transformers' names
        return names_as_ours(tensors, names.TRANSFORMERS_CLIP_TEXT, source), {"hidden_act": "quick_gelu"}
    ours = names_as_ours(names.open_clip(tensors), names.OPEN_CLIP_TEXT, source)
    if part == "text_encoder":
        # SD 2.x reads what the last block but one writes, normalised, and never the last
        last = f"blocks.{count(ours, r'blocks.([0-9]+)[.]') - 1}."
        ours = {n: t for n, t in ours.items() if not n.startswith(last) and n != "text_projection.weight"}
    return ours, {"hidden_act": "gelu"}


def names_as_ours(tensors: Tensors, table: names.Table, source: str | Path) -> Tensors:
    """Renamed; a clash of two names is told with the file."""
    try:
        return {name: tensors[old] for old, name in new_names(tensors, table).items()}
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
