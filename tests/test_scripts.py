"""The shell scripts, with stubs in the place of what they call."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"

TRAIN = """#!/usr/bin/env bash
[ "$1" != data ] || exit 0
trap "touch ended.$$; exit 1" TERM
touch started.$$
case "$*" in
  run*early*) [ ! -e fail ] || { sleep 0.3; echo "disk full"; touch ended.$$; exit 1; };;
esac
for _ in {1..400}; do sleep 0.05; done
"""
"""`nmm-train`: goes on for a while, or until SIGTERM."""


def stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def start_demo(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [SCRIPTS / "demo.sh"],
        cwd=folder,
        env=os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("end", ["a family fails", "Ctrl-C", "SIGTERM"])
def test_nothing_goes_on_when_the_demo_has_ended(tmp_path, end):
    stub(tmp_path / "bin/nmm-train", TRAIN)
    if end == "a family fails":
        (tmp_path / "fail").touch()
    demo = start_demo(tmp_path)

    def pids(what: str) -> set[str]:
        return {path.suffix for path in tmp_path.glob(f"{what}.*")}

    wait_for(lambda: len(pids("started")) == 4, "three trainings and what watches them")
    if end == "Ctrl-C":
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does: to the group in the foreground
    elif end == "SIGTERM":
        demo.terminate()
    output, _ = demo.communicate(timeout=15)
    assert demo.returncode != 0
    assert ("training of early failed" in output and "disk full" in output) == (end == "a family fails")
    assert pids("ended") == pids("started"), "waited for: what trains had the time to save"
    assert len(pids("started")) == 4, "none of the trainings that follow has begun"


EVAL = """#!/usr/bin/env bash
echo "$1 ${*: -1}" >>evaluated
case "$*" in
  *moe*) ;;
  *) exit 0;;
esac
trap "touch ended; exit 1" TERM
touch started
for _ in {1..400}; do sleep 0.05; done
"""
"""`nmm-eval`: done at once, but with the last family."""


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM"])
def test_an_evaluation_ends_with_the_demo(tmp_path, end):
    stub(tmp_path / "bin/nmm-train", "#!/usr/bin/env bash\n")
    stub(tmp_path / "bin/nmm-eval", EVAL)
    demo = start_demo(tmp_path)
    wait_for((tmp_path / "started").exists, "the third evaluation")
    if end == "Ctrl-C":
        os.killpg(demo.pid, signal.SIGINT)
    else:
        demo.terminate()
    demo.communicate(timeout=15)
    assert demo.returncode != 0
    assert (tmp_path / "ended").exists()
    records = [f"all demo/records/{family}.json" for family in ("early", "late", "moe")]
    assert (tmp_path / "evaluated").read_text().split("\n") == [*records, ""], "no table of what is not there"


def test_an_evaluation_that_fails_ends_the_demo(tmp_path):
    stub(tmp_path / "bin/nmm-train", "#!/usr/bin/env bash\n")
    stub(tmp_path / "bin/nmm-eval", '#!/usr/bin/env bash\necho "$1" >>evaluated\nexit 3\n')
    demo = start_demo(tmp_path)
    demo.communicate(timeout=15)
    assert demo.returncode == 3
    assert (tmp_path / "evaluated").read_text() == "all\n"


PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m venv --clear "*)
    [ ! -e venv-fails ] || exit 1
    rm -rf .venv
    mkdir -p .venv/bin
    echo "command = $0 -m venv --clear .venv" >.venv/pyvenv.cfg
    cp "$0" .venv/bin/python;;
  *install*) echo "$*" >>installed;;
esac
"""
"""A Python with venv and pip, and the one in the folder that it makes."""


def set_up(folder: Path) -> subprocess.CompletedProcess:
    scripts = folder / "scripts"
    stub(scripts / "setup.sh", (SCRIPTS / "setup.sh").read_text())
    stub(folder / "bin/python", PYTHON)
    (folder / "pyproject.toml").touch()
    environment = os.environ | {"PYTHON": str(folder / "bin/python")}
    return subprocess.run([scripts / "setup.sh"], env=environment, capture_output=True, text=True, timeout=30)


def make_venv(folder: Path, python: str | None, command: str = "command = /usr/bin/python3 -m venv /x/.venv") -> None:
    """With a `python` that is a script, or a link to nowhere."""
    venv = folder / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(f"home = /usr/bin\n{command}\n")
    if python is None:
        (venv / "bin/python").symlink_to(folder / "gone")
    else:
        stub(venv / "bin/python", python)


NO_PIP = "#!/usr/bin/env bash\necho No module named pip >&2\nexit 1\n"


@pytest.mark.parametrize("left", ["nothing", "empty folders", "no pip", "python gone"])
def test_setup_mends_what_is_left_of_one(tmp_path, left):
    if left == "empty folders":
        (tmp_path / ".venv/bin").mkdir(parents=True)
    elif left != "nothing":
        make_venv(tmp_path, NO_PIP if left == "no pip" else None)
    run = set_up(tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / ".venv/.setup-done").exists()
    installed = (tmp_path / "installed").read_text()
    assert "install --quiet -e" in installed
    assert set_up(tmp_path).returncode == 0
    assert (tmp_path / "installed").read_text() == installed, "a finished one has nothing to do"
    (tmp_path / ".venv/bin/python").write_text(NO_PIP)
    assert set_up(tmp_path).returncode == 0
    assert (tmp_path / "installed").read_text() == 2 * installed, "the stamp of the old one does not count"


def test_setup_clears_no_environment_of_another_tool(tmp_path):
    make_venv(tmp_path, NO_PIP, "uv = 0.9.0")
    run = set_up(tmp_path)
    assert run.returncode == 1
    assert ".venv is in the way: it has no working pip" in run.stderr
    assert (tmp_path / ".venv/bin/python").read_text() == NO_PIP
    assert not (tmp_path / "installed").exists()


def test_setup_says_what_venv_lacks_and_goes_on_when_it_is_there(tmp_path):
    (tmp_path / "venv-fails").touch()
    make_venv(tmp_path, None)
    assert "apt install python3-venv" in set_up(tmp_path).stderr
    (tmp_path / "venv-fails").unlink()
    assert set_up(tmp_path).returncode == 0
