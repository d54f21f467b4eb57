"""nmm-serve: serve a checkpoint, ask it something, look at it, and check the installation."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command, Group
from nmm_serve.cli.kernels import kernels
from nmm_serve.cli.render import note, print_json, print_table, quiet_stdout, stderr_console

_DTYPES = click.Choice(["auto", "float32", "bfloat16", "float16"])


@click.group(cls=Group)
def main() -> None:
    """Serve native multimodal models with vLLM or ONNX Runtime.

    \b
    nmm-serve doctor
    nmm-serve info ckpt/
    nmm-serve generate ckpt/ --image a.png --prompt "What is this?"
    nmm-serve launch ckpt/
    nmm-serve export ckpt/ --onnx exported/
    """


main.add_command(kernels)


class Launch(Command):
    """vLLM has short flags of several letters (`-tp 2`, `-cc.mode=0`). click would take them for ours in a row, if
    there were any of ours: `-v` and `-h` are told apart here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [{"-v": "--verbose", "-h": "--help"}.get(arg, arg) for arg in args])


@main.command(cls=Launch, context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.argument("checkpoint")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0: every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key", envvar="VLLM_API_KEY", metavar="KEY",
    help="Key that clients must send. Better set in VLLM_API_KEY: other users can see a command line.",
)  # fmt: skip
@click.option(
    "--allow-media-domain", "media_domains", multiple=True, metavar="HOST",
    help="Host that images may be fetched from; give it several times. Without it, clients send the images themselves.",
)  # fmt: skip
@click.option("--dtype", type=_DTYPES, default="auto", show_default=True, help="auto: the checkpoint's own.")
@click.option("--max-model-len", type=int, help="Longest prompt and answer together. Default: the model's context.")
@click.option("--engine", type=click.Choice(["vllm", "onnx"]), help="Default: onnx for an exported model, else vllm.")
@click.option("--max-num-seqs", type=click.IntRange(1), help="Requests that run at once. Default: 8 (onnx).")
@click.option("--max-waiting", type=click.IntRange(0), help="onnx: requests in line before 429 is sent. Default: 64.")
@click.option("--threads", type=click.IntRange(1), help="onnx: threads of the model. Default: one a physical core.")
@click.option(
    "--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Append the server's log to this file."
)
@click.option("--verbose", is_flag=True, help="Show the server's log; or -v.")
def launch(
    checkpoint: str,
    vllm_flags: tuple[str, ...],
    api_key: str | None,
    engine: str | None,
    max_num_seqs: int | None,
    max_waiting: int | None,
    threads: int | None,
    log_file: Path | None,
    verbose: bool,
    **options: Any,
) -> int:
    """Serve CHECKPOINT with vLLM's OpenAI-compatible server, or an exported model with ONNX Runtime.

    Every option not listed here is passed on to vLLM, for example --enable-prefix-caching.

    \b
    nmm-serve launch ckpt/ --port 9000
    nmm-serve launch exported/ --engine onnx
    nmm-serve launch ckpt/ --allow-media-domain images.example.org
    """
    from nmm_serve.onnx.manifest import is_exported
    from nmm_serve.server import LOOPBACK, Server
    from nmm_serve.server_options import ServerOptions

    if options["host"] not in LOOPBACK and not api_key:
        note(f"Warning: {options['host']} can be reached from other machines, and no --api-key is set.")
    if (engine or ("onnx" if is_exported(checkpoint) else "vllm")) == "onnx":
        own = {"slots": max_num_seqs, "max_waiting": max_waiting, "threads": threads}
        return _launch_onnx(checkpoint, ServerOptions(api_key=api_key, extra=vllm_flags, **options), own, log_file)
    if max_waiting is not None or threads is not None:
        raise click.UsageError("--max-waiting and --threads belong to --engine onnx")
    if max_num_seqs is not None:
        vllm_flags = (*vllm_flags, "--max-num-seqs", str(max_num_seqs))
    log_stream = log_file.open("a", buffering=1, encoding="utf-8", errors="replace") if log_file else None
    console = stderr_console()

    def log(line: str) -> None:
        nonlocal log_stream
        try:
            if log_stream:
                log_stream.write(line + "\n")
        except OSError as error:  # a full disk must not stop the server
            log_stream = None
            note(f"Warning: {log_file} cannot be written ({error.strerror}); the log ends here.")
        if verbose:
            with contextlib.suppress(OSError):  # nobody reads it any more
                click.echo(line, err=True)

    with console.status("Checking the checkpoint ..."):
        server = Server(checkpoint, ServerOptions(api_key=api_key, extra=vllm_flags, **options), log=log)
    _hide_key(api_key)
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: server.terminate()) for number in signals]
    try:
        server.start()
        with console.status("Starting vLLM ...") as status:
            server.wait_ready(lambda passed: status.update(f"Starting vLLM ... {passed:.0f} s"))
        click.echo(_welcome(server.url, server.served_model, bool(api_key)))
        exit_status = server.wait()
        return exit_status if exit_status >= 0 else 128 - exit_status
    finally:
        server.stop(grace_s=5)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        if log_stream:
            log_stream.close()


def _launch_onnx(model: str, options: Any, own: dict[str, int | None], log_file: Path | None) -> int:
    import logging

    from nmm_serve.serving.run import serve

    style = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(filename=log_file, encoding="utf-8", level=logging.WARNING, format=style)
    _hide_key(options.api_key)
    given = {name: value for name, value in own.items() if value is not None}
    serve(
        model, options, **given,  # type: ignore[arg-type]
        ready=lambda url, name: click.echo(_welcome(url, name, bool(options.api_key))),
    )  # fmt: skip
    return 0


