"""What README and docs tell the reader to type is accepted by the command line, and the scripts that they
name exist.
"""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from minireflect.__main__ import main
from minireflect.cli import TRAINED, sample, train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HISTORY = {"log.md"}  # its commands are those of their day


def commands(text: str) -> list[list[str]]:
    """Words of every command in bash blocks and code spans: `python train.py ...`, `minireflect sample ...`,
    `python scripts/...`.
    """
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    spans = re.findall(r"`((?:python|minireflect) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [line for block in blocks for line in block.splitlines()] + spans
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in found if words and words[0] in ("python", "minireflect")]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in HISTORY], ids=lambda p: p.name)
def test_documented_commands_are_accepted(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(page.read_text()):
        program, rest = words[1], words[2:]
        if not rest and program in ("sample.py", "sample"):  # the command is only named
            continue
        if program in ("train.py", "train") and "--resume" not in rest:
            command, options = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("srrl", rest)
            assert command in TRAINED, words
            try:
                train.parse(options, train.defaults(command, options))
            except SystemExit:
                pytest.fail(f"refused: {shlex.join(words)}")
        elif program in ("sample.py", "sample"):
            try:
                tyro.cli(sample.SampleOptions, args=rest)
            except SystemExit:
                pytest.fail(f"refused: {shlex.join(words)}")
        elif program.endswith(".py") and program not in ("train.py", "sample.py"):
            assert (ROOT / program).exists(), words


def test_commands_are_found() -> None:
    """The test above reads something."""
    assert sum(len(commands(page.read_text())) for page in PAGES) > 30


@pytest.mark.slow
def test_readme_shows_what_its_first_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Verdict by verdict; numbers may differ in their last digit from one processor to another."""
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"```text\n(round 0.*?)```", text, re.S).group(1)
    monkeypatch.chdir(tmp_path)
    words = next(words for words in commands(text) if words[1] == "sample.py")
    assert main(["sample", *words[2:]]) == 0
    verdicts = re.compile(r"round (\d): ([\w: ]*?)(?: ·|: nearest)")
    printed = verdicts.findall(capsys.readouterr().out)
    assert verdicts.findall(shown) == printed[:2], printed


# a row of the README's results: the page that a study's script wrote, and its rows and column
QUOTED = {
    "SRRL": ("study.md", ("base · one picture", "SRRL · one picture", "base · best of 4"), "unconventional"),
    "RL-RIG": ("rlrig_study.md", ("base", "phase 1 + 2", "best of 5"), "SG-IoU"),
    "ReasonGen-R1": (
        "reasongen_study.md", ("no rationale", "SFT + GRPO", "no rationale, best of 2"), "GenEval mean"
    ),
}  # fmt: skip


def tables(text: str) -> dict[str, dict[str, str]]:
    """The rows of the first table of a page: by name, then by column."""
    lines = [line.strip()[1:-1].split("|") for line in text.splitlines() if line[:1] == "|"]
    cells = [[cell.strip("* ") for cell in line] for line in lines]
    head = cells[0]
    return {row[0]: dict(zip(head, row)) for row in cells[2:] if len(row) == len(head)}


@pytest.mark.parametrize("method", QUOTED)
def test_the_readme_quotes_what_the_studies_wrote(method: str) -> None:
    page, rows, column = QUOTED[method]
    line = next(s for s in (ROOT / "README.md").read_text().splitlines() if s.startswith(f"| {method} |"))
    quoted = re.findall(r"\d\.\d{3}", line)
    table = tables((ROOT / "docs" / page).read_text())
    wrote = [table[row][column].split(" ")[0] for row in rows]
    assert quoted == wrote, f"docs/{page} has {wrote}"
