"""A run that is killed anywhere goes on to the very numbers of one that was not; a full disk is as a kill.

    pytest tests/test_kills.py                             the windows between two writes, one after the other
    KILLS=200 pytest -m slow -n0 tests/test_kills.py       random moments of every command

Runs are forked off one process that has imported everything: a run of the smoke preset takes a second or two.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from minireflect import disk
from minireflect.__main__ import main
from minireflect.checkpoints.files import checksum, read_ours

pytestmark = pytest.mark.usefixtures("short_strips")
KILLS = int(os.environ.get("KILLS", "12"))
TINY = ["--evaluation.pictures", "2"]
FEW = ["--steps", "2", "--prompts-per-iteration", "2", "--rounds", "1"]
COMMANDS = {
    "vq": [], "captioner": [], "actor": [], "autoencoder": [], "reward": [], "diffusion": [], "checker": [],
    "reason-sft": TINY, "reason-grpo": [*TINY, "--no-controls"], "srrl": [*TINY, *FEW],
    "rlrig": [*TINY, "--no-controls"], "all": [],
}  # fmt: skip


def forked(words: list[str], before: Callable[[], None] = lambda: None, seconds: float | None = None) -> int:
    """The exit status of a command in a process of its own; -9 if it was killed, after `seconds` if given."""
    process = os.fork()
    if not process:
        status = 99
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            before()
            status = main(["train", *words])
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def at_event(number: int, name: str = "replace") -> Callable[[], None]:
    """Before the `number`-th call of os.NAME is done the process is killed."""

    def patch() -> None:
        calls, real = [0], getattr(os, name)

        def counted(*words: object) -> object:
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            calls[0] += 1
            return real(*words)

        setattr(os, name, counted)

    return patch


def files_of(folder: Path) -> dict[str, object]:
    """Digests of weights and last states, markers and metrics: what must be the same.  The checksum of a file
    is over its tensors and metadata; the order of the metadata in the file is random.
    """
    found: dict[str, object] = {"metrics": (folder / "metrics.jsonl").read_text()}
    for path in [*(folder / "weights").iterdir(), *(folder / "state").iterdir()]:
        if path.suffix == ".safetensors" and ".before." not in path.name:
            found[f"{path.parent.name}/{path.name}"] = checksum(*read_ours(path))
        elif ".before." not in path.name:
            found[path.name] = path.read_bytes()
    return found


@cache
def unbroken(command: str, folder: Path) -> tuple[dict[str, object], float]:
    """What a run leaves, and the seconds that it takes."""
    out, began = folder / f"whole-{command}", time.time()
    assert forked([command, "--preset", "smoke", *COMMANDS[command], "--out", str(out)]) == 0
    return files_of(out), time.time() - began


def goes_on(command: str, out: Path, expected: dict[str, object]) -> None:
    started = (out / "config.json").exists()
    again = ["--resume"] if started else [command, "--preset", "smoke", *COMMANDS[command]]
    assert forked([*again, "--out", str(out)]) == 0
    found = files_of(out)
    assert found.keys() == expected.keys()
    assert not [name for name in found if found[name] != expected[name]]
    assert not list(out.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.mark.slow
@pytest.mark.parametrize("event", ["replace", pytest.param("fsync", marks=pytest.mark.rare)])
def test_every_window_of_a_stage(folder: Path, event: str) -> None:
    """vq: its start, states, figures, weights that are handed on, its end: killed before each write."""
    expected, _ = unbroken("vq", folder)
    for number in range(100):
        out = folder / f"window-{event}-{number}"
        words = ["vq", "--preset", "smoke", "--out", str(out)]
        if forked(words, at_event(number, event)) == 0:
            assert number > 5
            return
        goes_on("vq", out, expected)
        shutil.rmtree(out)
    raise AssertionError("a run has less than 100 writes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.rare) if c == "all" else c for c in COMMANDS]
)
def test_killed_at_random_moments(folder: Path, command: str) -> None:
    """Half of the kills are before a random write, half at a random time."""
    draw, (expected, seconds) = random.Random(f"kills {command}"), unbroken(command, folder)
    done = 0
    while done < -(-KILLS // len(COMMANDS)):
        out = folder / f"killed-{command}-{done}"
        words = [command, "--preset", "smoke", *COMMANDS[command], "--out", str(out)]
        if done % 2:
            status = forked(words, seconds=draw.uniform(0.02, 0.95) * seconds)
        else:
            status = forked(words, at_event(draw.randrange(40 if command == "all" else 14)))
        assert status in (0, -9), status
        goes_on(command, out, expected)
        shutil.rmtree(out)
        done += 1


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence_and_loses_nothing(folder: Path, command: str) -> None:
    """A limit on the size of a file, which some of the writes exceed: config, weights, state or figures."""
    expected, _ = unbroken(command, folder)
    for limit in (100, 20_000, 300_000, 2_000_000):
        out = folder / f"full-{command}-{limit}"
        words = [command, "--preset", "smoke", *COMMANDS[command], "--out", str(out)]
        status = forked(words, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
        assert status in (0, 1, 2), status
        assert (status == 2) == (not out.exists())
        goes_on(command, out, expected)
        shutil.rmtree(out)


@pytest.mark.slow
def test_two_starts_at_once(folder: Path) -> None:
    """Two processes resume one run: one does, the other is refused.  Twenty times where KILLS is 200."""
    expected, _ = unbroken("vq", folder)
    for number in range(20 if KILLS >= 200 else 3):
        out = folder / f"two-{number}"
        words = ["vq", "--preset", "smoke", "--out", str(out)]
        assert forked(words, at_event(6)) == -9
        processes = []
        for _ in range(2):
            process = os.fork()
            if not process:
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                os._exit(main(["train", "--resume", "--out", str(out)]))
            processes.append(process)
        ends = sorted(os.WEXITSTATUS(os.waitpid(process, 0)[1]) for process in processes)
        assert ends in ([0, 2], [0, 0])  # both, when one ended before the other began
        found = files_of(out)
        assert all(found[name] == expected[name] for name in expected)


def test_no_folder_pipe_or_device_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(os.devnull)
    for path in [*tmp_path.iterdir()]:
        with pytest.raises(OSError, match="not a regular file"):
            disk.write_text(path, "x")
    assert (
        (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir() and (tmp_path / "link").is_symlink()
    )
    with disk.replacing(tmp_path / "a") as file, pytest.raises(OSError):
        file.fileno()  # Pillow would write there itself, and not see that a disk is full


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.write_text(tmp_path / "a", "old")
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("full")))
            disk.write_text(tmp_path / "a", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
