"""Run folders: nothing is overwritten, nothing that was trained is lost, whatever ends the process."""

import errno
import fcntl
import json
import math
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch

from minireflect import run as run_module
from minireflect.checkpoints.files import read_ours, read_weights, save_weights
from minireflect.run import Interrupted, Run, RunError, flat, keeping, read_metrics

ROOT = Path(__file__).parent.parent
LOOP = """
import sys, time, torch
from minireflect.run import Run
net = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(net.parameters())
run = Run(sys.argv[1], {"a": 1}, resume=len(sys.argv) > 2)
for step in run.steps("stage", 400, {"net": net}, optimizer):
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    run.log("stage", step, loss=float(step))
    print(step, flush=True)
    time.sleep(0.01)
"""


def start(folder: Path, *more: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if int(line) >= 5:
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    seen = 5
    time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    seen = max([seen, *map(int, out.split())])
    if number != signal.SIGKILL:
        assert "stopped after step" in err and "--resume" in err
    states = [folder / "state" / name for name in ("stage.safetensors", "stage.before.safetensors")]
    latest = next(path for path in states if path.exists())  # killed between two renames: the one before
    state = read_weights(latest)  # readable whatever happened
    assert state["net/weight"].shape == (4, 4)
    again = start_and_finish(folder)
    first = int(again[0])
    assert seen <= first <= seen + 1  # at most the step that was under way is done again
    steps = [row["step"] for row in Run(folder, {"a": 1}, resume=True).metrics("stage")]
    assert steps == list(range(400))  # every step logged once


def start_and_finish(folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOOP.replace("time.sleep(0.01)", ""), str(folder), "resume"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_steps_after_the_last_save_are_done_again_to_the_same_numbers(tmp_path: Path) -> None:
    """A loop of eight steps that saves every third and the last, and fails after it has logged step 5: it
    goes on from step 3 with its weights, moments of Adam and memory; every step stands in the log once.
    """

    def loop(run: Run, fails: int = -1) -> tuple[list[int], torch.nn.Linear, dict]:
        torch.manual_seed(0)
        net, memory, done = torch.nn.Linear(4, 4), {"seen": 0}, []
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for step in run.steps("stage", 8, {"net": net}, optimizer, 3, memory):
            done.append(step)
            memory["seen"] += step
            optimizer.zero_grad()
            (net(torch.ones(1, 4)) - step).square().sum().backward()
            optimizer.step()
            run.log("stage", step, seen=memory["seen"])
            if step == fails:
                raise FloatingPointError
        return done, net, memory

    done, net, memory = loop(Run(tmp_path / "whole", {}))
    assert done == [*range(8)] and memory == {"seen": 28}
    run = Run(tmp_path / "cut", {})
    with pytest.raises(FloatingPointError):
        loop(run, fails=5)
    done, again, memory = loop(run)
    assert done == [3, 4, 5, 6, 7] and memory == {"seen": 28}
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))
    assert run.metrics("stage") == Run(tmp_path / "whole", {}, resume=True).metrics("stage")
    assert loop(run)[0] == []  # the last step is saved, too


