"""SRRL on a real checkpoint's layout: the reward rises, half precision and parts change nothing that they
should not.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel

from minireflect import figures
from minireflect.checkpoints.load import Given, load_checkpoint
from minireflect.evaluate import EvaluationConfig, Score, evaluate_rewards
from minireflect.methods import learn as learning
from minireflect.methods.finetune import (
    FinetuneConfig,
    chosen_reward,
    draw_from,
    finetune,
    load_base,
    read_prompts,
)
from minireflect.methods.learn import HALF_SCALE, Learner, learn
from minireflect.methods.rollout import Rollout, rollout
from minireflect.methods.srrl import SRRLConfig, recipe
from minireflect.models.lora import LoRAConfig, add_lora, lora_layers
from minireflect.models.tokenizer import PromptError
from minireflect.pipeline import LatentDiffusion, SamplerConfig
from minireflect.rl.rewards import incompressibility
from minireflect.run import Job, Run, read_metrics
from minireflect.streams import rng
from tests.cli.console import refused, run
from tests.parity.checkpoints import WORDS, pipeline, trainable, vocabulary
from tests.small import shaken

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(autouse=True)
def noisy_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four denoising steps train the noisiest: with few steps the others move by much more than their
    noise.
    """
    monkeypatch.setattr(learning, "MIN_SIGMA", 0.3)
    monkeypatch.setattr(learning, "WARMUP", 2)


