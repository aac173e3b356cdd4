"""SRRL on a checkpoint: what is handed on to loading, rewards and training, which are stubs here.

tests/parity/test_finetune.py has checkpoints.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minireflect import rng
from minireflect.checkpoints.load import Given
from minireflect.methods import finetune as module
from minireflect.methods.finetune import FinetuneConfig, chosen_reward, draw_from, finetune, load_base
from minireflect.methods.srrl import SRRLConfig
from minireflect.models.lora import LoRAConfig
from minireflect.pipeline import LatentDiffusion
from minireflect.run import Job, Run
from tests.small import TEXTS, small_pipeline

CPU = torch.device("cpu")


def test_the_base_gets_all_options(monkeypatch: pytest.MonkeyPatch) -> None:
    told, pipe = [], small_pipeline()
    monkeypatch.setattr(module, "load_checkpoint", lambda *given: told.append(given) or pipe)
    monkeypatch.setattr(LatentDiffusion, "to", lambda self, device: self)
    how = {"tokenizer": "words", "vae": "vae", "prediction": "v"}
    rest = {"negative": "a red ball", "clip_skip": 1, "micro_batch": 3, "checkpointing": True}
    found = load_base(FinetuneConfig(base="x", size=(8, 16), precision="fp16", **how, **rest), CPU)
    assert told.pop() == ("x", Given(torch.float16, image_size=(8, 16), **how))
    assert (found.negative, found.clip_skip, found.micro_batch) == ("a red ball", 1, 3)
    assert found.unet.checkpointing
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        load_base(FinetuneConfig(base="x", size=(8,)), torch.device(device))
        assert told.pop() == ("x", Given(dtype, image_size=8)) and not pipe.unet.checkpointing


@pytest.mark.parametrize(
    ("reward", "source", "made"),
    [
        ("clip", "C", ("clip", False)),
        ("pickscore=P", "P", ("clip", True)),
        ("hps=H", "H", ("clip", True)),
        ("aesthetic=A", "C", ("aesthetic", "weights of A", "A")),
    ],
)
def test_a_reward_reads_its_own_clip(
    reward: str, source: str, made: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the vocabulary and the activation that are given; only CLIP's own reward is not scaled."""
    told, clip, words = [], SimpleNamespace(to=lambda device: clip), lambda prompts: None
    monkeypatch.setattr(module, "load_clip", lambda *given: told.append(given) or (clip, words))
    monkeypatch.setattr(module, "read_weights", lambda path: f"weights of {path}")
    monkeypatch.setattr(module, "clip_reward", lambda _, __, scaled: ("clip", scaled))
    monkeypatch.setattr(module, "aesthetic_reward", lambda _, *head: ("aesthetic", *head))
    config = FinetuneConfig(base="x", reward=(reward,), clip="C", tokenizer="words", clip_activation="gelu")
    assert chosen_reward(config, CPU) == made and told == [(source, "words", "gelu")]


def test_prompts_depend_on_the_seed_and_the_iteration() -> None:
    drawn = {(seed, step): draw_from(TEXTS, seed, 8)(step)[0] for seed in (0, 1) for step in (0, 1)}
    assert len(set(map(tuple, drawn.values()))) == 4 and {t for v in drawn.values() for t in v} == {*TEXTS}


def test_weights_and_pictures_are_saved_before_every_second_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of the first four prompts as in training, but without step noise, and of the same noise."""
    saved, shown, drawn, made, pipe = [], [], [], [], small_pipeline()
    monkeypatch.setattr(module, "save_lora", lambda path, unet: saved.append((path.name, len(drawn))))
    monkeypatch.setattr(
        module, "write_picture", lambda picture, path: shown.append((path.name, picture.shape))
    )
    monkeypatch.setattr(
        module, "add_lora", lambda unet, lora, noise: made.append((lora, noise.initial_seed()))
    )

    def generated(prompts: list[str], steps: int, guidance: float, eta: float, generator: torch.Generator):
        made.append((prompts, steps, guidance, eta, generator.initial_seed()))
        return torch.zeros(4, 3, 8, 8)

    def trained(config: SRRLConfig, pipe: LatentDiffusion, reward, texts, inspector: None, job: Job) -> None:
        drawn.extend(texts(step) for step in range(5))
        assert inspector is None

    monkeypatch.setattr(pipe, "generate", generated), monkeypatch.setattr(module, "train_srrl", trained)
    (tmp_path / "prompts.txt").write_text("\n".join([*TEXTS, "a tree"]))
    lora, srrl = LoRAConfig(rank=3), SRRLConfig(prompts_per_iteration=6, steps=7, guidance=2.5)
    config = FinetuneConfig(base="x", prompts=str(tmp_path / "prompts.txt"), lora=lora, every=2)
    finetune(config, srrl, pipe, None, Job(Run(tmp_path / "run", {}), 5))
    assert [name for name, _ in saved] == ["lora_2.safetensors", "lora_4.safetensors", "lora.safetensors"]
    assert shown == [(f"samples_{step}.png", (8, 32, 3)) for step in (2, 4)]
    assert made[0] == (lora, rng(5, "lora").initial_seed())
    assert made[1:] == [(TEXTS, 7, 2.5, 0.0, rng(5, "shown").initial_seed())] * 2
    draw = draw_from([*TEXTS, "a tree"], 5, 6)
    assert drawn == [draw(step) for step in range(5)] and drawn[0][0] == drawn[0][1]