def test_another_run_is_never_overwritten(tmp_path: Path) -> None:
    Run(tmp_path / "a", {"lr": 1})
    with pytest.raises(RunError, match="already holds a run"):
        Run(tmp_path / "a", {"lr": 1})
    (tmp_path / "b").mkdir()
    for name in ("diary.txt", "diary.tmp"):
        (tmp_path / "b" / name).write_text("dear diary")
        with pytest.raises(RunError, match="neither empty nor a run folder"):
            Run(tmp_path / "b", {})
        assert (tmp_path / "b" / name).read_text() == "dear diary"
        (tmp_path / "b" / name).unlink()


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    Run(tmp_path / "a" / "b", {}).abandon()
    assert not list(tmp_path.iterdir())
    first, second = Run(tmp_path / "new" / "a", {}), Run(tmp_path / "new" / "b", {})
    first.abandon()
    assert not first.folder.exists() and (second.folder / "config.json").exists()
    begun = Run(tmp_path / "a" / "b", {})
    net = torch.nn.Linear(1, 1)
    for _ in begun.steps("s", 1, {"net": net}, torch.optim.SGD(net.parameters())):
        pass
    begun.abandon()  # something was trained
    assert (tmp_path / "a" / "b" / "config.json").exists()
    Run(tmp_path / "a" / "b", {}, resume=True).abandon()
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_resume_with_another_configuration_names_the_difference(tmp_path: Path) -> None:
    Run(tmp_path, {"srrl": {"lr": 1, "group": 8}})
    with pytest.raises(RunError, match=r"srrl\.lr was 1, now 2"):
        Run(tmp_path, {"srrl": {"lr": 2, "group": 8}}, resume=True)
    with pytest.raises(RunError, match="no run to resume"):
        Run(tmp_path / "empty", {}, resume=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        Run(tmp_path / "file" / "run", {})


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path, {})
    run.log("stage", 0, loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "stage", "st')
    net = torch.nn.Linear(1, 1)
    for _ in run.steps("stage", 0, {"net": net}, torch.optim.SGD(net.parameters())):
        pass
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_old_signal_handlers_come_back(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    net = torch.nn.Linear(1, 1)
    with pytest.raises(Interrupted):
        for _ in Run(tmp_path, {}).steps("s", 3, {"net": net}, torch.optim.SGD(net.parameters(), lr=0.1)):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before and (tmp_path / "state" / "s.safetensors").exists()


def test_nohup_is_respected(tmp_path: Path) -> None:
    before, net = signal.signal(signal.SIGHUP, signal.SIG_IGN), torch.nn.Linear(1, 1)
    try:
        for _ in Run(tmp_path, {}).steps("s", 3, {"net": net}, torch.optim.SGD(net.parameters(), lr=0.1)):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_can_train(tmp_path: Path) -> None:
    """As of a notebook's widget or a web page; only the main thread gets signals."""
    net, done = torch.nn.Linear(1, 1), []
    steps = Run(tmp_path, {}).steps("s", 3, {"net": net}, torch.optim.SGD(net.parameters(), lr=0.1))
    thread = threading.Thread(target=lambda: done.extend(steps))
    thread.start()
    thread.join()
    assert done == [0, 1, 2]


@pytest.mark.slow
def test_a_training_without_output_is_stopped_like_another(tmp_path: Path) -> None:
    """As of a daemon: what is opened next may get the number of the closed stream."""
    run, words = tmp_path / "run", "-m minireflect train vq --preset smoke --steps 2000 --out"
    shell = f"exec {sys.executable} {words} {run} >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", shell], cwd=ROOT)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 130 and (run / "state" / "vq.safetensors").exists()
    assert (run / ".lock").read_text() == f"process {process.pid} on {socket.gethostname()}"
    assert read_metrics(run)


@pytest.mark.slow
@pytest.mark.usefixtures("terminal")
def test_a_closed_terminal_stops_a_training_that_is_saved(tmp_path: Path) -> None:
    """All that is printed after the terminal is gone fails; the step is finished and saved nevertheless."""
    words = [sys.executable, "-m", "minireflect", "train", "vq", "--preset", "smoke", "--steps", "2000"]
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        os.execv(sys.executable, [*words, "--out", str(tmp_path / "run")])
    window = struct.pack("HHHH", 24, 80, 0, 0)  # a bar of no columns would print nothing
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, window)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    state = read_ours(tmp_path / "run" / "state" / "vq.safetensors", checked=True)[1]
    logged = [row["step"] for row in read_metrics(tmp_path / "run", "vq")]
    assert logged == list(range(int(state["step"]))) and 0 < len(logged) < 2000


def test_flat_names() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


# ---- nothing lost, nothing silent


