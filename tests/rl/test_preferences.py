"""Rewards of preferences, against the formulas of their papers' code, written here with transformers."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from minireflect.checkpoints.load import load_clip
from minireflect.methods.finetune import FinetuneConfig, chosen_reward, parsed, reward_of_module
from minireflect.rl.rewards import aesthetic_reward, incompressibility, weighted
from minireflect.run import RewardFailed
from tests.parity.checkpoints import WORDS, vocabulary
from tests.small import shaken

PROMPTS = WORDS[:2]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    import json

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    n = len(json.loads((vocabulary(folder) / "vocab.json").read_text("utf-8")))
    text = dict(vocab_size=n, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=1, eos_token_id=n - 1, hidden_act="gelu")  # fmt: skip
    vision = dict(image_size=28, patch_size=14, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                  num_attention_heads=1, hidden_act="gelu")  # fmt: skip
    model = shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))
    with torch.no_grad():
        model.logit_scale.fill_(3.7)
    model.save_pretrained(folder)
    return model, folder


def pixels(images: Tensor) -> Tensor:
    """As CLIP's processor gives them, of pictures that have its size."""
    mean, std = (torch.tensor(v)[:, None, None] for v in
                 ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    return ((images + 1) / 2 - mean) / std


@pytest.mark.parametrize("name", ["pickscore", "hps", "clip"])
@torch.no_grad()
def test_a_scaled_cosine(name: str, theirs: tuple[CLIPModel, Path]) -> None:
    model, folder = theirs
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    reward = chosen_reward(FinetuneConfig(base="x", reward=(f"{name}={folder}",)), torch.device("cpu"))
    _, tokenizer = load_clip(folder)
    out = model(input_ids=tokenizer(PROMPTS), pixel_values=pixels(images))
    seen = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    read = out.text_embeds / out.text_embeds.norm(dim=-1, keepdim=True)
    scale = 1.0 if name == "clip" else model.logit_scale.exp()
    assert torch.allclose(reward(images, PROMPTS), scale * (read * seen).sum(1), atol=1e-5 * float(scale))


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_the_aesthetic_head_is_linear_on_normalised_features(
    version: int, theirs: tuple[CLIPModel, Path]
) -> None:
    model, folder = theirs
    layers = [torch.nn.Linear(16, 1)] if version == 1 else [torch.nn.Linear(16, 8), torch.nn.Linear(8, 1)]
    names = [""] if version == 1 else ["layers.0.", "layers.7."]
    head = {f"{n}{k}": t for n, layer in zip(names, layers) for k, t in layer.state_dict().items()}
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    x = model.get_image_features(pixel_values=pixels(images))
    x = x if isinstance(x, Tensor) else x.pooler_output
    expected = x / x.norm(dim=-1, keepdim=True)
    for layer in layers:
        expected = layer(expected)
    clip = load_clip(folder)[0]
    assert torch.allclose(aesthetic_reward(clip, head)(images, [""] * 3), expected[:, 0], atol=1e-5)


WHOLE = {
    "0.weight": torch.ones(4, 16),
    "0.bias": torch.ones(4),
    "1.weight": torch.ones(1, 4),
    "1.bias": torch.ones(1),
}
OTHER_HEADS = {
    "no bias": {"weight": torch.zeros(1, 16)},
    "nothing": {},
    "another width": {"weight": torch.zeros(1, 9), "bias": torch.zeros(1)},
    "more than one number": {"weight": torch.zeros(2, 16), "bias": torch.zeros(2)},
    "layers that do not fit each other": WHOLE | {"1.weight": torch.ones(1, 5)},
    "a bias of another layer": WHOLE | {"0.bias": torch.ones(3)},
    "a scalar": WHOLE | {"1.weight": torch.ones(())},
    "an extra tensor": WHOLE | {"scale": torch.ones(1)},
    "an extra bias": WHOLE | {"2.bias": torch.ones(1)},
    "NaN": WHOLE | {"0.bias": torch.tensor([1, 1, torch.nan, 1])},
    "infinity": WHOLE | {"1.weight": torch.full((1, 4), torch.inf)},
    "quantised weights": WHOLE | {"0.weight": torch.ones(4, 16, dtype=torch.int8)},
}


@pytest.mark.parametrize("what", OTHER_HEADS)
def test_what_is_no_aesthetic_head_is_refused(
    what: str, theirs: tuple[CLIPModel, Path], tmp_path: Path
) -> None:
    torch.save(OTHER_HEADS[what], tmp_path / "head.pt")
    config = FinetuneConfig(base="x", reward=(f"aesthetic={tmp_path / 'head.pt'}",), clip=str(theirs[1]))
    with pytest.raises(ValueError, match=r"head\.pt is no aesthetic head|head\.pt .*no tensors") as error:
        chosen_reward(config, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_ten_layers_are_in_the_order_of_their_numbers(theirs: tuple[CLIPModel, Path]) -> None:
    sizes = [16, *range(30, 20, -1), 1]
    head = {}
    for n, (i, o) in enumerate(zip(sizes, sizes[1:])):
        head |= {f"layers.{n}.weight": torch.ones(o, i), f"layers.{n}.bias": torch.ones(o)}
    aesthetic_reward(load_clip(theirs[1])[0], head)


@pytest.mark.parametrize("weight", ["1e999", "1e39", "nan", "inf", "-1"])
def test_a_weight_that_is_not_finite_is_refused(weight: str) -> None:
    with pytest.raises(ValueError, match=r"--reward '?[\w-]+\*incompressibility'? (is not|must be a finite)"):
        parsed(f"{weight}*incompressibility")
    with pytest.raises(ValueError, match=r"'incompressibility=x' is not \[WEIGHT"):
        parsed("incompressibility=x")


def test_several_are_normalised_within_their_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loudness.py").write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "def loud(images, prompts):\n    return 1000 * images[:, 0].mean((1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    config = FinetuneConfig(base="x", reward=("loudness:brightness", "0.5*loudness:loud"))
    images, prompts = torch.randn(6, 3, 4, 4), ["a", "b"] * 3
    first, second = images.mean((1, 2, 3)), 1000 * images[:, 0].mean((1, 2))

    def normal(x: Tensor) -> Tensor:
        x = x.view(3, 2)  # a group is a column
        return ((x - x.mean(0)) / x.std(0)).flatten()

    reward = chosen_reward(config, torch.device("cpu"))
    assert torch.allclose(reward(images, prompts), normal(first) + 0.5 * normal(second), atol=1e-4)
    assert torch.allclose(reward.plain(images, prompts), first + 0.5 * second)
    config = FinetuneConfig(base="x", reward=("0.5*incompressibility", "2*compressibility"))
    sizes = chosen_reward(config, torch.device("cpu")).plain(images.clamp(-1, 1), prompts)
    torch.testing.assert_close(sizes, -1.5 * incompressibility(images.clamp(-1, 1), prompts))
    alone = reward_of_module("loudness:brightness")
    assert weighted([(1.0, alone)]) is alone
    images, asked = (
        torch.tensor([0.1, 0.3, 0.9, 0.5]).view(4, 1, 1, 1).expand(4, 3, 4, 4),
        ["a", "a", "b", "b"],
    )
    mean = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    twice = weighted([(2.0, mean)])  # with a weight of its own it is normalised, too
    torch.testing.assert_close(
        twice(images, asked), torch.tensor([-1.0, 1, 1, -1]) * 2**0.5, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(twice.plain(images, asked), torch.tensor([0.2, 0.6, 1.8, 1.0]))
    with pytest.raises(ValueError, match=r"loudness:dark: .* expected MODULE:FUNCTION"):
        reward_of_module("loudness:dark")
    with pytest.raises(ValueError, match=r"math:pi is not a function, but 3\.14"):
        reward_of_module("math:pi")
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(ValueError, match=r"broken:f: .*syntax"):
        reward_of_module("broken:f")
    for weight, right in {"1e3": 1e3, ".5": 0.5, "1.2.3": None, ".": None}.items():
        config = FinetuneConfig(base="x", reward=(f"{weight}*loudness:brightness",))
        with nullcontext() if right else pytest.raises(ValueError, match=r"is not \[WEIGHT"):
            plain = chosen_reward(config, torch.device("cpu")).plain(images, asked)
            torch.testing.assert_close(plain, right * images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="--reward beauty is not one of"):
        chosen_reward(FinetuneConfig(base="x", reward=("beauty",)), torch.device("cpu"))


def test_an_error_of_a_users_reward_shows_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mistaken.py").write_text(
        "def deeper():\n    return {}['score']\ndef mine(images, prompts):\n    return deeper()\n"
        "def end(images, prompts):\n    raise StopIteration\n"
    )
    (tmp_path / "divided.py").write_text("x = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for name, said in {
        "mistaken:mine": "raised KeyError: 'score'$", "mistaken:end": "raised StopIteration$",
        "divided:mine": "raised ZeroDivisionError: division by zero$",
    }.items():  # fmt: skip
        with pytest.raises(RewardFailed, match=f"^--reward {name} {said}"):
            reward_of_module(name)(torch.zeros(1, 3, 4, 4), ["a"])
    traces = capsys.readouterr().err.split("Traceback")
    assert "in mine" in traces[1] and "in deeper" in traces[1] and "finetune.py" not in traces[1]
    assert "1 / 0" in traces[3]
