"""Walks a program once and records each node in its native form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mixbit.kernels import ops
from mixbit.kernels.cpu import _cpu
from mixbit.kernels.experts import expert_parts, stacks, streamable
from mixbit.kernels.spec import DenseTensor, Matrix, QuantizedTensor

_DTYPES = {
    np.dtype(np.float32): _cpu.DType.f32,
    np.dtype(np.float16): _cpu.DType.f16,
    np.dtype(ml_dtypes.bfloat16): _cpu.DType.bf16,
}

_NormArg = tuple[npt.NDArray[np.float32], float]
_ColumnsArg = tuple[int, int, int]


def record(program: ops.Program, native: _cpu.Program, files: Mapping[Path, int]) -> tuple[_cpu.Weight, ...]:
    """Add the program's values and nodes to `native`; returns the weights that must outlive it.

    files: numbers of the files that experts are streamed from; those of others stay where they are.
    """
    recorder = _Recorder(native, files)
    for value in program.values:
        native.value(value.dim, value.rows is ops.Rows.SELECTED)
    ahead = _mixer_inputs(program, list(streamable(program))) if files else {}
    for node in program.nodes:
        recorder.node(node)
        for value in ops.outputs_of(node):
            for layer, norm, moe, before in ahead.get(value, ()):
                recorder.read_ahead(value, layer, norm, moe, before)
    native.finish(program.logits.index, program.hidden.index)
    return tuple(recorder.weights.values())


class _Recorder:
    def __init__(self, native: _cpu.Program, files: Mapping[Path, int]) -> None:
        self.native = native
        self.files = files
        self.weights: dict[Matrix, _cpu.Weight] = {}
        self._ropes: dict[ops.Rope, int] = {}

    def node(self, node: ops.Node) -> None:
        native = self.native
        match node:
            case ops.Embed(table, out):
                native.embed(self._weight(table), out.index)
            case ops.SelectRows(x, out):
                native.select_rows(x.index, out.index)
            case ops.RmsNorm(x, norm, out):
                native.rms_norm(x.index, _norm(norm), out.index)
            case ops.AddNorm(x, delta, norm, total, out):
                native.add_norm(x.index, delta.index, _norm(norm), total.index, out.index)
            case ops.BatchMatvec(x, specs, outs):
                parts = [(self._weight(s.matrix), None if s.bias is None else _floats(s.bias)) for s in specs]
                native.batch_matvec(x.index, parts, [out.index for out in outs])
            case ops.Mlp(x, spec, out):
                native.mlp(x.index, self._mlp(spec), out.index)
            case ops.Moe():
                self._moe(node)
            case ops.Attention():
                self._attention(node)
            case ops.GatedDelta():
                self._gated_delta(node)

    def _moe(self, node: ops.Moe) -> None:
        spec = node.spec
        self.native.moe(
            node.x.index,
            self._weight(spec.router),
            self._mlp(spec.experts),
            top_k=spec.top_k,
            normalize=spec.normalize,
            shared=None if spec.shared is None else self._mlp(spec.shared),
            shared_gate=None if spec.shared_gate is None else self._weight(spec.shared_gate),
            stored=self._stored(node),
            out=node.out.index,
        )

    def read_ahead(self, x: ops.Value, layer: int, norm: ops.Norm, node: ops.Moe, before: ops.Value | None) -> None:
        """See _mixer_inputs."""
        self.native.read_ahead(
            x.index,
            _norm(norm),
            self._weight(node.spec.router),
            top_k=node.spec.top_k,
            layer=layer,
            before=None if before is None else before.index,
        )

    def _stored(self, node: ops.Moe) -> list[tuple[int, int, int]] | None:
        """Where expert 0 lies, or None for experts that are not streamed."""
        streamed = all(matrix.stored for matrix in stacks(node)) and bool(self.files)
        return expert_parts(node, self.files) if streamed else None

    def _attention(self, node: ops.Attention) -> None:
        spec = node.spec
        self.native.attention(
            _columns(node.q),
            _columns(node.k),
            _columns(node.v),
            None if node.gate is None else _columns(node.gate),
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scale,
            rope=None if spec.rope is None else self._rope(spec.rope),
            q_norm=None if spec.q_norm is None else _norm(spec.q_norm),
            k_norm=None if spec.k_norm is None else _norm(spec.k_norm),
            out=node.out.index,
        )

    def _gated_delta(self, node: ops.GatedDelta) -> None:
        spec = node.spec
        self.native.gated_delta(
            [_columns(columns) for columns in (node.q, node.k, node.v, node.z, node.b, node.a)],
            key_heads=spec.key_heads,
            value_heads=spec.value_heads,
            key_dim=spec.key_dim,
            value_dim=spec.value_dim,
            conv=_floats(spec.conv),
            a_log=_floats(spec.a_log),
            dt_bias=_floats(spec.dt_bias),
            norm=_norm(spec.norm),
            out=node.out.index,
        )

    def _rope(self, rope: ops.Rope) -> int:
        """Number of the rope in the native program: layers that share one share its tables."""
        if rope not in self._ropes:
            self.native.rope(np.ascontiguousarray(rope.inv_freq, np.float32), rope.scale)
            self._ropes[rope] = len(self._ropes)
        return self._ropes[rope]

    def _mlp(self, spec: ops.MlpSpec) -> tuple[_cpu.Weight, _cpu.Weight, _cpu.Weight]:
        return self._weight(spec.gate), self._weight(spec.up), self._weight(spec.down)

    def _weight(self, matrix: Matrix) -> _cpu.Weight:
        if matrix not in self.weights:
            self.weights[matrix] = _weight(matrix)
        return self.weights[matrix]


def _mixer_inputs(
    program: ops.Program, moes: Sequence[ops.Moe]
) -> dict[ops.Value, list[tuple[int, ops.Norm, ops.Moe, ops.Value | None]]]:
    """Layers of experts, with their numbers, by the value that a mixer's output is added to before the router has it.

    With the norm of that sum: the value alone, so normed, already tells most of what the router will choose. And with
    the value as it is before the streamed layer before adds to it, or None where something else does.
    """
    additions = [node for node in program.nodes if isinstance(node, ops.AddNorm)]
    sums, totals = {node.out: node for node in additions}, {node.total: node for node in additions}
    whole = {node.out: node.x for node in program.nodes if isinstance(node, ops.SelectRows)}
    found: dict[ops.Value, list[tuple[int, ops.Norm, ops.Moe, ops.Value | None]]] = {}
    for layer, moe in enumerate(moes):
        if (made := sums.get(moe.x)) is None:
            continue
        x = whole.get(made.x, made.x)
        last, before = totals.get(x), None
        if last is not None and layer > 0 and last.delta == moes[layer - 1].out:
            before = last.x
        found.setdefault(x, []).append((layer, made.norm, moe, before))
    return found


def _weight(matrix: Matrix) -> _cpu.Weight:
    shape = {"experts": matrix.experts or 1, "rows": matrix.out_dim, "cols": matrix.in_dim}
    if isinstance(matrix, QuantizedTensor):
        return _cpu.Weight(
            _stored(matrix.weight, matrix.name),
            _stored(matrix.scales, matrix.name),
            _stored(matrix.biases, matrix.name),
            dtype=_DTYPES[matrix.scales.dtype],
            bits=matrix.bits,
            group_size=matrix.group_size,
            **shape,
        )
    dtype = _DTYPES[matrix.data.dtype]
    return _cpu.Weight(_stored(matrix.data, matrix.name), None, None, dtype=dtype, bits=0, group_size=0, **shape)


def _stored(array: npt.NDArray[np.generic], name: str) -> npt.NDArray[np.uint8]:
    """The array's own bytes, not a copy."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: its values do not lie one after another in memory")
    return array.reshape(-1).view(np.uint8)


def _floats(tensor: DenseTensor) -> npt.NDArray[np.float32]:
    """A small tensor as float32: the native program takes a copy."""
    return np.ascontiguousarray(tensor.data, np.float32)


def _norm(norm: ops.Norm) -> _NormArg:
    return _floats(norm.weight).reshape(-1), norm.eps


def _columns(columns: ops.Columns) -> _ColumnsArg:
    return columns.value.index, columns.offset, columns.stride
