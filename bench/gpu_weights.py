"""Random weights that are made on an MLX device, the same for every model of these names: nothing is read or copied."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from bench.gpu_shapes import GROUP_SIZE, bits_of
from mixbit.kernels.mlx.weights import DenseWeight, QuantizedWeight
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor


def _key(name: str) -> mx.array:
    return mx.random.key(zlib.crc32(name.encode()))


def random_matrix(shape: tuple[int, ...], bits: int, dtype: mx.Dtype, name: str) -> QuantizedWeight:
    """[..., out, in] whose values are even within +-sqrt(3 / in); a name always gives the same."""
    *lead, in_dim = shape
    halves = mx.random.randint(0, 1 << 16, (*lead, in_dim * bits // 32, 2), mx.uint16, key=_key(name))
    codes = halves.view(mx.uint32).squeeze(-1)
    reach = (3 / in_dim) ** 0.5
    groups = (*lead, in_dim // GROUP_SIZE)
    scales, biases = mx.full(groups, 2 * reach / (2**bits - 1), dtype), mx.full(groups, -reach, dtype)
    mx.eval(codes, scales, biases)
    return QuantizedWeight(codes, scales, biases, bits, GROUP_SIZE)


def random_vector(shape: tuple[int, ...], dtype: mx.Dtype, name: str) -> mx.array:
    """Values around 1; a name always gives the same."""
    count = 1
    for size in shape:
        count *= size
    made = (1 + 0.1 * mx.random.normal((count,), key=_key(name))).astype(dtype).reshape(shape)
    mx.eval(made)
    return made


class RandomWeights:
    """Stands for kernels.mlx.weights.Weights: takes shapes and names from the program, makes values on the device."""

    def __init__(self, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._made: dict[str, QuantizedWeight] = {}

    def matrix(self, matrix: Matrix) -> QuantizedWeight | DenseWeight:
        if matrix.name not in self._made:
            assert isinstance(matrix, QuantizedTensor)
            shape = (*matrix.weight.shape[:-1], matrix.in_dim)
            self._made[matrix.name] = random_matrix(shape, matrix.bits, self.dtype, matrix.name)
        return self._made[matrix.name]

    def vector(self, tensor: DenseTensor, dtype: mx.Dtype | None = None) -> mx.array:
        return random_vector(tensor.data.shape, self.dtype, tensor.name).astype(dtype or self.dtype)


def mlx_lm_model(config: Mapping[str, Any], dtype: mx.Dtype) -> Any:
    """mlx-lm's own model of this config.json with the weights that RandomWeights gives ours."""
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(dict(config))
    model = model_class(args_class.from_dict(dict(config)))  # lazy: these values are never made
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and {"group_size": GROUP_SIZE, "bits": bits_of(path)}
        ),
    )
    names: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    made: list[tuple[str, mx.array]] = []
    for name, like in names.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in names and name != path:
            bits = bits_of(path)
            weight = random_matrix((*like.shape[:-1], like.shape[-1] * 32 // bits), bits, dtype, path)
            made += [(f"{path}.{part}", value) for part, value in zip(_PARTS, _arrays(weight), strict=True)]
        elif not name.endswith((".scales", ".biases")):
            made.append((name, random_vector(like.shape, dtype, name)))
    model.load_weights(made)
    model.eval()
    return model


_PARTS = ("weight", "scales", "biases")


def _arrays(weight: QuantizedWeight) -> tuple[mx.array, mx.array, mx.array]:
    return weight.codes, weight.scales, weight.biases
