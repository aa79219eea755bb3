"""What setup.py builds: one shared library with the kernels, optional, without Python in it."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

SOURCES = (
    "attention.cpp",
    "dense.cpp",
    "elementwise.cpp",
    "layer.cpp",
    "layout.cpp",
    "lookup.cpp",
    "lowbit.cpp",
    "lowbit_avx512.cpp",
    "lowbit_avx2.cpp",
    "lowbit_scalar.cpp",
    "lowrank.cpp",
    "team.cpp",
)
COMPILER_FLAGS = (
    "-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden",
    # else gcc postpones the kernels' sums until all products are made, which do not fit in the registers
    "-fno-tree-ter", "-fno-tree-reassoc",
    *(
        "-Wno-psabi",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ),  # what gcc 12 says of its own intrinsics
)  # fmt: skip


def extensions() -> list[Extension]:
    """The extension for `setup(ext_modules=...)`; empty where torch is absent or the platform is not Linux.

    A build that fails is a warning (`optional`): the package then runs on PyTorch operators alone. The library holds
    every instruction set's kernels and chooses at run time, so it is built for plain x86-64 (or any other processor).
    No AMX among them: with many rows the matrix library's product on unpacked tiles uses that.
    """
    if not sys.platform.startswith("linux"):
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        return []
    here = Path("llama/kernels/csrc")
    return [
        Extension(
            "llama.kernels._kernels",
            sources=[str(here / source) for source in SOURCES],
            depends=[str(header) for header in sorted(here.glob("*.h"))],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=list(COMPILER_FLAGS),
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ]


class ParallelBuild(build_ext):
    """Compiles sources side by side: each instruction set's kernels take some seconds."""

    def build_extensions(self) -> None:
        compile_some = self.compiler.compile

        def compile_each(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_some([source], **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_each
        super().build_extensions()
