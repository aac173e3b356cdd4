"""What a CLIP and a checkpoint state: it is read as the libraries do, or refused by name."""

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CLIPConfig, CLIPModel

from minireflect.checkpoints.files import WeightsError
from minireflect.checkpoints.load import load_checkpoint, load_clip
from minireflect.checkpoints.ours import SHIPPED, load_module, stated
from minireflect.models.clip import TextConfig
from minireflect.models.unet import UNet
from tests.parity.checkpoints import pipeline

SMALL = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TEXT = SMALL | dict(vocab_size=600, eos_token_id=599, hidden_act="gelu")
VISION = SMALL | dict(image_size=28, patch_size=14, hidden_act="gelu")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=32)).save_pretrained(tmp_path)
    return tmp_path


def acts(folder: Path, **config: object) -> tuple[bool, bool, list[str]]:
    """Whether text and pictures use quick GELU with this configuration, and the warnings."""
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_clip(folder)[0].config
    said = [str(each.message) for each in caught if "activation" in str(each.message)]
    return found.text.quick_gelu, found.vision.quick_gelu, said


OPENAI = {key: value for key, value in SMALL.items() if "heads" in key or "layers" in key}
QUICK = {"hidden_act": "quick_gelu", "eos_token_id": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dict(text_config=TEXT, vision_config=VISION), (False, False)),
        (dict(text_config_dict=TEXT, vision_config_dict=VISION), (False, False)),
        (dict(text_config=TEXT, vision_config=VISION, text_config_dict=None, vision_config_dict=None),
         (False, False)),
        (dict(text_config={**SMALL, **QUICK}, text_config_dict=OPENAI, vision_config=VISION), (True, False)),
        (dict(text_config=TEXT, text_config_dict=OPENAI | QUICK, vision_config=VISION), (True, False)),
        (dict(text_config={}, text_config_dict=TEXT, vision_config=SMALL), (False, True)),
    ],
)  # fmt: skip
def test_the_second_configuration_of_older_files_counts(config: dict, expected: tuple, clip: Path) -> None:
    assert acts(clip, **config) == (*expected, [])
    for key in ("text_config", "vision_config"):  # as transformers reads it
        theirs = getattr(CLIPConfig(**json.loads(json.dumps(config))), key)
        assert (theirs.hidden_act == "quick_gelu") == expected[key == "vision_config"]


@pytest.mark.parametrize("config", [{}, {"text_config": {}}, {"text_config": None, "text_config_dict": {}}])
def test_an_activation_that_is_not_stated_is_told(config: dict, clip: Path) -> None:
    quick, _, said = acts(clip, **{"vision_config": VISION} | config)
    assert quick and len(said) == 1 and "assuming quick_gelu" in said[0]


def test_a_text_encoder_does_not_take_the_configuration_of_a_clip(saved: Callable[..., Path]) -> None:
    folder = saved("sd1", "text_encoder/config.json", text_config_dict={"hidden_act": "gelu"})
    with pytest.raises(WeightsError, match="asks for text_config_dict"):
        load_checkpoint(folder)


SQUARE = {"height": 28, "width": 28}
GOOD = [{}, {"size": 28}, {"size": {"shortest_edge": 28}, "crop_size": 28}, {"crop_size": SQUARE},
        {"size": None, "default_to_square": False}]  # fmt: skip
BAD = [{"size": 40}, {"size": {"shortest_edge": 40}}, {"crop_size": 14}, {"crop_size": {"height": 28}},
       {"size": SQUARE}, {"size": "28"}, {"crop_size": [28]}, {"default_to_square": True}]  # fmt: skip


@pytest.mark.parametrize("about", GOOD)
def test_pictures_of_the_size_of_the_network_are_read(about: dict, clip: Path) -> None:
    (clip / "preprocessor_config.json").write_text(json.dumps({"do_resize": True} | about))
    assert load_clip(clip)[0].config.vision.size == 28


