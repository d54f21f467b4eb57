"""What a launch would compile for an NVIDIA GPU (Hopper), compiled without one: launches are recorded, not run."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8",
}  # fmt: skip
HOPPER_SHARED_BYTES = 232448
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, constants and options that Triton would compile it for."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.sass))


def launch_of(kernel: Any, args: tuple, kwargs: dict[str, Any]) -> Launch:
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value, parameter = values[name], kernel.params[index]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in names}
    return Launch(kernel, signature, constants, attributes, options)


@contextmanager
def recorded(*modules: Any) -> Iterator[list[Launch]]:
    """Inside, launching a kernel of these modules notes down what it would compile."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append(launch_of(self.kernel, args, kwargs))

    kernels = [(m, n, v) for m in modules for n, v in vars(m).items() if isinstance(v, triton.runtime.JITFunction)]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


def compile_ahead(launch: Launch, folder: Path, capability: int = 90) -> Compiled:
    """Triton keeps what it has compiled on disk, so a second time costs little."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = folder / f"{compiled.hash}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(what: str) -> str:
        return subprocess.run([TOOLS / "cuobjdump", what, cubin], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
    assert usage is not None
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    return Compiled(int(usage[1]), int(usage[2]), metadata.shared, ptx, dump("--dump-sass"))


def assembler_says(compiled: Compiled, folder: Path) -> str:
    """What NVIDIA's assembler remarks on the code for Hopper, such as a loss of speed."""
    source = folder / "kernel.ptx"
    source.write_text(compiled.ptx)
    command = [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.cubin"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr
