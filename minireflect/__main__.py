"""usage: minireflect COMMAND

  sample   sample pictures of prompts, and print the inspector's verdicts
  train    train a model; `minireflect train --help` lists the models
  report   write an HTML page about one or several runs: curves, pictures, laws, costs, options
  inspect  describe a file: a checkpoint, a LoRA, or a picture of the synthetic world

`minireflect COMMAND --help` lists the options of a command.
"""

import sys

try:
    import argparse
    import os
    import signal
    import warnings
    from importlib import import_module
    from inspect import getdoc
    from io import TextIOWrapper
    from pathlib import Path

    from .cli import HELP, PICTURES, TRAINED, known, lacks_memory, refuse, sentence, train_help
    from .disk import mute, stops
    from .ranges import QUOTED, plain
except KeyboardInterrupt:  # `main` handles it later
    print("minireflect: stopped", file=sys.stderr)
    sys.exit(130)

COMMANDS = ("sample", "train", "report", "inspect")  # a command's modules are imported only when it runs


def main(words: list[str] | None = None) -> int:
    """Run a command.

    -> exit status: 0; 1 if a check or run fails; 2 on bad input; 130 if stopped; 141 if the output closes
    """
    command, *rest = (sys.argv[1:] if words is None else words) or [""]
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # a terminal without Unicode must not stop a run; each line is flushed, to notice a full disk at once
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"  # without a place in our files
    for number in stops() - {signal.SIGINT}:
        signal.signal(number, signal.default_int_handler)
    try:
        if command in ("", *HELP):
            print(__doc__.strip())
            return 0 if command else 2
        known(command, COMMANDS)
        here = {"inspect": inspect, "report": report}.get(command)
        if command != "sample" and HELP & {*rest[:1]}:
            print(getdoc(here) if here else train_help())
            return 0
        if here:
            return here(rest)
        if command == "train" and rest and not rest[0].startswith("-"):
            known(rest[0], TRAINED)
        return import_module(f".cli.{command}", __package__).main(rest)
    except KeyboardInterrupt as stop:
        try:
            print(f"minireflect {command}: {str(stop) or 'stopped'}", file=sys.stderr)
        except OSError:  # the terminal was closed
            mute(sys.stdout, sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError) and not error.filename:
            mute(*(sys.stdout, sys.stderr)[: 1 + isinstance(error, BrokenPipeError)])
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `| head` does
            return 141
        status = getattr(error, "status", 1 if isinstance(error, FloatingPointError) else 2)
        if isinstance(error, RuntimeError) and status == 2 and not lacks_memory(error):
            raise  # a bug: show the traceback
        print(f"minireflect {plain(command[:QUOTED])}: {sentence(error)}", file=sys.stderr)
        return status


def inspect(words: list[str]) -> int:
    """usage: minireflect inspect PATH ...

      PATH  checkpoint, or a part of one, CLIP or LoRA (a folder or a file), a run folder or our own weights,
            or a picture 64 pixels high

    Parts of a file that are not supported are named.
    """
    if not words:
        raise ValueError("there is no path; try: minireflect inspect checkpoint.safetensors")
    from .checkpoints.ours import describe

    for path in map(Path, words):
        print(read_off(path) if path.suffix.lower() in PICTURES else describe(path))
    return 0


def report(words: list[str]) -> int:
    """usage: minireflect report RUN ... [-o report.html]

      RUN  run folder of a training; several runs are shown side by side
      -o   HTML file to write (default: report.html); it needs no network

    SRRL, DDPO, GRPO and --base runs are shown with pictures, laws and costs, other runs with curves only.
    """
    from .report import write_report

    parser = argparse.ArgumentParser("minireflect report", add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"))
    parser.error = refuse
    given = parser.parse_args(words)
    size = write_report(given.runs, given.out)
    print(f"{given.out}: {size / 1e6:.1f} MB; open it in a browser")
    return 0


def read_off(path: Path) -> str:
    """The inspector's reading of a picture, or of each picture in a row of 64x64 pictures."""
    from .world.canvas import read_picture, to_tensor
    from .world.captions import caption
    from .world.inspector import inspect_all

    pixels = read_picture(path)  # (h w 3)
    height, width = pixels.shape[:2]
    if height != 64 or width % 64:
        said = f"{path} has {width} x {height} pixels"
        raise ValueError(f"{said}; the inspector reads pictures of 64 x 64 pixels, or a row of them")
    row = to_tensor(pixels.reshape(64, -1, 64, 3).swapaxes(0, 1))  # (n 3 64 64)
    read = [caption(r.scene) if r.scene else f"unreadable: {r.why}" for r in inspect_all(row)]
    return "\n  ".join([f"{path}: {len(read)} pictures", *read] if read[1:] else [f"{path}: {read[0]}"])


if __name__ == "__main__":
    sys.exit(main())