def _hide_key(api_key: str | None) -> None:
    """Take a key that came with the command line out of what `ps` shows."""
    if api_key:
        import setproctitle  # comes with vLLM, and with the extra "onnx"

        setproctitle.setproctitle("nmm-serve launch")


def _welcome(url: str, model: str, needs_key: bool) -> str:
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if needs_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"Ready: {url}/v1 (model {model})\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{body}'\n"
        "Stop it with Ctrl-C."
    )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> int:
    """Say what is installed, what is broken, and what to do about it."""
    from nmm_serve.doctor import examine

    with stderr_console().status("Looking around ..."):
        findings = examine()
    broken = any(finding.level == "problem" for finding in findings)
    if as_json:
        print_json({"ok": not broken, "findings": [finding.as_dict() for finding in findings]})
    else:
        width = max(len(finding.name) for finding in findings)
        marks = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}
        for finding in findings:
            click.echo(f"{marks[finding.level]}  {finding.name:<{width}}  {finding.found}")
            if finding.advice:
                click.echo(f"{'':{width + 11}}-> {finding.advice}")
    return int(broken)


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--onnx", "out", required=True, type=click.Path(path_type=Path), help="Directory to write.")
@click.option(
    "--quant", "quantization", type=click.Choice(["none", "int8", "int4"]), default="none", show_default=True,
    help="Bits of the weights. int8: fastest prompts. int4: smallest file; the last layer keeps 8 bits.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def export(checkpoint: Path, out: Path, quantization: Any, as_json: bool) -> None:
    """Write CHECKPOINT as ONNX graphs, for machines without a GPU and without torch.

    The graphs are compared with torch first; a model that differs is not written.

    \b
    nmm-serve export ckpt/ --onnx exported/ --quant int8
    nmm-serve generate exported/ --image a.png --prompt "What is this?"
    """
    from dataclasses import asdict

    from nmm_serve.onnx.export import export as export_checkpoint

    with quiet_stdout(), stderr_console().status("Exporting, and comparing with torch ..."):
        manifest = export_checkpoint(checkpoint, out, quantization)
    if as_json:
        print_json(asdict(manifest))
        return
    check, size = manifest.check, sum(file.stat().st_size for file in out.iterdir())
    click.echo(
        f"Wrote {out} ({manifest.family}, {manifest.parameters:,} parameters, {size / 1e6:,.1f} MB). "
        f"Against torch in fp32: greedy tokens equal at {check['greedy_equal']} of {check['positions']} positions, "
        f"log-probabilities at most {check['max_logprob_diff']:.2g} nats apart."
    )


@main.command()
@click.argument("model")
@click.option("--prompt", required=True, help="What to ask. '-' reads it from standard input.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="Image file, before the prompt."
)
@click.option(
    "--engine", help="torch (default), vllm, onnx (default for an exported model), or openai (default for a URL)."
)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Length of the answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--raw", is_flag=True, help="No chat format: continue the prompt. <|image|> in it marks each image.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer with counts and times as JSON.")
def generate(
    model: str,
    prompt: str,
    images: tuple[Path, ...],
    engine: str | None,
    raw: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Ask MODEL, a checkpoint directory or a server's URL, for one answer.

    \b
    nmm-serve generate ckpt/ --image a.png --prompt "What colour is the circle?"
    nmm-serve generate http://127.0.0.1:8000 --prompt "Describe the image." --image a.png
    """
    from nmm_serve.engines import open_engine
    from nmm_serve.engines.base import Request, SamplingParams
    from nmm_serve.errors import PromptError
    from nmm_serve.images import load_image

    text = sys.stdin.read() if prompt == "-" else prompt
    pictures = [load_image(path) for path in images]  # before the model: a wrong path should not cost the time to load
    params = SamplingParams(**sampling)
    if raw:
        request = Request(prompt=text, images=pictures, sampling=params)
    else:
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        request = Request(messages=[{"role": "user", "content": content}], images=pictures, sampling=params)
    with quiet_stdout():
        with stderr_console().status("Loading the model ..."):
            opened = open_engine(model, engine)
        try:
            output = opened.generate([request])[0]
            described = opened.describe()
        finally:
            opened.close()
    if output.error:
        raise PromptError(output.error)
    if not as_json:
        click.echo(output.text)
        return
    print_json(
        {
            "text": output.text,
            "finish_reason": output.finish_reason,
            "num_prompt_tokens": output.num_prompt_tokens,
            "num_tokens": output.num_tokens,
            "token_ids": list(output.token_ids) or None,
            "ttft_s": output.timing.ttft_s,
            "e2e_s": output.timing.e2e_s,
            "engine": described,
        }
    )


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def info(checkpoint: Path, as_json: bool) -> None:
    """Say what CHECKPOINT is: family, sizes, how it was trained. Reads no weights into memory."""
    from nmm_serve.info import describe_checkpoint

    found = describe_checkpoint(checkpoint)
    if as_json:
        print_json(found)
        return
    rows = [[name.replace("_", " "), _show(value)] for name, value in found.items() if name != "run"]
    run = found["run"]
    curves = ("history", "validation", "config")  # pages of numbers; --json has them
    rows += [[f"run: {name}", _show(value)] for name, value in run.items() if name not in curves]
    rows += [] if run else [["run", "no run.json"]]
    print_table(str(checkpoint), ["", ""], rows)


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, dict | list) and not value:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_show(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return os.fspath(value) if isinstance(value, Path) else str(value)
