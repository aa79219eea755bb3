"""The person's own packages: where they are, who may write there, and that each is made once."""

import os
import stat
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_args, tiny_model

from llama.compiled import cache as cache_module
from llama.compiled import choose_program, compiler
from llama.compiled.cache import PackageCache, cache_folder
from llama.compiled.fingerprint import Fingerprint
from llama.compiled.graph import StepGraph
from llama.compiled.manifest import MANIFEST, PACKAGE
from llama.files.errors import CheckpointError
from llama.kernels import library

pytestmark = pytest.mark.skipif(not library.AVAILABLE, reason="a package calls the compiled kernels")
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no modes")


@pytest.fixture(scope="module")
def graph() -> StepGraph:
    return StepGraph(tiny_model(tiny_args(n_heads=4, n_kv_heads=2)), torch.float32)


@pytest.fixture
def fakes(monkeypatch) -> list[Path]:
    """Packages that are a word, and where they were written."""
    made = []

    def compile_package(graph: StepGraph, path: Path) -> None:
        made.append(path)
        path.write_text("native code")

    monkeypatch.setattr(cache_module, "compile_package", compile_package)
    return made


@pytest.fixture
def package(graph, fakes, tmp_path) -> tuple[PackageCache, Fingerprint, Path]:
    """A cache with one package."""
    cache, fingerprint = PackageCache(tmp_path / "cache"), Fingerprint.of(graph)
    return cache, fingerprint, cache.make(graph, fingerprint)


def test_the_folder_is_where_the_standard_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/person")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/llama/compiled")
    for other in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", other)
        assert cache_folder() == Path("/home/person/.cache/llama/compiled")


def test_a_package_is_made_once_and_found_again(package, graph, fakes):
    cache, fingerprint, folder = package
    assert cache.find(fingerprint) == folder == cache.make(graph, fingerprint)
    assert len(fakes) == 1
    assert {file.name for file in folder.iterdir()} == {MANIFEST, PACKAGE}


def test_whatever_differs_is_another_package(package):
    cache, fingerprint, _ = package
    for field in fields(Fingerprint):
        assert cache.find(replace(fingerprint, **{field.name: "other"})) is None


@posix
def test_nobody_else_can_read_or_write_what_is_made(package):
    cache, _, folder = package
    assert stat.S_IMODE(cache.folder.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


@posix
@pytest.mark.parametrize("mode", [0o702, 0o720, 0o777])
@pytest.mark.parametrize("place", ["cache", "folder", PACKAGE, MANIFEST])
def test_where_others_may_write_nothing_runs(package, mode, place):
    cache, fingerprint, folder = package
    path = {"cache": cache.folder, "folder": folder}.get(place, folder / place)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"{path}: others may write there, .* chmod go-w {path}$"):
        cache.find(fingerprint)


@posix
def test_a_folder_in_a_place_that_others_may_exchange_is_refused(graph, fakes, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    cache = PackageCache(tmp_path / "open" / "cache")
    fingerprint = Fingerprint.of(graph)
    with pytest.raises(ValueError, match="others may rename what is in there"):
        cache.make(graph, fingerprint)
    assert fakes == []
    (tmp_path / "open").chmod(0o1777)  # as /tmp, where each may rename his own alone
    assert cache.find(fingerprint) is None
    assert cache.make(graph, fingerprint)


@posix
def test_a_folder_of_another_person_and_a_link_are_refused(package, monkeypatch, tmp_path):
    cache, fingerprint, folder = package
    folder.rename(tmp_path / "theirs")
    folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="folders of your own alone"):
        cache.find(fingerprint)
    folder.unlink()
    (tmp_path / "theirs").rename(folder)
    assert cache.find(fingerprint) == folder
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ValueError, match="folders of your own alone, and this one is another's"):
        cache.find(fingerprint)


@pytest.mark.parametrize("name", [PACKAGE, MANIFEST])
@pytest.mark.parametrize("data", [None, b"", b"other code"])
def test_a_damaged_package_is_made_again(package, graph, fakes, name, data):
    cache, fingerprint, folder = package
    (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    assert cache.find(fingerprint) is None
    assert cache.make(graph, fingerprint) == folder
    assert cache.find(fingerprint) == folder
    assert len(fakes) == 2


def test_of_several_that_want_it_at_once_one_compiles_and_all_find_it(graph, fakes, tmp_path):
    cache, fingerprint = PackageCache(tmp_path / "cache"), Fingerprint.of(graph)
    at_once, found = threading.Barrier(4), []

    def make() -> None:
        at_once.wait()
        found.append(cache.make(graph, fingerprint))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fakes) == 1
    assert found == [cache.folder / fingerprint.key] * 4


def test_what_fails_leaves_nothing_behind(graph, monkeypatch, tmp_path):
    def fail(graph: StepGraph, path: Path) -> None:
        path.write_text("half of it")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(cache_module, "compile_package", fail)
    cache, fingerprint = PackageCache(tmp_path / "cache"), Fingerprint.of(graph)
    with pytest.raises(RuntimeError, match="the disk is full"):
        cache.make(graph, fingerprint)
    assert [path.name for path in cache.folder.iterdir() if path.is_dir()] == []


