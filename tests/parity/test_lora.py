"""LoRA files travel to diffusers and peft and come back, with the same pictures."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from minireflect.checkpoints.files import WeightsError, new_names
from minireflect.checkpoints.load import load_checkpoint
from minireflect.checkpoints.lora import load_lora, read_lora, save_lora
from minireflect.checkpoints.names import DIFFUSERS_UNET, TO_DIFFUSERS
from minireflect.checkpoints.ours import describe
from minireflect.models.lora import LoRAConfig, add_lora
from tests.models.test_lora import learnt

from .checkpoints import FAMILIES, WORDS, pipeline

pytestmark = pytest.mark.usefixtures("no_network")
SIZE = 32
STEPS = dict(num_inference_steps=2, guidance_scale=3.0, output_type="pt", height=SIZE, width=SIZE)


def test_names_for_diffusers_are_the_rename_table_backwards() -> None:
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    )
    linear = [
        n for n, m in theirs.named_modules() if isinstance(m, nn.Linear) and "proj_" not in n.split(".")[-1]
    ]
    ours = new_names([f"{n}.weight" for n in linear], DIFFUSERS_UNET)
    back = new_names([n.removesuffix(".weight") for n in ours.values()], TO_DIFFUSERS)
    assert list(back.values()) == linear


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_draws_the_same_picture_with_our_lora(family: str, tmp_path: Path) -> None:
    theirs = pipeline(family, tmp_path)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "sd")
    ours, x_T = load_checkpoint(tmp_path / "sd"), torch.randn(1, 4, 16, 16)
    without = ours.generate(WORDS[:1], 2, 3.0, 0.0, latents=x_T)
    learnt(
        add_lora(
            ours.unet, LoRAConfig(rank=3, alpha=6.0, targets=("q", "v", "out", "ff.up", "ff.down", "proj_in"))
        )
    )
    save_lora(tmp_path / "lora.safetensors", ours.unet)
    found = ours.generate(WORDS[:1], 2, 3.0, 0.0, latents=x_T) / 2 + 0.5
    assert (found - without / 2 - 0.5).abs().max() > 0.02
    theirs.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    with torch.no_grad():
        expected = theirs(WORDS[0], latents=x_T, **STEPS).images
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("form", ["diffusers", "diffusers without metadata", "peft"])
def test_we_draw_the_same_picture_with_a_lora_of_peft(form: str, tmp_path: Path) -> None:
    theirs = pipeline("sd1", tmp_path)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "sd")
    alpha = 4 if form != "diffusers" else 10  # without metadata alpha is taken for the rank
    theirs.unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
    )
    for name, p in theirs.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    tensors = get_peft_model_state_dict(theirs.unet)
    if form == "peft":
        save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, tmp_path / "lora.safetensors")
    else:
        about = (
            {"unet_lora_adapter_metadata": theirs.unet.peft_config["default"].to_dict()}
            if form == "diffusers"
            else {}
        )
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, convert_state_dict_to_diffusers(tensors), weight_name="lora.safetensors", **about
        )
    x_T = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        expected = theirs(WORDS[0], latents=x_T, **STEPS).images
    ours = load_checkpoint(tmp_path / "sd")
    load_lora(ours.unet, tmp_path / "lora.safetensors")
    found = ours.generate(WORDS[:1], 2, 3.0, 0.0, latents=x_T) / 2 + 0.5
    assert (found - expected).abs().max() < 1e-3
    assert "a LoRA of 32 layers, rank 4" in describe(tmp_path / "lora.safetensors")


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(4, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 4)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (2,), (0,), (2, 3), (4, 2, 1, 1)])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_alpha_is_one_number_of_any_shape(shape: tuple[int, ...], kind: torch.dtype, tmp_path: Path) -> None:
    """With several axes it is no third matrix; with several numbers it is refused in one sentence."""
    save_file({**PAIR, f"{LAYER}.alpha": torch.full(shape, 2, dtype=kind)}, tmp_path / "lora.safetensors")
    if torch.Size(shape).numel() == 1:
        (found,) = read_lora(tmp_path / "lora.safetensors").values()
        assert (found.A.shape, found.B.shape, found.scale) == ((4, 8), (8, 4), 2 / 4)
        return
    with pytest.raises(
        WeightsError, match=r"to_q with .*; expected matrices of finite numbers, and one alpha"
    ) as error:
        read_lora(tmp_path / "lora.safetensors")
    assert f"alpha {shape} {kind}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", [torch.tensor(2j), torch.tensor(float("nan")), float("inf")])
def test_an_alpha_that_is_no_finite_number_is_refused(alpha: object, tmp_path: Path) -> None:
    torch.save({**PAIR, f"{LAYER}.alpha": alpha}, tmp_path / "lora.bin")
    with pytest.raises(WeightsError, match=r"alpha must be|alpha \(\) torch.complex64; expected"):
        read_lora(tmp_path / "lora.bin")


ENDS = ["alpha", "lora_alpha", "lora.alpha", "lora_A.alpha", "lora_down.alpha", "processor.alpha"]


@pytest.mark.parametrize("end", ENDS)
def test_an_alpha_is_found_wherever_it_is_written(end: str, tmp_path: Path) -> None:
    save_file(PAIR | {f"{LAYER}.{end}": torch.tensor(2.0)}, tmp_path / "lora.safetensors")
    assert [found.scale for found in read_lora(tmp_path / "lora.safetensors").values()] == [2 / 4]


def test_an_alpha_of_no_layer_is_refused(tmp_path: Path) -> None:
    stray = {LAYER.replace("to_q", "to_k") + ".alpha": torch.tensor(2.0)}
    save_file(PAIR | stray, tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match=r"to_k: missing lora_A\.weight"):
        read_lora(tmp_path / "lora.safetensors")


OURS = "unet.down.0.layers.0.attn.blocks.0.self_attn.q"
NAMES = {  # of a layer in files of other tools -> ours
    f"diffusion_model.{LAYER.removeprefix('unet.')}": OURS,
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": OURS,
    "base_model.model.unet." + LAYER.removeprefix("unet."): OURS,
    "base_model.model.encoder.layers.0.mlp.fc1": "text_encoder.blocks.0.fc1",  # in recent transformers
    "lora_te2_text_projection": "text_encoder_2.text_projection",
}


@pytest.mark.parametrize("name", NAMES)
def test_layers_under_the_names_of_other_tools(name: str, tmp_path: Path) -> None:
    for side in ("lora_A.my-adapter.weight", "lora_A.weight"):
        pair = {f"{name}.{side.replace('A', s)}": t for s, t in zip("AB", PAIR.values())}
        save_file(pair, tmp_path / "lora.safetensors")
        assert [*read_lora(tmp_path / "lora.safetensors")] == [NAMES[name]]


def test_the_configuration_of_peft_lies_beside_its_file_whatever_its_name(tmp_path: Path) -> None:
    save_file({f"base_model.model.{name[5:]}": t for name, t in PAIR.items()}, tmp_path / "mine.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 32}')
    assert [found.scale for found in read_lora(tmp_path / "mine.safetensors").values()] == [32 / 4]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.fp16.safetensors"])
def test_a_folder_with_a_lora_is_read_and_inspected(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no adapter_model\.safetensors or other file of weights"):
        read_lora(tmp_path)
    save_file(PAIR, tmp_path / name)
    assert read_lora(tmp_path).keys() == {"unet.down.0.layers.0.attn.blocks.0.self_attn.q"}
    assert describe(tmp_path).startswith(f"{tmp_path}: a LoRA of 1 layers, rank 4")