def trained(folder: Path, steps: int = 3, resume: bool = False, memory: dict | None = None) -> list[int]:
    """The steps that a loop over a layer does."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    done = []
    for step in Run(folder, {}, resume).steps("s", steps, {"net": net}, optimizer, memory=memory):
        optimizer.zero_grad()
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        done.append(step)
    return done


def test_another_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    held = Run(tmp_path / "a", {})
    process = os.fork()
    if not process:
        try:
            run_module._LOCKS.clear()  # as a process that was not forked off the holder
            Run(tmp_path / "a", {}, resume=True)
        except RunError as error:
            os._exit(0 if f"process {os.getppid()} on" in str(error) else 3)
        os._exit(4)
    assert os.WEXITSTATUS(os.waitpid(process, 0)[1]) == 0
    assert Run(tmp_path / "a", {}, resume=True).folder == held.folder  # the same process may


def test_a_start_that_was_killed_can_be_made_again(tmp_path: Path) -> None:
    for name in ("weights", "state", "figures"):
        (tmp_path / "a" / name).mkdir(parents=True)
    (tmp_path / "a" / ".lock").write_text("process 1 on host")
    (tmp_path / "a" / ".config.json.0123456789abcdef.tmp").write_text("{")
    run = Run(tmp_path / "a", {})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        ".lock", "config.json", "figures", "state", "weights",
    ]  # fmt: skip
    (tmp_path / "a" / "album").mkdir()
    (tmp_path / "a" / "album" / ".00001.json.0123456789abcdef.tmp").write_text("[")
    del run
    Run(tmp_path / "a", {}, resume=True)
    assert not list((tmp_path / "a" / "album").iterdir())


def test_a_refused_state_replaces_no_trained_weights() -> None:
    saved = []
    with keeping(lambda: saved.append("at the end")):
        pass
    with pytest.raises(KeyboardInterrupt), keeping(lambda: saved.append("when stopped")):
        raise Interrupted
    with pytest.raises(RunError), keeping(lambda: saved.append("when refused")):
        raise RunError("the state is damaged")
    assert saved == ["at the end", "when stopped"]


def test_what_ruined_a_training_is_raised_and_not_that_its_weights_cannot_be_saved() -> None:
    def save() -> None:
        raise FloatingPointError("a weight, which is to be saved, is not a finite number")

    with pytest.raises(FloatingPointError, match=r"^the loss"), keeping(save):
        raise FloatingPointError("the loss is not a finite number")
    with pytest.raises(FloatingPointError, match="a weight"), keeping(save):
        pass


def test_two_states_are_kept_and_a_flipped_byte_is_refused_by_name(tmp_path: Path) -> None:
    assert trained(tmp_path) == [0, 1, 2]
    state = tmp_path / "state" / "s.safetensors"
    whole = bytearray(state.read_bytes())
    whole[-1] ^= 1
    state.write_bytes(whole)
    with pytest.raises(RunError, match=r"s\.safetensors is damaged.*delete it.*s\.before\.safetensors"):
        trained(tmp_path, resume=True)
    state.unlink()
    assert trained(tmp_path, resume=True) == [2]  # from the state before it


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"step": "-5"}, "-5 finished steps"), ({"step": "9"}, "9 finished steps"), ({}, "step in"),
        ({"step": '"x"'}, "step in"),
        ({"step": "1"}, "memory in"), ({"step": "1", "memory": "null"}, "memory in"),
        ({"step": "1", "memory": "[1]"}, "memory in"),
        ({"step": "1", "memory": '{"b": 1}'}, "another memory"),
        ({"step": "1", "memory": '{"a": "x"}'}, "another memory"),
    ],
)  # fmt: skip
def test_a_state_that_lies_is_refused(tmp_path: Path, about: dict[str, str], said: str) -> None:
    trained(tmp_path, memory={"a": 0})
    state = tmp_path / "state" / "s.safetensors"
    save_weights(state, read_weights(state), about)
    with pytest.raises(RunError, match=said):
        trained(tmp_path, resume=True, memory={"a": 0})


@pytest.mark.parametrize("name", ["metrics.jsonl", "weights", "state", "figures"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    trained(tmp_path / "a")
    outside = tmp_path / "outside"
    target = tmp_path / "a" / name
    target.rename(outside) if target.exists() else outside.write_text("")
    target.symlink_to(outside)
    with pytest.raises(RunError, match=f"{name} in .* is a link"):
        trained(tmp_path / "a", resume=True)


@pytest.mark.parametrize(
    "kl", [torch.nan, [0.0, torch.inf], {"a": torch.nan}, {"a": {"b": (0.0, torch.nan)}}]
)
def test_a_statistic_that_is_not_finite_is_not_logged(tmp_path: Path, kl: object) -> None:
    with pytest.raises(FloatingPointError, match=r"kl.* is not a finite number"):
        Run(tmp_path, {}).log("s", 0, loss=1.0, kl=kl)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(FloatingPointError, match=r"a, to be saved in w\.safetensors, is not a finite number"):
        save_weights(tmp_path / "w.safetensors", {"a": torch.tensor([1.0, torch.inf])}, {})
    assert torch.equal(read_weights(tmp_path / "w.safetensors")["a"], torch.ones(2))


def test_a_line_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    lines = [f'{{"stage": "s", "step": 0, {more}}}' for more in ('"reward": "x"', '"right_by_round": [null]')]
    lines += ['{"stage": 5, "step": 0}', '{"stage": "s"}', "5", "{", '{"stage": "evaluation", "step": 0}']
    for scores in ("5", "null", '{"physical": 5}', '{"physical": {"accuracy": "x"}}'):
        lines.append(f'{{"stage": "evaluation", "step": 0, "model": "x", "scores": {scores}}}')
    for line in lines:
        (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"stage": "s", "step": 1}}\n')
        with pytest.raises(ValueError, match="line 1 of"):
            read_metrics(tmp_path)


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"stage": "\xc3', b"\xff\xfe", b'{"loss": NaN'])
def test_a_torn_end_of_metrics_is_dropped_and_a_torn_middle_is_named(tmp_path: Path, tail: bytes) -> None:
    """A power cut leaves zeros or any bytes."""
    whole, path = b'{"stage": "s", "step": 0}\n', tmp_path / "metrics.jsonl"
    path.write_bytes(whole + tail)
    assert read_metrics(tmp_path) == [{"stage": "s", "step": 0}]
    path.write_bytes(whole + tail + b"\n" + whole)
    with pytest.raises(ValueError, match=r"line 2 of .* is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "Infinity", "NaN"])
def test_a_number_that_is_not_finite_is_named_and_not_written_again(tmp_path: Path, number: str) -> None:
    trained(tmp_path, steps=1)
    line = f'{{"stage": "s", "step": 0, "nested": {{"a": [{number}]}}}}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    with pytest.raises(ValueError, match=f"line 1 of .* is not JSON: {number} is not a finite number"):
        Run(tmp_path, {}, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == line
    (tmp_path / "metrics.jsonl").write_text(line.replace(number, "1e9"))
    assert trained(tmp_path, steps=2, resume=True) == [1]


def test_lines_of_an_editor_are_left_out(tmp_path: Path) -> None:
    """Empty lines, the line ends and the byte order mark of Windows, and no end of the last line."""
    (tmp_path / "metrics.jsonl").write_bytes(
        b'\xef\xbb\xbf{"stage": "s", "step": 0}\r\n\r\n \t\n{"stage": "s", "step": 1}'
    )
    assert [row["step"] for row in read_metrics(tmp_path, "s")] == [0, 1]
    (tmp_path / "metrics.jsonl").write_text("\n\n")
    assert read_metrics(tmp_path) == []


def test_a_second_ctrl_c_waits_for_no_step(tmp_path: Path) -> None:
    assert trained(tmp_path, steps=1) == [0]
    net = torch.nn.Linear(2, 2)
    run = Run(tmp_path, {}, resume=True)
    with pytest.raises(KeyboardInterrupt) as stop:
        for _ in run.steps("s", 3, {"net": net}, torch.optim.AdamW(net.parameters())):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
    assert stop.type is KeyboardInterrupt
    assert trained(tmp_path, resume=True) == [1, 2]


def test_a_marker_names_no_file_outside_the_folder_of_weights(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_text("precious")
    trained(tmp_path / "a")
    (tmp_path / "a" / "state" / "s.done").write_text("../../mine.safetensors")
    assert trained(tmp_path / "a", resume=True) == []
    assert (tmp_path / "mine.safetensors").read_text() == "precious"
    assert not (tmp_path / "a" / "state" / "s.done").exists()


@pytest.mark.parametrize(
    ("slot", "value"),
    [
        ("step", torch.ones(2, 2)), ("step", torch.tensor(-1.0)), ("exp_avg", torch.zeros(())),
        ("exp_avg", torch.zeros(2, 2, dtype=torch.long)), ("exp_avg_sq", -torch.ones(2, 2)),
    ],
)  # fmt: skip
def test_a_state_of_another_optimiser_is_refused(tmp_path: Path, slot: str, value: torch.Tensor) -> None:
    trained(tmp_path)
    state = tmp_path / "state" / "s.safetensors"
    save_weights(state, read_weights(state) | {f"optimizer/0/{slot}": value}, {"step": "1", "memory": "{}"})
    with pytest.raises(RunError, match=f"does not fit the optimiser: optimizer/'0/{slot}'"):
        trained(tmp_path, resume=True)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Lustre and NFS without a lock manager."""
    failed = iter((errno.ENOLCK, errno.EIO))
    monkeypatch.setattr(
        run_module.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(next(failed), "x"))
    )
    assert Run(tmp_path / "a", {}).folder.exists()
    assert "has no locks; do not start a second run in it" in capsys.readouterr().err
    with pytest.raises(RunError, match="cannot write to"):
        Run(tmp_path / "b", {})


def test_options_that_are_no_json_leave_no_folder(tmp_path: Path) -> None:
    for config, error in (({"lr": math.nan}, ValueError), ({"lr": object()}, TypeError)):
        with pytest.raises(error, match="JSON"):
            Run(tmp_path / "run", config)
    assert not list(tmp_path.iterdir())
