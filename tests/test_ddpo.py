"""Both sides of `benchmarks/ddpo.py` do the same work, at a twentieth of the size."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks import ddpo
from minireflect.checkpoints.lora import save_lora


@pytest.mark.slow
def test_both_sides_draw_learn_and_evaluate_the_same(tmp_path: Path) -> None:
    seen: Counter[bool] = Counter()  # rows that went through a UNet, with and without gradient

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if type(module).__name__ in ("UNet", "UNet2DConditionModel"):
            seen[torch.is_grad_enabled()] += len(inputs[0])

    found, hook = [], register_module_forward_pre_hook(count)
    for name, side in ddpo.SIDES.items():
        nets = ddpo.networks(name, "small")
        iteration = side(nets)
        if name == "ours":
            save_lora(tmp_path / "lora.safetensors", nets["unet"])
        else:
            tensors = load_file(tmp_path / "lora.safetensors")
            named = {k[len("unet.") :].replace(".weight", ".default.weight"): v for k, v in tensors.items()}
            assert not nets["unet"].load_state_dict(named, strict=False).unexpected_keys
        found.append((*iteration(0), seen.copy()))
        seen.clear()
    hook.remove()
    (rewards, norm, ours), (same_rewards, same_norm, theirs) = found
    torch.testing.assert_close(rewards, same_rewards)
    assert norm == pytest.approx(same_norm, rel=1e-3)
    guided, kl = 2 * ddpo.PICTURES, 2  # rows of a step; ours measures the KL on one picture
    assert theirs == {False: ddpo.CONFIG.steps * guided, True: ddpo.TRAINED * guided}
    assert ours == {False: ddpo.CONFIG.steps * guided + kl, True: ddpo.TRAINED * guided}


@pytest.mark.slow
def test_the_sides_take_turns(capsys: pytest.CaptureFixture) -> None:
    ddpo.compare("small", 1)
    said = capsys.readouterr().out
    assert "median of 1 pairs" in said and "GB" in said
