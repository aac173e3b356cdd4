"""What checkpoints of the field state beside their tensors: the same pictures as diffusers draws."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from minireflect.checkpoints.files import WeightsError
from minireflect.checkpoints.load import Given, load_checkpoint, load_clip
from minireflect.checkpoints.lora import load_lora, networks_of, read_lora
from minireflect.checkpoints.ours import describe
from minireflect.checkpoints.parts import weights_file
from minireflect.models.clip import OPENAI_MEAN, OPENAI_STD
from minireflect.models.lora import merge_lora
from minireflect.pipeline import LatentDiffusion
from tests.small import shaken

from .checkpoints import WORDS, pipeline, save_original

pytestmark = pytest.mark.usefixtures("no_network")
PROMPT = WORDS[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function (family, folder, JSON file, keys of it to change; ... removes one) -> a saved pipeline in
    folder/sd, a copy of one that is made once.
    """
    made: dict[str, Path] = {}

    def copy(family: str, folder: Path, file: str = "", **changes: object) -> Path:
        if family not in made:
            theirs_of(family, made.setdefault(family, tmp_path_factory.mktemp(family)))
        shutil.copytree(made[family] / "sd", folder / "sd")
        if file:
            values = json.loads((folder / "sd" / file).read_text()) | changes
            kept = {key: value for key, value in values.items() if value is not ...}
            (folder / "sd" / file).write_text(json.dumps(kept))
        return folder / "sd"

    return copy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of an original file of SD 1.x."""
    folder = tmp_path_factory.mktemp("whole")
    return load_file(save_original(pipeline("sd1", folder), "sd1", folder / "one.safetensors"))


def theirs_of(family: str, folder: Path, unet: dict | None = None, scheduler: object = None) -> object:
    """diffusers' pipeline and its folder `folder`/sd, with another UNet or scheduler."""
    theirs = pipeline(family, folder)
    if unet:
        config = {k: v for k, v in (dict(theirs.unet.config) | unet).items() if k[0] != "_"}
        theirs.unet = shaken(UNet2DConditionModel(**config))
    theirs.scheduler = scheduler or theirs.scheduler
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder / "sd")
    return theirs


