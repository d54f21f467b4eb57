"""nmm-eval: evaluate a checkpoint or a running server, and set the records side by side."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.compare import compare
from nmm_serve.cli.contamination import contamination
from nmm_serve.cli.errors import Group
from nmm_serve.cli.latency import (
    compare_latency,
    comparison_options,
    latency_report,
    ledger,
    parse_slo,
    parse_sweep,
    split_options,
)  # fmt: skip
from nmm_serve.cli.onnx_speed import onnx_speed
from nmm_serve.cli.records import file_name, raise_failures
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, quiet_stdout
from nmm_serve.cli.routing import routing, routing_of
from nmm_serve.cli.score import score

_FILE = click.Path(path_type=Path)


@click.group(cls=Group)
def main() -> None:
    """Evaluate native multimodal models: VQA, captions, text, latency; compare them; write a report."""


main.add_command(score)
main.add_command(routing)
main.add_command(contamination)
main.add_command(compare)
main.add_command(onnx_speed)
main.add_command(ledger)
main.add_command(latency_report)


def _evaluation(command: Callable[..., None]) -> Callable[..., None]:
    """The options that vqa, caption, latency and all have in common."""
    return _any_evaluation(_data_options(command))


def _any_evaluation(command: Callable[..., None]) -> Callable[..., None]:
    """The options of everything that asks a model."""
    for decorate in reversed(
        (
            click.option(
                "--model",
                help="Checkpoint directory, or the URL of an OpenAI-compatible server (its key: OPENAI_API_KEY).",
            ),
            click.option(
                "--engine",
                help="torch (default), vllm, onnx (default for an exported model), or openai (default for a URL).",
            ),
            click.option("--name", help="How tables call the model. Default: the directory's name."),
            click.option(
                "--limit", type=click.IntRange(1), help="Only the first N items; the record is then not final."
            ),
            click.option("--batch-size", type=click.IntRange(1), help="Requests at once. Default: the engine's."),
            click.option(
                "--seed",
                type=int,
                default=0,
                show_default=True,
                help="Of the bootstrap, of arrivals and of random weights. Another seed asks everything again.",
            ),
            click.option(
                "-o",
                "--output",
                type=_FILE,
                help="Where the record goes. Default: NAME-TASK.json here, unless it is another model's; "
                "latency-comparison.json with --compare.",
            ),
            click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else, on stdout."),
        )
    ):
        command = decorate(command)
    return command


def _data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where pictures with questions and captions are."""
    for decorate in reversed(
        (
            click.option(
                "--data", type=_FILE, help="Folder with images/SPLIT/, captions_SPLIT.json, vqa_SPLIT_*.json."
            ),
            click.option("--split", default="val", show_default=True, help="Which split of --data."),
            click.option("--images", type=_FILE, help="Image folder, in place of the one in --data."),
            click.option("--captions", type=_FILE, help="COCO captions JSON, in place of the one in --data."),
            click.option("--questions", type=_FILE, help="VQA v2 questions JSON, in place of the one in --data."),
            click.option("--annotations", type=_FILE, help="VQA v2 annotations JSON, in place of the one in --data."),
        )
    ):
        command = decorate(command)
    return command


