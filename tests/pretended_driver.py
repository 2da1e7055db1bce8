"""A driver of Triton's without a GPU: kernels are specialised, compiled and their arguments bound, and never run.

    launched = pretend_driver("cuda:90")    # in a process of its own, with the interpreter off
    ...                                     # launch kernels on tensors in host memory; the results mean nothing
    launched                                # kernel -> how many times

What a real launch refuses ends the test: arguments that a kernel does not have, grids and shared memory larger than the
chip's, scratch memory that nobody allocates, descriptors that the copy engine does not take. It follows Triton 3.8's
launcher, whose insides other versions do not share.
"""

import collections
import types
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from kernels import dispatch
from kernels.dispatch import CHIPS

SWIZZLED_BYTES = {0: 1 << 20, 1: 32, 2: 64, 3: 128}  # how long a row of a tile may be, by the swizzle of shared memory


def pretend_driver(target: str) -> collections.Counter:
    """Have Triton compile for a chip of the table, and ops on host tensors dispatched as there; return the launches."""
    launched: collections.Counter = collections.Counter()
    chip = CHIPS[target]
    nvidia.PyKernelArg = lambda **fields: fields  # made by a library that needs the driver's

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
            return 1, 2, 0, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": chip.shared_bytes, "multiprocessor_count": 132}

        def fill_tma_descriptor_tiled(
            self, address: int, swizzle: int, size: int, kind: int, tile: Any, shape: Any, strides: Any, padding: int
        ) -> str:
            assert address % 16 == 0 and len(tile) == len(shape) == len(strides)
            assert all(0 < n <= 256 for n in tile) and all(n * size % 16 == 0 for n in strides[:-1]), (tile, strides)
            assert tile[-1] * size <= SWIZZLED_BYTES[swizzle], (tile, swizzle)
            return "descriptor"

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            descriptors = getattr(metadata, "tensordesc_meta", None)
            nvidia.annotate_arguments(nvidia.expand_signature(source.signature.values(), descriptors, "nvTmaDesc"))
            self.name, self.bind = metadata.name, nvidia.wrap_handle_tensordesc(tuple, source.signature, descriptors)
            assert metadata.shared <= chip.shared_bytes and metadata.global_scratch_size == 0, self.name

        def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
            assert 0 <= x < 2**31 and 0 <= y < 2**16 and 0 <= z < 2**16, (self.name, x, y, z)
            self.bind(rest[6:])
            launched[self.name] += 1

    class Driver:
        utils, launcher_cls = Utils(), Launcher
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_device_capability = staticmethod(lambda device=0: divmod(int(target.removeprefix("cuda:")), 10))
        get_current_target = staticmethod(lambda: GPUTarget("cuda", int(target.removeprefix("cuda:")), 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        map_python_to_cpp_type = staticmethod(nvidia.ty_to_cpp)

    driver.set_active(Driver())
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)
    dispatch.force_chip(chip)
    ours = set(dispatch.OPS) - {op for op, matrices in dispatch.OPS.items() if matrices and not chip.tensor_cores}
    dispatch._decide = lambda op, device: ("triton" if op in ours else "torch", "pretended")
    return launched