@torch.no_grad()
def off(
    theirs: DiffusionPipeline, ours: LatentDiffusion, steps: int = 2, guidance: float = 5.0, **more: object
) -> float:
    """The largest difference of their picture and ours, of a range of 1."""
    height, width = more.pop("size", (32, 32))
    x_T: Tensor = torch.randn(1, 4, height // 2, width // 2)
    expected = theirs(
        PROMPT, num_inference_steps=steps, guidance_scale=guidance, latents=x_T.clone(), output_type="pt",
        height=height, width=width, **more,
    ).images  # fmt: skip
    assert expected.std() > 0.05
    found = ours.generate([PROMPT], steps, guidance, 0.0, latents=x_T) / 2 + 0.5
    return float((found - expected).abs().max())


SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TRAILING = SD | dict(timestep_spacing="trailing")
DDIM = SD | dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
ZERO = dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
SCHEDULERS = {
    "turbo": (EulerAncestralDiscreteScheduler(**TRAILING), 1, 1.0),
    "turbo, DDIM": (DDIMScheduler(**DDIM | dict(timestep_spacing="trailing")), 1, 1.0),
    "euler, three steps": (EulerDiscreteScheduler(**TRAILING), 3, 5.0),
    "euler, leading": (EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1), 4, 5.0),
    "zero SNR": (DDIMScheduler(**DDIM | ZERO), 4, 7.5),
    "zero SNR, one step": (DDIMScheduler(**DDIM | ZERO), 1, 1.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_and_noise_are_those_of_the_scheduler(name: str, tmp_path: Path) -> None:
    scheduler, steps, guidance = SCHEDULERS[name]
    theirs = theirs_of("sdxl", tmp_path, scheduler=scheduler)
    file = tmp_path / "sd" / "scheduler" / "scheduler_config.json"
    others = {"set_alpha_to_one": False, "skip_prk_steps": True}  # of other classes, as in SDXL's own folder
    file.write_text(json.dumps(others | json.loads(file.read_text())))
    assert off(theirs, load_checkpoint(tmp_path / "sd"), steps, guidance) < 1e-3


DISTILLED = {
    "tiny-sd": ("sd1", dict(mid_block_type=None)),
    "SSD-1B": (
        "sdxl",
        dict(
            layers_per_block=2, mid_block_type="UNetMidBlock2D",
            transformer_layers_per_block=[[1, 1], [2, 4]],
            reverse_transformer_layers_per_block=[[3, 1, 2], [1, 1, 1]],
        ),
    ),
    "heads of several widths": ("sd2", dict(attention_head_dim=(1, 4))),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTILLED)
def test_unets_are_read_off_every_layer(name: str, tmp_path: Path) -> None:
    family, unet = DISTILLED[name]
    theirs = theirs_of(family, tmp_path, unet)
    assert off(theirs, load_checkpoint(tmp_path / "sd")) < 1e-3


def test_size_negative_prompt_and_clip_skip(tmp_path: Path) -> None:
    for family in ("sd1", "sdxl"):
        theirs = theirs_of(family, tmp_path / family)
        if not hasattr(theirs.text_encoder, "text_model"):  # where diffusers looks for the last norm
            object.__setattr__(theirs.text_encoder, "text_model", theirs.text_encoder)
        ours = load_checkpoint(tmp_path / family / "sd", Given(image_size=(32, 48)))
        ours.negative, ours.clip_skip = WORDS[1], 1
        assert off(theirs, ours, size=(32, 48), negative_prompt=WORDS[1], clip_skip=1) < 1e-3
        plain = load_checkpoint(tmp_path / family / "sd", Given(image_size=(32, 48)))
        assert off(theirs, plain, size=(32, 48), negative_prompt=WORDS[1], clip_skip=1) > 1e-3


def test_averaged_weights_state_how_they_were_averaged(tmp_path: Path) -> None:
    """The folder unet_ema of diffusers' training scripts in the place of unet."""
    theirs = pipeline("sd1", tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    unet = theirs.unet
    EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config).save_pretrained(
        tmp_path / "sd" / "unet"
    )
    assert "optimization_step" in (tmp_path / "sd" / "unet" / "config.json").read_text()
    assert off(theirs, load_checkpoint(tmp_path / "sd")) < 1e-3


@torch.no_grad()
def test_another_autoencoder_and_its_statistics(tmp_path: Path) -> None:
    theirs = theirs_of("sdxl", tmp_path)
    theirs.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    shaken(theirs.vae).save_pretrained(tmp_path / "vae")
    file = save_original(theirs, "sdxl", tmp_path / "one.safetensors")
    ours = load_checkpoint(tmp_path / "sd", Given(vae=tmp_path / "vae"))
    assert off(theirs, ours) < 1e-3
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"  # its configuration lies beside it
    assert off(theirs, load_checkpoint(tmp_path / "sd", Given(vae=weights))) < 1e-3
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    latents = ours.autoencoder.encode(images)
    assert (ours.autoencoder.decode(latents) - theirs.vae(images).sample).abs().max() < 1e-3
    single = load_checkpoint(tmp_path / "sd", Given(vae=file)).autoencoder.state_dict()
    assert all(torch.equal(t, single[name]) for name, t in ours.autoencoder.state_dict().items())
    without = {n: t for n, t in load_file(file).items() if not n.startswith("first_stage_model.")}
    save_file(without, tmp_path / "without.safetensors")
    with pytest.raises(WeightsError, match="has no vae"):
        load_checkpoint(tmp_path / "without.safetensors")
    given = Given(tokenizer=tmp_path / "words", image_size=32, vae=tmp_path / "vae")
    assert off(theirs, load_checkpoint(tmp_path / "without.safetensors", given)) < 1e-3


def kohya(theirs: DiffusionPipeline, path: Path, alpha: float = 2.0) -> Path:
    """A LoRA of UNet and text encoders in kohya's names, also on the 1x1 convolutions around attention."""
    out = {}
    parts = {"lora_unet": theirs.unet, "lora_te": theirs.text_encoder}
    if hasattr(theirs, "text_encoder_2"):
        parts = {"lora_unet": theirs.unet, "lora_te1": theirs.text_encoder, "lora_te2": theirs.text_encoder_2}
    for prefix, module in parts.items():
        ends = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "q_proj", "out_proj", "fc1")
        for name, layer in module.named_modules():
            if name.endswith(ends) and "embed" not in name:
                name = name if prefix == "lora_unet" or name.startswith("text_") else f"text_model.{name}"
                key, kernel = f"{prefix}_{name.replace('.', '_')}", layer.weight.shape[2:]
                out[f"{key}.lora_down.weight"] = 0.1 * torch.randn(4, layer.weight.shape[1], *kernel)
                out[f"{key}.lora_up.weight"] = 0.1 * torch.randn(len(layer.weight), 4, *kernel)
                out[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(out, path)
    return path


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_lora_of_kohya_with_its_text_encoders(family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, tmp_path)
    path = kohya(theirs, tmp_path / "kohya.safetensors")
    ours, weaker = (load_checkpoint(tmp_path / "sd") for _ in range(2))
    with pytest.raises(WeightsError, match=r"extra text_encoder"):
        load_lora(load_checkpoint(tmp_path / "sd").unet, path)
    load_lora(ours, path), load_lora(weaker, path, 0.3)
    theirs.load_lora_weights(str(tmp_path), weight_name=path.name)
    assert off(theirs, ours) < 1e-3
    for network in networks_of(weaker).values():
        merge_lora(network)
    assert off(theirs, weaker) > 1e-3
    theirs.set_adapters("default_0", 0.3)
    assert off(theirs, weaker) < 1e-3


@pytest.mark.parametrize("more", [dict(use_rslora=True), dict(alpha_pattern={"to_q": 1, "attn2.to_k": 32})])
def test_scales_of_peft(more: dict, tmp_path: Path) -> None:
    theirs = theirs_of("sd1", tmp_path)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], rank_pattern={"to_q": 2}, **more)
    theirs.unet.add_adapter(config)
    for name, p in theirs.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    tensors = {f"base_model.model.{n}": t for n, t in get_peft_model_state_dict(theirs.unet).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    about = {k: v for k, v in config.to_dict().items() if k != "target_modules"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about, default=str))
    ours = load_checkpoint(tmp_path / "sd")
    load_lora(ours.unet, tmp_path)
    assert off(theirs, ours) < 1e-3


