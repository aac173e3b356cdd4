"""LoRA: nothing changes at the start, and only A and B learn."""

import pytest
import torch
from torch import nn

from minireflect.checkpoints.lora import save_lora
from minireflect.methods.learn import reference
from minireflect.models.lora import LoRAConfig, adapters, add_lora, lora_layers, merge_lora, remove_lora
from minireflect.models.unet import UNet, UNetConfig


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


def test_merged_equals_unmerged() -> None:
    unet, x = small_unet(), inputs()
    learnt(add_lora(unet, LoRAConfig(rank=2, alpha=3.0)))
    with torch.no_grad():
        expected = unet(*x)
        merge_lora(unet)
        assert not lora_layers(unet) and (unet(*x) - expected).abs().max() < 1e-4 * expected.abs().max()


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


def test_bad_options_are_one_sentence() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match="alpha must be above 0, got -1"):
        LoRAConfig(alpha=-1)
    with pytest.raises(ValueError, match="no layer's name ends in 'to_q'; try q"):
        add_lora(small_unet(), LoRAConfig(targets=("to_q",)))
    with pytest.raises(ValueError, match="is a Conv2d; LoRA needs a linear layer or a 1x1 convolution"):
        add_lora(small_unet(), LoRAConfig(targets=("conv_in",)))
    unet = add_lora(small_unet(), LoRAConfig())
    with pytest.raises(ValueError, match="already has LoRA adapters: call merge_lora or remove_lora first"):
        add_lora(unet, LoRAConfig())
    with pytest.raises(ValueError, match="no LoRA to save"):
        save_lora("x.safetensors", small_unet())


def test_a_begins_uniform_within_one_over_the_root_of_the_inputs() -> None:
    for layer in lora_layers(add_lora(small_unet(), LoRAConfig(rank=8))).values():
        largest = layer.lora.A.abs().max().item() * layer.weight.shape[1] ** 0.5
        assert 0.9 < largest <= 1 and not layer.lora.B.any()


def test_without_an_alpha_the_scale_is_1() -> None:
    layers = lora_layers(add_lora(small_unet(), LoRAConfig(rank=4)))
    assert {layer.scale for layer in layers.values()} == {1.0}
