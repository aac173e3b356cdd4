"""Real checkpoints: the same tensors, the same tokens and the same pictures as diffusers, transformers and
OpenCLIP.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from minireflect import load_pipeline
from minireflect.checkpoints import names
from minireflect.checkpoints.files import WeightsError, new_names, read_weights
from minireflect.checkpoints.load import Given, load_checkpoint, load_clip
from minireflect.checkpoints.ours import RIG, describe
from minireflect.checkpoints.parts import weights_file
from minireflect.models.clip import CLIP, CLIPConfig
from minireflect.models.tokenizer import BytePairs, NoVocabulary, PromptError
from minireflect.models.unet import Added
from minireflect.rl.rewards import clip_reward
from minireflect.run import store
from tests.cli.console import run
from tests.models.test_clip import CLIP_H, CLIP_L, similarity
from tests.small import shaken

from .checkpoints import FAMILIES, WORDS, original_file, pipeline, save_original, vocabulary

SIZE = 32  # pixels of the small checkpoints


pytestmark = pytest.mark.usefixtures("no_network")


class Checkpoint(NamedTuple):
    family: str
    theirs: DiffusionPipeline
    folder: Path
    file: Path
    words: Path


OF_EACH = [pytest.param(name, marks=pytest.mark.slow if name == "sd2" else ()) for name in FAMILIES]


@pytest.fixture(scope="module", params=OF_EACH)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkpoint]:
    root = tmp_path_factory.mktemp(request.param)
    theirs = pipeline(request.param, root)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root / "folder")
    file = save_original(theirs, request.param, root / "one.safetensors")
    yield Checkpoint(request.param, theirs, root / "folder", file, root / "words")


def from_file(checkpoint: Checkpoint, path: Path | None = None) -> object:
    """Single files do not say what SD 2.x predicts, nor the size of small pictures."""
    prediction = "v" if checkpoint.family == "sd2" else None
    return load_checkpoint(path or checkpoint.file, Given(None, checkpoint.words, prediction, SIZE))


def close(found: Tensor, expected: Tensor, relative: float = 1e-4) -> bool:
    assert expected.std() > 1e-3  # not a comparison of two constants
    return bool((found - expected).abs().max() <= relative * expected.abs().max())


# --- the same numbers ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_network_equals_diffusers(checkpoint: Checkpoint) -> None:
    theirs, ours = checkpoint.theirs, load_pipeline(checkpoint.folder)
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 981])
    context = torch.randn(2, 77, theirs.unet.config.cross_attention_dim)
    added, kwargs = None, None
    if checkpoint.family == "sdxl":
        added = Added(torch.randn(2, 24), torch.tensor([[32.0, 32, 0, 0, 32, 32], [64, 48, 8, 2, 32, 32]]))
        kwargs = {"text_embeds": added.pooled, "time_ids": added.sizes}
    assert close(ours.unet(x, t, context, added), theirs.unet(x, t, context, added_cond_kwargs=kwargs).sample)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean = theirs.vae.encode(images).latent_dist.mean * theirs.vae.config.scaling_factor
    assert close(ours.autoencoder.encode(images), mean)
    assert close(
        ours.autoencoder.decode(mean), theirs.vae.decode(mean / theirs.vae.config.scaling_factor).sample
    )
    if checkpoint.family == "sdxl":
        hidden, _, pooled, _ = theirs.encode_prompt(WORDS, do_classifier_free_guidance=False)
        assert close(ours.embed(WORDS)[:, :-1], hidden)
        assert close(ours.embed(WORDS)[:, -1, :24], pooled)
    else:
        hidden, _ = theirs.encode_prompt(WORDS, "cpu", 1, do_classifier_free_guidance=False)
        assert close(ours.embed(WORDS), hidden)


@torch.no_grad()
def test_the_picture_is_the_one_that_diffusers_draws(checkpoint: Checkpoint) -> None:
    x_T, texts = torch.randn(2, 4, 16, 16), WORDS[:2]
    expected = checkpoint.theirs(
        texts,
        num_inference_steps=5,
        guidance_scale=7.5,
        latents=x_T,
        output_type="pt",
        height=SIZE,
        width=SIZE,
    ).images
    for ours in (load_pipeline(checkpoint.folder), from_file(checkpoint)):
        found = ours.generate(texts, steps=5, guidance=7.5, eta=0.0, latents=x_T)
        assert expected.std() > 0.1
        assert (found / 2 + 0.5 - expected).abs().max() < 1e-3


def test_both_layouts_give_identical_tensors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = load_checkpoint(checkpoint.folder)
    torch_file = save_original(checkpoint.theirs, checkpoint.family, tmp_path / "one.ckpt")
    for single in (from_file(checkpoint), from_file(checkpoint, torch_file)):
        for part in ("unet", "autoencoder", "text_encoder"):
            a, b = getattr(folder, part).state_dict(), getattr(single, part).state_dict()
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
        assert folder.schedule.config == single.schedule.config


def test_our_original_file_is_one_that_diffusers_reads(checkpoint: Checkpoint) -> None:
    """The oracle for the layout: diffusers converts the file and finds its own tensors again."""
    kind = StableDiffusionXLPipeline if checkpoint.family == "sdxl" else StableDiffusionPipeline
    again = kind.from_single_file(str(checkpoint.file), config=str(checkpoint.folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        a, b = getattr(checkpoint.theirs, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a), part


@torch.no_grad()
def test_half_precision_is_kept_or_asked_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    tensors = original_file(checkpoint.theirs, checkpoint.family)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, file)
    as_stored = from_file(checkpoint, file)
    assert {p.dtype for p in as_stored.unet.parameters()} == {torch.float16}
    assert {p.dtype for p in as_stored.text_encoder.parameters()} == {torch.float16}
    assert {p.dtype for p in as_stored.autoencoder.parameters()} == {
        torch.float32
    }  # SDXL's overflows in half
    asked = load_pipeline(
        file, dtype=torch.bfloat16, tokenizer=checkpoint.words, prediction="epsilon", image_size=SIZE
    )
    assert {p.dtype for p in asked.unet.parameters()} == {torch.bfloat16}
    images = asked.generate(WORDS[:1], 2, 3.0, 0.0)
    assert images.dtype == torch.float32 and images.isfinite().all()


def test_files_in_several_parts_variants_and_torch_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = load_checkpoint(checkpoint.folder)
    checkpoint.theirs.save_pretrained(tmp_path / "parts", max_shard_size="2MB")
    assert weights_file(tmp_path / "parts" / "unet").name.endswith(".safetensors.index.json")
    checkpoint.theirs.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert weights_file(tmp_path / "fp16" / "unet").name == "diffusion_pytorch_model.fp16.safetensors"
    checkpoint.theirs.save_pretrained(tmp_path / "bin", safe_serialization=True)
    for old in (tmp_path / "bin").glob("*/*.safetensors"):
        torch.save(load_file(old), old.with_suffix(".bin"))
        old.unlink()
    for name in ("parts", "fp16", "bin"):
        found = load_checkpoint(tmp_path / name).unet.state_dict()
        assert all(torch.equal(found[n], t) for n, t in expected.unet.state_dict().items()), name


def test_the_empty_prompt_of_sdxl_is_zeros_unless_the_checkpoint_says_otherwise(tmp_path: Path) -> None:
    theirs = pipeline("sdxl", tmp_path)
    theirs.set_progress_bar_config(disable=True)
    x_T = torch.randn(1, 4, 16, 16)
    pictures = []
    for zeros in (True, False):
        theirs.register_to_config(force_zeros_for_empty_prompt=zeros)
        theirs.save_pretrained(tmp_path / str(zeros))
        ours = load_checkpoint(tmp_path / str(zeros))
        with torch.no_grad():
            expected = theirs(
                WORDS[0], num_inference_steps=2, latents=x_T, output_type="pt", height=SIZE, width=SIZE
            ).images
        found = ours.generate(WORDS[:1], 2, 5.0, 0.0, latents=x_T)  # 5.0: diffusers' default for SDXL
        assert (found / 2 + 0.5 - expected).abs().max() < 1e-3
        pictures.append(found)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-2


def test_the_end_token_of_old_configurations_is_a_known_mistake(tmp_path: Path) -> None:
    """They say 2 where CLIP has the last token of its vocabulary; the pooled prompt is read there all the
    same.
    """
    theirs = pipeline("sdxl", tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    expected = load_checkpoint(tmp_path / "sd").embed(WORDS)
    config = tmp_path / "sd" / "text_encoder_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))
    assert torch.equal(load_checkpoint(tmp_path / "sd").embed(WORDS), expected)


# --- prompts ------------------------------------------------------------------------------------------------


def five_hundred() -> list[str]:
    """Plain, Unicode, emoji, empty, blank, very long, special tokens, digits, contractions, control
    characters.
    """
    odd = [
        "",
        " ",
        "\n\t  ",
        "a" * 1000,
        "word " * 300,
        "naïve café über straße",
        "Ångström É é e\u0301 ﬁ ﬀ",
        "猫が椅子の下にいる",
        "кошка под стулом",
        "قطة تحت الكرسي",
        "😀👩‍👩‍👧‍👦🏳️‍🌈 a fox 🦊 riding a 🚲",
        "it's they're I'd we'll don't o'clock 'tis",
        "<|startoftext|> a <|endoftext|> b",
        "<|endoftext|>",
        "x=1;y=2//3 #tag @you $5.00 100% <b>&amp;</b>",
        "1234567890 3.14159",
        "ALL CAPS And MiXeD",
        "tab\tnew\nline\r\nend",
        "zero\u200bwidth\u00a0space\u3000wide",
        "!!!???...---___",
        "İstanbul ǅ ΑΒΓ ß",
        "\x00 \x07 control",
        "e=mc²  ½ ¾ ①②③",
        "A" * 76,
        "the " * 75,
        "the " * 76,
    ]
    letters = "abcdefghijklmnopqrstuvwxyz ABCXYZ 0123456789 .,!?'-éüñ漢字😀🦊\u0301"
    draw = np.random.default_rng(0)
    made = ["".join(draw.choice(list(letters), draw.integers(0, 120))) for _ in range(500 - len(odd))]
    return odd + made


@pytest.fixture(scope="module")
def real_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own 49,408 tokens, from OpenCLIP's copy of the list of merges."""
    folder = tmp_path_factory.mktemp("clip")
    engine = open_clip.tokenizer.SimpleTokenizer()
    (folder / "vocab.json").write_text(
        json.dumps(
            {
                t.replace("<start_of_text>", "<|startoftext|>").replace("<end_of_text>", "<|endoftext|>"): i
                for t, i in engine.encoder.items()
            }
        ),
        "utf-8",
    )
    merges = [" ".join(pair) for pair in engine.bpe_ranks]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    return folder


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("form", ["merges", "json"])
def test_token_ids_equal_transformers(real_vocabulary: Path, tmp_path: Path, form: str) -> None:
    theirs = CLIPTokenizer(
        str(real_vocabulary / "vocab.json"), str(real_vocabulary / "merges.txt"), model_max_length=77
    )
    folder = real_vocabulary
    if form == "json":
        theirs.save_pretrained(tmp_path)
        (tmp_path / "vocab.json").unlink(missing_ok=True)
        folder = tmp_path
    ours, prompts = BytePairs(folder), five_hundred()
    assert len(prompts) == 500 and ours._engine.get_vocab_size() == 49_408
    expected = theirs(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(prompts), expected)