# ---- keys that are absent, and what the libraries take then ------------------------------------------------
ABSENT = {
    "scheduler/scheduler_config.json": ("set_alpha_to_one", "beta_schedule", "steps_offset", "_class_name",
                                        "timestep_spacing", "prediction_type"),
    "unet/config.json": ("attention_head_dim", "norm_num_groups", "flip_sin_to_cos"),
    "vae/config.json": ("scaling_factor", "force_upcast"),
    "text_encoder_2/config.json": ("num_attention_heads", "hidden_act", "layer_norm_eps"),
    "tokenizer_2/tokenizer_config.json": ("pad_token",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in ABSENT.items() for key in keys])
def test_an_absent_key_means_what_the_library_takes(
    file: str, key: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("sdxl", tmp_path, file, **{key: ...})
    theirs = DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert off(theirs, load_checkpoint(folder)) < 1e-3


CHANGED = [  # a sampler that clips where nothing is said, another side of the words, other words at the ends
    ("scheduler/scheduler_config.json", {"clip_sample": ...}, "clip_sample = True"),
    ("scheduler/scheduler_config.json", {"prediction_type": "V_Prediction"}, "prediction_type"),
    (
        "scheduler/scheduler_config.json",
        {"interpolation_type": "log_linear"},
        "interpolation_type",
    ),  # Euler's
    ("scheduler/scheduler_config.json", {"predict_epsilon": False}, "predict_epsilon"),  # of older DDPM
    ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "tokenizer"),
    ("unet/config.json", {"only_cross_attention": [False, True]}, "only_cross_attention"),
    ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "padding_side"),
    ("tokenizer/tokenizer_config.json", {"truncation_side": "left"}, "truncation_side"),
    ("tokenizer/tokenizer_config.json", {"bos_token": "a</w>"}, "bos_token"),
    ("tokenizer/tokenizer_config.json", {"eos_token": {"content": "a</w>"}}, "eos_token"),
    ("tokenizer/tokenizer_config.json", {"split_special_tokens": True}, "split_special_tokens"),
]


