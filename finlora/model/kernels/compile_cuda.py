"""Run-time compilation (NVRTC) of this package's CUDA C++, once for all processes, and launch on torch's current stream.

NVRTC comes with torch's CUDA build; `cuda-bindings` calls it and the driver, so no CUDA toolkit is needed. Imported only for CUDA
tensors.

Source: https://nvidia.github.io/cuda-python/cuda-bindings/latest/overview.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from finlora.errors import ResourceError
from finlora.machine.kernel_folder import keep_binary
from finlora.model.kernels import launch

try:
    from cuda.bindings import driver, nvrtc, runtime
except ImportError as error:
    raise ResourceError(
        "products with a 4-bit base on a GPU, and stages that share one, need the package cuda-bindings, which is not installed: "
        f"`make setup TORCH=gpu`, or pip install 'cuda-bindings>=13,<14' ({error})."
    ) from error

__all__ = ["CudaKernel", "check", "driver", "load_kernels", "runtime"]


class CudaKernel:
    """A function of a .cu file on one GPU.

    Args:
        shared_bytes: dynamic shared memory of a block.
    """

    def __init__(self, function: Any, context: Any, threads: int, shared_bytes: int) -> None:
        self._function, self._context = function, context
        self._threads, self._shared_bytes = threads, shared_bytes
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, limit, shared_bytes))
        self._overlap = driver.CUlaunchAttribute()
        self._overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self._overlap.value.programmaticStreamSerializationAllowed = 1
        self.blocks_a_processor: int = check(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared_bytes)
        )

    def launch(self, grid: tuple[int, int], *arguments: Tensor | int | None, overlaps: bool = False) -> None:
        """Queue the kernel on the current stream; a tensor is passed as a pointer to its data, None as a null pointer.

        Args:
            overlaps: launch it to overlap the end of the kernel before it (finlora/model/kernels/launch.py).
        """
        check(driver.cuCtxSetCurrent(self._context))  # a thread that has not used the GPU yet has no context
        values = tuple(each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in arguments)
        types = tuple(ctypes.c_int if isinstance(each, int) else ctypes.c_void_p for each in arguments)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1)
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        if overlaps:
            config.attrs, config.numAttrs = [self._overlap], 1
        check(driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


def load_kernels(
    files: Sequence[str], device: torch.device, defines: Mapping[str, int], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, CudaKernel]:
    """Compile files of this folder as one and return their functions.

    Args:
        files: in their order.
        defines: the constants that it leaves open.
        sizes: name of a function -> (threads, bytes of shared memory) of a block.

    Raises:
        ResourceError: the GPU's generation is too old for it, or the compiler is missing.
    """
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        options = ["--std=c++17", f"--gpu-architecture=sm_{major}{minor}"]
        options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
        binary = _compile(files, tuple(options))
        context = check(driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(torch.cuda.current_device()))))
        check(driver.cuCtxSetCurrent(context))
        module = check(driver.cuModuleLoadData(binary))
        return {
            name: CudaKernel(check(driver.cuModuleGetFunction(module, name.encode())), context, *size)
            for name, size in sizes.items()
        }


def _compile(files: Sequence[str], options: tuple[str, ...]) -> bytes:
    # The compiler's messages name the file and line that is meant.
    parts = ((name, (resources.files("finlora.model.kernels") / name).read_text()) for name in files)
    source = "".join(f'#line 1 "{name}"\n{text}' for name, text in parts).encode()
    try:
        _, *version = nvrtc.nvrtcVersion()
    except RuntimeError as error:  # cuda-bindings finds no library
        raise ResourceError(
            f"NVIDIA's run-time compiler (nvidia-cuda-nvrtc, which torch installs) is missing: {error}"
        ) from error
    facts = (source.decode(), *options, ".".join(map(str, version)))
    return keep_binary(files[-1], facts, lambda: _make_binary(source, files[-1], options))


def _make_binary(source: bytes, name: str, options: Sequence[str]) -> bytes:
    with launch.compiling():
        program = check(nvrtc.nvrtcCreateProgram(source, name.encode(), 0, [], []))
        flags = [option.encode() for option in options]
        if int(nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]):
            log = bytes(check(nvrtc.nvrtcGetProgramLogSize(program)))
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise ResourceError(
                f"{name} cannot be compiled for this GPU ({' '.join(options)}): {log.decode().strip()[:2000]}"
            )
        binary = bytes(check(nvrtc.nvrtcGetCUBINSize(program)))
        check(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary


def check(result: tuple[Any, ...]) -> Any:
    """Return the value that a call gives beside its status, or raise RuntimeError."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None
