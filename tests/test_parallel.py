"""N processes do what one does: pictures bit for bit, metrics but for the order of the terms of a sum."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minireflect import parallel
from minireflect.methods.reasongen import ReasonRLConfig, Rewards, train_reason_grpo
from minireflect.methods.rollout import rollout
from minireflect.methods.srrl import SRRLConfig, train_srrl
from minireflect.models.lora import LoRAConfig, add_lora
from minireflect.parallel import spread
from minireflect.pipeline import scored
from minireflect.run import Job, Run, read_metrics
from minireflect.streams import rng
from minireflect.tracking import numbers
from tests.cli.console import run
from tests.methods.common import plus
from tests.small import TEXTS, brightness, four_texts, law_texts, small_pipeline, small_reasongen

ROOT = Path(__file__).parent.parent
SIZES = {"iterations": 2, "prompts_per_iteration": 4, "steps": 4, "updates": 2, "rounds": 2, "batch": 5}
CONFIGS = {
    "regress": SRRLConfig(objective="regress", group=3, **SIZES),
    "grpo": SRRLConfig(objective="grpo", guidance=2.0, **SIZES),
    "ppo": SRRLConfig(objective="ppo", group=2, lr=1e-4, pull=0.1, kl=0.1, **SIZES),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def with_processes(n: int, work: Callable[[Path], None], folder: Path) -> list[Path]:
    """`work` in n forked processes, each with a folder of its own.  -> the folders"""
    port, pids, folders = free_port(), [], [folder / f"{n}-{r}" for r in range(n)]
    for r in range(n):
        folders[r].mkdir()
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": r, "WORLD_SIZE": n}
                os.environ.update({name: str(value) for name, value in where.items()})
                torch.set_num_threads(1)
                assert parallel.start(torch.device("cpu")).type == "cpu" and parallel.world() == n
                work(folders[r])
                parallel.finish()
                code = 0
            except BaseException as error:
                (folders[r] / "error").write_text(repr(error))
            finally:
                os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * n, [p.read_text() for f in folders for p in f.glob("error")]
    return folders


def same(folders: list[Path], stage: str, expected: list[dict], tolerance: float = 1e-5) -> None:
    for folder in folders:
        rows = read_metrics(folder / "run", stage)
        assert len(rows) == len(expected) > 0
        for row, wanted in zip(rows, expected):
            found = [dict(numbers(values, "")) for values in (row, wanted)]
            # a difference of log-densities of hundreds of nats, whose float32 steps are 1.5e-5
            ratios = [values.pop("/log_ratio", 0.0) for values in found]
            assert ratios[0] == pytest.approx(ratios[1], abs=1e-4)
            assert found[0] == pytest.approx(found[1], rel=tolerance, abs=tolerance)
            assert {k: v is None for k, v in row.items()} == {k: v is None for k, v in wanted.items()}


def srrl(config: SRRLConfig, lora: bool = False, micro_batch: int = 2) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        pipe = small_pipeline()
        pipe.micro_batch = micro_batch
        if lora:
            add_lora(pipe.unet, LoRAConfig(rank=2), rng(0, "lora"))
        reward = plus if config.objective == "regress" else brightness
        out = rollout(pipe, TEXTS, reward, config, 0, 0)
        torch.save([r.path.latents for r in out.rounds] + [r.images for r in out.rounds], folder / "drawn")
        train_srrl(config, pipe, reward, four_texts, None, Job(Run(folder / "run", {})))

    return work


def drawn(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / "drawn", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regress", "lora", "grpo", "ppo"])
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    config = CONFIGS.get(name, CONFIGS["grpo"])
    (one,), two = (with_processes(n, srrl(config, name == "lora"), tmp_path) for n in (1, 2))
    expected = read_metrics(one / "run", "srrl")
    assert len(expected) == 2 and expected[-1]["updates_total"] == 4
    same(two, "srrl", expected)
    for folder in two:
        for mine, theirs in zip(drawn(folder), drawn(one), strict=True):
            assert torch.equal(mine, theirs)


KINDS = {"list": Tensor.tolist, "numpy": Tensor.numpy, "bf16": Tensor.bfloat16, "right": lambda v: v > 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_may_give_numbers_of_any_kind(kind: str, tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        images, prompts = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4), list("abcde")
        reward = lambda x, _: KINDS[kind](x.mean((1, 2, 3)))  # noqa: E731
        assert torch.equal(scored(partial(spread, reward), images, prompts), scored(reward, images, prompts))

    with_processes(2, work, tmp_path)


@pytest.mark.slow
def test_without_units_kernels_differ_in_the_last_bits(tmp_path: Path) -> None:
    (one,), two = (with_processes(n, srrl(CONFIGS["regress"], micro_batch=0), tmp_path) for n in (1, 2))
    same(two, "srrl", read_metrics(one / "run", "srrl"))
    for mine, theirs in zip(drawn(two[1]), drawn(one), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


@pytest.mark.slow
def test_three_processes_with_fewer_pictures_than_processes(tmp_path: Path) -> None:
    """Refused pictures may be one or two; processes without a share wait for the others."""
    config = replace(CONFIGS["ppo"], group=1, advantage="history", batch=2, rounds=3)
    (one,), three = (with_processes(n, srrl(config), tmp_path) for n in (1, 3))
    same(three, "srrl", read_metrics(one / "run", "srrl"))


def reason(folder: Path) -> None:
    pipe = small_reasongen()
    sizes = {"prompts_per_iteration": 3, "group": 4, "updates": 2, "max_resamples": 2}
    config = ReasonRLConfig(iterations=2, recall=0.0, **sizes)
    bright = Rewards(lambda images, prompts: (images.mean((1, 2, 3)) * 1e3).floor() % 2)  # as good as random
    train_reason_grpo(config, pipe, bright, law_texts, None, Job(Run(folder / "run", {})))


@pytest.mark.slow
def test_two_processes_reinforce_tokens_as_one(tmp_path: Path) -> None:
    (one,), two = (with_processes(n, reason, tmp_path) for n in (1, 2))
    expected = read_metrics(one / "run", "reason-grpo")
    assert sum("loss" in row for row in expected) >= 2, expected
    same(two, "reason-grpo", expected)


def test_one_process_is_the_identity() -> None:
    x = torch.randn(5, 2)
    assert parallel.share(5) == slice(0, 5) and parallel.spread(lambda v: 2 * v, x).equal(2 * x)
    assert parallel.gather(x, 5) is x and parallel.total(x) is x and not dist.is_initialized()


def test_shares_cover_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 4)
    for n, unit in product((1, 3, 4, 10, 17), (1, 3, 4)):
        covered = []
        for r in range(4):
            monkeypatch.setattr(parallel, "rank", lambda r=r: r)
            covered += range(n)[parallel.share(n, unit)]
            assert len(range(n)[parallel.rows(n, unit)]) >= 1
            assert parallel.share(n, unit).start % unit == 0 or parallel.share(n, unit).start == n
        assert covered == list(range(n))


# ---- the command under torchrun ---------------------------------------------------------------------------

FEW = ["--evaluation.pictures", "2", "--steps", "2", "--prompts-per-iteration", "2", "--rounds", "1"]


def torchrun(n: int, *words: str, script: str = "train.py") -> subprocess.Popen:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n}",
        f"--master_port={free_port()}",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*launch, script, *words], cwd=ROOT, env=environment, text=True, **pipes)


def finished(process: subprocess.Popen) -> str:
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return said


def alike(one: Path, other: Path, *stages: str) -> None:
    """Two runs have the same metrics, and files of the same names."""
    for stage in stages:
        (place := other.with_name(f"{other.name}-{stage}")).mkdir()
        (place / "run").symlink_to(other)
        same([place], stage, read_metrics(one, stage), 1e-4)
    assert {p.name for p in one.rglob("*")} == {p.name for p in other.rglob("*")}


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "stages"), [("rlrig", ["phase-1", "phase-2"]), ("reason-grpo", ["reason-grpo"])]
)
def test_torchrun_gives_the_metrics_of_one_process(command: str, stages: list[str], tmp_path: Path) -> None:
    words = [command, "--preset", "smoke", "--device", "cpu"]
    if command == "reason-grpo":
        words.append("--no-controls")
    for n in (1, 2):
        said = finished(torchrun(n, *words, "--out", str(tmp_path / str(n))))
        assert said.count("run folder") == 1 == said.count("done in")
    alike(tmp_path / "1", tmp_path / "2", *stages, "evaluation")


@pytest.mark.slow
@pytest.mark.usefixtures("short_strips")
def test_two_under_torchrun_are_one_and_a_killed_rank_stops_both(tmp_path: Path) -> None:
    """Of three runs the first has one process, the second two; the third begins with two, of which one is
    killed, and is resumed with one.
    """
    words = ["srrl", "--preset", "smoke", "--device", "cpu", *FEW, "--iterations", "6", "--out"]
    alone = run("train", *words, "one", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "killed"
    process = torchrun(2, *words, str(out))
    while len(read_metrics(out, "srrl")) < 2:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    for child in children:
        assert not Path(f"/proc/{child}").exists()
    assert run("train", "--resume", "--out", "killed", cwd=tmp_path).returncode == 0
    said = finished(torchrun(2, *words, str(tmp_path / "two")))
    assert said.count("run folder") == 1 == said.count("done in")
    for other in ("two", "killed"):
        alike(tmp_path / "one", tmp_path / other, "srrl", "evaluation")
    assert json.loads((out / "config.json").read_text())["command"] == "srrl"
