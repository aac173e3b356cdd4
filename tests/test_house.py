"""The rules of the house: imports run downward, sizes stay in budget, reading path, links and words hold."""

import ast
import functools
import io
import json
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minireflect"

# Rooms from the ground up; a module may import from its own rank and from those below.
ROOMS = {
    "parallel": 0,
    "ranges": 0,
    "disk": 0,
    "streams": 0,
    "tracking": 0,
    "world": 1,
    "diffusion": 2,
    "models": 3,
    "pipeline": 4,
    "checkpoints": 5,
    "rl": 6,
    "run": 6,
    "training": 6,
    "evaluate": 7,
    "evaluate_graphs": 7,
    "evaluate_reason": 7,
    "pretrain": 8,
    "methods": 9,
    "figures": 10,
    "showcase": 10,
    "config": 10,
    "report": 10,
    "stages": 11,
    "cli": 12,
    "__init__": 13,
    "__main__": 13,
}
# Sizes may fall and not grow. The aim is 6,200 lines in 60 files, and 1,200 in scripts/.
LINES, FILES, SCRIPT_LINES, DESK_LINES = 8_718, 67, 1_200, 10
COLUMNS, LENGTH, PARAMETERS = 110, 60, 6
LONG: set[str] = set()  # "file function" that may be longer, each with its reason
MANY = {  # "file function" that may take more parameters, each with its reason
    "minireflect/diffusion/ddim.py ddim_step",  # the quantities of DDIM (12), x_prev or a generator
    "minireflect/pipeline.py generate",  # the front door: prompts, sampler, rounds, reward, noise
}

PATH_LINES, README_BYTES = 1000, 10_000
PATH_HOLDS = [  # the parts of SRRL that the README's reading path must contain
    "minireflect/world/scenes.py",
    "minireflect/diffusion/ddim.py",
    "minireflect/diffusion/reflection.py",
    "minireflect/rl/policy.py",
    "minireflect/rl/advantage.py",
    "minireflect/methods/rollout.py",
    "minireflect/methods/learn.py",
    "minireflect/methods/srrl.py",
]


# ---- imports ---------------------------------------------------------------------------------------------


def module_name(path: Path) -> str:
    """`minireflect/world/scenes.py` -> `minireflect.world.scenes`; an `__init__` has its package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions: `from ..rl import policy` is rl.policy."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = (
                path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            )  # of `from ..rl import policy`
            module = ".".join((*above, *([node.module] if node.module else [])))
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else module for name in names}
    return found


@functools.cache
def arrows() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    return {name: (imports(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def rank(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    assert room in ROOMS, f"{module} stands in no room: give it a rank in ROOMS"
    return ROOMS[room]


def test_imports_run_downward() -> None:
    upward = [f"{a} -> {b}" for a, bs in arrows().items() for b in sorted(bs) if rank(b) > rank(a)]
    assert not upward, "imports that run upward:\n" + "\n".join(upward)


def reached(module: str, seen: set[str] | None = None) -> set[str]:
    """All modules that a module needs, directly or not; itself too if it is on a circle."""
    seen = set() if seen is None else seen
    for other in arrows()[module] - seen:
        seen.add(other)
        reached(other, seen)
    return seen


def test_imports_form_no_circle() -> None:
    circle = {module for module in MODULES if module in reached(module)}
    found = [f"{a} -> {b}" for a in sorted(circle) for b in sorted(arrows()[a] & circle) if a in reached(b)]
    assert not found, "circles:\n" + "\n".join(found)


def test_the_world_knows_no_networks() -> None:
    for path in sorted((PACKAGE / "world").rglob("*.py")):
        used = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        found = [name for name in used | imports(path) if f"{name}.".startswith("torch.nn.")]
        assert not found, f"{path} uses {found}"


# ---- sizes -----------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What is counted of a file; functions are "file name" with their number of lines and of parameters."""

    code: int  # lines with code on them: no comment, docstring or blank line
    wide: list[int]  # numbers of the lines over 110 columns
    long: list[tuple[str, int]]
    many: list[tuple[str, int]]


@functools.cache
def size(path: Path) -> Size:
    source, name = path.read_text(), str(path.relative_to(ROOT))
    tree = ast.parse(source)
    docstrings, code = set(), set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    ignored = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored | {tokenize.ENDMARKER}:
            code |= set(range(token.start[0], token.end[0] + 1))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    parameters = [{a.arg for a in f.args.args + f.args.kwonlyargs} - {"self", "cls"} for f in functions]
    return Size(
        len(code - docstrings),
        [i for i, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS],
        [(f"{name} {f.name}", f.end_lineno - f.lineno + 1) for f in functions],
        [(f"{name} {f.name}", len(names)) for f, names in zip(functions, parameters)],
    )


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_the_package_is_small() -> None:
    counts = [size(path).code for path in files("minireflect")]
    assert sum(counts) <= LINES, f"{sum(counts):,} code lines in the package"
    assert sum(n > 0 for n in counts) <= FILES, f"{sum(n > 0 for n in counts)} files with code"


