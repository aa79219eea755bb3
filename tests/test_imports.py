"""The house rules of docs/architecture.md, read from the package's own files: imports, names, lengths, depth."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import Llama, SamplingParams
from llama.embedding import Embedding

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "children" not in path.parts)
"""All modules; the scripts in `bench/children/` are run by path, some by interpreters that have no `llama`."""

# A file or folder imports only from rows above its own. Quoted in docs/architecture.md.
ROWS = """
files  device  streams  progress  kernels  request  sampling_params  masks  tool_call  version
parallel  linear
cache  rotary  embedding  vocabulary  blocks  sampling  options  keyboard  program
attention  quantization  tokenizer  scheduler  lora
layer_stack
model  chat  answer  constraints
checkpoint  runner  choice  client  compiled
drafters  adapting
speculation
engine
building
generation  export
service  perplexity  terminal  cluster
batch  server  protocol  bench
report  replicated_batch
__init__  __main__
"""
ROW = {name: number for number, line in enumerate(ROWS.strip().splitlines()) for name in line.split()}

# Public names that several modules define.
SHARED_NAMES = {
    "FORMATS": "tables of one row a format: of chats, of checkpoints, of low bits",
    "convert": "the command, and what it calls",
    "inspect": "the command, and what it calls",
    "perplexity": "the command, and what it calls",
    "push": "the command, and what it calls",
    "rms_norm": "an operator, and the same on a GPU",
    "swiglu": "an operator, and the same on a GPU",
    "verify": "the command, and what it calls",
}
MOST_LINES = 450
LONG = "This file is long because"  # what the docstring at the top of a longer file must explain
MOST_FRAMES = 8


def unit(path: Path) -> str:
    """The file or folder that stands in a row."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


@cache
def imported(path: Path) -> frozenset[str]:
    """The package's own modules that a file imports, whether at its top or inside a function."""
    found = set()
    package = ["llama", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            full = {f"{name}.{alias.name}" for alias in node.names}
            found |= {one if one in MODULES else name for one in full}
    return frozenset(found & MODULES.keys())


def public_names(path: Path) -> Iterator[str]:
    """What a module defines at its top level: functions, classes, variables."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_rows_above_its_own(path):
    assert unit(path) in ROW, f"give {unit(path)} a place in ROWS, here and in docs/architecture.md"
    for other in {unit(MODULES[name]) for name in imported(path)} - {unit(path)}:
        assert ROW[other] < ROW[unit(path)], f"{unit(path)} imports {other}"


def test_no_imports_go_in_a_circle():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def test_the_documentation_quotes_the_rows():
    assert ROWS in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_no_row_names_what_is_not_there():
    assert ROW.keys() == {unit(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_fits_in_the_head_or_says_why_not(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES or LONG in (ast.get_docstring(ast.parse(text)) or "")


def test_a_public_name_means_one_thing():
    places = defaultdict(set)
    for path in FILES:
        for name in public_names(path):
            places[name].add(str(path.relative_to(PACKAGE)))
    shared = {name: sorted(files) for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in shared.items() if name not in SHARED_NAMES} == {}
    assert SHARED_NAMES.keys() <= shared.keys(), "a name that one module alone defines need not be listed"


def test_few_calls_lie_between_a_program_and_the_model(monkeypatch):
    look_up, stacks = Embedding.forward, []

    def forward(self, tokens):
        frame, names = sys._getframe(1), []
        while frame:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                names.append(frame.f_code.co_qualname)
            frame = frame.f_back
        stacks.append(names)
        return look_up(self, tokens)

    monkeypatch.setattr(Embedding, "forward", forward)
    llm = Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="llama2")
    stacks.clear()
    llm.complete(["a prompt"], SamplingParams(max_tokens=2))
    for names in stacks:
        assert names[-1] == "Llama.complete"
        assert len(names) <= MOST_FRAMES, names
    assert len(stacks) == 2


def loaded(code: str, names: list[str]) -> list[str]:
    """Which of these modules are there after the code has run in a fresh process."""
    code += f"; import sys; print(*[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_needs_what_windows_lacks_to_be_imported(path):
    posix = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            assert not posix & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in posix


def test_importing_llama_pulls_in_no_server_and_no_library_that_one_process_does_not_need():
    heavy = ["fairscale", "transformers", "fastapi", "uvicorn", "huggingface_hub", "fire", "triton", "gguf"]
    heavy += ["llguidance", "rich", "pydantic", "jinja2", "sentencepiece", "tiktoken", "tokenizers"]
    assert loaded("from llama import Llama", heavy) == []


COUNTED = """
import gc
counts = [0]
gc.callbacks.append(lambda phase, info: counts.append(counts.pop() + (phase == "stop" and info["generation"] == 2)))
"""


def test_nothing_is_collected_while_the_package_is_imported_nor_caught_up_on_after_it():
    code = COUNTED + "from llama import Llama; assert gc.isenabled() and not gc.get_freeze_count()"
    code += "; are_old = len(gc.get_objects(generation=2)) > 100_000"  # before the next collection makes them so
    code += "; kept = [[] for _ in range(20_000)]; print(counts, are_old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[0] True\n"


def test_what_a_program_has_said_about_collections_outlives_an_import():
    code = "import gc; gc.disable(); import llama; llama.chat; assert not gc.isenabled()"
    code += "; gc.enable(); gc.freeze(); llama.client; assert gc.isenabled() and gc.get_freeze_count()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_shows_its_help_without_torch():
    assert loaded("import llama.__main__", ["torch", "rich", "numpy", "prompt_toolkit"]) == []


def test_every_path_that_the_documentation_names_exists():
    for document in [ROOT / "README.md", ROOT / "README.zh-CN.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"\b(?:llama|benchmarks|tests|docs)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
