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


@pytest.mark.parametrize("end", ["a family fails", "Ctrl-C", "SIGTERM"])
def test_nothing_goes_on_when_the_demo_has_ended(tmp_path, end):
    stub(tmp_path / "bin/nmm-train", TRAIN)
    if end == "a family fails":
        (tmp_path / "fail").touch()
    demo = subprocess.Popen(
        [SCRIPTS / "demo.sh"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

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