@pytest.mark.parametrize(("file", "change", "told"), CHANGED)
def test_what_would_change_the_picture_is_refused(
    file: str, change: dict, told: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("sdxl", tmp_path, file, **change)
    with pytest.raises(WeightsError, match=f"asks for {told}.*which is refused"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"transformer_layers_per_block": [1, 1]}),
        ("unet/config.json", {"cross_attention_dim": 99}),
        ("unet/config.json", {"layers_per_block": [1, 3]}),
        ("unet/config.json", {"use_linear_projection": False}),
        ("vae/config.json", {"mid_block_add_attention": False}),
        ("vae/config.json", {"block_out_channels": [32, 32]}),
        ("text_encoder/config.json", {"hidden_size": 96}),
        ("text_encoder_2/config.json", {"vocab_size": 5}),
    ],
)
def test_a_configuration_that_contradicts_its_tensors_is_refused(
    file: str, change: dict, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """diffusers fails, or leaves out the tensors that are not stated, and draws other pictures."""
    with pytest.raises(WeightsError, match=f"states {next(iter(change))} = .*, but its tensors are of"):
        load_checkpoint(saved("sdxl", tmp_path, file, **change))


def test_a_folder_that_is_ambiguous_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("sdxl", tmp_path, "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(WeightsError, match="says StableDiffusionPipeline, but its networks are of SDXL"):
        load_checkpoint(folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for variant in ("ema", "non_ema"):
        shutil.copy(weights, weights.with_suffix(f".{variant}.safetensors"))
    assert weights_file(weights.parent) == weights
    weights.unlink()
    with pytest.raises(
        WeightsError, match=r"has .*\.ema\.safetensors and .*\.non_ema\.safetensors, and nothing"
    ):
        weights_file(weights.parent)


def test_a_vocabulary_is_described_only_if_it_is_read_as_in_a_checkpoint(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("sd1", tmp_path, "tokenizer/tokenizer_config.json", bos_token="<s>")
    with pytest.raises(WeightsError, match="asks for bos_token = '<s>'"):
        describe(folder / "tokenizer")


ODD = [  # of the right type, and no number that could be meant
    ("unet/config.json", {"sample_size": [16]}, "whole number at least 1 or null or a list of 2, got .16."),
    ("unet/config.json", {"sample_size": -16}, "at least 1 .*, got -16"),
    ("unet/config.json", {"sample_size": 0}, "at least 1 .*, got 0"),
    ("unet/config.json", {"attention_head_dim": 0}, "at least 1 .*, got 0"),
    ("unet/config.json", {"norm_num_groups": 0}, "at least 1, got 0"),
    ("vae/config.json", {"scaling_factor": 0}, "above 0, got 0"),
    ("vae/config.json", {"latents_std": [1, 0, 1, 1]}, "above 0, got 0"),
    ("vae/config.json", {"latents_mean": [1, 1, 1]}, "a number for each of 4 latent channels"),
    ("vae/config.json", {"latents_mean": [1, 1, 1, 1]}, "only one of latents_mean and latents_std"),
    ("vae/config.json", {"latents_std": [1, 1, 1, 1]}, "only one of latents_mean and latents_std"),
]


@pytest.mark.parametrize(("file", "change", "told"), ODD)
def test_a_number_out_of_its_range_is_no_default(
    file: str, change: dict, told: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        load_checkpoint(saved("sdxl", tmp_path, file, **change))


FILES = [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]


@pytest.mark.parametrize("file", [*FILES, "scheduler/scheduler_config.json"])
def test_a_configuration_that_is_missing_is_not_guessed(
    file: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("sd1", tmp_path)
    (folder / file).unlink()
    with pytest.raises(WeightsError, match=f"{file} is missing or empty"):
        load_checkpoint(folder)


OTHERS = [EulerDiscreteScheduler(**SD, use_karras_sigmas=True), PNDMScheduler(**SD, skip_prk_steps=True),
          DPMSolverMultistepScheduler(**SD)]  # fmt: skip


@pytest.mark.parametrize("scheduler", OTHERS, ids=lambda scheduler: type(scheduler).__name__)
def test_another_sampler_is_said(scheduler: object, saved: Callable[..., Path], tmp_path: Path) -> None:
    """diffusers writes an infinite number into DPMSolver's configuration, which is no JSON."""
    scheduler.save_pretrained(saved("sd1", tmp_path) / "scheduler")
    with pytest.warns(
        UserWarning, match=f"asks for {type(scheduler).__name__}.*; DDIM is used, so its pictures differ"
    ) as said:
        load_checkpoint(tmp_path / "sd")
    other = f"is of {type(scheduler).__name__} and is used; model_index.json names DDIMScheduler"
    assert any(other in str(warning.message) for warning in said)


YAML = """model:
  params:
    linear_start: 1e-4
    linear_end: 0.02
    timesteps: 500
    parameterization: "v"
    scale_factor: 0.5
"""


def test_the_yaml_beside_a_file_is_read(tmp_path: Path) -> None:
    stated = dict(beta_start=1e-4, beta_end=0.02, num_train_timesteps=500, prediction_type="v_prediction")
    theirs = theirs_of("sd1", tmp_path, scheduler=DDIMScheduler(**DDIM | stated))
    theirs.vae.register_to_config(scaling_factor=0.5)
    file = save_original(theirs, "sd1", tmp_path / "one.safetensors")
    file.with_suffix(".yaml").write_text(YAML)
    assert off(theirs, load_checkpoint(file, Given(tokenizer=tmp_path / "words", image_size=32))) < 1e-3
    file.with_suffix(".yaml").write_text(
        "linear_start: 8.5E-4\n'linear_end' : +.012\nlinear_end: 1"
    )  # the first
    found = load_checkpoint(file).schedule.config
    assert (found.beta_start, found.beta_end) == (0.00085, 0.012)
    file.with_suffix(".yaml").write_text("target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling")
    assert load_checkpoint(file).schedule.config.prediction == "v"
    file.with_suffix(".yaml").write_text("beta_schedule: sqrt_linear")  # "linear" is diffusers' scaled_linear
    assert load_checkpoint(file).schedule.config.beta_schedule == "linear"
    for text, told in {
        "beta_schedule: cosine": "'cosine', which is refused",
        "denoiser_scaling.EDMScaling": "'edm', which is refused",
        "scale_factor: -": "'-'",
    }.items():
        file.with_suffix(".yaml").write_text(text)
        with pytest.raises(WeightsError, match=told):
            load_checkpoint(file)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (
            "modelspec.encoder_layer",
            "2",
            "encoder_layer '2', which is not applied; give --clip-skip, this number minus 1",
        ),
        (
            "ss_clip_skip",
            "2",
            "ss_clip_skip '2', which is not applied; give --clip-skip, this number minus 1",
        ),
        ("ss_zero_terminal_snr", "True", "ss_zero_terminal_snr 'True', which is not applied$"),
        ("modelspec.timestep_range", "0,500", "timestep_range '0,500', which is not applied$"),
        ("modelspec.timestep_range", "0,1000", None),
        ("modelspec.encoder_layer", "1", None),
        ("ss_clip_skip", "None", None),
    ],
)
def test_metadata_that_changes_the_meaning_of_weights_is_told(
    key: str, value: str, told: str | None, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """Of a single file, and of a LoRA as kohya writes it."""
    layer = "lora_unet_mid_block_attentions_0_proj_in.lora_"
    down_up = {f"{layer}down.weight": torch.ones(2, 4, 1, 1), f"{layer}up.weight": torch.ones(4, 2, 1, 1)}
    for read, tensors in ((load_checkpoint, whole), (read_lora, down_up)):
        save_file(tensors, file := tmp_path / "said.safetensors", {key: value})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read(file)
        said = [str(each.message) for each in caught if key in str(each.message)]
        assert len(said) == (told is not None) and all(re.search(told, each) for each in said)


def test_every_tensor_of_a_single_file_is_of_a_part_or_named(
    whole: dict[str, Tensor], tmp_path: Path
) -> None:
    table = DDIMScheduler(**SD, num_train_timesteps=500).alphas_cumprod
    sigmas = (1 / table - 1).sqrt().flip(0).contiguous()
    for noise in {"alphas_cumprod": table.bfloat16()}, {"denoiser.sigmas": sigmas}:
        one = {"cond_stage_model.logit_scale": torch.ones(()), **noise}
        save_file(whole | one, tmp_path / "comfy.safetensors")
        assert load_checkpoint(tmp_path / "comfy.safetensors").schedule.config.train_steps == 500
    for name, told, value in (
        ("alphas_cumprod", "alphas_cumprod is off by nan", torch.full((1000,), float("nan"))),
        ("denoiser.sigmas", "alphas_cumprod is off by 0", torch.linspace(0.03, 80, 1000)),
        ("scale_factor", "above 0, got 0", torch.zeros(())),
        ("scale_factor", "only one element", torch.ones(2)),
        ("cond_stage_model.model.ln_final.bias", "has a second text_encoder", torch.ones(2)),
    ):
        save_file(whole | {name: value}, tmp_path / "odd.safetensors")
        with pytest.raises(ValueError, match=told):
            load_checkpoint(tmp_path / "odd.safetensors")
    for name, told in {
        "cond_stage_model.roberta.pooler.weight": r"of no known part: cond_stage_model\.roberta",
        "conditioner.embedders.0.model.ln_final.bias": "which is refused: SDXL's refiner",
    }.items():
        save_file(whole | {name: torch.ones(2)}, tmp_path / "odd.safetensors")
        with pytest.raises(WeightsError, match=told):
            load_checkpoint(tmp_path / "odd.safetensors")


def test_a_yaml_without_a_parameterization_is_of_epsilon(tmp_path: Path) -> None:
    """As of SD 2's 512-pixel base: the original program's own default.  The default of the family is v."""
    file = save_original(pipeline("sd2", tmp_path), "sd2", tmp_path / "one.safetensors")
    file.with_suffix(".yaml").write_text("linear_start: 0.00085\nlinear_end: 0.0120")
    with pytest.warns(UserWarning) as told:
        assert load_checkpoint(file).schedule.config.prediction == "epsilon"
    assert not [each for each in told if "assuming" in str(each.message)]
    file.with_suffix(".yaml").unlink()
    with pytest.warns(UserWarning, match="does not say what its UNet predicts; assuming 'v'"):
        assert load_checkpoint(file).schedule.config.prediction == "v"


def test_a_pipeline_that_was_sampled_and_saved_again_is_read(tmp_path: Path) -> None:
    """transformers writes how the tokenizer was called last, and where its file was."""
    theirs = theirs_of("sd1", tmp_path)
    for name in ("once", "twice"):
        theirs(PROMPT, num_inference_steps=1, height=32, width=32)
        theirs.save_pretrained(tmp_path / name)
        theirs = DiffusionPipeline.from_pretrained(tmp_path / name)
        theirs.set_progress_bar_config(disable=True)
    about = tmp_path / "twice" / "tokenizer" / "tokenizer_config.json"
    stated = json.loads(about.read_text())
    assert stated["max_length"] == 77 and stated["truncation_strategy"] == "longest_first"
    about.write_text(json.dumps(stated | {"tokenizer_file": "nowhere/tokenizer.json"}))
    assert off(theirs, load_checkpoint(tmp_path / "twice")) < 1e-3


def test_two_statements_of_what_a_unet_predicts_are_told(whole: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(
        whole | {"v_pred": torch.ones(0)},
        file := tmp_path / "odd.safetensors",
        {"modelspec.prediction_type": "v"},
    )
    with pytest.warns(UserWarning) as told:
        assert load_checkpoint(file).schedule.config.prediction == "v"
    assert not [each for each in told if "disagree" in str(each.message)]
    file.with_suffix(".yaml").write_text("parameterization: eps")
    with pytest.warns(UserWarning, match="disagree about what its UNet predicts; the last of .*'v'. is used"):
        assert load_checkpoint(file).schedule.config.prediction == "v"


def test_a_unet_that_writes_a_variance_is_refused(tmp_path: Path) -> None:
    theirs_of("sd1", tmp_path, dict(out_channels=8))
    with pytest.raises(WeightsError, match="4 input and 8 output channels; only 4 are supported"):
        load_checkpoint(tmp_path / "sd")


def test_the_folder_of_a_unet_alone(tmp_path: Path) -> None:
    """`save_lora_adapter` writes into the header what is stated, without the network's name."""
    theirs = theirs_of("sd1", tmp_path)
    theirs.unet.add_adapter(LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "proj_in", "linear_1"]))
    for name, p in theirs.unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    theirs.unet.save_lora_adapter(tmp_path / "lora")
    ours = load_checkpoint(tmp_path / "sd")
    load_lora(ours, tmp_path / "lora")
    assert off(theirs, ours) < 1e-3


def test_an_absent_alpha_of_peft(tmp_path: Path) -> None:
    """It is 8 of any rank: LoraConfig's."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora"
    tensors = {f"base_model.model.{name}_{side}.weight": torch.ones(*shape) for side, shape in
               {"A": (2, 64), "B": (64, 2)}.items()}  # fmt: skip
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "peft_type": "LORA"}))
    (adapter,) = read_lora(tmp_path).values()
    assert adapter.scale == LoraConfig(r=2).lora_alpha / 2


def test_heads_that_a_clip_does_not_state(tmp_path: Path) -> None:
    """CLIPModel writes only what differs from its defaults, 8 heads for words and 12 for pictures."""
    text = dict(vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, eos_token_id=599)
    vision = dict(image_size=28, patch_size=14, hidden_size=96, intermediate_size=96, num_hidden_layers=2)
    theirs = shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)))
    theirs.save_pretrained(tmp_path)
    ours, x = load_clip(tmp_path)[0], torch.rand(2, 3, 28, 28) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_MEAN, OPENAI_STD))
    ids = torch.cat([torch.randint(1, 598, (2, 9)), torch.full((2, 1), 599)], 1)
    found = theirs(input_ids=ids, pixel_values=(x - mean) / std)
    assert (found.image_embeds - ours.encode_image(x)).abs().max() < 1e-5
    assert (found.text_embeds - ours.encode_text(ids)).abs().max() < 1e-5
    for stated, told in (
        ({"do_normalize": False}, "do_normalize"),
        ({"image_std": [1, 0, 1]}, "above 0, got 0"),
    ):
        nested = {"image_processor": stated}  # of transformers 5
        for name, inside in (("preprocessor", stated), ("processor", nested)):
            (file := tmp_path / f"{name}_config.json").write_text(json.dumps(inside))
            with pytest.raises(ValueError, match=told):
                load_clip(tmp_path)
            file.unlink()
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    file.write_text(json.dumps({"image_processor": grey}))
    assert load_clip(tmp_path)[0].config.vision.mean == (0.0,) * 3
    for file in tmp_path.glob("*config.json"):
        file.unlink()
    with pytest.warns(UserWarning, match="does not state its activation: assuming quick_gelu"):
        load_clip(tmp_path)


@pytest.mark.parametrize("name", ["to_q.lora_up.bias", "to_q.lora.down.bias"])
def test_no_tensor_of_a_lora_is_dropped(name: str, tmp_path: Path) -> None:
    path = kohya(pipeline("sd1", tmp_path), tmp_path / "kohya.safetensors")
    more = {f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_{name}": torch.ones(64)}
    save_file(load_file(path) | more, path)
    with pytest.raises(WeightsError, match=name):
        read_lora(path)
