"""LoRA: nothing changes at the start, only A and B learn, and files go to diffusers and peft and come back."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from minireflect.checkpoints.files import WeightsError, new_names
from minireflect.checkpoints.load import describe, load_checkpoint
from minireflect.checkpoints.lora import TO_DIFFUSERS, load_lora, read_lora, save_lora, unmerge_lora
from minireflect.checkpoints.names import DIFFUSERS_UNET
from minireflect.methods.learn import reference
from minireflect.models.lora import LoRAConfig, adapters, add_lora, lora_layers, merge_lora, remove_lora
from minireflect.models.unet import UNet, UNetConfig
from tests.checkpoints import FAMILIES, WORDS, pipeline

pytestmark = pytest.mark.usefixtures("no_network")
SIZE = 32
STEPS = dict(num_inference_steps=4, guidance_scale=3.0, output_type="pt", height=SIZE, width=SIZE)


def small_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig((16, 32), (1, 1), 1, 12, res_blocks=1, heads=2, groups=4))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return unet


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 3, 12)


def learnt(unet: nn.Module) -> nn.Module:
    """As if it had been trained: B is no longer zero."""
    for layer in lora_layers(unet).values():
        nn.init.normal_(layer.lora.B, std=0.1)
    return unet


def test_changes_nothing_at_the_start_and_only_the_adapters_learn() -> None:
    unet = small_unet()
    names, x = list(unet.state_dict()), inputs()
    with torch.no_grad():
        before = unet(*x)
    add_lora(unet, LoRAConfig(rank=3))
    assert torch.equal(unet(*x), before)
    assert [n for n in unet.state_dict() if ".lora." not in n] == names  # the base kept its names
    unet(*x).square().mean().backward()
    with_gradient = {n for n, p in unet.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in unet.named_parameters() if ".lora." in n}
    assert len(lora_layers(unet)) == 7 * 8  # seven transformer blocks of twice q, k, v, out
    assert set(adapters(unet).parameters()) == {p for p in unet.parameters() if p.requires_grad}


def test_equals_the_formula() -> None:
    layer = nn.Sequential(nn.Linear(5, 7))
    weight, x = layer[0].weight.detach().clone(), torch.randn(4, 5)
    learnt(add_lora(layer, LoRAConfig(rank=2, alpha=6.0, targets=("0",))))
    A, B = layer[0].lora.A, layer[0].lora.B
    expected = x @ (weight + 3.0 * B @ A).T + layer[0].bias  # alpha / r = 3
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_merged_equals_unmerged_and_comes_apart_again(tmp_path: Path) -> None:
    unet, x = small_unet(), inputs()
    original = {n: t.clone() for n, t in unet.state_dict().items()}
    learnt(add_lora(unet, LoRAConfig(rank=2, alpha=3.0)))
    save_lora(tmp_path / "a.safetensors", unet)
    with torch.no_grad():
        expected = unet(*x)
        merge_lora(unet)
        assert not lora_layers(unet) and (unet(*x) - expected).abs().max() < 1e-4 * expected.abs().max()
    unmerge_lora(unet, tmp_path / "a.safetensors")
    assert all((unet.state_dict()[n] - t).abs().max() < 1e-6 for n, t in original.items())


def test_removed_is_the_base_bit_for_bit() -> None:
    unet, x = small_unet(), inputs()
    with torch.no_grad():
        before = unet(*x)
        remove_lora(learnt(add_lora(unet, LoRAConfig())))
        assert torch.equal(unet(*x), before)


def test_the_reference_policy_shares_the_weights_and_ignores_the_adapters() -> None:
    unet, x = small_unet(), inputs()
    with torch.no_grad():
        before = unet(*x)
        add_lora(unet, LoRAConfig())
        base = reference(unet)
        learnt(unet)
        assert torch.equal(base(*x), before) and not torch.allclose(unet(*x), before)
    assert base.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()
    assert not lora_layers(base) and not any(p.requires_grad for p in base.parameters())
    full = small_unet()
    assert reference(full).conv_in.weight.data_ptr() != full.conv_in.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_half_precision_the_adapters_stay_float32(dtype: torch.dtype) -> None:
    unet = add_lora(small_unet().to(dtype), LoRAConfig())
    assert {p.dtype for p in adapters(unet).parameters()} == {torch.float32}
    x, t, context = inputs()
    out = unet(x.to(dtype), t, context.to(dtype))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapters(unet).parameters())


def test_names_for_diffusers_are_the_rename_table_backwards() -> None:
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=2, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
    )  # fmt: skip
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
    without = ours.generate(WORDS[:1], 4, 3.0, 0.0, latents=x_T)
    learnt(
        add_lora(ours.unet, LoRAConfig(rank=3, alpha=6.0, targets=("q", "k", "v", "out", "ff.up", "ff.down")))
    )
    save_lora(tmp_path / "lora.safetensors", ours.unet)
    found = ours.generate(WORDS[:1], 4, 3.0, 0.0, latents=x_T) / 2 + 0.5
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
    found = ours.generate(WORDS[:1], 4, 3.0, 0.0, latents=x_T) / 2 + 0.5
    assert (found - expected).abs().max() < 1e-3
    assert "a LoRA of 32 layers, rank 4" in describe(tmp_path / "lora.safetensors")


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    unet = learnt(add_lora(small_unet(), LoRAConfig(rank=2, alpha=8.0)))
    save_lora(tmp_path / "a.safetensors", unet)
    assert not [n for n in load_file(tmp_path / "a.safetensors") if "lora_" not in n]  # A and B, nothing else
    again = load_lora(small_unet(), tmp_path / "a.safetensors")
    assert lora_layers(again).keys() == lora_layers(unet).keys()
    for name, layer in lora_layers(unet).items():
        other = lora_layers(again)[name]
        assert other.scale == layer.scale == 4.0
        assert torch.equal(other.lora.A, layer.lora.A) and torch.equal(other.lora.B, layer.lora.B)


def test_older_layouts_are_read(tmp_path: Path) -> None:
    unet = learnt(add_lora(small_unet(), LoRAConfig(rank=2, alpha=1.0, targets=("cross_attn.q",))))
    save_lora(tmp_path / "new.safetensors", unet)
    tensors = load_file(tmp_path / "new.safetensors")
    expected = read_lora(tmp_path / "new.safetensors")

    def same(path: Path) -> bool:
        found = read_lora(path)
        return found.keys() == expected.keys() and all(
            torch.allclose(found[n][2] * found[n][1] @ found[n][0], s * B @ A, atol=1e-6)
            for n, (A, B, s) in expected.items()
        )

    down_up = {n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for n, t in tensors.items()}
    save_file(down_up, tmp_path / "middle.safetensors")
    processors = {
        n.replace(".to_q.lora_A", ".processor.to_q_lora.down").replace(
            ".to_q.lora_B", ".processor.to_q_lora.up"
        ): t
        for n, t in tensors.items()
    }
    save_file(processors, tmp_path / "old.safetensors")
    with_alpha = {
        n: t * (2 if "lora_B" in n else 1) for n, t in tensors.items()
    }  # alpha 1 of rank 2 takes half of it
    with_alpha |= {n.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for n in tensors if "lora_A" in n}
    save_file(with_alpha, tmp_path / "alpha.safetensors")
    assert (
        same(tmp_path / "middle.safetensors")
        and same(tmp_path / "old.safetensors")
        and same(tmp_path / "alpha.safetensors")
    )


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_lora(path, learnt(add_lora(small_unet(), LoRAConfig(targets=("cross_attn.k",)))))
    other = UNet(UNetConfig((16, 32), (1, 1), 1, 20, res_blocks=1, heads=2, groups=4))
    with pytest.raises(WeightsError, match=r"misshapen .*cross_attn\.k: expected \(r 20\) and"):
        load_lora(other, path)
    shallow = UNet(UNetConfig((16, 32), (1, 0), 0, 12, res_blocks=1, heads=2, groups=4))
    with pytest.raises(WeightsError, match=r"extra down\.1\.layers\.0\.attn"):
        load_lora(shallow, path)
    assert not lora_layers(shallow)
    tensors = load_file(path)
    first = next(n for n in tensors if "lora_B" in n)
    half = {n: t for n, t in tensors.items() if n != first}
    save_file(half, path)
    with pytest.raises(WeightsError, match=r"missing lora_B\.weight"):
        read_lora(path)
    save_file({**tensors, "text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(WeightsError, match=r"text_encoder\.x\.lora_A"):
        read_lora(path)
    save_file({"a.weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=r"not a LoRA of a UNet .* a\.weight \(2,\)"):
        read_lora(path)


def test_bad_options_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="alpha must be positive"):
        LoRAConfig(alpha=-1)
    with pytest.raises(ValueError, match="no layer's name ends in 'to_q'; try q"):
        add_lora(small_unet(), LoRAConfig(targets=("to_q",)))
    with pytest.raises(ValueError, match="is a Conv2d; LoRA goes on linear layers"):
        add_lora(small_unet(), LoRAConfig(targets=("conv_in",)))
    unet = add_lora(small_unet(), LoRAConfig())
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(unet, LoRAConfig())
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora("x.safetensors", small_unet())
