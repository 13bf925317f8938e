"""Runs `mx.fast.metal_kernel` kernels on the host.

MLX itself writes the kernel's signature (it does so without Metal while a function is exported), clang
compiles the text against metal.h, and runtime.cpp executes it. `HostMetal.kernel` has the interface of
`mx.fast.metal_kernel`, so that a wrapper and the Metal text it ships are tested together, unchanged.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "metal-host"
# -O1 keeps loads and stores as written, and no vectorizer joins them into sizes that are not traced. Loops stay loops:
# clang takes ten times as long over a kernel of matrices that are unrolled, and each load is traced either way.
FLAGS = (
    *("-std=c++17", "-O1", "-fno-exceptions", "-fno-rtti", "-fno-vectorize", "-fno-slp-vectorize", "-fPIC"),
    "-fno-unroll-loops",
    *("-nostdlib", "-shared", "-fno-sanitize=all", "-Wall", "-Werror"),
)
# Metal's own attributes mean nothing here, and a template's unused parameters are normal.
KERNEL_FLAGS = ("-fsanitize-coverage=trace-loads,trace-stores,edge", "-Wno-unknown-attributes", "-Wno-unused")

Array = npt.NDArray[Any]


class MetalError(RuntimeError):
    """The text does not compile, or its execution broke a rule of Metal; the message says which."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("writable", ctypes.c_int32),
        ("ready", ctypes.c_int32),
    )


