"""The CUDA driver, as little of it as an executor needs: memory, modules, launches, graphs, events.

    device = Device(0)                                   # makes its context current in this thread
    memory = device.alloc(1 << 20)                       # Buffer: .address, .nbytes; freed with its last reference
    memory.upload(array); memory.download(out)           # NumPy arrays, on device.stream, synchronous
    kernel = device.load(cubin).function("add_norm")     # extern "C" name
    launch = Launch(kernel, (grid, 1, 1), (256, 1, 1), (memory, np.int32(4), np.float32(1e-6)))
    device.launch(launch)                                # asynchronous, on device.stream
    graph = device.capture([launch, ...]); device.replay(graph)
    device.synchronize(); device.milliseconds(lambda: device.replay(graph))

Arguments are `Buffer` (or anything with an `address`) for pointers, and NumPy scalars or ctypes structures, whose
types are those of the kernel's parameters. They are fixed when the Launch is made.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mixbit.kernels.executor import BackendError
from mixbit.kernels.nvidia import missing_driver

Size = tuple[int, int, int]


class DriverError(BackendError):
    """A call of the CUDA driver failed; the message names the call and the driver's reason."""


@cache
def _driver() -> Any:
    """The driver's functions, from cuda-bindings, which is optional."""
    return importlib.import_module("cuda.bindings.driver")


def _call(name: str, *arguments: Any) -> Any:
    """The results of a driver function: None, one, or a tuple."""
    driver = _driver()

    status, *results = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise DriverError(f"{name} failed: {text.decode() if text else status}")
    return results[0] if len(results) == 1 else tuple(results) or None


def unavailable() -> str | None:
    """None if there is a driver with a device, else what is missing."""
    if reason := missing_driver():
        return reason
    try:
        _driver()
    except ImportError:
        return "cuda-bindings is not installed (pip install 'mixbit[cuda]')"
    try:
        _call("cuInit", 0)
        return None if _call("cuDeviceGetCount") else "the driver sees no device"
    except (DriverError, RuntimeError) as error:  # RuntimeError: there is no libcuda
        return str(error)


class Addressed(Protocol):
    """Something on the device."""

    @property
    def address(self) -> int:
        """Where it begins."""


Argument = Addressed | np.generic | ctypes.Structure


@dataclass(frozen=True, eq=False)
class View:
    """Part of a buffer, which it keeps alive."""

    owner: Buffer | View
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.owner.address + self.offset

    @property
    def device(self) -> Device:
        """Where it lies."""
        return self.owner.device

    def upload(self, array: npt.NDArray[Any]) -> None:
        """Copy an array there; waits until it is done."""
        _upload(self, array)

    def download(self, array: npt.NDArray[Any]) -> None:
        """Fill an array from there; waits until it is done."""
        _download(self, array)