# ---- what a person is told


@posix
def test_an_unsafe_cache_is_an_error_for_who_asks_and_a_warning_for_who_does_not(
    graph, fakes, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = PackageCache()
    cache.make(graph, Fingerprint.of(graph))
    capsys.readouterr()
    cache.folder.chmod(0o777)
    with pytest.raises(ValueError, match="others may write there"):
        choose_program(graph.model, torch.float32, True)
    assert choose_program(graph.model, torch.float32, None) is None
    assert capsys.readouterr().err.startswith(f"warning: {cache.folder}: others may write there")


@pytest.mark.parametrize("missing", ["", "nothing-of-that-name"])
def test_without_a_compiler_the_reason_is_one_line(graph, monkeypatch, tmp_path, missing):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", missing)
    with pytest.raises(RuntimeError, match=r"compiling a model needs g\+\+, and .*: install it, or leave compile out$"):
        choose_program(graph.model, torch.float32, True)
    assert choose_program(graph.model, torch.float32, None) is None


def test_what_the_compilers_say_is_cut_to_one_line(graph, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise TypeError("of many\nlines")

    monkeypatch.setattr(compiler, "validate_compiler", lambda: None)
    monkeypatch.setattr("torch.export.export", fail)
    with pytest.raises(RuntimeError, match="the model's step does not compile: TypeError: of many"):
        compiler.compile_package(graph, tmp_path / PACKAGE)


REFUSED = {
    "deterministic=True fixes the shapes": dict(fixed_rows=16),
    "bf16 or fp32 and multiples of 16": dict(dtype=torch.float16),
    "2 ranks share this model": dict(size=2),
    "this model is on meta": dict(device="meta"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compiled_is_refused_by_name_and_left_out_where_nobody_asks(reason):
    change = REFUSED[reason]
    model = tiny_model(tiny_args(n_heads=4, n_kv_heads=2))
    model.to(change.get("dtype")).prepare(change.get("fixed_rows"))
    model.to(change.get("device"))
    model.parallel = replace(model.parallel, size=change.get("size", 1))
    with pytest.raises(ValueError, match=f"does not run compiled: .*{reason}.*; leave compile out"):
        choose_program(model, torch.float32, True)
    assert choose_program(model, torch.float32, None) is None


# ---- what a package depends on

MISFITS = {
    "torch": ("2.0.0", "compiled with torch 2.0.0, and this is"),
    "llama": ("0.0.1", "compiled with llama 0.0.1, and this is"),
    "system": ("Darwin arm64", "compiled with a system like Darwin arm64, and this is"),
    "instructions": ("avx2 avx999", "compiled for a processor with .*avx999, which this one lacks"),
    "kernels": ("other", "with other kernels"),
    "sources": ("other", "from other code of the model"),
    "model": ("other", "for another model"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named(graph, name):
    value, reason = MISFITS[name]
    here = Fingerprint.of(graph)
    assert here.misfit(here) is None
    made = replace(here, **{name: value})
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(made.misfit(here))


def test_a_processor_that_has_more_runs_what_one_with_less_compiled(graph):
    here = Fingerprint.of(graph)
    first, *others = here.instructions.split()
    assert replace(here, instructions=" ".join(others)).misfit(here) is None
    assert first in here.misfit(replace(here, instructions=" ".join(others)))


def test_the_weights_values_and_the_lengths_do_not_matter_but_their_types_do():
    def of(seed: int = 0, kv_dtype: torch.dtype = torch.float32, **changes) -> str:
        model = tiny_model(tiny_args(**{"n_heads": 4, "n_kv_heads": 2} | changes), seed)
        return Fingerprint.of(StepGraph(model, kv_dtype)).key

    assert of() == of(seed=1) == of(max_seq_len=17) == of(max_batch_size=9) == of(sliding_window=8)
    others = [of(kv_dtype=torch.int8), of(n_layers=1), of(attention_bias=True), of(rope_theta=5e5), of(norm_eps=1e-6)]
    assert len({of(), *others}) == 6


def test_a_manifest_that_is_none_is_refused(package):
    from llama.compiled import Manifest
    from llama.files.json import json_bytes, read_json

    folder = package[2]
    good = read_json(folder / MANIFEST)
    limits = dict(batch_size=1, sequence_length=8, num_cores=1, dtype="float32", kv_dtype="auto")
    bad = [{"format": 9}, {"made_with": 1}, {"made_with": good["made_with"] | {"torch": 2}}, {"package": 1}]
    bad += [{"limits": 1}, {"limits": limits | {"batch_size": 0}}, {"limits": limits | {"num_cores": "2"}}]
    for change in bad:
        (folder / MANIFEST).write_bytes(json_bytes(good | change))
        with pytest.raises(CheckpointError, match=str(folder / MANIFEST)):
            Manifest.read(folder)
    (folder / MANIFEST).write_bytes(json_bytes(good | {"limits": limits}))
    assert Manifest.read(folder).limits.sequence_length == 8
