from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int32]
_Norm = tuple[_Floats, float]
_Columns = tuple[int, int, int]
_Mlp = tuple[Weight, Weight, Weight]

def usable_cores() -> int: ...
def best_isa() -> str: ...
def supported_isas() -> list[str]: ...

class ReadError(OSError): ...

class Access(Enum):
    direct = 0
    cached = 1
    mapped = 2

class ReadTimer:
    def __init__(self, *, files: list[str], access: Access, threads: int, bytes: int) -> None: ...
    def seconds(self, experts: list[list[tuple[int, int, int]]], /, *, together: int, use: bool = False) -> float: ...

class Residency:
    def __init__(self, *, keys: int, slots: int) -> None: ...
    def find(self, key: int, /) -> int: ...
    def advance(self) -> None: ...
    def note(self, key: int, share: float, /) -> None: ...
    def claim(self, key: int, /) -> int: ...
    def pin(self, slot: int, /) -> None: ...
    def unpin(self, slot: int, /) -> None: ...
    def spoil(self, slot: int, /) -> None: ...

class DType(Enum):
    f32 = 0
    f16 = 1
    bf16 = 2

class Precision(Enum):
    exact = 0
    fast = 1
    fine = 2

class Weight:
    def __init__(
        self,
        weight: npt.NDArray[Any],
        scales: npt.NDArray[Any] | None,
        biases: npt.NDArray[Any] | None,
        dtype: DType,
        bits: int,
        group_size: int,
        experts: int,
        rows: int,
        cols: int,
    ) -> None: ...

def matmul_rows(
    weight: Weight,
    x: _Floats,
    *,
    isa: str,
    expert: int,
    index: _Ints | None,
    row_begin: int,
    row_end: int,
    precision: Precision = ...,
) -> _Floats: ...

class Program:
    def __init__(
        self,
        *,
        max_tokens: int,
        blocks: int,
        block_size: int,
        state_slots: int,
        precision: Precision,
        threads: int,
        isa: str,
        profile: bool,
    ) -> None: ...
    def stream_experts(self, *, files: list[str], bytes: int, access: Access, threads: int) -> None: ...
    def value(self, dim: int, selected: bool, /) -> None: ...
    def rope(self, inv_freq: _Floats, scale: float, /) -> None: ...
    def embed(self, table: Weight, out: int, /) -> None: ...
    def select_rows(self, x: int, out: int, /) -> None: ...
    def rms_norm(self, x: int, norm: _Norm, out: int, /) -> None: ...
    def add_norm(self, x: int, delta: int, norm: _Norm, total: int, out: int, /) -> None: ...
    def batch_matvec(self, x: int, specs: list[tuple[Weight, _Floats | None]], outs: list[int], /) -> None: ...
    def mlp(self, x: int, weights: _Mlp, out: int, /) -> None: ...
    def moe(
        self,
        x: int,
        router: Weight,
        experts: _Mlp,
        /,
        *,
        top_k: int,
        normalize: bool,
        shared: _Mlp | None,
        shared_gate: Weight | None,
        stored: list[tuple[int, int, int]] | None,
        out: int,
    ) -> None: ...
    def read_ahead(
        self, x: int, norm: _Norm, router: Weight, /, *, top_k: int, layer: int, before: int | None
    ) -> None: ...
    def attention(
        self,
        q: _Columns,
        k: _Columns,
        v: _Columns,
        gate: _Columns | None,
        /,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rope: int | None,
        q_norm: _Norm | None,
        k_norm: _Norm | None,
        out: int,
    ) -> None: ...
    def gated_delta(
        self,
        inputs: list[_Columns],
        /,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        conv: _Floats,
        a_log: _Floats,
        dt_bias: _Floats,
        norm: _Norm,
        out: int,
    ) -> None: ...
    def finish(self, logits: int, hidden: int, /) -> None: ...
    def run(
        self,
        tokens: _Ints,
        query_starts: _Ints,
        context_lengths: _Ints,
        block_tables: _Ints,
        state_slots: _Ints,
        logit_rows: _Ints,
        hidden: bool,
        /,
    ) -> _Floats: ...
    def copy_block(self, source: int, target: int, /) -> None: ...
    def copy_state(self, source: int, target: int, /) -> None: ...
    def export_block(self, number: int, /) -> npt.NDArray[np.uint8]: ...
    def export_state(self, number: int, /) -> npt.NDArray[np.uint8]: ...
    def import_block(self, number: int, data: npt.NDArray[np.uint8], /) -> None: ...
    def import_state(self, number: int, data: npt.NDArray[np.uint8], /) -> None: ...
    def seconds(self) -> dict[str, float]: ...
    def expert_counts(self) -> list[tuple[int, int, int, int, int, float, float, float]]: ...
    @property
    def expert_bytes(self) -> int: ...
    @property
    def expert_slots(self) -> int: ...
    @property
    def step_bytes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def cache_bytes(self) -> int: ...
