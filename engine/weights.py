"""Binding: a model takes its tensors one by one, each with the shape its architecture gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixbit.engine.checkpoint import Checkpoint
from mixbit.engine.errors import CheckpointError
from mixbit.engine.quantization import Quantization, Scheme
from mixbit.engine.safetensors import StoredTensor
from mixbit.kernels.ops import Norm
from mixbit.kernels.spec import BatchMatvecSpec, DenseTensor, Matrix, QuantizedTensor, SpecError


@dataclass(frozen=True)
class Binding:
    """How a matrix was resolved. scheme: None if it is not quantized; origin: the claim that says so, for people."""

    path: str
    scheme: Scheme | None
    origin: str


class Weights:
    """The tensors of a checkpoint under their names within the text model ("model.layers.0...").

    Every getter raises CheckpointError if the tensor is missing or has another shape or width than asked.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization) -> None:
        self._checkpoint = checkpoint
        self._quantization = quantization
        self._taken: set[str] = set()
        self._skipped: set[str] = set()
        self.bindings: dict[str, Binding] = {}

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self._checkpoint.tensors

    def matrix(self, path: str, out_dim: int, in_dim: int, experts: int | None = None) -> Matrix:
        """The matrix [out_dim, in_dim] of the module at `path`, or the stack [experts, out_dim, in_dim]."""
        lead = () if experts is None else (experts,)
        if f"{path}.scales" in self:
            return self._quantized(path, (*lead, out_dim), in_dim)
        weight = self._take(f"{path}.weight")
        stored = weight.name.removesuffix(".weight")
        self._quantization.check_unquantized(path, stored, weight.shape)
        self._check_shape(weight, (*lead, out_dim, in_dim))
        self.bindings[path] = Binding(path, None, self._quantization.claim(path).origin)
        return self._dense(path, weight)

    def linear(self, path: str, out_dim: int, in_dim: int, *, bias: bool = False) -> BatchMatvecSpec:
        """A linear layer: its matrix, and the vector it adds where `bias`."""
        matrix = self.matrix(path, out_dim, in_dim)
        return BatchMatvecSpec(matrix, self.tensor(f"{path}.bias", (out_dim,)) if bias else None)

    def norm(self, path: str, dim: int, eps: float) -> Norm:
        """The RMS norm of the module at `path`."""
        return Norm(self.tensor(f"{path}.weight", (dim,)), eps)

    def tensor(self, name: str, shape: Sequence[int]) -> DenseTensor:
        """An unquantized tensor of this shape."""
        stored = self._take(name)
        self._check_shape(stored, tuple(shape))
        return self._dense(name, stored)

    def skip(self, prefix: str) -> None:
        """Leave the tensors whose name starts so, on purpose."""
        self._skipped |= {name for name in self._checkpoint.tensors if name.startswith(prefix)}

    def finish(self) -> None:
        """Raise CheckpointError if the checkpoint holds tensors that the model did not take."""
        used = self._taken | self._skipped
        left = [stored.name for name, stored in self._checkpoint.tensors.items() if name not in used]
        if left:
            more = f" and {len(left) - 4} more" if len(left) > 4 else ""
            raise CheckpointError(
                f"{self._checkpoint.path}: {len(left)} tensors belong to nothing in this model: "
                f"{', '.join(left[:4])}{more}; config.json describes another model than the weights"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors taken so far."""
        return sum(self._checkpoint.tensors[name].nbytes for name in self._taken)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Stored names of the tensors left on purpose."""
        return tuple(self._checkpoint.tensors[name].name for name in sorted(self._skipped))

    def _take(self, name: str) -> StoredTensor:
        stored = self._checkpoint.tensors.get(name)
        if stored is None:
            raise CheckpointError(
                f"{self._checkpoint.path}: tensor {name} is missing; the model in config.json needs it "
                f"({len(self._checkpoint.tensors)} tensors are stored)"
            )
        self._taken.add(name)
        return stored

    @staticmethod
    def _check_shape(stored: StoredTensor, expected: tuple[int, ...]) -> None:
        if stored.shape != expected:
            packed = stored.dtype == "U32" and stored.name.endswith(".weight")
            hint = " (packed codes, but no .scales beside them)" if packed else ""
            raise CheckpointError(
                f"{stored.name} in {stored.file.name}: shape {stored.shape}{hint}, but config.json implies {expected}"
            )

    @staticmethod
    def _dense(name: str, stored: StoredTensor) -> DenseTensor:
        try:
            return DenseTensor(name, stored.array(), (stored.place,))
        except SpecError as error:
            raise CheckpointError(f"{stored.file}: {error}") from error

    def _quantized(self, path: str, rows: tuple[int, ...], in_dim: int) -> QuantizedTensor:
        weight, scales = self._take(f"{path}.weight"), self._take(f"{path}.scales")
        stored = weight.name.removesuffix(".weight")
        if weight.shape[:-1] != rows or scales.shape[:-1] != rows:
            raise CheckpointError(
                f"{stored}: weight {weight.shape} and scales {scales.shape}, but config.json implies "
                f"{rows} rows of {in_dim} values"
            )
        scheme, claim = self._quantization.resolve(path, stored, weight.shape, scales.shape, in_dim)
        if f"{path}.biases" not in self:
            raise CheckpointError(f"{stored}.biases is missing; affine quantization has scales and biases")
        biases = self._take(f"{path}.biases")
        self.bindings[path] = Binding(path, scheme, claim.origin)
        try:
            return QuantizedTensor(
                path,
                weight.array(),
                scales.array(),
                biases.array(),
                scheme.bits,
                scheme.group_size,
                "affine",
                stored=(weight.place, scales.place, biases.place),
            )
        except SpecError as error:
            raise CheckpointError(f"{weight.file}: {error}") from error