def _load_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of the latency measurement."""
    for decorate in reversed(
        (
            click.option(
                "--concurrency", type=click.IntRange(1), multiple=True, default=(1, 4), show_default=True,
                help="Requests in flight; give it several times.",
            ),
            click.option("--requests", type=click.IntRange(1), default=16, show_default=True, help="Per concurrency."),
            click.option("--warmup", type=click.IntRange(0), default=2, show_default=True, help="Waves not measured."),
            click.option("--output-tokens", type=click.IntRange(1), default=32, show_default=True, help="Per request."),
            click.option(
                "--sweep", multiple=True, callback=parse_sweep, metavar="NAME=V,V",
                help="resolution, images, prompt (words) or output (tokens), each value apart; give it several times.",
            ),
            click.option(
                "--rate", "rates", type=click.FloatRange(0, min_open=True), multiple=True,
                help="Requests/s of an open loop with Poisson arrivals, measured as well; give it several times.",
            ),
            click.option(
                "--slo", callback=parse_slo, metavar="NAME=MS,...",
                help="Limits of ttft, tpot and e2e in ms, to count goodput: ttft=200,tpot=30.",
            ),
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


@main.command()
@_evaluation
def vqa(**options: Any) -> None:
    """Official VQA v2 accuracy, with baselines that need no image."""
    _evaluate(("vqa",), options)


@main.command()
@_evaluation
def caption(**options: Any) -> None:
    """BLEU, METEOR, ROUGE-L and CIDEr of captions."""
    _evaluate(("caption",), options)


@main.command()
@_evaluation
@_load_options
@comparison_options
def latency(**options: Any) -> None:
    """Where the time of a request goes: one model (--model), or several side by side (--compare MODEL...)."""
    compared, options = split_options(options)
    if compared is None:
        _evaluate(("latency",), options)
    else:
        compare_latency(compared, options)


@main.command()
@_any_evaluation
@click.option(
    "--tasks",
    default="nmm",
    show_default=True,
    help="Comma-separated: lm-eval's names, groups and tags, patterns, paths of YAML files. nmm: all that we ship.",
)
@click.option(
    "--include-path",
    type=_FILE,
    multiple=True,
    help="Folder with YAML tasks of yours. They are programs: !function runs what they name.",
)
@click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each item, where the task leaves it open.")
@click.option("--apply-chat-template", is_flag=True, help="Ask in the chat format, for fine-tuned models.")
@click.option("--system-instruction", help="Words before every prompt.")
@click.option(
    "--gen-kwargs", default="", help="Over the tasks' own, as key=value,...: max_gen_toks=32,temperature=0.7."
)
@click.option("--output-dir", type=_FILE, help="Folder for the results in lm-eval's own format.")
@click.option("--log-samples", is_flag=True, help="Every item with its answer into --output-dir too.")
def text(**options: Any) -> None:
    """Text tasks through lm-eval: its own, yours, and those that we ship."""
    if options["log_samples"] and not options["output_dir"]:
        raise click.UsageError("--log-samples needs --output-dir")
    _evaluate(("text",), options)


@main.command(name="all")
@_evaluation
@_load_options
def all_(**options: Any) -> None:
    """VQA, captions, latency, our text tasks and, for a mixture of experts, routing: one record."""
    tasks: tuple[str, ...] = ("vqa", "caption", "latency", "text")
    if options["model"] is not None and Path(options["model"]).is_dir():
        from nmm_serve.onnx.manifest import is_exported, read_manifest

        if is_exported(options["model"]):
            if "moe" in read_manifest(options["model"]).family:
                note("routing is left out: an exported model does not tell its experts' choices; ask its checkpoint")
        else:
            from nmm_serve.evals.routing import is_sparse

            tasks += ("routing",) if is_sparse(options["model"]) else ()
    _evaluate(tasks, options)


@main.command()
@click.argument("records", nargs=-1, required=True, type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def table(records: tuple[Path, ...], as_json: bool) -> None:
    """Print one comparison table of RECORDS."""
    from nmm_serve.evals.records import load_record, tell_apart
    from nmm_serve.evals.table import join, joined

    loaded = [load_record(path) for path in records]
    rows = [join([loaded[i] for i in group]) for group in joined(loaded)]
    tell_apart(rows)  # the remarks below the table call them by name
    _print_comparison(rows, as_json)


@main.command()
@click.argument("records", nargs=-1, required=True, type=_FILE)
@click.option("-o", "--output", type=_FILE, default=Path("report.html"), show_default=True, help="The page to write.")
@click.option("--title", default="Model comparison", show_default=True)
@click.option("--scaling", type=_FILE, help="Fits of a sweep (`nmm-train fit -o`), whose plots are drawn too.")
def report(records: tuple[Path, ...], output: Path, title: str, scaling: Path | None) -> None:
    """Write one self-contained HTML page of RECORDS: tables, plots, sample images with predictions."""
    from nmm_serve.evals.report import write_report

    write_report(records, output, title=title, scaling=scaling)
    note(f"Report written to {output}")


def _evaluate(tasks: tuple[str, ...], options: dict[str, Any]) -> None:
    from nmm_serve.evals.datasets import find_files
    from nmm_serve.evals.latency import Load
    from nmm_serve.evals.model_files import ANSWERS
    from nmm_serve.evals.records import check_default_place
    from nmm_serve.evals.run import Options, evaluate, load_data, open_for

    if options["model"] is None:
        raise click.UsageError("Missing option '--model'.")
    files = find_files(
        options.get("data"),
        options.get("split", ""),
        **{name: options.get(name) for name in ("images", "captions", "questions", "annotations")},
    )
    model, name = options["model"], options["name"]
    load = Load()
    if "latency" in tasks:
        load = Load(
            concurrencies=options["concurrency"],
            requests=options["requests"],
            warmup=options["warmup"],
            output_tokens=options["output_tokens"],
            sweep=options["sweep"],
            rates=options["rates"],
            slo=options["slo"],
        )
    label = "all" if len(tasks) > 1 else tasks[0]
    out = options["output"] or Path(f"{file_name(name or model)}-{label}.json")
    if options["output"] is None:
        check_default_place(out, model)
    plan = Options(
        tasks=tasks, files=files, out=out, name=name, limit=options["limit"], seed=options["seed"], load=load,
        at_once=options["batch_size"], text=_text_options(options),
    )  # fmt: skip
    data = load_data(plan)  # before the model: a wrong path should not cost the time to load one
    with quiet_stdout(), progress_bars() as bars:

        def start_task(task: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(task, total=total)
            return lambda count: bars.advance(bar, count)

        measured = {"routing": routing_of(model, plan, start_task)} if "routing" in tasks else {}
        begin = time.perf_counter()
        engine = open_for(plan, model, options["engine"])
        startup_s = time.perf_counter() - begin
        try:
            record = evaluate(engine, data, plan, start_task, measured, startup_s)
        finally:
            engine.close()
    if options["as_json"]:
        print_json(record)
    else:
        _print_comparison([record], as_json=False)
    for task, section in record["tasks"].items():
        if section.get("answers_reused"):
            asked = section.get("requests", section["n"])  # a text task asks several times an item
            kept = f"{section['answers_reused']:,} of {asked:,} answers were kept from an earlier run"
            note(f"{task}: {kept}; delete {out.parent / ANSWERS} to ask again")
    note(f"Record written to {out}")
    raise_failures(record, out)


def _text_options(options: dict[str, Any]) -> Any:
    """What `text` was given; the tasks that ship for `all`, which has no options for them."""
    from nmm_serve.evals.text import TextOptions, parse_gen_kwargs

    if "tasks" not in options:
        return TextOptions(leave_out=True)
    return TextOptions(
        tasks=tuple(name for name in options["tasks"].split(",") if name),
        include_path=options["include_path"],
        num_fewshot=options["num_fewshot"],
        chat_template=options["apply_chat_template"],
        system_instruction=options["system_instruction"],
        gen_kwargs=parse_gen_kwargs(options["gen_kwargs"]),
        output_dir=options["output_dir"],
        log_samples=options["log_samples"],
    )


def _print_comparison(records: list[dict[str, Any]], as_json: bool) -> None:
    from nmm_serve.evals.table import comparison, remarks

    columns, rows = comparison(records)
    notes = remarks(records)
    if as_json:
        titles = [column.title for column in columns]
        print_json({"rows": [dict(zip(titles, (c.value for c in row), strict=True)) for row in rows], "notes": notes})
        return
    side_by_side = [i for i, column in enumerate(columns) if not column.aside]
    shown = [[_cell(row[i]) for i in side_by_side] for row in rows]
    print_table("", [columns[i].title for i in side_by_side], shown)
    # a terminal has no room for these: a row each, and a column a model
    aside = [[column.title, *(_cell(row[i]) for row in rows)] for i, column in enumerate(columns) if column.aside]
    if aside:
        print_table("", ["text tasks and experts", *(_cell(row[0]) for row in rows)], aside)
    for line in notes:
        note(line)


def _cell(cell: Any) -> str:
    return f"{cell.text} {cell.detail}".rstrip()
