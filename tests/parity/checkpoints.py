"""Checkpoints of the true layouts with random weights: small networks, diffusers' folders and original single
files.

The original layout is written here from its own names (latent-diffusion's module tree), the other way round
than minireflect/checkpoints/names.py reads it; test_checkpoints.py lets diffusers confirm that it is the true
one.
"""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.small import shaken

WORDS = [
    "a photo of a cat riding a red bicycle",
    "two birds on a wire",
    "the ball rolls uphill, it's 2026!",
    "naïve café",
]
FAMILIES = ("sd1", "sd2", "sdxl")


def byte_pairs(words: list[list[str]], most: int) -> list[str]:
    """The most frequent pair again and again; of two alike the first by the alphabet, in every process."""
    merges: list[str] = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        if len(merges) == most:
            break
        best = max(sorted(pairs), key=pairs.__getitem__)
        merges.append(" ".join(best))
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


def vocabulary(folder: Path, texts: list[str] = WORDS, size: int = 700) -> Path:
    """A byte-pair vocabulary in CLIP's format: bytes, bytes at the end of a word, merges, begin, end."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)
    pieces = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words = [piece for text in texts for piece, _ in pieces.pre_tokenize_str(text.lower())]
    merges = byte_pairs([[*word[:-1], word[-1] + "</w>"] for word in words], size - 2 * len(alphabet))
    tokens = dict.fromkeys(
        [*alphabet, *[c + "</w>" for c in alphabet], *[m.replace(" ", "") for m in merges]]
    )
    ids = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(ids), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


def text_encoder(
    width: int, vocabulary: int, layers: int, act: str, projection: int | None = None
) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        hidden_act=act,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        projection_dim=projection or 16,
    )
    return shaken((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def pipeline(family: str, folder: Path, seed: int = 0) -> DiffusionPipeline:
    """diffusers' own pipeline of a family, with small networks: pictures of 32 x 32, latents of 16 x 16."""
    torch.manual_seed(seed)
    words = vocabulary(folder / "words")
    ids = json.loads((words / "vocab.json").read_text("utf-8"))
    end = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77)
    bang = CLIPTokenizer(
        str(words / "vocab.json"), str(words / "merges.txt"), pad_token="!", model_max_length=77
    )
    common = dict(block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=32, sample_size=16)
    if family == "sdxl":
        unet = UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=192,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=24 + 6 * 256,
        )
    else:
        unet = UNet2DConditionModel(
            **common,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=8 if family == "sd1" else (1, 2),
            cross_attention_dim=64 if family == "sd1" else 128,
            use_linear_projection=family == "sd2",
        )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=32,
        latent_channels=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )
    unet, vae = shaken(unet), shaken(vae)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if family == "sd2" else "epsilon",
    )
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            vae,
            text_encoder(64, len(ids), 2, "quick_gelu"),
            text_encoder(128, len(ids), 3, "gelu", 24),
            end,
            bang,
            unet,
            scheduler,
        )
    text = (
        text_encoder(64, len(ids), 2, "quick_gelu")
        if family == "sd1"
        else text_encoder(128, len(ids), 2, "gelu")
    )
    return StableDiffusionPipeline(
        vae,
        text,
        end if family == "sd1" else bang,
        unet,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


# --- the original layout ------------------------------------------------------------------------------------


def original_unet(tensors: dict[str, Tensor], levels: int, res_blocks: int) -> dict[str, Tensor]:
    """diffusers' UNet under latent-diffusion's names."""
    n = res_blocks
    heads = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(levels):
        for j in range(n):
            heads[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{1 + i * (n + 1) + j}.0"
            heads[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{1 + i * (n + 1) + j}.1"
        heads[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (n + 1)}.0.op"
        attends = any(name.startswith(f"up_blocks.{i}.attentions.") for name in tensors)
        for j in range(n + 1):
            heads[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * (n + 1) + j}.0"
            heads[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * (n + 1) + j}.1"
        heads[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{i * (n + 1) + n}.{1 + attends}"
    inside = {
        ".norm1.": ".in_layers.0.",
        ".conv1.": ".in_layers.2.",
        ".time_emb_proj.": ".emb_layers.1.",
        ".norm2.": ".out_layers.0.",
        ".conv2.": ".out_layers.3.",
        ".conv_shortcut.": ".skip_connection.",
    }
    out = {}
    for name, t in tensors.items():
        head = max((h for h in heads if name.startswith(h + ".")), key=len)
        rest = name[len(head) :]
        if ".resnets." in head + ".":
            for ours, theirs in inside.items():
                rest = rest.replace(ours, theirs)
        out[f"model.diffusion_model.{heads[head]}{rest}"] = t
    return out


def original_vae(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    out = {}
    for name, t in tensors.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        for i in range(levels):
            name = name.replace(f"up_blocks.{i}.resnets.", f"up.{levels - 1 - i}.block.")
            name = name.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            for ours, theirs in {
                "mid_block.attentions.0": "mid.attn_1",
                "group_norm": "norm",
                "to_out.0": "proj_out",
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
            }.items():
                name = name.replace(ours, theirs)
            t = t[:, :, None, None] if name.endswith("weight") and t.ndim == 2 else t
        out[f"first_stage_model.{name}"] = t
    return out


def open_clip_text(tensors: dict[str, Tensor], prefix: str, more_layers: int = 0) -> dict[str, Tensor]:
    """transformers' text tower as OpenCLIP keeps it; `more_layers` stand for those that SD 2.x stores and
    never uses.
    """
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.": "ln_final.",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    out, qkv = {}, {}
    for name, t in tensors.items():
        name = name.removeprefix("text_model.")
        if match := re.search(r"layers\.(\d+)\.self_attn\.(q|k|v)_proj\.(weight|bias)", name):
            qkv.setdefault((match[1], match[3]), {})[match[2]] = t
            continue
        if name == "text_projection.weight":
            out["text_projection"] = t.T.contiguous()
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        out[name] = t
    for (layer, kind), three in qkv.items():
        out[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([three[k] for k in "qkv"])
    layers = 1 + max(int(layer) for layer, _ in qkv)
    for extra in range(more_layers):
        last = {n: t for n, t in out.items() if f"resblocks.{layers - 1}." in n}
        out |= {n.replace(f".{layers - 1}.", f".{layers + extra}.", 1): 2 * t for n, t in last.items()}
    if more_layers:
        width = out["positional_embedding"].shape[1]
        out |= {"text_projection": torch.randn(width, width), "logit_scale": torch.tensor(4.6)}
    return {prefix + n: t for n, t in out.items()}


def original_file(pipe: DiffusionPipeline, family: str) -> dict[str, Tensor]:
    """All of a pipeline's tensors as an original single file has them, tables of the schedule and a running
    average included.
    """
    levels = len(pipe.unet.config.block_out_channels)
    unet = original_unet(pipe.unet.state_dict(), levels, pipe.unet.config.layers_per_block)
    tensors = unet | original_vae(pipe.vae.state_dict(), len(pipe.vae.config.block_out_channels))
    words = {
        f"text_model.{n.removeprefix('text_model.')}": t for n, t in pipe.text_encoder.state_dict().items()
    }
    if family == "sd1":
        tensors |= {f"cond_stage_model.transformer.{n}": t for n, t in words.items()}
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif family == "sd2":
        tensors |= open_clip_text(pipe.text_encoder.state_dict(), "cond_stage_model.model.", more_layers=1)
    else:
        tensors |= {f"conditioner.embedders.0.transformer.{n}": t for n, t in words.items()}
        tensors |= open_clip_text(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
        tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    if family != "sdxl":
        tensors |= {
            "betas": torch.zeros(1000),
            "alphas_cumprod": torch.zeros(1000),
            "model_ema.decay": torch.zeros(()),
        }
    return {n: t.contiguous() for n, t in tensors.items()}


def save_original(pipe: DiffusionPipeline, family: str, path: Path) -> Path:
    tensors = {n: t.clone() for n, t in original_file(pipe, family).items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    else:
        save_file(tensors, path)
    return path


def trainable(folder: Path, level: float = 1.0, width: int = 32) -> Path:
    """A base whose pixels have the mean `level`.  At 1 they are mostly blown out to white: a JPEG grows where
    they darken, which a small policy can learn.

    Latents of 8 x 8, pictures of 32 x 32, `width` channels in the UNet; saved in diffusers' layout.
    """
    pipe = pipeline("sd1", folder)
    pipe.unet = shaken(
        UNet2DConditionModel(
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=8,
            attention_head_dim=width // 8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=64,
        )
    )
    pipe.vae = shaken(
        AutoencoderKL(
            block_out_channels=(16, 16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            scaling_factor=0.18215,
        )
    )
    last = pipe.vae.decoder.conv_out
    with torch.no_grad():
        drawn = pipe.vae.decode(torch.randn(16, 4, 8, 8) / 0.18215).sample
        last.weight.mul_(0.4 / drawn.std())
        last.bias.fill_(level - 0.4 * drawn.mean() / drawn.std())
    pipe.save_pretrained(folder / "sd")
    return folder / "sd"


def taught(base: Path, steps: int = 150) -> None:
    """Train the UNet of a base a little, on latents of one random colour each, so that it predicts noise."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    unet, abar = pipe.unet.train(), pipe.scheduler.alphas_cumprod
    with torch.no_grad():
        context = pipe.text_encoder(pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids)[
            0
        ]
    optimizer, random = torch.optim.Adam(unet.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        colour = torch.randn(32, 4, 1, 1, generator=random)
        x_0, noise = (torch.randn(32, 4, 8, 8, generator=random) for _ in range(2))
        x_0, t = 0.9 * colour + 0.4 * x_0, torch.randint(1000, (32,), generator=random)
        a = abar[t][:, None, None, None]
        eps = unet(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, context.expand(32, -1, -1)).sample
        loss = (eps - noise).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.4, f"the base predicts no noise: {loss:.2f}"  # 1 of a network that says 0
    unet.eval().save_pretrained(base / "unet")