def test_padding_is_the_checkpoints(real_vocabulary: Path) -> None:
    ids = BytePairs(real_vocabulary, pad="!")(["a cat"])[0]
    assert ids[:4].tolist() == [49_406, 320, 2368, 49_407] and not ids[4:].any()
    assert BytePairs(real_vocabulary)(["a cat"])[0, 4:].unique().tolist() == [49_407]


def test_a_long_prompt_is_cut_and_says_what_is_lost(tmp_path: Path) -> None:
    tokenizer = BytePairs(vocabulary(tmp_path), length=6)
    with pytest.warns(UserWarning, match="a prompt has more than 4 tokens; ignored: .*riding a red bicycle"):
        ids = tokenizer(["a photo of a cat riding a red bicycle"])
    assert ids.shape == (1, 6) and ids[0, -1] == tokenizer.eos


def test_a_missing_or_broken_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"neither tokenizer.json nor vocab.json"):
        BytePairs(tmp_path)
    vocabulary(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(PromptError, match=r"cannot be read"):
        BytePairs(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(PromptError, match=r"has no token <\|startoftext\|>"):
        BytePairs(tmp_path)


# --- CLIP ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_clip_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = json.loads((vocabulary(tmp_path) / "vocab.json").read_text("utf-8"))
    theirs = shaken(
        CLIPModel(
            TheirConfig(
                text_config=dict(
                    vocab_size=len(ids),
                    hidden_size=64,
                    intermediate_size=256,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    eos_token_id=len(ids) - 1,
                    hidden_act="gelu",
                ),
                vision_config=dict(
                    image_size=28,
                    patch_size=14,
                    hidden_size=64,
                    intermediate_size=256,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    hidden_act="gelu",
                ),
                projection_dim=32,
            )
        )
    )
    theirs.save_pretrained(tmp_path)
    clip, tokenizer = load_clip(tmp_path)
    assert not clip.config.text.quick_gelu and clip.config.text.heads == 4 and clip.config.vision.heads == 2
    texts, images = tokenizer(WORDS), torch.rand(4, 3, 28, 28) * 2 - 1
    processor = CLIPImageProcessor()
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    expected = theirs(input_ids=texts, pixel_values=((images + 1) / 2 - mean) / std)
    assert close(similarity(clip, images, texts), expected.logits_per_image)
    reward = clip_reward(clip, tokenizer, batch=3)(images, WORDS)
    assert torch.allclose(reward, (expected.image_embeds * expected.text_embeds).sum(1), atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_open_clip_state_dict(tmp_path: Path, quick: bool) -> None:
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=14, image_size=28)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=600, width=64, heads=1, layers=2)
    theirs = shaken(open_clip.CLIP(32, vision, text, quick_gelu=quick))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    about = {
        "model_cfg": {
            "quick_gelu": quick,
            "vision_cfg": {"head_width": 32, "width": 64},
            "text_cfg": {"heads": 1},
        }
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    clip, tokenizer = load_clip(tmp_path)
    ids = torch.randint(1, 590, (3, 77))
    ids[:, 9] = 599  # end of text, the largest of the ids
    images = torch.randn(3, 3, 28, 28)
    config = clip.config.vision
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    seen = images * std + mean  # ours normalises, theirs is given what is normalised
    assert close(clip.encode_image(seen), theirs.encode_image(images, normalize=True))
    assert close(clip.encode_text(ids), theirs.encode_text(ids, normalize=True))
    assert isinstance(tokenizer, NoVocabulary)
    save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, tmp_path / "one.safetensors")
    (tmp_path / "open_clip_config.json").unlink()
    alone, _ = load_clip(tmp_path / "one.safetensors", activation="quick_gelu" if quick else "gelu")
    assert torch.equal(alone.text_projection.weight, clip.text_projection.weight)


@pytest.mark.parametrize("name, ours", [("ViT-L-14", CLIP_L), ("ViT-H-14", CLIP_H)])
def test_open_clip_at_the_published_sizes(name: str, ours: CLIPConfig) -> None:
    """Without weights: the tensors of OpenCLIP's own configuration have our names and shapes."""
    with torch.device("meta"):
        clip = CLIP(ours)
        about = open_clip.get_model_config(name)
        theirs = open_clip.CLIP(about["embed_dim"], about["vision_cfg"], about["text_cfg"])
    tensors = names.open_clip(theirs.state_dict())
    found = {new: tensors[old] for old, new in new_names(tensors, names.OPEN_CLIP).items()}
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in clip.state_dict().items()}
    assert clip.config.vision.width // clip.config.vision.heads == about["vision_cfg"].get("head_width", 64)


