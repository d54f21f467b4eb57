"""nmm-serve: what each command prints, and how it fails."""

import json
import os
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner
from PIL import Image
from tiny_checkpoint import make_checkpoint

from nmm_serve import doctor
from nmm_serve.cli.serve import main
from nmm_serve.errors import EngineError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", vision_config={"hidden_size": 64}, num_experts=2)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


NOISY = """
import http.server, os, sys
for number in range(300):
    sys.stdout.buffer.write(b"\\xe2\\x96\\x88\\xe2\\x96\\x84 " + b"x" * 1000 + b"\\n")
sys.stdout.flush()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection.close()
        os._exit(0)
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""Stands for vLLM: says more than a pipe holds, and ends when it was found ready."""


def run(*args, **options):
    return CliRunner().invoke(main, [str(arg) for arg in args], **options)


def fails(result, told, code=1):
    assert result.exit_code == code
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_help_needs_nothing_heavy():
    code = (
        "import sys\n"
        "from nmm_serve.cli.serve import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy', 'openai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "launch" in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", ["launch", "doctor", "generate", "info"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(command, flag):
    result = run(command, flag)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["lunch"], "Did you mean 'launch'?"),
        (["generate", "ckpt"], "Missing option '--prompt'"),
        (["generate", "ckpt", "--prompt", "x", "--imag", "a.png"], "Did you mean '--image'?"),
        (["generate", "ckpt", "--prompt", "x", "--temperature", "-1"], "-1"),
        (["generate", "ckpt", "--prompt", "x", "--top-p", "0"], "0"),
        (["launch"], "Missing argument 'CHECKPOINT'"),
        (["launch", "ckpt", "--port", "70000"], "70000"),
        (["launch", "ckpt", "--dtype", "int4"], "int4"),
        (["info"], "Missing argument 'CHECKPOINT'"),
    ],
)
def test_usage_errors(args, told):
    fails(run(*args), told, code=2)


class TestInfo:
    def test_json(self, checkpoint):
        result = run("info", checkpoint, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["family"] == "late-moe"
        assert found["parameters"]["total"] > found["parameters"]["active"] > 0
        assert found["experts"] == {"number": 2, "per_token": 1}
        assert found["image"] == {"side_pixels": 64, "patch_pixels": 8, "most_tokens": 64}
        assert found["vision"]["width"] == 64
        assert found["run"] == {"tokens": 1000, "loss": 2.5}
        assert found["hash"].startswith("sha256:")
        assert found["weights_bytes"] == (checkpoint / "model.safetensors").stat().st_size

    def test_sizes_are_the_models(self, checkpoint):
        from nmm_serve.checkpoint import load_model

        found = json.loads(run("info", checkpoint, "--json").stdout)
        assert found["parameters"]["total"] == load_model(checkpoint).num_parameters()

    def test_table(self, checkpoint):
        result = run("info", checkpoint)
        assert "late-moe" in result.stdout
        assert "run: loss" in result.stdout

    def test_without_run_json(self, tmp_path):
        path = make_checkpoint(tmp_path / "bare")
        (path / "run.json").unlink()
        assert "no run.json" in run("info", path).stdout

    def test_what_is_empty_is_called_none(self, tmp_path):
        path = make_checkpoint(tmp_path / "ckpt")
        (path / "run.json").write_text(json.dumps({"data": {"bad": {}, "documents": {"vqa": 900}}}))
        assert "bad none, documents vqa 900" in run("info", path).stdout

    @pytest.mark.parametrize("command", ["info", "launch", "generate"])
    def test_wrong_directories(self, tmp_path, command):
        more = ["--prompt", "x"] if command == "generate" else []
        if command == "launch":
            pytest.importorskip("vllm")
        fails(run(command, tmp_path / "none", *more), "does not exist")
        fails(run(command, tmp_path, *more), "it lacks config.json, tokenizer.json")
        (tmp_path / "file").touch()
        fails(run(command, tmp_path / "file", *more), "is a file; give the checkpoint's directory")

    def test_another_models_tokenizer(self, tmp_path):
        pytest.importorskip("vllm")
        path = make_checkpoint(tmp_path / "mixed")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"image_token_id": 9}))
        fails(run("launch", path), "tokenizer and model do not match: image_token_id")
        fails(run("generate", path, "--prompt", "x"), "tokenizer and model do not match: image_token_id")


