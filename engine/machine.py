"""Facts about this machine and this installation, for `mixbit doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from mixbit.engine.demo import cache_directory, demo_path, demo_present
from mixbit.engine.sizing import available_memory
from mixbit.kernels.registry import BackendError, availability, choose

# What the CPU kernels, or their reader, care about; by the names of /proc/cpuinfo.
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}
_PACKAGES = ("mlx", "cuda-bindings", "mlx-lm", "numpy", "tokenizers", "transformers", "huggingface-hub")
_NATIVE_MODULE = "mixbit.kernels.cpu._cpu"


@dataclass(frozen=True)
class Machine:
    """Hardware and system. Memory in bytes; usable_cores: those this process may run on."""

    system: str
    architecture: str
    python: str
    cpu: str
    cores: int
    usable_cores: int
    features: tuple[str, ...]
    memory_total: int
    memory_available: int


@dataclass(frozen=True)
class BackendStatus:
    """One backend: whether it runs here; detail: the device if it does, else the reason."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """What `mixbit doctor` tells. chosen: the backend that `auto` takes, None if there is none; sizes in bytes."""

    version: str
    machine: Machine
    backends: tuple[BackendStatus, ...]
    chosen: str | None
    explanation: str
    native_module: str | None
    packages: Mapping[str, str | None]
    cache: str
    cache_size: int
    cache_free: int
    hub_cache: str
    hub_cache_size: int
    demo: str | None

    def as_json(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


def examine() -> Diagnosis:
    """Look at this machine, and ask every backend that may be chosen whether it can run here."""
    chosen, explanation = _choice()
    native = importlib.util.find_spec(_NATIVE_MODULE)
    hub = _hub_cache()
    return Diagnosis(
        version=importlib.metadata.version("mixbit"),
        machine=_machine(),
        backends=tuple(_status(name, reason) for name, reason in availability()),
        chosen=chosen,
        explanation=explanation,
        native_module=native.origin if native else None,
        packages={name: _version(name) for name in _PACKAGES},
        cache=str(cache_directory()),
        cache_size=_tree_size(cache_directory()),
        cache_free=shutil.disk_usage(_existing(cache_directory())).free,
        hub_cache=str(hub),
        hub_cache_size=_tree_size(hub),
        demo=str(demo_path()) if demo_present() else None,
    )


def _machine() -> Machine:
    memory = psutil.virtual_memory()  # type: ignore[no-untyped-call]
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return Machine(
        system=_system(),
        architecture=platform.machine(),
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        cpu=info.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown",
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        features=tuple(label for flag, label in _FEATURES.items() if flag in flags),
        memory_total=int(memory.total),
        memory_available=available_memory(),
    )


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, kernel {platform.release()}"


def _cpu_info(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Fields of the first processor that Linux lists; empty elsewhere."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sysctl(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    result = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _usable_cores() -> int:
    """Cores this process may use: its affinity where the system has one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _status(name: str, reason: str | None) -> BackendStatus:
    return BackendStatus(name, reason is None, choose(name).backend.describe() if reason is None else reason)


def _choice() -> tuple[str | None, str]:
    try:
        choice = choose()
    except BackendError as error:
        return None, str(error)
    return choice.backend.name, str(choice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _existing(path: Path) -> Path:
    """The path, or its nearest ancestor that exists."""
    while not path.exists():
        path = path.parent
    return path


def _tree_size(directory: Path) -> int:
    """Bytes of the files below; links count nothing, as the hub's cache links to its blobs."""
    total = 0
    for root, _, files in os.walk(directory):
        for name in files:
            path = Path(root, name)
            if not path.is_symlink() and path.exists():
                total += path.stat().st_size
    return total
