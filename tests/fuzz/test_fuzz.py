"""Inputs that nobody meant: each ends well or in one sentence of ours, within five seconds.

pytest tests/fuzz                                            25 inputs of each kind
FUZZ=10000 pytest -m "" -n0 --hypothesis-seed=1 tests/fuzz   10,000 of each kind, or another number
"""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minireflect.checkpoints.files import read_metadata, read_weights
from minireflect.checkpoints.load import load_checkpoint
from minireflect.checkpoints.lora import read_lora
from minireflect.checkpoints.ours import describe, load_module, save_module
from minireflect.cli import sentence
from minireflect.cli.train import defaults, parse
from minireflect.config import preset, read_config, to_dict
from minireflect.models.autoencoder import Autoencoder
from minireflect.models.clip import Matcher, MatcherConfig
from minireflect.models.tokenizer import Tokenizer
from minireflect.ranges import MESSAGE
from minireflect.streams import choices
from minireflect.world.graphs import parse_graph
from minireflect.world.layout import lay_out
from minireflect.world.prompts import all_texts, understand
from minireflect.world.published import from_laion_sg

GOOD = (ValueError, OSError, ImportError, FloatingPointError)
NUMBER = int(os.environ.get("FUZZ", "25"))
SECONDS = 5  # of the processor
FUZZ = settings(
    max_examples=NUMBER, deadline=None, derandomize=NUMBER == 25, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def ends_well(work: Callable[[], object]) -> None:
    """The work passes, or is refused in a sentence; `SystemExit` is how a help ends."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except GOOD as error:
        said = sentence(error) if isinstance(error, OSError) else str(error)  # Python's has the whole path
        assert said.strip() and len(said) <= MESSAGE + 10, f"{type(error).__name__} of {len(said)} characters"
        assert max(map(len, said.split("\n"))) <= 310, said
        assert all(c.isprintable() or c == "\n" for c in said), repr(said)
    except SystemExit as end:
        assert end.code == 0
    assert time.process_time() - began < SECONDS


# fmt: off
WORDS = st.sampled_from([
    "a", "red", "blue", "ball", "box", "on", "left", "of", "and", "two", "tall", "candle", "in",
    "still", "air", ";", ",", ".", "$", "1e9", "-1",
])
# fmt: on
TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(WORDS | st.text(max_size=8), max_size=12).map(" ".join),
    st.builds(lambda text, n: text * n, st.text(min_size=1, max_size=5), st.integers(1, 20_000)),
)  # fmt: skip
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from((10**400, -(2**63), 1e308))
)  # fmt: skip
JSON = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
RAW = st.one_of(
    st.just("[" * 100_000), st.just('{"a":' * 900 + "1" + "}" * 900), st.just("NaN"), st.text(max_size=40)
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in inner for p in places(v, (*path, key)))]


@st.composite
def tampered(draw: st.DrawFn, whole: Any) -> str:
    """A JSON text with one or two values replaced, removed or added; or no JSON at all."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([p for p in places(whole) if p] or [("x",)]))
        part = whole
        for key in path:
            part = part[key]
        how = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if how == "remove":
            del part[last]
        elif how == "add" and isinstance(part, dict):
            part[draw(TEXT)] = draw(JSON)
        else:
            part[last] = draw(JSON)
        if not isinstance(whole, dict) or not whole:
            break
    text = json.dumps(whole)
    return draw(st.one_of(st.just(text), st.just(text), st.just(text), st.just(text[: len(text) // 2]), RAW))


@cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="minireflect-fuzz-"))
    return path


@cache
def world() -> Tokenizer:
    return Tokenizer.of(all_texts(), 32)


@FUZZ
@given(TEXT)
def test_prompts(text: str) -> None:
    ends_well(lambda: world()([text]))
    ends_well(lambda: understand(text))


SG = {
    "items": [{"item_id": 0, "label": "red ball", "attributes": []}, {"item_id": 1, "label": "blue box"}],
    "relations": [{"item1": 0, "relation": "on", "item2": 1}],
}


@FUZZ
@given(TEXT, tampered(SG))
def test_graphs(text: str, annotation: str) -> None:
    ends_well(lambda: lay_out(parse_graph(text), choices(0, "fuzz"), tries=3))
    ends_well(lambda: lay_out(from_laion_sg(annotation), choices(0, "fuzz"), tries=3))


RUN = {"weights": None, **to_dict(preset("smoke"))}


@FUZZ
@given(tampered(RUN))
def test_configurations(text: str) -> None:
    (folder() / "config.json").write_text(text, errors="replace")
    ends_well(lambda: read_config(folder()))


@cache
def ours() -> Path:
    path, sizes = (
        folder() / "matcher.safetensors",
        MatcherConfig(20, 1, 8, width=8, layers=1, heads=2, stem=(8, 8)),
    )
    save_module(path, Matcher(sizes), {"words": " ".join(f"w{i}" for i in range(18))})
    return path


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes that are cut, flipped, doubled, or others."""
    if draw(st.booleans()):
        return whole[: draw(st.integers(0, len(whole)))]
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        found[draw(st.integers(0, min(len(found), draw(st.sampled_from((200, len(found))))) - 1))] = draw(
            st.integers(0, 255)
        )
    return bytes(found)


@FUZZ
@given(st.data())
def test_weight_files(data: st.DataObject) -> None:
    path, broken = ours(), folder() / "broken.safetensors"
    about, tensors = read_metadata(path), load_file(path)
    if data.draw(st.booleans()):
        broken.write_bytes(data.draw(damaged(path.read_bytes())))
    else:
        about["config"] = data.draw(tampered(json.loads(about["config"])))
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensors[name] = data.draw(st.sampled_from((tensors[name], *odd_tensors())))
        save_file(tensors, broken, {k: v.encode(errors="replace").decode() for k, v in about.items()})
    ends_well(lambda: load_module(broken, Matcher))
    ends_well(lambda: load_module(broken, Autoencoder))
    ends_well(lambda: describe(broken))


def odd_tensors() -> list[torch.Tensor]:
    shapes = ((), (0,), (1,), (5,), (3, 0), (2, 3), (1, 1, 1, 1))
    return [torch.zeros(shape, dtype=dtype) for shape in shapes for dtype in (torch.float32, torch.int64)]


LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NAMES = st.sampled_from([f"{LAYER}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")]) | st.text(
    max_size=30
)


@FUZZ
@given(st.dictionaries(NAMES, st.sampled_from(odd_tensors()), max_size=4), st.data())
def test_lora_files(tensors: dict[str, torch.Tensor], data: st.DataObject) -> None:
    whole = {f"{LAYER}.lora_A.weight": torch.ones(4, 8), f"{LAYER}.lora_B.weight": torch.ones(8, 4)}
    about = {"unet.r": 4, "unet.lora_alpha": 8.0, "down.0.layers.0.attn.blocks.0.self_attn.q": 1.0}
    key = data.draw(st.sampled_from(("lora_adapter_metadata", "minireflect_alphas", "format")))
    text = data.draw(tampered(about)).encode(errors="replace").decode()
    named = {k.encode(errors="replace").decode(): t.clone() for k, t in {**whole, **tensors}.items()}
    save_file(named, folder() / "lora.safetensors", {key: text})
    ends_well(lambda: read_lora(folder() / "lora.safetensors"))


@cache
def torch_files() -> list[bytes]:
    """A torch file as it is written today, and one as before torch 1.6."""
    files = []
    for new in (True, False):
        torch.save(
            {"a": torch.ones(3), "b": {"c": torch.zeros(2, 2)}},
            folder() / "x.pt",
            _use_new_zipfile_serialization=new,
        )
        files.append((folder() / "x.pt").read_bytes())
    return files


@FUZZ
@given(st.data())
def test_torch_files(data: st.DataObject) -> None:
    (folder() / "x.ckpt").write_bytes(data.draw(damaged(data.draw(st.sampled_from(torch_files())))))
    ends_well(lambda: read_weights(folder() / "x.ckpt"))


# fmt: off
OPTIONS = st.sampled_from([
    "srrl", "rlrig", "autoencoder", "vq", "reason-grpo", "all", "--lr", "--steps", "--preset",
    "--seed", "--out", "--weights", "--device", "--guidance", "--group", "--objective",
    "--loop.t-star", "--suffixes", "--evaluation.pictures", "--resume", "--help", "--base",
    "--method", "--scenes", "--stop-on-collapse", "--no-controls", "smoke", "cpu", "x", "0", "-1",
    "nan", "inf", "1e400", "1e30", "true", "None",
])
# fmt: on


@FUZZ
@given(st.lists(OPTIONS | OPTIONS | TEXT, max_size=6))
def test_command_lines(words: list[str]) -> None:
    named = (
        words[0]
        if words and words[0] in ("srrl", "rlrig", "autoencoder", "vq", "reason-grpo", "all")
        else None
    )
    words = words[1:] if named else words
    ends_well(lambda: parse(words, defaults(named, words)))


@cache
def diffusers_folder() -> Path:
    from tests.parity.checkpoints import pipeline

    path = folder() / "sd1"
    pipeline("sd1", folder() / "tmp").save_pretrained(path)
    return path


@pytest.mark.slow  # imports diffusers, and loads a pipeline for every input
@settings(FUZZ, max_examples=max(25, NUMBER))
@given(st.data())
def test_checkpoint_folders(data: st.DataObject) -> None:
    path = diffusers_folder()
    file = data.draw(st.sampled_from(sorted(p for p in path.rglob("*") if p.is_file())))
    kept = file.read_bytes()
    try:
        if file.suffix == ".json" and len(kept) < 10_000:
            file.write_text(data.draw(tampered(json.loads(kept))), errors="replace")
        elif file.suffix == ".safetensors" and data.draw(st.booleans()):
            tensors = load_file(file)
            name = data.draw(st.sampled_from(sorted(tensors)))
            tensors[name] = data.draw(st.sampled_from(odd_tensors())).clone()
            save_file(tensors, file)
        else:
            file.write_bytes(data.draw(damaged(kept)))
        ends_well(lambda: load_checkpoint(path))
    finally:
        file.write_bytes(kept)


def teardown_module() -> None:
    shutil.rmtree(folder())