class TestGenerate:
    def test_text(self, checkpoint, picture):
        result = run("generate", checkpoint, "--image", picture, "--prompt", "what is", "--max-tokens", 3)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.endswith("\n")

    def test_json_counts_and_two_images(self, checkpoint, picture):
        args = ("generate", checkpoint, "--image", picture, "--prompt", "what", "--max-tokens", 3, "--json")
        one, two = run(*args), run(*args, "--image", picture)
        one, two = json.loads(one.stdout), json.loads(two.stdout)
        assert one["num_tokens"] == len(one["token_ids"]) <= 3
        assert two["num_prompt_tokens"] > one["num_prompt_tokens"] + 40
        assert one["engine"]["engine"] == "torch"

    def test_raw_prompt_from_stdin(self, checkpoint, picture):
        args = ("generate", checkpoint, "--raw", "--image", picture, "--prompt", "-", "--max-tokens", 2, "--json")
        result = run(*args, input="<|image|> a circle")
        assert json.loads(result.stdout)["num_prompt_tokens"] > 40

    def test_seed_repeats(self, checkpoint):
        args = ("generate", checkpoint, "--prompt", "what", "--temperature", 5, "--max-tokens", 12, "--json")
        first, second, other = (json.loads(run(*args, "--seed", s).stdout)["token_ids"] for s in (1, 1, 2))
        assert first == second != other

    def test_bad_images(self, checkpoint, tmp_path):
        fails(run("generate", checkpoint, "--prompt", "x", "--image", tmp_path / "no.png"), "no.png: no such file")
        fails(run("generate", checkpoint, "--prompt", "x", "--image", tmp_path), "is a directory, not an image")
        (tmp_path / "text.png").write_text("I am no image")
        fails(run("generate", checkpoint, "--prompt", "x", "--image", tmp_path / "text.png"), "not a readable image")
        strip = tmp_path / "strip.png"
        Image.new("RGB", (900, 2)).save(strip)
        fails(run("generate", checkpoint, "--prompt", "x", "--image", strip), "900x2 is longer than 16:1")

    def test_over_long_prompt(self, checkpoint):
        fails(run("generate", checkpoint, "--prompt", "circle " * 900), "context is 512")

    def test_image_marks_that_do_not_match(self, checkpoint, picture):
        fails(run("generate", checkpoint, "--raw", "--prompt", "no mark", "--image", picture), "0 <|image|> marks")

    def test_engines(self, checkpoint):
        fails(run("generate", checkpoint, "--prompt", "x", "--engine", "torhc"), "Did you mean 'torch'?")
        fails(run("generate", checkpoint, "--prompt", "x", "--engine", "openai"), "does not fit")
        fails(run("generate", "http://127.0.0.1:9", "--prompt", "x", "--engine", "torch"), "does not fit")

    def test_a_server_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr("nmm_serve.engines.openai_retries.FIRST_DELAY_S", 0.01)
        fails(run("generate", "http://127.0.0.1:9", "--prompt", "x"), "http://127.0.0.1:9: cannot connect")


class TestLaunch:
    @pytest.fixture(autouse=True)
    def _needs_vllm(self):
        pytest.importorskip("vllm")

    def test_port_in_use(self, checkpoint):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            fails(
                run("launch", checkpoint, "--port", port), f"cannot listen on 127.0.0.1:{port}: address already in use"
            )

    def test_conflicts(self, checkpoint):
        fails(run("launch", checkpoint, "--allowed-media-domains", "x.example"), "use --allow-media-domain", 2)
        fails(run("launch", checkpoint, "--max-model-len", 4096), "the model's context of 512")
        fails(run("launch", "--block-size", "32", checkpoint), "give the directory first", 2)

    @pytest.mark.parametrize(
        "flags", [["-cc.mode=0"], ["-cc", '{"mode": 3}', "-dph"], ["-O3"], ["-O.level=3"], ["-tp", "2", "-dp", "2"]]
    )
    @pytest.mark.parametrize("ours", [[], ["-v"]])
    def test_vllms_short_flags_reach_it(self, checkpoint, flags, ours, monkeypatch):
        seen = []

        def server(path, options, log):
            seen.extend(options.extra)
            raise EngineError("seen")

        monkeypatch.setattr("nmm_serve.server.Server", server)
        fails(run("launch", *ours, checkpoint, *flags, *ours, "--port", 0, "--seed", 1), "seen")
        assert seen == [*flags, "--seed", "1"]

    def test_the_server_lives_on_when_nobody_reads_its_log(self, checkpoint, tmp_path):
        """Standard error is closed, and the locale knows no character that vLLM draws."""
        code = (
            "import sys, types, nmm_serve.server as server\n"
            "light = sys.modules['nmm_serve.checkpoint'] = types.ModuleType('light')\n"  # the real one takes seconds
            "light.load_config = light.load_processor = lambda _: types.SimpleNamespace(max_position_embeddings=512)\n"
            "from nmm_serve.cli.serve import main\n"
            f"server.server_command = lambda *a: [sys.executable, '-c', {NOISY!r}, str(a[3]), "
            "'--served-model-name', 'm']\n"
            "main()"
        )
        command = [sys.executable, "-P", "-c", code, "launch", str(checkpoint), "--port", "0", "-v"]
        read, write = os.pipe()
        os.close(read)
        ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        log = tmp_path / "log"
        with os.fdopen(write, "w") as closed:
            done = subprocess.run(
                [*command, "--log-file", str(log)], stdout=subprocess.PIPE, stderr=closed, text=True, timeout=100,
                env=os.environ | ascii_only,
            )  # fmt: skip
        assert done.returncode == 0
        assert "Ready: " in done.stdout
        assert [line[:3] for line in log.read_text(encoding="utf-8").splitlines()] == ["\u2588\u2584 "] * 300

    def test_a_log_file_that_cannot_be_written(self, checkpoint, tmp_path):
        fails(run("launch", checkpoint, "--log-file", tmp_path / "no" / "x.log"), "no such file or directory")


class TestDoctor:
    GOOD = doctor.Finding("torch", "ok", "2.13.0")
    BAD = doctor.Finding("torchvision", "problem", "does not load: X", "pip uninstall -y torchvision")
    SO_SO = doctor.Finding("java", "warning", "none", "apt-get install java")

    def test_all_well(self, monkeypatch):
        monkeypatch.setattr(doctor, "examine", lambda: [self.GOOD, self.SO_SO])
        result = run("doctor")
        assert result.exit_code == 0
        assert "ok       torch  2.13.0" in result.stdout
        assert "WARNING  java   none" in result.stdout
        assert "-> apt-get install java" in result.stdout

    def test_a_problem_is_exit_1(self, monkeypatch):
        monkeypatch.setattr(doctor, "examine", lambda: [self.GOOD, self.BAD])
        result = run("doctor", "--json")
        assert result.exit_code == 1
        report = json.loads(result.stdout)
        assert report["ok"] is False
        assert report["findings"][1]["advice"] == "pip uninstall -y torchvision"