@pytest.mark.parametrize("about", BAD)
def test_another_size_of_the_pictures_is_refused(about: dict, clip: Path) -> None:
    (clip / "preprocessor_config.json").write_text(json.dumps({"do_resize": True} | about))
    with pytest.raises(WeightsError, match=f"asks for {next(iter(about))} = .*, which is refused"):
        load_clip(clip)


# --- folders of Stable Diffusion ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function family -> the folder of a saved pipeline, made once."""

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        pipeline(family, folder).save_pretrained(folder / "sd")
        return folder / "sd"

    return make


@pytest.fixture
def saved(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (family, JSON file, keys of it to change) -> the folder of a copy of a saved pipeline."""

    def save(family: str, file: str, **changes: object) -> Path:
        shutil.copytree(made(family), tmp_path / "sd")
        path = tmp_path / "sd" / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
        return tmp_path / "sd"

    return save


T5, UNET_3D = ["transformers", "T5EncoderModel"], ["diffusers", "UNet3DConditionModel"]
REFUSED = [
    ("sdxl", "unet/config.json", {"addition_time_embed_dim": 128}, "pooled prompt of width 792, .* gives 24"),
    ("sd1", "unet/config.json", {"mid_block_type": None}, "mid_block_type = None, .* are of 'UNetMid"),
    ("sd1", "unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNet.*, but"),
    ("sdxl", "unet/config.json", {"addition_embed_type": None}, "addition_embed_type = None, .* 'text_time'"),
    ("sd1", "unet/config.json", {"addition_embed_type": "text_time"}, "= 'text_time', but .* are of None"),
    ("sd1", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**15}, r"num_.* \[1, 100000\]"),
    (
        "sd1",
        "scheduler/scheduler_config.json",
        {"steps_offset": "1"},
        "steps_offset .* whole number, got '1'",
    ),
    ("sd1", "scheduler/scheduler_config.json", {"steps_offset": -1}, "steps_offset .* at least 0, got -1"),
    ("sd1", "scheduler/scheduler_config.json", {"clip_sample": "no"}, "clip_sample = 'no'"),
    ("sd1", "model_index.json", {"_class_name": ["StableDiffusionPipeline"]}, "_class_name .* a text"),
    ("sd1", "model_index.json", {"text_encoder": T5}, "text_encoder = .*T5EncoderModel"),
    ("sd1", "model_index.json", {"unet": UNET_3D}, "unet = .*UNet3DConditionModel"),
    ("sd1", "vae/config.json", {"act_fn": ["silu", "silu"]}, "act_fn = "),
    ("sd1", "tokenizer/special_tokens_map.json", {"bos_token": "cat</w>"}, "bos_token = 'cat</w>'"),
    ("sd1", "tokenizer/special_tokens_map.json", {"eos_token": {"content": "a"}}, "eos_token = 'a'"),
    ("sd1", "tokenizer/added_tokens.json", {"<my-cat>": 567}, "embeddings of added tokens are not in this"),
    ("sd1", "tokenizer/tokenizer_config.json", {"extra_special_tokens": ["<a>"]}, "embeddings of added"),
]


@pytest.mark.parametrize(("family", "file", "change", "told"), REFUSED)
def test_what_a_folder_says_is_not_dropped(
    family: str, file: str, change: dict, told: str, saved: Callable[..., Path]
) -> None:
    with pytest.raises(WeightsError, match=told):
        load_checkpoint(saved(family, file, **change))


def test_a_file_of_another_network_is_named() -> None:
    with pytest.raises(WeightsError, match=r"text_encoder.* does not hold a UNetConfig: .*'vocabulary'"):
        load_module(SHIPPED / "text_encoder.safetensors", UNet)
    with pytest.raises(WeightsError, match=r"^here does not hold a TextConfig: .*'vocabulary' and 'eos'"):
        stated("here", {"config": "{}"}, "config", TextConfig)
    with pytest.raises(WeightsError, match="not hold a TextConfig: eos must be at least 0, got -1"):
        stated("here", {"config": '{"vocabulary": 9, "eos": -1}'}, "config", TextConfig)
