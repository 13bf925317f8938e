"""Makes kernels of this project callable on an MLX device."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx

from mixbit.kernels.mlx.custom.sources import Language, source

Template = Sequence[tuple[str, int | bool | mx.Dtype]]
Size = tuple[int, int, int]


class Kernel(Protocol):
    """A kernel as MLX makes it: inputs and the sizes of a launch in, outputs out."""

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        grid: Size,
        threadgroup: Size,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Template = (),
    ) -> list[mx.array]:
        """grid counts threads, not threadgroups."""


class Launcher:
    """Kernels for one device. `make` has the interface of mx.fast.metal_kernel."""

    def __init__(self, language: Language, make: Callable[..., Any]) -> None:
        self.language: Language = language
        self._make = make

    @classmethod
    def of_this_machine(cls) -> Launcher | None:
        """For MLX's GPU, or None if it has none."""
        if mx.metal.is_available():
            return cls("metal", mx.fast.metal_kernel)
        if mx.cuda.is_available():
            return cls("cuda", mx.fast.cuda_kernel)
        return None

    def kernel(self, name: str, inputs: Sequence[str], outputs: Sequence[str], *defines: str) -> Kernel:
        """The kernel of the file `name`. defines: macros its text expects, "NAME" or "NAME value"."""
        text = source(name, self.language)
        header = "".join(f"#define {define}\n" for define in defines) + text.header
        kernel: Kernel = self._make(
            name=name, input_names=inputs, output_names=outputs, source=text.body, header=header
        )
        return kernel


def float_bits(value: float) -> int:
    """A float32 as an int that a template can carry; the kernel reads it with as_type<float>."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def lanes_for(in_dim: int) -> int:
    """How many lanes share a row of `in_dim` columns, so that few of them idle: 8, 16 or 32."""
    blocks = in_dim // 32
    return max((32, 16, 8), key=lambda lanes: (blocks / (-(-blocks // lanes) * lanes), lanes))
