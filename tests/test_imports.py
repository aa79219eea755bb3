"""The import rule of docs/architecture.md, read from the files themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llama"

ROWS = [
    {
        "parallel",
        "request",
        "blocks",
        "sampling_params",
        "scheduler",
        "tokenizer",
        "vocabulary",
        "kernels",
        "linear",
        "rotary",
        "cache",
        "attention",
        "device",
        "progress",
        "files",
    },
    {"model", "sampling", "quantization", "chat"},
    {"checkpoint", "runner"},
    {"answer", "engine"},
    {"building", "generation"},
    {"options", "perplexity", "protocol", "batch"},
    {"terminal", "report", "__main__", "__init__"},
]
NEIGHBOURS = {
    ("blocks", "request"),
    ("scheduler", "request"),
    ("scheduler", "blocks"),
    ("engine", "answer"),
    ("generation", "building"),
    ("attention", "cache"),
    ("attention", "kernels"),
    ("attention", "rotary"),
    ("cache", "kernels"),
    ("rotary", "kernels"),
    ("tokenizer", "vocabulary"),
    ("__main__", "terminal"),
    ("__main__", "report"),
    ("batch", "protocol"),
    ("chat", "chat"),
    ("checkpoint", "checkpoint"),
    ("files", "files"),
    ("tokenizer", "files"),
    ("vocabulary", "files"),
    ("vocabulary", "vocabulary"),
    ("kernels", "kernels"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The file or folder that stands in the picture."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def row(name: str) -> int:
    return next(number for number, names in enumerate(ROWS) if name in names)


def imported_units(path: Path) -> set[str]:
    """The package's own files that a file imports, whether at its top or inside a function."""
    found = set()
    package = ["llama", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "llama" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("llama.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_the_rows_above_its_own(path):
    name = unit(path)
    for other in imported_units(path):
        assert row(other) < row(name) or (name, other) in NEIGHBOURS, f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_over_600_lines(path):
    assert len(path.read_text().splitlines()) <= 600


def test_importing_llama_pulls_in_no_server_and_no_library_that_one_process_does_not_need():
    heavy = ["fairscale", "transformers", "fastapi", "uvicorn", "huggingface_hub", "fire", "triton"]
    code = f"import llama, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