# --- what does not fit is named -----------------------------------------------------------------------------


def broken(checkpoint: Checkpoint, tmp_path: Path, change: str) -> Path:
    """A copy of the single file with one tensor of the UNet changed."""
    tensors = load_file(checkpoint.file)
    name = "model.diffusion_model.out.2.bias"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["model.diffusion_model.out.3.bias"] = torch.zeros(4)
    elif change == "stranger":
        tensors["control_model.out.bias"] = torch.zeros(4)
    else:
        tensors[name] = torch.zeros(5)
    save_file(tensors, tmp_path / "broken.safetensors")
    return tmp_path / "broken.safetensors"


@pytest.mark.parametrize(
    "change, told",
    [
        ("missing", r"missing conv_out\.bias \(4,\)"),
        ("extra", r"extra out\.3\.bias \(4,\)"),
        ("misshapen", r"misshapen conv_out\.bias: expected \(4,\), found \(5,\)"),
        ("stranger", r"1 tensors of no known part: control_model\.out\.bias"),
    ],
)
def test_each_mismatch_is_named(checkpoint: Checkpoint, tmp_path: Path, change: str, told: str) -> None:
    with pytest.raises(WeightsError, match=told):
        from_file(checkpoint, broken(checkpoint, tmp_path, change))


def test_a_file_of_something_else_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"not an original file of Stable Diffusion: it has a\.weight"):
        load_pipeline(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(WeightsError, match=r"missing vision.patch.weight"):
        load_clip(tmp_path / "other.safetensors")
    assert "of an unknown kind of network: a.weight" in describe(tmp_path / "other.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.file.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="truncated"):
        load_pipeline(cut)


def test_a_folder_without_a_part_is_an_error(tmp_path: Path) -> None:
    theirs = pipeline("sd1", tmp_path)
    theirs.save_pretrained(tmp_path / "sd")
    config = tmp_path / "sd" / "unet" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"act_fn": "relu"}))
    with pytest.raises(WeightsError, match="asks for act_fn = 'relu'"):
        load_checkpoint(tmp_path / "sd")
    config.write_text("[]")
    with pytest.raises(WeightsError, match=r"config.json must be an object, got \[\]"):
        load_checkpoint(tmp_path / "sd")
    config.write_text(json.dumps(values))
    for file in (tmp_path / "sd" / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(
        WeightsError, match=r"vae has no diffusion_pytorch_model\.safetensors or other file of weights"
    ):
        load_checkpoint(tmp_path / "sd")
    with pytest.raises(WeightsError, match=r"model_index.json is missing"):
        load_checkpoint(tmp_path)


class Payload:
    """Unpickled carelessly, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "evil.ckpt"
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "b": Payload(mark)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    assert b"exec" in path.read_bytes()  # the trap is in the file
    for read in (read_weights, load_pipeline, load_clip):
        with pytest.raises(
            WeightsError, match=r"may run code .* was not opened: .*exec.* use the safetensors file"
        ):
            read(path)
    assert not mark.exists()


def test_an_index_that_lists_what_is_not_there(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "part-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-1.safetensors"}}))
    with pytest.raises(WeightsError, match="lists 1 tensors that its files do not have, such as 'b'"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))
    with pytest.raises(WeightsError, match=r"part-2\.safetensors does not exist"):
        read_weights(index)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="not the index"):
        read_weights(index)


def test_what_a_single_file_does_not_say_is_assumed_aloud(tmp_path: Path) -> None:
    theirs = pipeline("sd2", tmp_path)
    file = save_original(theirs, "sd2", tmp_path / "v2.safetensors")
    with pytest.warns(UserWarning, match="assuming 'v', as SD 2.x at 768 pixels does"):
        pipe = load_checkpoint(file)
    assert pipe.schedule.config.prediction == "v" and pipe.image_size == 768
    with pytest.raises(PromptError, match=r"has no vocabulary for prompts: .* as tokenizer or --tokenizer"):
        pipe.embed(["a cat"])
    (tmp_path / "v2.yaml").write_text("model:\n  params:\n    parameterization: eps\n")
    assert load_checkpoint(file).schedule.config.prediction == "epsilon"


def test_inspect_says_what_is_in_it(checkpoint: Checkpoint) -> None:
    said = describe(checkpoint.folder)
    name = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}[checkpoint.family]
    assert f"{name}, pictures of 32 x 32" in said
    assert re.search(r"unet +\d+ tensors, [\d,]+ parameters, float32: all matched", said)


def test_inspect_is_a_command(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    done = run("inspect", "other.safetensors", "nowhere", cwd=tmp_path)
    assert "1 tensors of an unknown kind of network" in done.stdout
    assert done.returncode == 2 and "nowhere does not exist" in done.stderr and "Traceback" not in done.stderr


# --- micro-batches ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_micro_batches_draw_the_same_pictures(checkpoint: Checkpoint) -> None:
    pipe = load_checkpoint(checkpoint.folder)
    x_T, texts = torch.randn(3, 4, 16, 16), WORDS[:3]
    whole = pipe.generate(texts, 2, 4.0, 0.0, latents=x_T)
    pipe.micro_batch = 2
    seen: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    parts = pipe.generate(texts, 2, 4.0, 0.0, latents=x_T)
    hook.remove()
    assert seen == [4, 2] * 2  # both sides of guidance in one batch
    assert torch.allclose(whole, parts, atol=1e-4)


def test_a_picture_that_is_not_finite_is_an_error(checkpoint: Checkpoint) -> None:
    pipe = load_checkpoint(checkpoint.folder)
    nn.init.constant_(pipe.autoencoder.decoder.conv_out.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="a picture is not a finite number"):
        pipe.decode(torch.zeros(1, 4, 16, 16))


def test_each_part_of_a_checkpoint_is_described_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        folder = checkpoint.folder / part
        for path in () if not folder.exists() else (folder, *folder.glob("*.safetensors")):
            kind = part.removesuffix("_2")
            assert describe(path).startswith(f"{path}: the {kind} of a Stable Diffusion checkpoint, ")
            assert describe(path).endswith("all matched")
    assert "the scheduler of a Stable Diffusion checkpoint\n  " in describe(checkpoint.folder / "scheduler")
    assert re.search(r": a vocabulary of \d+ tokens", describe(checkpoint.folder / "tokenizer"))
    assert "actor.safetensors: Actor of minireflect" in describe(RIG)  # each file of a folder of ours
    with pytest.raises(WeightsError, match="it has no files"):
        describe(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(WeightsError, match="it has notes"):
        describe(tmp_path)


def test_the_state_of_a_training_is_described(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    store(tmp_path / "s.safetensors", 7, {"net": net}, torch.optim.SGD(net.parameters()), {})
    assert "the state of a training after 7 steps" in describe(tmp_path / "s.safetensors")