def test_scripts_are_small() -> None:
    assert sum(size(path).code for path in files("scripts")) <= SCRIPT_LINES
    assert size(ROOT / "train.py").code + size(ROOT / "sample.py").code <= DESK_LINES


def test_no_line_is_wide() -> None:
    wide = [
        f"{p.relative_to(ROOT)}:{n}"
        for p in files("minireflect", "scripts", "benchmarks")
        for n in size(p).wide
    ]
    assert not wide, f"{len(wide)} lines over {COLUMNS} columns:\n" + "\n".join(wide)


def test_no_function_is_long_or_takes_many_parameters() -> None:
    sizes = [size(path) for path in files("minireflect", "scripts")]
    over = [f"{n:3} lines {f}" for s in sizes for f, n in s.long if n > LENGTH and f not in LONG]
    over += [f"{n:3} parameters {f}" for s in sizes for f, n in s.many if n > PARAMETERS and f not in MANY]
    assert not over, "\n".join(over)


# ---- README and docs -------------------------------------------------------------------------------------


def reading_path() -> dict[str, int]:
    """File -> lines, of the README's rows `| 1 | [`minireflect/world/scenes.py`](...) | 60 | ... |`."""
    rows = re.findall(r"^\| \d+ \| .*?`([\w/.]+\.py)`.*? \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    return {file: int(lines) for file, lines in rows}


def test_the_reading_path_is_true_and_short() -> None:
    stated = reading_path()
    assert set(PATH_HOLDS) <= stated.keys(), sorted(set(PATH_HOLDS) - stated.keys())
    true = {file: size(ROOT / file).code for file in stated}
    wrong = {
        file: f"{stated[file]} stated, {true[file]} counted" for file in stated if stated[file] != true[file]
    }
    assert not wrong, f"`python -m tests.test_house` corrects the README's reading path: {wrong}"
    assert sum(true.values()) <= PATH_LINES
    assert f"{sum(true.values()):,} code lines" in (ROOT / "README.md").read_text(), sum(true.values())


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= README_BYTES, f"{len(text):,} bytes"


def documents() -> list[Path]:
    return [ROOT / "README.md", PACKAGE / "pretrained" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links and their anchors; GitHub makes `#what-a-picture-leaves` of "What a picture leaves"."""
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{link}: no such heading"


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d\.\d{3}", text))


def test_results_of_the_readme_stand_in_the_documents() -> None:
    """Every figure with three decimals in a row of results stands in a document that the same row links."""
    rows = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|") and numbers(line)
    ]
    assert len(rows) >= 3, "one row of results a method"
    for row in rows:
        linked = [ROOT / link for link in re.findall(r"\]\((docs/[\w.]+\.md)", row)]
        assert linked, f"no document linked: {row}"
        assert numbers(row) <= numbers("".join(path.read_text() for path in linked)), row


# ---- words -----------------------------------------------------------------------------------------------

RIDDLES = (  # words of an earlier style, each with a plain one in its place
    "lest|hearsay|whoever|thumb"
    '|spoils|spoilt|spoiled|(?<!")spoil(?!")'  # corrupt; "spoil" in quotes names a random stream
    "|painter|painters"  # ReasonPipeline
    "|exact checker|exact judge"  # inspector
)


def prose() -> dict[str, str]:
    """Text that people read: code with its comments, documents but for the log, sources of the notebooks."""
    paths = files("minireflect", "scripts", "benchmarks") + [p for p in documents() if p.name != "log.md"]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts[f"notebooks/{path.name}"] = "\n".join("".join(cell["source"]) for cell in cells)
    return texts


def test_words_are_plain() -> None:
    found = [
        f"{name}: ... {text[max(0, m.start() - 40) : m.end() + 40]!r}"
        for name, text in prose().items()
        for m in re.finditer(rf"\b({RIDDLES})\b", text, re.I)
    ]
    assert not found, "\n".join(found)


def correct_the_readme() -> None:
    """Write the counted code lines into the reading path."""
    text, total = (ROOT / "README.md").read_text(), 0
    for file, stated in reading_path().items():
        lines = size(ROOT / file).code
        total += lines
        text = re.sub(rf"(\| \[`{re.escape(file)}`\]\([^)]*\) \| ){stated} \|", rf"\g<1>{lines} |", text)
    (ROOT / "README.md").write_text(re.sub(r"is [\d,]+ code lines", f"is {total:,} code lines", text))


if __name__ == "__main__":
    correct_the_readme()
