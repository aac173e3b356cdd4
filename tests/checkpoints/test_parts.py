"""Original single files: what the .yaml beside one states, and files of other models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minireflect.checkpoints.files import WeightsError
from minireflect.checkpoints.load import load_checkpoint
from tests.parity.checkpoints import FAMILIES, pipeline, save_original


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The tensors of an original file of each family."""
    folder = tmp_path_factory.mktemp("originals")
    return {f: load_file(save_original(pipeline(f, folder), f, folder / "one.safetensors")) for f in FAMILIES}


@pytest.fixture
def single(files: dict, tmp_path: Path) -> Callable[..., Path]:
    """A function (family, text of the .yaml beside it) -> an original file."""

    def save(family: str, yaml: str = "") -> Path:
        save_file(files[family], tmp_path / "one.safetensors")
        (tmp_path / "one.yaml").write_text(yaml)
        return tmp_path / "one.safetensors"

    return save


COMMENTED = """# parameterization: "v"
model:
  params:
    parameterization: eps  # not "v": linear_start: 0.5
    #linear_end: 0.5
    # cond_stage_config: {layer: hidden}
    linear_start: 0.001\t# zero_snr: true
"""


def test_comments_in_a_yaml_are_not_read(single: Callable[..., Path]) -> None:
    config = load_checkpoint(single("sd1", COMMENTED)).schedule.config
    assert (config.prediction, config.beta_start, config.beta_end) == ("epsilon", 0.001, 0.012)
    assert not config.zero_snr


SDXL = "params:\n  layer: hidden\n  layer_idx: 11\nparams:\n  layer: penultimate\n  layer_idx: null\n"
READ = [
    ("sd1", 'layer: "last"'),
    ("sd2", 'layer: "penultimate"'),
    ("sdxl", SDXL),
    ("sd1", "n_layer: 3\nlayers: 2"),
]
CLIP_SKIP = [
    ("sd1", "layer: hidden\nlayer_idx: -2"), ("sd1", "{layer: 'penultimate'}"), ("sd1", "layer_idx: 11"),
    ("sd2", 'layer: "last"'), ("sdxl", "layer: last"), ("sdxl", "'layer_idx': 10"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "yaml"), READ)
def test_the_usual_layer_of_the_text_encoder_is_read(family: str, yaml: str, single: Callable) -> None:
    load_checkpoint(single(family, f"model:\n  {yaml}\n  parameterization: eps\n"))


@pytest.mark.parametrize(("family", "yaml"), CLIP_SKIP)
def test_another_layer_of_the_text_encoder_is_refused(family: str, yaml: str, single: Callable) -> None:
    with pytest.raises(WeightsError, match=r"one.yaml asks for layer .* only .* is supported; .*--clip-skip"):
        load_checkpoint(single(family, f"{yaml}\nparameterization: eps\n"))


@pytest.mark.parametrize("key", ["rescale_betas_zero_snr", "zero_snr"])
@pytest.mark.parametrize("value", ["true", "True", "false"])
def test_zero_terminal_snr_in_a_yaml_is_read(key: str, value: str, single: Callable[..., Path]) -> None:
    path = single("sd1", f"parameterization: v\n{key}: {value}\n")
    assert load_checkpoint(path).schedule.config.zero_snr == (value != "false")
    path.with_suffix(".yaml").write_text(f"{key}: 2\n")
    with pytest.raises(WeightsError, match=r"rescale_betas_zero_snr .* must be true or false, got 2"):
        load_checkpoint(path)
    path.with_suffix(".yaml").write_text(f"timesteps: {10**15}\n")
    with pytest.raises(WeightsError, match=r"num_train_timesteps .* must be in \[1, 100000\]"):
        load_checkpoint(path)


OTHERS = {
    "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": "refused: Stable Diffusion 3, Flux",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "refused: Stable Diffusion 3, Flux",
    "model.diffusion_model.single_blocks.0.linear1.weight": "refused: Stable Diffusion 3, Flux",
    "double_blocks.0.img_attn.qkv.weight": "refused: Stable Diffusion 3, Flux",
    "single_transformer_blocks.0.attn.to_q.weight": "refused: Stable Diffusion 3, Flux",
    "text_encoders.t5xxl.transformer.shared.weight": "refused: Stable Diffusion 3, Flux",
    "model_ema.diffusion_modelinput_blocks00weight": r"it has averaged weights \(model_ema\) and no others",
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_models_are_named(name: str, files: dict, tmp_path: Path) -> None:
    rest = {n: t for n, t in files["sd1"].items() if not n.startswith("model.diffusion_model.")}
    save_file(rest | {name: torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=OTHERS[name]):
        load_checkpoint(tmp_path / "other.safetensors")
