"""nmm-eval: evaluate a checkpoint or a running server, and set the records side by side."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.compare import compare
from nmm_serve.cli.errors import Group, ItemsFailed
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
from nmm_serve.cli.render import note, print_json, print_table, progress_bars, quiet_stdout
from nmm_serve.cli.score import score

_FILE = click.Path(path_type=Path)
_SHOWN_FAILURES = 5


@click.group(cls=Group)
def main() -> None:
    """Evaluate native multimodal models: VQA, captions, text, latency; compare them; write a report."""


main.add_command(score)
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
            click.option("--model", help="Checkpoint directory, or the URL of an OpenAI-compatible server."),
            click.option(
                "--engine",
                help="torch (default), vllm, onnx (default for an exported model), or openai (default for a URL).",
            ),
            click.option("--name", help="How tables call the model. Default: the directory's name."),
            click.option(
                "--limit", type=click.IntRange(1), help="Only the first N items; the record is then not final."
            ),
            click.option("--batch-size", type=click.IntRange(1), help="Requests at once. Default: the engine's."),
            click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap."),
            click.option("-o", "--output", type=_FILE, help="Where the record goes. Default: NAME-TASK.json here."),
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
@click.option("--model", help="Checkpoint directory of a mixture-of-experts model.")
@click.option("--name", help="How tables call the model. Default: the directory's name.")
@click.option(
    "--data",
    type=_FILE,
    help="Folder as for vqa, a training configuration (.yaml), or .jsonl, .txt, .parquet or .tar files.",
)
@click.option("--split", default="val", show_default=True, help="Which split of a --data folder.")
@click.option("--log", type=_FILE, help="A run's folder or log.jsonl, in place of --model and --data.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N documents of each source; not final then.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Documents at once.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap.")
@click.option("-o", "--output", type=_FILE, help="Where the record goes. Default: NAME-routing.json here.")
@click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else, on stdout.")
def routing(**options: Any) -> None:
    """Which experts image and text tokens go to, layer by layer: specialisation and load balance."""
    from nmm_serve.evals import routing as task
    from nmm_serve.evals.records import blank_record, check_place, new_record, no_checkpoint, write_record

    model, log, name = options["model"], options["log"], options["name"]
    if (log is None) == (model is None) or (model is None) != (options["data"] is None):
        raise click.UsageError("give --model with --data, or --log")
    out = options["output"] or Path(f"{_file_name(name or model or str(log))}-routing.json")
    check_place(out)
    if log is not None:
        label = name or (log if log.is_dir() else log.parent).resolve().name
        about = no_checkpoint(label, str(log), "measured from a training log")
        record = blank_record(about, {"name": "training log"}, seed=options["seed"])
        record["tasks"]["routing"] = task.from_log(log)
    else:
        task.check_sparse(model)
        readings, total = _readings(options["data"], options["split"], options["limit"])
        with quiet_stdout(), progress_bars() as bars, _torch_engine(model) as engine:
            bar = bars.add_task("routing", total=len(readings))
            record = new_record(engine, name=name, seed=options["seed"])
            record["tasks"]["routing"] = task.measure(
                engine, readings, total=total, seed=options["seed"], batch_size=options["batch_size"],
                progress=lambda count: bars.advance(bar, count),
            )  # fmt: skip
        record["final"] = record["tasks"]["routing"]["complete"]
    write_record(record, (), out)
    if options["as_json"]:
        print_json(record)
    else:
        _print_routing(record)
    note(f"Record written to {out}")
    _raise_failures(record, out)


@main.command()
@click.option(
    "--train",
    type=_FILE,
    multiple=True,
    required=True,
    help="Training data: a folder as for vqa, a training configuration (.yaml), or files; give it several times.",
)
@click.option("--train-split", default="train", show_default=True, help="Which split of a --train folder.")
@click.option("--data", type=_FILE, required=True, help="The evaluation set, in any of these forms.")
@click.option("--split", default="val", show_default=True, help="Which split of a --data folder.")
@click.option("-o", "--output", type=_FILE, help="Where the record goes. Default: DATA-SPLIT-contamination.json here.")
@click.option("--json", "as_json", is_flag=True, help="Print the record, and nothing else, on stdout.")
def contamination(**options: Any) -> None:
    """Look for an evaluation set in training data: same images, nearly the same, 13 same words in a row."""
    from nmm_serve.evals.contamination import check
    from nmm_serve.evals.records import blank_record, check_place, no_checkpoint, write_record
    from nmm_serve.evals.table import contamination_table
    from nmm_serve.train.data.paths import readings, sources_at

    data, split = options["data"], options["split"]
    label = f"{data.resolve().name} {split}"
    out = options["output"] or Path(f"{_file_name(label)}-contamination.json")
    check_place(out)
    train = [source for path in options["train"] for source in sources_at(path, options["train_split"])]
    evaluation = sources_at(data, split)
    with progress_bars() as bars:
        bar = bars.add_task("contamination", total=sum(map(len, (*train, *evaluation))))
        section, items = check(
            readings(train), readings(evaluation), progress=lambda count: bars.advance(bar, count)
        )  # fmt: skip
    about = no_checkpoint(label, str(data), "data was checked, no model")
    record = blank_record(about, {"name": "none"}, seed=0)
    record["tasks"]["contamination"] = section
    write_record(record, items, out)
    if options["as_json"]:
        print_json(record)
    else:
        print_table(f"{label} against {', '.join(map(str, options['train']))}", *contamination_table(record))
        for item in section["examples"]:
            note(f"{item['kind']}: {item['evaluation']} is {', '.join(item['train'])} ({item['train_count']} in all)")
    note(f"Record written to {out}")
    _raise_failures(record, out)


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
        from nmm_serve.evals.routing import is_sparse

        tasks += ("routing",) if is_sparse(options["model"]) else ()
    _evaluate(tasks, options)


@main.command()
@click.argument("records", nargs=-1, required=True, type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def table(records: tuple[Path, ...], as_json: bool) -> None:
    """Print one comparison table of RECORDS."""
    from nmm_serve.evals.records import load_record
    from nmm_serve.evals.table import join, joined

    loaded = [load_record(path) for path in records]
    _print_comparison([join([loaded[i] for i in group]) for group in joined(loaded)], as_json)


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
    from nmm_serve.evals.answers import FOLDER
    from nmm_serve.evals.datasets import find_files
    from nmm_serve.evals.latency import Load
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
    out = options["output"] or Path(f"{_file_name(name or model)}-{label}.json")
    plan = Options(
        tasks=tasks, files=files, out=out, name=name, limit=options["limit"], seed=options["seed"], load=load,
        at_once=options["batch_size"], text=_text_options(options),
    )  # fmt: skip
    data = load_data(plan)  # before the model: a wrong path should not cost the time to load one
    with quiet_stdout(), progress_bars() as bars:

        def start_task(task: str, total: int) -> Callable[[int], None]:
            bar = bars.add_task(task, total=total)
            return lambda count: bars.advance(bar, count)

        measured = {"routing": _routing_of(model, plan, start_task)} if "routing" in tasks else {}
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
            note(f"{task}: {kept}; delete {out.parent / FOLDER} to ask again")
    note(f"Record written to {out}")
    _raise_failures(record, out)


def _raise_failures(record: dict[str, Any], out: Path) -> None:
    from nmm_serve.evals.run import failures

    failed = failures(record)
    if failed:
        more = f"\n  and {len(failed) - _SHOWN_FAILURES} more, all in {out}" if len(failed) > _SHOWN_FAILURES else ""
        shown = "\n  ".join(failed[:_SHOWN_FAILURES])
        raise ItemsFailed(f"items or tasks failed, so these tasks have no score:\n  {shown}{more}")


def _readings(data: Path, split: str, limit: int | None) -> tuple[list[Any], int]:
    """Documents of `data` that have not been read yet, and how many there are without the limit."""
    from nmm_serve.train.data.paths import sources_at

    return _limited(sources_at(data, split), limit)


def _limited(sources: Sequence[Any], limit: int | None) -> tuple[list[Any], int]:
    from nmm_serve.train.data.paths import readings

    return list(readings(sources, limit=limit)), sum(map(len, sources))


def _routing_of(model: str, plan: Any, start_task: Callable[[str, int], Callable[[int], None]]) -> dict[str, Any]:
    """Routing over the data of the other tasks, by torch, which is closed again before another engine opens."""
    from nmm_serve.evals.routing import measure
    from nmm_serve.train.data.paths import sources_of

    files = plan.files
    named = {name: getattr(files, name) for name in ("images", "captions", "questions", "annotations")}
    readings, total = _limited(sources_of(**named), plan.limit)
    with _torch_engine(model) as engine:
        progress = start_task("routing", len(readings))
        return measure(engine, readings, total=total, seed=plan.seed, progress=progress)


def _torch_engine(model: str) -> Any:
    from nmm_serve.engines.torch import TorchEngine

    return TorchEngine(model)


def _print_routing(record: dict[str, Any]) -> None:
    from nmm_serve.evals.table import remarks, routing_table

    columns, rows, caption = routing_table(record)
    print_table(record["model"]["name"], columns, rows, caption)
    for line in remarks([record]):
        note(line)


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


def _file_name(model: str) -> str:
    last = (
        model.rstrip("/").rpartition("/")[2]
        if model.startswith(("http://", "https://"))
        else Path(model).resolve().name
    )
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last) or "model"


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
