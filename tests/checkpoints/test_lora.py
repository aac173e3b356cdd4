"""LoRA files: what is written comes back, older layouts are read, and what does not fit is named."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minireflect.checkpoints.files import WeightsError
from minireflect.checkpoints.lora import STEMS, load_lora, read_lora, save_lora
from minireflect.models.lora import LoRAConfig, add_lora, lora_layers
from minireflect.models.unet import UNet, UNetConfig
from tests.models.test_lora import learnt, small_unet


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
    with pytest.raises(WeightsError, match=r"extra unet\.down\.1\.layers\.0\.attn"):
        load_lora(shallow, path)
    assert not lora_layers(shallow)
    tensors = load_file(path)
    first = next(n for n in tensors if "lora_B" in n)
    half = {n: t for n, t in tensors.items() if n != first}
    save_file(half, path)
    with pytest.raises(WeightsError, match=r"missing lora_B\.weight"):
        read_lora(path)
    save_file({**tensors, "text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(WeightsError, match=r"text_encoder\.x: missing lora_B"):
        read_lora(path)
    save_file({n: t.clone().fill_(torch.nan) if n == first else t for n, t in tensors.items()}, path)
    with pytest.raises(WeightsError, match="expected matrices of finite numbers"):
        read_lora(path)
    save_file({"a.weight": torch.zeros(2)}, path)
    with pytest.raises(
        WeightsError, match=r"not a complete LoRA of a UNet or text encoder: a\.weight \(2,\)"
    ):
        read_lora(path)


@pytest.mark.parametrize("pattern", ["((a+)+)+!", "a?" * 30 + "a" * 30, "(a|a)" * 30, "(", "a{999999999999}"])
def test_a_pattern_that_may_never_end_is_refused(tmp_path: Path, pattern: str) -> None:
    path, layer = tmp_path / "a.safetensors", "unet.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{layer}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}

    def scale(patterns: dict[str, float]) -> float:
        about = {"unet.r": 2, "unet.alpha_pattern": patterns}
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(about)})
        return next(iter(read_lora(path).values())).scale

    with pytest.raises(WeightsError, match="alpha_pattern"):
        scale({pattern: 1.0})
    assert scale({r".*\.(proj_in|proj_out)": 4.0}) == 2


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("first", [None, f"unet.{LAYER.replace('to_q', 'to_v')}"])
def test_the_configuration_of_peft_is_read_whatever_comes_first(first: str | None, tmp_path: Path) -> None:
    matrices = {"A": torch.ones(2, 64), "B": torch.ones(64, 2)}
    tensors = {f"base_model.model.{LAYER}.lora_{side}.weight": t for side, t in matrices.items()}
    if first:  # safetensors stores the larger type first
        tensors = {f"{first}.lora_{side}.weight": t.double() for side, t in matrices.items()} | tensors
    save_file(tensors, tmp_path / "mine.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    assert {found.scale for found in read_lora(tmp_path / "mine.safetensors").values()} == {3.0}


@pytest.mark.parametrize("more", [{"config": {"use_dora": True}}, {"metadata": {"lora_alpha": 4}}])
def test_a_configuration_in_a_torch_file_is_not_dropped(more: dict, tmp_path: Path) -> None:
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 2)}
    torch.save(tensors | {"step": 7}, tmp_path / "plain.pt")
    assert len(read_lora(tmp_path / "plain.pt")) == 1
    torch.save(tensors | more, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match=f"holds '{next(iter(more))}', which is no tensor; expected only"):
        read_lora(tmp_path / "more.pt")


MEANS = {"r": 4, "lora_alpha": 6, "peft_type": "LORA"}  # what adapter_config.json says
PAIR = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 64), f"unet.{LAYER}.lora_B.weight": torch.ones(64, 2)}


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({}, {}, "rank 2, but its configuration says 4 "),
        ({"r": 2, "rank_pattern": {"to_q": 3}}, {}, "rank 2, but its configuration says 3 "),
        ({"r": 2}, {"alpha": torch.tensor(4.0)}, "alpha 4, but its configuration says 6 "),
        ({"r": "two"}, {}, "r in its configuration must be a whole number"),
        (
            {"rank_pattern": {"to_q": 2.5}},
            {},
            "rank_pattern in its configuration.to_q must be a whole number",
        ),
        ({"r": 2, "arrow_config": {"top_k": 3}}, {}, "arrow_config"),
        ({"r": 2}, {"lora_A.weight": torch.ones(2, 16, 2, 2, 1)}, "a convolution LoRA"),
        ({"r": 2}, {"lora_B.weight": torch.ones(64, 3)}, "A of rank 2, but B of rank 3"),
        ({"r": 2}, {"lora_A.weight": torch.full((2, 64), torch.nan).to(torch.float8_e5m2)}, "finite"),
        ({"rank_pattern": {"to_q": 2}}, {"alpha": torch.tensor(6.0)}, ""),  # as peft reads it
    ],
)
def test_what_a_lora_states_twice_must_agree(config: dict, more: dict, said: str, tmp_path: Path) -> None:
    tensors = PAIR | {f"unet.{LAYER}.{name}": t for name, t in more.items()}
    header = {f"unet.{key}": value for key, value in (MEANS | config).items()}
    save_file(tensors, tmp_path / "mine.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(MEANS | config))
    for path in (tmp_path / "mine.safetensors", tmp_path):
        if said:
            with pytest.raises(WeightsError, match=re.escape(said)) as error:
                read_lora(path)
            assert "\n" not in str(error.value)
        else:
            assert [found.scale for found in read_lora(path).values()] == [3.0]


def test_a_folder_with_two_loras_is_refused(tmp_path: Path) -> None:
    for stem in STEMS:
        save_file(PAIR, tmp_path / f"{stem}.safetensors")
    with pytest.raises(WeightsError, match="has two LoRAs, adapter_model and pytorch_lora_weights; give"):
        read_lora(tmp_path)


@pytest.mark.parametrize(("theirs", "ours"), [("l", ""), ("h", ""), ("g", "_2")])
def test_the_text_encoders_of_comfyui_are_named(theirs: str, ours: str, tmp_path: Path) -> None:
    layer = f"text_encoders.clip_{theirs}.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    save_file(
        {name.replace(f"unet.{LAYER}", layer): t for name, t in PAIR.items()}, tmp_path / "a.safetensors"
    )
    assert [*read_lora(tmp_path / "a.safetensors")] == [f"text_encoder{ours}.blocks.0.attn.q"]


def test_a_strength_is_a_finite_number(tmp_path: Path) -> None:
    save_lora(tmp_path / "a.safetensors", learnt(add_lora(small_unet(), LoRAConfig(rank=2))))
    with pytest.raises(ValueError, match="strength must be a finite number"):
        load_lora(small_unet(), tmp_path / "a.safetensors", float("nan"))