class Buffer:
    """Memory on the device, freed with the last reference."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device, self.nbytes = device, nbytes
        self._pointer = _call("cuMemAlloc", max(nbytes, 16))
        self.address = int(self._pointer)
        weakref.finalize(self, _free, self._pointer).atexit = False

    def view(self, offset: int, nbytes: int) -> View:
        """The bytes from `offset`."""
        return View(self, offset, nbytes)

    def upload(self, array: npt.NDArray[Any]) -> None:
        """Copy an array there; waits until it is done."""
        _upload(self, array)

    def download(self, array: npt.NDArray[Any]) -> None:
        """Fill an array from there; waits until it is done."""
        _download(self, array)

    def fill(self, word: int = 0) -> None:
        """Set every 32-bit word of it."""
        _call("cuMemsetD32Async", self.address, word, self.nbytes // 4, self.device.stream)


def _free(pointer: Any) -> None:
    driver = _driver()

    driver.cuMemFree(pointer)


def _destroy(graph: Any) -> None:
    _driver().cuGraphExecDestroy(graph)


def _upload(target: Buffer | View, array: npt.NDArray[Any]) -> None:
    source = np.ascontiguousarray(array)
    if source.nbytes > target.nbytes:
        raise ValueError(f"{source.nbytes} bytes do not fit in {target.nbytes}")
    _call("cuMemcpyHtoDAsync", target.address, source.ctypes.data, source.nbytes, target.device.stream)
    target.device.synchronize()


def _download(source: Buffer | View, array: npt.NDArray[Any]) -> None:
    if not array.flags.c_contiguous or array.nbytes > source.nbytes:
        raise ValueError(f"{array.nbytes} bytes asked of {source.nbytes}, into one piece")
    _call("cuMemcpyDtoHAsync", array.ctypes.data, source.address, array.nbytes, source.device.stream)
    source.device.synchronize()


@dataclass(frozen=True, eq=False)
class Function:
    """A kernel of a loaded module."""

    name: str
    handle: Any
    module: Module
    shared: int  # bytes of dynamic shared memory at a launch


@dataclass(frozen=True, eq=False)
class Module:
    """Machine code on the device."""

    handle: Any

    def function(self, name: str, shared: int = 0) -> Function:
        """The extern "C" kernel `name`, launched with `shared` bytes of dynamic shared memory."""
        driver = _driver()

        handle = _call("cuModuleGetFunction", self.handle, name.encode())
        if shared > 48 << 10:
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call("cuFuncSetAttribute", handle, limit, shared)
        return Function(name, handle, self, shared)


class Launch:
    """A kernel with its sizes and arguments, ready to be enqueued any number of times.

    grid counts blocks, block counts threads. early: the kernel may start before the one in front of it has ended
    (programmatic dependent launch): it must wait by itself (`griddepcontrol.wait`) before it reads what that wrote.
    """

    def __init__(
        self, kernel: Function, grid: Size, block: Size, arguments: Sequence[Argument], *, early: bool = False
    ) -> None:
        driver = _driver()

        self.kernel, self.grid, self.block = kernel, grid, block
        self._kept = tuple(arguments)
        self._values = [_value(argument) for argument in arguments]
        self._pointers = (ctypes.c_void_p * max(1, len(self._values)))(
            *(ctypes.addressof(value) for value in self._values)
        )
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = kernel.shared
        if early:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        self._config = config

    def enqueue(self, stream: Any) -> None:
        """Put it on a stream."""
        self._config.hStream = stream
        _call("cuLaunchKernelEx", self._config, self.kernel.handle, ctypes.addressof(self._pointers), 0)


def _value(argument: Argument) -> Any:
    """The bytes of an argument, as a ctypes object."""
    if isinstance(argument, ctypes.Structure):
        return argument
    if isinstance(argument, np.generic):
        return ctypes.create_string_buffer(argument.tobytes(), argument.nbytes)
    return ctypes.c_uint64(argument.address)


class Device:
    """One GPU, its primary context and the stream that all work of this project takes."""

    def __init__(self, index: int = 0) -> None:
        _call("cuInit", 0)
        self._device = _call("cuDeviceGet", index)
        self._context = _call("cuDevicePrimaryCtxRetain", self._device)
        self.make_current()
        self.stream = _call("cuStreamCreate", 1)  # CU_STREAM_NON_BLOCKING
        self._pinned: dict[int, list[int]] = {}
        self._events = [_call("cuEventCreate", 0) for _ in range(2)]

    def make_current(self) -> None:
        """Let this thread use the device."""
        _call("cuCtxSetCurrent", self._context)

    def _attribute(self, name: str) -> int:
        driver = _driver()

        code = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_call("cuDeviceGetAttribute", code, self._device))

    @property
    def name(self) -> str:
        """As the driver has it: "NVIDIA H200"."""
        name: bytes = _call("cuDeviceGetName", 128, self._device)
        return name.split(b"\0")[0].decode()

    @cached_property
    def arch(self) -> str:
        """Compute capability as NVRTC takes it: "sm_80", and "sm_90a" for Hopper's own instructions."""
        return f"sm_{self.capability}{'a' if self.capability == 90 else ''}"

    @cached_property
    def capability(self) -> int:
        """Compute capability: 90 for 9.0."""
        return 10 * self._attribute("COMPUTE_CAPABILITY_MAJOR") + self._attribute("COMPUTE_CAPABILITY_MINOR")

    @cached_property
    def multiprocessors(self) -> int:
        """Units that run blocks."""
        return self._attribute("MULTIPROCESSOR_COUNT")

    @property
    def free_memory(self) -> int:
        """Bytes that can be allocated now."""
        return int(_call("cuMemGetInfo")[0])

    def alloc(self, nbytes: int) -> Buffer:
        """Uninitialised memory, aligned to 256 bytes. Raises DriverError if there is too little."""
        return Buffer(self, nbytes)

    def put(self, array: npt.NDArray[Any]) -> Buffer:
        """A copy of an array."""
        buffer = self.alloc(array.nbytes)
        buffer.upload(array)
        return buffer

    def load(self, cubin: bytes) -> Module:
        """Machine code from `compiler.compile`."""
        return Module(_call("cuModuleLoadData", cubin))

    def launch(self, *launches: Launch) -> None:
        """Enqueue, one after another."""
        for launch in launches:
            launch.enqueue(self.stream)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A host array that copies need not stage; its memory serves again when the last view of it is gone."""
        nbytes = max(1, int(np.prod(shape))) * dtype.itemsize
        size = 1 << (nbytes - 1).bit_length()
        kept = self._pinned.setdefault(size, [])
        address = kept.pop() if kept else int(_call("cuMemHostAlloc", size, 0))
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, kept.append, address).atexit = False
        return np.ndarray(shape, dtype, memoryview(memory))

    def send(self, target: Addressed, array: npt.NDArray[Any]) -> None:
        """Enqueue a copy from a pinned array, which must not change before it is done."""
        _call("cuMemcpyHtoDAsync", target.address, array.ctypes.data, array.nbytes, self.stream)

    def fetch(self, array: npt.NDArray[Any], source: Addressed) -> None:
        """Enqueue a copy to a pinned array."""
        _call("cuMemcpyDtoHAsync", array.ctypes.data, source.address, array.nbytes, self.stream)

    def copy(self, target: Addressed, source: Addressed, nbytes: int) -> None:
        """Enqueue a copy within the device."""
        _call("cuMemcpyDtoDAsync", target.address, source.address, nbytes, self.stream)

    def capture(self, launches: Sequence[Launch]) -> Graph:
        """The launches as one graph."""
        driver = _driver()

        _call("cuStreamBeginCapture", self.stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        self.launch(*launches)
        captured = _call("cuStreamEndCapture", self.stream)
        graph = Graph(_call("cuGraphInstantiate", captured, 0), tuple(launches))
        _call("cuGraphDestroy", captured)
        weakref.finalize(graph, _destroy, graph.handle).atexit = False
        return graph

    def replay(self, graph: Graph) -> None:
        """Enqueue a graph."""
        _call("cuGraphLaunch", graph.handle, self.stream)

    def synchronize(self) -> None:
        """Wait until the stream is empty; raises DriverError for what failed on it."""
        _call("cuStreamSynchronize", self.stream)

    def milliseconds(self, run: Callable[[], None]) -> float:
        """Device time of what `run` enqueues."""
        begin, end = self._events
        _call("cuEventRecord", begin, self.stream)
        run()
        _call("cuEventRecord", end, self.stream)
        _call("cuEventSynchronize", end)
        return float(_call("cuEventElapsedTime", begin, end))


@dataclass(frozen=True, eq=False)
class Graph:
    """Launches that are enqueued with one call."""

    handle: Any
    launches: tuple[Launch, ...]
