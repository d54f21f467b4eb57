"""nmm-eval contamination: is an evaluation set in training data?"""

from pathlib import Path
from typing import Any

import click

from nmm_serve.cli.errors import Command
from nmm_serve.cli.records import file_name, raise_failures
from nmm_serve.cli.render import note, print_json, print_table, progress_bars

_FILE = click.Path(path_type=Path)


@click.command(cls=Command)
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
    out = options["output"] or Path(f"{file_name(label)}-contamination.json")
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
    raise_failures(record, out)