QUICK = replace(
    recipe("srrl", checkpoint=True),
    iterations=20,
    prompts_per_iteration=2,
    group=24,
    steps=4,
    renoise_steps=4,
    guidance=1.0,
    w_renoise=0.0,
    lr=2e-2,
    clip_range=3e-2,
    cooldown=0.0,
)
TEXTS = WORDS[:2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainable(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "two.txt"
    path.write_text("# two of them\n\n" + "\n".join(TEXTS) + "\n")
    return path


def with_lora(base: Path, dtype: torch.dtype = torch.float32, micro_batch: int = 0) -> LatentDiffusion:
    pipe = load_checkpoint(base, Given(dtype))
    add_lora(pipe.unet, LoRAConfig(), rng(0, "lora"))
    pipe.micro_batch = micro_batch
    return pipe


PPO = replace(QUICK, objective="ppo", updates=1)


def one_update(
    pipe: LatentDiffusion, config: SRRLConfig
) -> tuple[dict[str, torch.Tensor], float | None, Rollout]:
    """Rollout and one iteration of updates.  -> the adapters after it, `first_ratio`, what was drawn"""
    learner = Learner(pipe, replace(config, lr=1.0), config.guidance, 64)
    trained = learner.networks["unet"]
    learner.optimizer = torch.optim.SGD(trained.parameters())
    drawn = rollout(pipe, TEXTS, incompressibility, config, 0, 0)
    stats = learn(learner, drawn, 1.0, rng(0, "update"))
    return trained.state_dict(), stats.first_ratio, drawn


@pytest.mark.rare
@pytest.mark.slow
def test_the_reward_rises_on_incompressibility(base: Path, prompts: Path, tmp_path: Path) -> None:
    """K = 1, 20 iterations; the same 64 noises before and after, with the sampler alone."""
    given = {"base": str(base), "prompts": str(prompts), "micro_batch": 24}
    config = FinetuneConfig(reward=("incompressibility",), **given)
    run, pipe = Run(tmp_path / "run", {}), load_base(config, torch.device("cpu"))
    before = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")

    def kilobytes() -> Score:
        texts, sampler = TEXTS * 32, SamplerConfig(4, 1.0, 1.0)
        config = EvaluationConfig(batch=24)
        return evaluate_rewards(pipe, incompressibility, texts, sampler, config)[1]

    first = kilobytes()
    finetune(config, replace(QUICK, objective="regress"), pipe, incompressibility, Job(run))
    last = kilobytes()
    assert last["reward"] > first["reward"] + 4 * (first["reward_se"] ** 2 + last["reward_se"] ** 2) ** 0.5
    rows = run.metrics("srrl")
    assert all(len(r["reward_by_round"]) == 2 and r["first_ratio"] is None for r in rows)
    assert (tmp_path / "run" / "weights" / "lora.safetensors").stat().st_size < 200_000
    ours = load_checkpoint(base).unet.state_dict()
    assert len(before) == len(ours)
    assert all(torch.equal(pipe.unet.state_dict()[n], t) for n, t in ours.items())  # frozen


@pytest.mark.parametrize("objective", ["ppo", "regress"])
def test_in_parts_the_update_is_the_same(base: Path, objective: str) -> None:
    config = replace(QUICK, group=3, objective=objective, batch=6, updates=1)
    (whole, a, _), (split, b, _) = (one_update(with_lora(base, micro_batch=m), config) for m in (0, 2))
    assert a == b == (0.0 if objective == "ppo" else None)
    moved = [n for n in whole if n.endswith("B") and whole[n].any()]
    assert len(moved) == len(lora_layers(with_lora(base).unet))
    for name in moved:
        assert (whole[name] - split[name]).abs().max() < 1e-3 * whole[name].abs().max() + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_other_families_learn_too(family: str, tmp_path: Path) -> None:
    """v-prediction, and two text encoders with a pooled prompt, through rollout, reflection and update."""
    pipeline(family, tmp_path).save_pretrained(tmp_path / "sd")
    pipe = with_lora(tmp_path / "sd", micro_batch=2)
    before = load_checkpoint(tmp_path / "sd").unet.state_dict()
    after, first_ratio, _ = one_update(pipe, replace(PPO, group=2, guidance=2.0, batch=4))
    assert first_ratio == 0.0
    assert all(t.isfinite().all() for t in after.values()) and any(
        t.any() for n, t in after.items() if n.endswith("B")
    )
    assert all(torch.equal(pipe.unet.state_dict()[n], t) for n, t in before.items())  # frozen


def test_parts_are_those_that_were_drawn(base: Path) -> None:
    """Each part has its own backward pass, or memory would hold the graph of all."""
    pipe = with_lora(base, micro_batch=4)
    learner = Learner(pipe, QUICK, QUICK.guidance, 10)
    assert learner.parts(10) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    seen: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with torch.no_grad():
        pipe.eps(["a"] * 10)(1.0)(torch.randn(10, 4, 8, 8), torch.tensor(500))
    assert seen == [4, 4, 2]
    pipe.micro_batch = 0
    assert learner.parts(10) == [slice(0, 10)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_in_half_precision_the_first_ratio_is_one_and_latents_are_float32(
    base: Path, dtype: torch.dtype
) -> None:
    pipe = with_lora(base, dtype, micro_batch=2)
    config = replace(PPO, group=3, batch=6)
    after, first_ratio, out = one_update(pipe, config)
    path = out.rounds[0].path
    assert path.latents.dtype == path.log_probs.dtype == torch.float32
    assert first_ratio == 0.0
    full = one_update(with_lora(base), config)[0]
    a, b = (torch.cat([v[n].flatten() for n in sorted(v) if n.endswith("B")]) for v in (after, full))
    assert torch.cosine_similarity(a, b, dim=0) > 0.5  # rollouts differ by rounding; the direction must not


def test_float16_gradients_are_scaled_and_scaled_back() -> None:
    half = torch.nn.Linear(1, 1, bias=False).half()
    half.weight = torch.nn.Parameter(half.weight.detach(), requires_grad=False)
    half.added = torch.nn.Parameter(torch.zeros(1))
    loss = (1e-9 * half.added.half().float()).sum()  # a gradient that float16 cannot hold
    optimizer = torch.optim.SGD([half.added], lr=1.0)
    learner = Learner(SimpleNamespace(unet=half), SRRLConfig(objective="ppo"), 1.0, 1)
    learner.optimizer = optimizer
    learner.backward(loss)
    assert half.added.grad.item() == pytest.approx(1e-9 * HALF_SCALE, rel=1e-2)
    assert learner.step() == pytest.approx(1e-9, rel=1e-2)


def test_checkpointing_changes_no_gradient(base: Path) -> None:
    config = replace(QUICK, group=2, updates=1, batch=4)
    results = []
    for checkpointing in (False, True):
        pipe = with_lora(base)
        pipe.unet.checkpointing = checkpointing
        results.append(one_update(pipe, config)[0])
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


# --- options ------------------------------------------------------------------------------------------------


def test_prompts_come_from_a_file_or_from_ours(prompts: Path, tmp_path: Path) -> None:
    assert read_prompts(str(prompts)) == TEXTS
    for name in ("animals", "colours", "relations", "physical_law", "counter_intuitive"):
        lines = read_prompts(name)
        assert len(lines) >= 20 and len(set(lines)) == len(lines)
    with pytest.raises(PromptError, match="shipped ones are animals, colours, counter_intuitive"):
        read_prompts("nowhere")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(ValueError, match=r"empty.txt has no prompt 1: .* or a prompt a line"):
        read_prompts(str(empty))
    empty.write_bytes("a red ball".encode("utf-16-le"))
    with pytest.raises(ValueError, match="not a text file in UTF-8: it has a NUL"):
        read_prompts(str(empty))
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_prompts(str(empty))
    for name, text, said in [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": " "}', "has no prompt 2: not GenEval's"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3 of .* is not JSON"),
        ("a.csv", "Prompts,Category\na,b\n,\n", "has no prompt 2"),
        ("a.csv", "", "needs one column Prompts"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=said):
            read_prompts(str(tmp_path / name))
    empty.write_bytes(b"a cat\ra dog\r")  # the ends of lines of an old Mac
    assert read_prompts(str(empty)) == ["a cat", "a dog"]


def test_prompts_are_drawn_anew_each_step_and_again_the_same() -> None:
    draw = draw_from(read_prompts("animals"), 0, 8)
    assert draw(3) == draw(3) and draw(3) != draw(4)
    texts, families = draw(0)
    assert texts == families and len(texts) == 8


def test_clip_is_the_reward_where_there_is_one(tmp_path: Path) -> None:
    ids = json.loads((vocabulary(tmp_path) / "vocab.json").read_text("utf-8"))
    text = dict(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=len(ids) - 1,
    )
    vision = dict(
        image_size=28,
        patch_size=14,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))).save_pretrained(
        tmp_path
    )
    reward = chosen_reward(FinetuneConfig(base="x", clip=str(tmp_path)), torch.device("cpu"))
    values = reward(torch.rand(2, 3, 40, 40) * 2 - 1, TEXTS)  # any size of picture
    assert values.shape == (2,) and (values.abs() <= 1).all() and values[0] != values[1]
    with pytest.raises(ValueError, match="needs --clip PATH"):
        chosen_reward(FinetuneConfig(base="x"), torch.device("cpu"))


def test_the_base_is_loaded_as_asked(base: Path) -> None:
    pipe = load_base(
        FinetuneConfig(base=str(base), precision="bf16", micro_batch=3, size=(64,)), torch.device("cpu")
    )
    assert next(pipe.unet.parameters()).dtype == torch.bfloat16
    assert pipe.micro_batch == 3 and pipe.latent_shape == (4, 16, 16)


# --- the command line ---------------------------------------------------------------------------------------

SMALL = [
    "--steps",
    "3",
    "--renoise-steps",
    "3",
    "--prompts-per-iteration",
    "2",
    "--group",
    "2",
    "--evaluation.pictures",
    "2",
    "--iterations",
    "2",
    "--cooldown",
    "0",
    "--sampler.steps",
    "3",
]


@pytest.mark.slow
def test_train_resume_and_sample_from_the_command_line(base: Path, prompts: Path, tmp_path: Path) -> None:
    words = [
        "srrl",
        "--base",
        str(base),
        "--reward",
        "incompressibility",
        "--prompts",
        str(prompts),
        *SMALL,
        "--device",
        "cpu",
    ]
    done = run("train", *words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "base" in done.stdout and "SRRL" in done.stdout and "pictures an hour" in done.stdout
    assert "layers with LoRA" in (tmp_path / "run" / "table.md").read_text()
    figures = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
    assert figures == {"reward.png", "latents_by_round.png", "before_and_after.png"}
    expected = load_file(tmp_path / "run" / "weights" / "lora.safetensors")
    half = [*words, "--out", "half"]
    half[half.index("--iterations") + 1] = "1"
    assert run("train", *half, cwd=tmp_path).returncode == 0
    config = (
        tmp_path / "half" / "config.json"
    )  # as if the longer run had been stopped after its first iteration
    values = json.loads(config.read_text())
    values["srrl"]["iterations"] = 2
    config.write_text(json.dumps(values))
    (tmp_path / "half" / "state" / "lora.done").unlink()
    again = run("train", "--resume", "--out", "half", "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    found = load_file(tmp_path / "half" / "weights" / "lora.safetensors")
    rows = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["stage"] == "srrl"] == [0, 1]
    assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
    drawn = run(
        "sample",
        "--base",
        str(base),
        "--lora",
        "run/weights/lora.safetensors",
        "a cat",
        "a dog",
        "--steps",
        "2",
        "--out",
        "x.png",
        cwd=tmp_path,
    )
    assert drawn.returncode == 0 and (tmp_path / "x.png").exists(), drawn.stderr
    strip = run(
        "sample",
        "--base",
        str(base),
        "a cat",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--out",
        "y.png",
        cwd=tmp_path,
    )
    assert strip.returncode == 0 and (tmp_path / "y.png").exists(), strip.stderr


BAD = {
    "no such base": (
        ["srrl", "--base", "nowhere", "--reward", "compressibility"],
        ("there is no checkpoint", "nowhere"),
    ),
    "no base after it": (["srrl", "--base"], ("--base needs a text",)),
    "no reward after it": (["srrl", "--base", ".", "--reward"], ("--reward '' is not [WEIGHT*]NAME",)),
    "a negative prompt that is not used": (
        [
            "--base",
            ".",
            "--method",
            "grpo",
            *["--guidance", "1", "--sampler.guidance", "1", "--negative", "x"],
        ],
        ("--negative has no effect with guidance 1",),
    ),
    "another command": (["diffusion", "--base", "."], ("use it with the command srrl",)),
    "clip without CLIP": (["srrl", "--base", "."], ("needs --clip PATH",)),
    "no such prompts": (
        ["srrl", "--base", ".", "--reward", "compressibility", "--prompts", "nowhere"],
        ("there is no file of prompts nowhere",),
    ),
    "a rank of 0": (["srrl", "--base", ".", "--lora.rank", "0"], ("rank must be at least 1",)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_to_train_is_one_sentence(tmp_path: Path, what: str) -> None:
    words, parts = BAD[what]
    refused(run("train", *words, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_sample_is_one_sentence(base: Path, tmp_path: Path) -> None:
    refused(
        run("sample", "--base", str(tmp_path / "nowhere"), "a cat", cwd=tmp_path), "there is no checkpoint"
    )
    refused(
        run("sample", "--lora", "x", "a red ball", cwd=tmp_path), "--lora has no effect here; try --base PATH"
    )
    refused(
        run("sample", "--base", str(base), "a cat", "--size", "33", cwd=tmp_path), "33 is not a multiple of 8"
    )
    refused(
        run("sample", "--base", str(base), "--lora", "nowhere", "a cat", cwd=tmp_path),
        "nowhere does not exist",
    )
    (tmp_path / "many.txt").write_text("a cat")
    for words in (["many.txt"], ["a cat", "many.txt", "--out", "folder"]):
        said = "'many.txt' is a file of prompts: give it alone, with --out FOLDER"
        refused(run("sample", "--base", str(base), *words, cwd=tmp_path), said)


def test_exported_prompts_may_be_longer_than_the_name_of_a_file(base: Path, tmp_path: Path) -> None:
    texts = ["a cat " * 50, "a dog"]
    few = ["--base", str(base), "--steps", "1", "--each", "1", "--out", "folder"]
    done = run("sample", *few, *texts, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "folder" / "settings.json").read_text())["prompts"] == texts


def test_an_export_has_the_rounds_that_its_settings_state(base: Path, tmp_path: Path) -> None:
    words = ["sample", "--base", str(base), "--steps", "1", "--each", "2", "a cat"]
    ways = {
        "plain": [], "again": ["--rounds", "0"], "round": ["--rounds", "1"],
        "other": ["--rounds", "1", "--blind", "--w-renoise", "3"],
    }  # fmt: skip
    seen = {}
    for folder, more in ways.items():
        assert run(*words, "--out", folder, *more, cwd=tmp_path).returncode == 0
        seen[folder] = (tmp_path / folder / "00000" / "samples" / "0001.png").read_bytes()
    assert seen["plain"] == seen["again"] and len({*seen.values()}) == 3
    assert json.loads((tmp_path / "round" / "settings.json").read_text())["rounds"] == 1


@pytest.mark.slow
def test_a_training_whose_reward_fails_can_be_resumed(base: Path, prompts: Path, tmp_path: Path) -> None:
    good = "def mine(images, prompts):\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "leaving.py").write_text("import sys\ndef mine(images, prompts):\n    sys.exit(3)\n")
    bad = "n = []\n" + good.replace("return", "n.append(1)\n    return 1 / (len(n) < 7) *")
    words = ["srrl", "--base", str(base), "--prompts", str(prompts), *SMALL, "--device", "cpu"]
    left = run("train", *words, "--reward", "leaving:mine", "--out", "run", cwd=tmp_path)
    assert left.returncode == 1 and "--reward leaving:mine raised SystemExit: 3" in left.stderr, left.stderr
    (tmp_path / "failing.py").write_text(bad)
    done = run("train", *words, "--reward", "failing:mine", "--out", "run", cwd=tmp_path)
    said = "--reward failing:mine raised ZeroDivisionError: division by zero, in step 1 of srrl; the saved"
    assert done.returncode == 1 and said in done.stderr and "in mine" in done.stderr, done.stderr
    assert (tmp_path / "run" / "weights" / "lora.safetensors").exists()
    (tmp_path / "failing.py").write_text(good)
    sys.modules.pop("failing")
    again = run("train", "--resume", "--out", "run", "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    (tmp_path / "failing.py").write_text(bad.replace("7", "0"))
    sys.modules.pop("failing")
    first = run("train", *words, "--reward", "failing:mine", "--out", "first", cwd=tmp_path)
    assert first.returncode == 1 and "raised ZeroDivisionError" in first.stderr
    (tmp_path / "failing.py").write_text(good.replace("images.mean", "float('nan') * images.mean"))
    sys.modules.pop("failing")
    none = run("train", *words, "--reward", "failing:mine", "--out", "first", cwd=tmp_path)
    assert none.returncode == 1 and none.stderr.splitlines()[-1].endswith("is not a finite number"), (
        none.stderr
    )
    assert not (tmp_path / "first").exists()


@pytest.mark.slow
def test_several_rewards_are_measured_and_shown_as_their_plain_sum(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised within a prompt, as they are learnt from, they would be 0 on average."""
    (tmp_path / "twofold.py").write_text(
        "def one(images, prompts):\n    return [1.0] * len(images)\n"
        "def three(images, prompts):\n    return [3.0] * len(images)\n"
    )
    said = []  # the rows of a figure
    monkeypatch.setattr(figures, "strip", lambda rows, *_, **how: said.extend(rows))
    words = ["srrl", "--base", str(base), "--prompts", str(prompts), *SMALL, "--iterations", "1"]
    words += ["--device", "cpu", "--reward", "twofold:one", "2*twofold:three", "--out", "run"]
    refused(run("train", *words, "--group", "1", cwd=tmp_path), "--group 1 leaves nothing to compare")
    one_reward = "--objective regress takes one reward without a weight, which is never negative"
    for more in ([], ["--reward", "compressibility"]):
        refused(run("train", *words, *more, "--objective", "regress", cwd=tmp_path), one_reward)
    done = run("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(tmp_path / "run")
    assert [row["score"]["reward"] for row in rows if row["stage"] == "evaluation"] == [7.0, 7.0]
    assert [row["reward"] for row in rows if row["stage"] == "srrl"] == [0.0]
    pages = [json.loads(page.read_text()) for page in (tmp_path / "run" / "album").glob("*.json")]
    assert {cell["reward"] for page in pages for cell in page} == {7.0}
    assert said and all("reward 7.000" in text for row in said for _, text, _ in row if "kept" not in text)