def _build(sources: dict[str, str], flags: Sequence[str]) -> Path:
    """A shared library made of `sources` (file name to text), cached by content."""
    digest = hashlib.sha256(repr((sources, flags, FLAGS)).encode())
    for header in ("metal.h", "metal_simdgroup_matrix", "runtime.h", "machine.h"):
        digest.update((HERE / header).read_bytes())
    library = BUILD / f"{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_text(text)
        out = Path(folder) / "out.so"
        command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, *flags, f"-I{HERE}", "-o", str(out)]
        done = subprocess.run([*command, *sources], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MetalError(done.stderr)
        out.rename(library)
    return library


@cache
def _runtime() -> ctypes.CDLL:
    sources = {name: (HERE / name).read_text() for name in ("runtime.cpp", "memory.cpp")}
    return ctypes.CDLL(str(_build(sources, ("-Wextra",))), mode=ctypes.RTLD_GLOBAL)


@cache
def _load(library: Path) -> ctypes.CDLL:
    _runtime()
    return ctypes.CDLL(str(library))


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated signature: `const device float* x [[buffer(0)]]` or an attribute."""

    type: str
    name: str
    buffer: int | None

    @property
    def argument(self) -> str:
        """What the caller passes for it."""
        if self.buffer is None:
            vector = f"uint3{{t->{self.name}.x, t->{self.name}.y, t->{self.name}.z}}"
            return vector if self.type == "uint3" else f"t->{self.name}"
        value = f"b[{self.buffer}]"
        return f"*({self.type[:-1]}*){value}" if self.type.endswith("&") else f"({self.type}){value}"


def _parameters(source: str) -> tuple[str, list[Parameter]]:
    """Name and parameters of the kernel in a text that MLX has generated."""
    head = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", source, re.DOTALL)
    if head is None:
        raise MetalError("no kernel in the generated text")
    lines = [line.strip().rstrip(",") for line in head[2].split("\n")]
    found = []
    for line in lines:
        match = re.fullmatch(r"(.+?) (\w+) \[\[(?:buffer\((\d+)\)|\w+)\]\]", line)
        if match is None:
            raise MetalError(f"cannot read the parameter {line!r}")
        found.append(Parameter(match[1], match[2], None if match[3] is None else int(match[3])))
    return head[1], found


def _translate(source: str) -> tuple[str, list[Parameter]]:
    """C++ for a text that MLX has generated: the same text, with an entry point for the runtime."""
    name, parameters = _parameters(source)
    # The explicit instantiation names the host function for Metal; here the entry point instantiates.
    text, _, instantiation = source.replace("#pragma unroll\n", "\n").partition("\ntemplate [[host_name(")
    arguments = re.search(rf"decltype\({name}(<.*?>)\) ", instantiation)
    # Threadgroup arrays live in the runtime's memory, between redzones; the text declares them in the kernel.
    text = re.sub(
        r"(?<![\w(,] )\bthreadgroup (\w+) (\w+)\[(\w+)\]",
        r"threadgroup \1 (&\2)[\3] = *(threadgroup \1(*)[\3])metal_threadgroup_memory(sizeof(\1[\3]), __COUNTER__)",
        text,
    )
    call = ",\n    ".join(p.argument for p in parameters)
    entry = f"""
extern "C" const char __ehdr_start, _end;
extern "C" void entry(void** b, const MetalThread* t) {{
  {name}{arguments[1] if arguments else ""}(
    {call});
}}
extern "C" const void* image_start() {{ return &__ehdr_start; }}
extern "C" const void* image_end() {{ return &_end; }}
"""
    return '#include "metal.h"\n#line 1\n' + text + entry, parameters


def _to_numpy(array: mx.array) -> Array:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def _to_mlx(array: Array) -> mx.array:
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(array.view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def _numpy_dtype(dtype: mx.Dtype) -> np.dtype[Any]:
    return _to_numpy(mx.zeros((1,), dtype)).dtype


def _generate(record: Callable[[list[mx.array]], Any], inputs: list[mx.array]) -> str:
    """What MLX prints (verbose=True) while it records a kernel for export."""
    with tempfile.TemporaryFile() as captured, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        saved = os.dup(1)
        os.dup2(captured.fileno(), 1)
        try:
            mx.export_function(str(Path(folder) / "kernel.mlxfn"), lambda *args: record(list(args)), *inputs)
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
        captured.seek(0)
        text = captured.read().decode()
    return text.partition("```\n")[2].rpartition("\n```")[0]


@dataclass
class HostMetal:
    """A Metal device made of host threads. `seed` picks the order in which threads run (0: natural).

    in_place: names of inputs that kernels may write to, as our caches are; any other store to an input fails.
    """

    seed: int = 0
    in_place: frozenset[str] = frozenset()
    sources: dict[str, str] = field(default_factory=dict)  # the generated text of each kernel that ran

    def kernel(
        self, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = ""
    ) -> Callable[..., list[mx.array]]:
        """As `mx.fast.metal_kernel`: a function that runs the kernel, now, on this host."""
        real: Any = mx.fast.metal_kernel(
            name=name, input_names=list(input_names), output_names=list(output_names), source=source, header=header
        )
        generated: dict[Any, str] = {}

        def run(
            *,
            inputs: Sequence[mx.array],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            template: Sequence[tuple[str, Any]] = (),
        ) -> list[mx.array]:
            options: dict[str, Any] = {
                "grid": grid,
                "threadgroup": threadgroup,
                "output_shapes": [tuple(shape) for shape in output_shapes],
                "output_dtypes": list(output_dtypes),
            }
            if template:
                options["template"] = list(template)
            # All that the generated text depends on.
            key = (str(template), tuple((a.dtype, a.ndim, a.size < 8) for a in inputs), tuple(output_dtypes))
            if key not in generated:
                generated[key] = _generate(lambda args: real(inputs=args, verbose=True, **options), list(inputs))
            self.sources[name] = generated[key]
            outputs = [np.zeros(s, _numpy_dtype(d)) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            named = dict(zip(input_names, map(_to_numpy, inputs), strict=True))
            self.dispatch(generated[key], named, dict(zip(output_names, outputs, strict=True)), grid, threadgroup)
            for array, (given_name, given) in zip(inputs, named.items(), strict=True):
                if given_name in self.in_place:
                    np.copyto(np.array(array.view(mx.uint8), copy=False), given.view(np.uint8))
            return [_to_mlx(out) for out in outputs]

        return run

    def dispatch(
        self,
        source: str,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> None:
        """Compile a generated text and run it; outputs start as all ones (NaN) and are filled in place."""
        text, parameters = _translate(source)
        library = _load(_build({"kernel.cpp": text}, KERNEL_FLAGS))
        buffers: list[_Buffer] = []
        keep: list[Array] = []
        for parameter in parameters:
            if parameter.buffer is None:
                continue
            name, writable, ready = parameter.name, False, True
            if name in outputs:
                data, writable, ready = outputs[name], True, False
                data.reshape(-1).view(np.uint8)[:] = 0xFF
            elif name in inputs:
                data, writable = inputs[name], name in self.in_place
            else:
                data = _metadata(name, inputs)
            keep.append(data)
            buffers.append(_Buffer(name.encode(), data.ctypes.data, data.nbytes, writable, ready))
        message = ctypes.create_string_buffer(512)
        library.image_start.restype = library.image_end.restype = ctypes.c_void_p
        failed = _runtime().metal_dispatch(
            library.entry,
            (_Buffer * len(buffers))(*buffers),
            len(buffers),
            (ctypes.c_uint32 * 3)(*grid),
            (ctypes.c_uint32 * 3)(*threadgroup),
            ctypes.c_uint64(self.seed),
            ctypes.c_void_p(library.image_start()),
            ctypes.c_void_p(library.image_end()),
            message,
            ctypes.c_size_t(len(message)),
        )
        if failed:
            raise MetalError(message.value.decode())


def _metadata(name: str, inputs: dict[str, Array]) -> Array:
    """The arrays that MLX binds for `x_shape`, `x_strides` (in elements) and `x_ndim`."""
    base, _, what = name.rpartition("_")
    array = inputs[base]
    if what == "shape":
        return np.array(array.shape, np.int32)
    if what == "strides":
        return np.array([s // array.itemsize for s in array.strides], np.int64)
    return np.array([array.ndim], np.int32)
