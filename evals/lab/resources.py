"""What a process and an artefact take: peak memory, bytes on disk."""

import contextlib
import resource
import sys
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError
from nmm_serve.evals.model_files import model_files

WEIGHTS = (".safetensors", ".onnx", ".data")


def reset_peak() -> None:
    """Count peaks from here on, where the system allows it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # then the peak stays that of the whole life of the process
            Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, Any]:
    """Peak resident memory of this process in bytes, and of its tensors on the GPU."""
    found: dict[str, Any] = {"peak_rss_bytes": _peak_rss()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return found | {"peak_gpu_bytes": torch.cuda.max_memory_allocated()}
    return found | {"peak_gpu_bytes": None, "peak_gpu_reason": "no GPU was used"}


def _peak_rss() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def artefact(model: str) -> dict[str, Any]:
    """Files and bytes that have to be shipped for a model directory, so not the optimizer's in a resume checkpoint, nor
    what evaluations left there; unknown for a URL."""
    folder = Path(model)
    if not folder.is_dir():
        return {"files": None, "bytes": None, "weights_bytes": None, "reason": "a server's URL does not show its files"}
    files = model_files(folder)
    if not files:
        raise DataError(f"{folder} is empty; expected a checkpoint or an exported model")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    return {
        "files": len(files),
        "bytes": sum(sizes.values()),
        "weights_bytes": sum(size for name, size in sizes.items() if name.endswith(WEIGHTS)),
    }
