"""The shape of the house: which room may import which, and that the package holds every room."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"nmm_serve": "nmm_serve", "train": "nmm_serve.train", "evals": "nmm_serve.evals",
         "kernels": "nmm_serve.kernels", "cli": "nmm_serve.cli"}  # fmt: skip
MAY_IMPORT = {
    "kernels": set(),
    "nmm_serve": {"kernels"},
    "train": {"kernels", "nmm_serve"},
    "evals": {"kernels", "nmm_serve"},
    "cli": {"kernels", "nmm_serve", "train", "evals"},
}


def room_of(module: str) -> str | None:
    """The room a module name belongs to; None for other people's modules."""
    if module != "nmm_serve" and not module.startswith("nmm_serve."):
        return None
    second = module.split(".")[1] if "." in module else ""
    return second if second in ROOMS else "nmm_serve"


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from nmm_serve import train` names a room in its second half
            names |= {
                f"{node.module}.{alias.name}" if node.module == "nmm_serve" else node.module for alias in node.names
            }
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / room).rglob("*.py")
        for module in imported_modules(path)
        if (target := room_of(module)) is not None and target != room and target not in MAY_IMPORT[room]
    ]
    assert not wrong


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "nmm_serve", *sys.stdlib_module_names}
    wrong = {
        f"{path.name}: {module}"
        for path in (ROOT / "kernels").rglob("*.py")
        for module in imported_modules(path)
        if module.split(".")[0] not in allowed
    }
    assert not wrong


def packages_on_disk() -> set[str]:
    found = set()
    for folder, name in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inner)))
    return found


def test_every_folder_with_code_is_a_listed_package():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == packages_on_disk()
    with_code = {p.parent for folder in ROOMS for p in (ROOT / folder).rglob("*.py")}
    assert not [str(p.relative_to(ROOT)) for p in with_code if not (p / "__init__.py").is_file()]


def test_wheel_holds_every_file(tmp_path):
    shutil.rmtree(ROOT / "build/lib", ignore_errors=True)  # setuptools packs what an earlier build left there
    subprocess.run(
        [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT), "-w",
         str(tmp_path)], check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {
        "/".join((*name.split("."), *path.relative_to(ROOT / folder).parts))
        for folder, name in ROOMS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".jsonl", ".jinja", ".html", ".json", ".typed")
    }
    assert packed == expected


@pytest.mark.parametrize("folder", ["train", "evals", "kernels", "cli", "train/data"])
def test_rooms_refuse_to_be_imported_by_their_bare_name(folder):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # our vLLM plugin sets it
    run = subprocess.run(
        [sys.executable, "-c", f"import {folder.replace('/', '.')}"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1
    assert "was picked up from the source folder" in run.stderr


@pytest.mark.parametrize("script", ["nmm-train", "nmm-serve", "nmm-eval"])
def test_help_does_not_load_torch(script):
    module = f"nmm_serve.cli.{script.removeprefix('nmm-')}"
    code = (
        f"import sys; from {module} import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
