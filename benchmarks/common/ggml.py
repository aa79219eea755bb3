"""llama.cpp's matrix products, measured from outside: a child process that speaks JSON lines.

Run by another interpreter that has llama-cpp-python (and need not have torch). One request a line on standard input,
one answer a line on standard output:

    {"make": {"type": "q4_0", "shapes": [[rows, columns], ...]}}  ->  {"layouts": ["CPU_REPACK"]}
    {"run": 1}        one pass over all weights with that many activation rows  ->  {"seconds": 0.031}

The weights are random and lie in the buffer type that llama.cpp's own loader would choose (AMX or repacked where it has
such kernels for the type), so that this is llama.cpp at its best. ggml's C interface is called through ctypes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import time
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {"bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_k": 12, "q6_k": 14}
F32, CPU_DEVICE, BUFFER_OFFSET = (
    0,
    0,
    8,
)  # `buffer` follows the four-byte type and its padding in struct ggml_tensor


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


SIGNATURES = {
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_dev_by_type": (c_void_p, c_int),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
}


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def silent(level: int, text: bytes, user_data: object) -> None:
    """Takes ggml's log, which would go to standard error."""


def load_ggml() -> dict[str, ctypes._CFuncPtr]:
    """ggml's functions by name, from the libraries inside llama-cpp-python (found without importing it)."""
    folder = Path(importlib.util.find_spec("llama_cpp").submodule_search_locations[0]) / "lib"
    names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
    libraries = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names]
    functions = {}
    for name, (result, *arguments) in SIGNATURES.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        functions[name.removeprefix("ggml_").removeprefix("backend_")] = function
    functions["log_set"](silent, None)
    return functions


class Linears:
    """One weight of each shape in a ggml type, and a graph of products for each number of activation rows."""

    def __init__(self, ggml: dict[str, ctypes._CFuncPtr], threads: int, kind: str, shapes: list[list[int]]) -> None:
        self.ggml, self.kind, self.shapes = ggml, TYPES[kind], shapes
        self.backend = ggml["cpu_init"]()
        ggml["cpu_set_n_threads"](self.backend, threads)
        self.device = ggml["dev_by_type"](CPU_DEVICE)
        self.buffer_types = self.possible_buffer_types()
        self.layouts: set[str] = set()
        self.owned: list[tuple[c_void_p, c_void_p]] = []  # contexts and their buffers, to be freed
        self.weights = [self.make_weight(rows, columns) for rows, columns in shapes]
        self.graphs: dict[int, c_void_p] = {}

    def possible_buffer_types(self) -> list[c_void_p]:
        """Those with kernels of their own first, the plain one last: the order of llama.cpp's loader."""
        registry = self.ggml["dev_backend_reg"](self.device)
        address = self.ggml["reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
        extra, found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device), []
        while extra and extra[len(found)]:
            found.append(extra[len(found)])
        return [*found, self.ggml["dev_buffer_type"](self.device)]

    def context(self, tensors: int) -> c_void_p:
        return self.ggml["init"](InitParams(tensors * 512 + 100000, None, True))

    def supports(self, buffer_type: c_void_p, rows: int, columns: int) -> bool:
        """Whether a product can read its weight from such a buffer."""
        context = self.context(4)
        weight = self.ggml["new_tensor_2d"](context, self.kind, columns, rows)
        x = self.ggml["new_tensor_2d"](context, F32, columns, 512)
        product = self.ggml["mul_mat"](context, weight, x)
        buffer = self.ggml["buft_alloc_buffer"](buffer_type, 0)
        c_void_p.from_address(weight + BUFFER_OFFSET).value = buffer
        supported = self.ggml["dev_supports_op"](self.device, product)
        self.ggml["buffer_free"](buffer)
        self.ggml["free"](context)
        return supported

    def make_weight(self, rows: int, columns: int) -> c_void_p:
        buffer_type = next(kind for kind in self.buffer_types if self.supports(kind, rows, columns))
        self.layouts.add(self.ggml["buft_name"](buffer_type).decode())
        context = self.context(1)
        weight = self.ggml["new_tensor_2d"](context, self.kind, columns, rows)
        self.owned.append((context, self.ggml["alloc_ctx_tensors_from_buft"](context, buffer_type)))
        # bytes below 60 keep every float16 in them an ordinary number
        content = np.random.default_rng(0).integers(0, 60, self.ggml["nbytes"](weight), dtype=np.uint8)
        self.ggml["tensor_set"](weight, content.ctypes.data, 0, content.size)
        return weight

    def graph(self, rows: int) -> c_void_p:
        """All products with `rows` activation rows, as one graph."""
        context = self.context(4 * len(self.shapes) + 1000)
        graph = self.ggml["new_graph_custom"](context, 4 * len(self.shapes) + 100, False)
        widths = sorted({columns for _, columns in self.shapes})
        inputs = {columns: self.ggml["new_tensor_2d"](context, F32, columns, rows) for columns in widths}
        for weight, (_, columns) in zip(self.weights, self.shapes, strict=True):
            self.ggml["build_forward_expand"](graph, self.ggml["mul_mat"](context, weight, inputs[columns]))
        self.owned.append((context, self.ggml["alloc_ctx_tensors"](context, self.backend)))
        for columns, tensor in inputs.items():
            x = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
            self.ggml["tensor_set"](tensor, x.ctypes.data, 0, x.nbytes)
        return graph

    def run(self, rows: int) -> float:
        """Seconds of one pass."""
        if rows not in self.graphs:
            self.graphs[rows] = self.graph(rows)
        start = time.perf_counter()
        self.ggml["graph_compute"](self.backend, self.graphs[rows])
        return time.perf_counter() - start

    def close(self) -> None:
        for context, buffer in self.owned:
            self.ggml["buffer_free"](buffer)
            self.ggml["free"](context)


def main() -> None:
    """Answer requests until standard input ends. The one argument is the number of threads."""
    ggml, threads, linears = load_ggml(), int(sys.argv[1]), None
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            if linears:
                linears.close()
            linears = Linears(ggml, threads, request["make"]["type"], request["make"]["shapes"])
            answer = {"layouts": sorted(linears.layouts)}
        else:
            answer = {"seconds": linears.run(request["run"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
