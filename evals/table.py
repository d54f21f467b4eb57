"""The comparison table: a row per record, columns for what the records hold. Shared by the terminal and the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nmm_serve.evals.records import Record

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """`higher_is_better` None: not a quality (a size, a name). `aside`: where a page is narrow, the column belongs
    into a table of its own."""

    title: str
    higher_is_better: bool | None
    what: str
    aside: bool = False


@dataclass(frozen=True)
class Cell:
    """`value` sorts, None when the record does not hold the number; `text` is shown, `detail` beside or below it."""

    value: float | str | None
    text: str
    detail: str = ""


def joined(records: Sequence[Record]) -> list[list[int]]:
    """Which records are about one model and hold different tasks, and so make one row: their positions, in order."""
    groups: list[list[int]] = []
    for position, record in enumerate(records):
        model = record["model"]
        for group in groups:
            first = records[group[0]]["model"]
            tasks = {task for member in group for task in records[member]["tasks"]}
            same = model["hash"] is not None and (model["name"], model["hash"]) == (first["name"], first["hash"])
            if same and not tasks & set(record["tasks"]):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def join(records: Sequence[Record]) -> Record:
    """The one record of `joined` ones. Its machine is the one on which times were taken, if any were."""
    timed = next((record for record in records if "latency" in record["tasks"]), records[0])
    unfinished = {task: reason for record in records for task, reason in record.get("unfinished", {}).items()}
    engines = dict.fromkeys(record["engine"]["name"] for record in records)
    return records[0] | {
        "engine": records[0]["engine"] | {"name": ", ".join(engines)},
        "environment": timed["environment"],
        "final": all(record["final"] for record in records),
        **({"unfinished": unfinished} if unfinished else {}),
        "tasks": {task: section for record in records for task, section in record["tasks"].items()},
        "samples": {image: src for record in records for image, src in record.get("samples", {}).items()},
    }


def comparison(records: Sequence[Record]) -> tuple[list[Column], list[list[Cell]]]:
    """Columns and rows; a column that no record fills is left out."""
    columns = [*_COLUMNS, *_text_columns(records)]
    rows = [[cell(record) for _, cell in columns] for record in records if set(record["tasks"]) != {"contamination"}]
    kept = [i for i in range(len(columns)) if any(row[i].value is not None for row in rows)]
    return [columns[i][0] for i in kept], [[row[i] for i in kept] for row in rows]


def remarks(records: Sequence[Record]) -> list[str]:
    """What a reader must know before setting these rows side by side."""
    lines = []
    for record in records:
        name = record["model"]["name"]
        for task, reason in record.get("unfinished", {}).items():
            lines.append(f"{name}: {task}: not finished: {reason}")
        for task, section in record["tasks"].items():
            if not section.get("complete", True):
                lines.append(f"{name}: {task}: not final, evaluated on part of the data (--limit)")
            if section.get("failed"):
                of = section["n"] + section.get("train_documents", 0)
                consequence = "they were not checked" if task == "contamination" else "no score is given"
                lines.append(f"{name}: {task}: {section['failed']} of {of} items failed; {consequence}")
            if section.get("few_answers"):
                lines.append(f"{name}: {task}: {section['few_answers']}")
            for left_out, reason in (section.get("left_out") or {}).items():
                lines.append(f"{name}: {task}: {left_out} left out: {reason}")
            for metric, reason in (section.get("metric_reasons") or {}).items():
                lines.append(f"{name}: {metric}: {reason}")
        if "contamination" in record["tasks"]:
            lines += [f"{name}: {line}" for line in contamination_lines(record)]
    for task in ("vqa", "caption"):
        seen = {
            str(r["tasks"][task]["data"]["files"]) + str(r["tasks"][task]["n"]) for r in records if task in r["tasks"]
        }
        if len(seen) > 1:
            lines.append(f"{task}: the records were made on different data; their scores cannot be compared")
        tokenizers = {r["tasks"][task].get("tokenizer") for r in records if task in r["tasks"]}
        if len(tokenizers) > 1:
            lines.append(f"{task}: the records used different tokenizers; their scores cannot be compared")
    for text_task in dict.fromkeys(t for r in records for t in r["tasks"].get("text", {}).get("tasks", {})):
        asked = {found.get("hash") for r in records if (found := _text_task(r, text_task))}
        if len(asked) > 1:
            lines.append(f"{text_task}: the records asked different things; their scores cannot be compared")
    machines = {str((r["environment"]["cpu"], r["environment"]["gpus"])) for r in records if "latency" in r["tasks"]}
    if len(machines) > 1:
        lines.append("latency: the records were made on different machines; their times cannot be compared")
    return lines


def routing_table(record: Record) -> tuple[list[str], list[list[str]], str]:
    """Columns, a row a layer and their mean, and a line below: how the experts of one model share the tokens."""
    section = record["tasks"]["routing"]
    columns = ["layer", "specialisation", "image skew %", "text skew %", "max/mean load", "load entropy", "dead"]
    if section["layers"] is None:
        return columns, [], section["reason"]

    def row(name: str, numbers: dict[str, Any], dead: str) -> list[str]:
        cells = [
            _number_text(numbers[key], scale, digits)
            for key, scale, digits in (
                ("specialisation", 1, 3), ("image_skew", 100, 1), ("text_skew", 100, 1), ("max_over_mean", 1, 2),
                ("load_entropy", 1, 3),
            )
        ]  # fmt: skip
        return [name, *cells, dead]

    rows = [row(str(layer["layer"]), layer, str(len(layer["dead"]))) for layer in section["layers"]]
    rows.append(row("mean", section["overall"], ""))
    tokens = section["routed_tokens"]
    caption = (
        f"{section['experts']} experts; {tokens['image']:,} image and {tokens['text']:,} text tokens a layer; a router "
        f"that ignores modality has specialisation {section['specialisation_floor']:.3f}"
    )
    return columns, rows, caption


def contamination_table(record: Record) -> tuple[list[str], list[list[str]], str]:
    """Columns, a row a kind of overlap, and a line below."""
    section = record["tasks"]["contamination"]
    images, texts = section["images"], section["texts"]
    rows = []
    for name, found in (
        ("exact image", images["exact"]),
        ("near-duplicate image", images["near"]),
        ("13-gram of text", texts["overlapping"]),
    ):
        share = MISSING if found["share"] is None else f"{100 * found['share']:.2f}"
        rows.append([name, f"{found['count']:,}", f"{found['of']:,}", share])
    caption = (
        f"against {images['train']:,} training images and {texts['train']:,} training texts; {texts['too_short']:,} of "
        f"{texts['evaluation']:,} evaluation texts are too short to check"
    )
    return ["evaluation data found in training data", "found", "of", "%"], rows, caption


def contamination_lines(record: Record) -> list[str]:
    """One line for each kind of overlap that was found."""
    _, rows, _ = contamination_table(record)
    return [f"{found} of {of} were found in the training data ({name})" for name, found, of, _ in rows if found != "0"]


def _number_text(number: dict[str, Any], scale: float, digits: int) -> str:
    if number["value"] is None:
        return MISSING
    interval = number["interval"]
    scaled = {"low": scale * interval["low"], "high": scale * interval["high"]} if interval else None
    return f"{scale * number['value']:.{digits}f} {brackets(scaled, digits)}".rstrip()


def _name(record: Record) -> Cell:
    return Cell(record["model"]["name"], record["model"]["name"])


def _engine(record: Record) -> Cell:
    return Cell(record["engine"]["name"], record["engine"]["name"])


def _parameters(record: Record) -> Cell:
    value = record["model"]["parameters"]
    if not value:
        return Cell(None, MISSING)
    counted = ((record["model"]["run"] or {}).get("params") or {}).get("active")
    return Cell(value, _count(value), f"{_count(counted)} active" if counted and counted != value else "")


def _count(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return str(value)


def _vqa(record: Record) -> Cell:
    section = record["tasks"].get("vqa", {})
    value, interval = section.get("accuracy"), section.get("interval")
    if value is None:
        return Cell(None, "failed" if section.get("failed") else MISSING)
    return Cell(value, f"{value:.2f}", brackets(interval, 1))


def brackets(interval: dict[str, Any] | None, digits: int) -> str:
    """`[low, high]`, or nothing without an interval."""
    return f"[{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]" if interval else ""


def _baseline(key: str) -> Any:
    def cell(record: Record) -> Cell:
        section = record["tasks"].get("vqa")
        return Cell(section[key]["overall"], f"{section[key]['overall']:.2f}") if section else Cell(None, MISSING)

    return cell


def _metric(name: str, digits: int) -> Any:
    def cell(record: Record) -> Cell:
        section = record["tasks"].get("caption", {})
        value = (section.get("metrics") or {}).get(name)
        if value is None:
            return Cell(None, "failed" if section.get("failed") else MISSING)
        interval = (section.get("intervals") or {}).get(name)
        return Cell(value, f"{value:.{digits}f}", brackets(interval, digits))

    return cell


_FIRST_METRICS = ("acc", "exact_match", "bits_per_byte")


def _text_columns(records: Sequence[Record]) -> list[tuple[Column, Any]]:
    """A column a text task, with its best known metric or else its first."""
    columns: dict[str, tuple[Column, Any]] = {}
    for record in records:
        section = record["tasks"].get("text", {})
        for task, found in section.get("tasks", {}).items():
            metric = next((m for m in _FIRST_METRICS if m in found["metrics"]), next(iter(found["metrics"]), None))
            if metric is not None:
                better = found["higher_is_better"].get(metric)
                what = f"{task}: {metric} with its 95 % interval over documents"
                column = Column(f"{task} {metric}", better, what, aside=True)
                columns.setdefault(task, (column, _text(task, metric)))
    return list(columns.values())


def _text_task(record: Record, task: str) -> dict[str, Any] | None:
    return record["tasks"].get("text", {}).get("tasks", {}).get(task)


def _text(task: str, metric: str) -> Any:
    def cell(record: Record) -> Cell:
        found = _text_task(record, task)
        if found is None or found["metrics"].get(metric) is None:
            return Cell(None, "failed" if found and found["failed"] else MISSING)
        return Cell(
            found["metrics"][metric], f"{found['metrics'][metric]:.3f}", brackets(found["intervals"][metric], 3)
        )

    return cell


def _latency(key: str, last: bool) -> Any:
    """Milliseconds (p50) or tokens/s at the lowest or highest concurrency."""

    def cell(record: Record) -> Cell:
        section = record["tasks"].get("latency")
        if not section or not section["levels"]:
            return Cell(None, MISSING)
        pick = max if last else min
        level = pick(section["levels"], key=lambda level: level["concurrency"])
        value = level[key]
        if isinstance(value, dict):
            value = None if value.get("p50") is None else 1000 * value["p50"]
        return Cell(None, MISSING) if value is None else Cell(value, f"{value:.1f}")

    return cell


def _routing(key: str, digits: int) -> Any:
    def cell(record: Record) -> Cell:
        number = ((record["tasks"].get("routing") or {}).get("overall") or {}).get(key)
        if number is None or number["value"] is None:
            return Cell(None, MISSING)
        return Cell(number["value"], f"{number['value']:.{digits}f}", brackets(number["interval"], digits))

    return cell


_COLUMNS: list[tuple[Column, Any]] = [
    (Column("model", None, "the model's name"), _name),
    (Column("engine", None, "what ran the model"), _engine),
    (Column("params", None, "stored weights"), _parameters),
    (Column("VQA acc %", True, "official VQA v2 accuracy with its 95 % interval over images"), _vqa),
    (Column("best const %", None, "the best constant answer per question type"), _baseline("best_constant")),
    (
        Column("question only %", None, "the best answer per question text, cross-validated over images"),
        _baseline("question_only"),
    ),
    (Column("CIDEr", True, "CIDEr-D, 0 to 10, with its 95 % interval over images"), _metric("CIDEr", 2)),
    (Column("BLEU-4", True, "corpus BLEU-4, 0 to 1"), _metric("Bleu_4", 3)),
    (Column("METEOR", True, "METEOR 1.5, 0 to 1"), _metric("METEOR", 3)),
    (Column("ROUGE-L", True, "ROUGE-L, 0 to 1"), _metric("ROUGE_L", 3)),
    (Column("TTFT ms", False, "median time to first token at the lowest concurrency"), _latency("ttft_s", False)),
    (Column("TPOT ms", False, "median time per output token at the lowest concurrency"), _latency("tpot_s", False)),
    (
        Column("tok/s", True, "output tokens per second at the highest concurrency"),
        _latency("output_tokens_per_s", True),
    ),
    (
        Column("specialisation", None, "of the experts in image or text, 0 to 1, mean over layers", aside=True),
        _routing("specialisation", 3),
    ),
    (
        Column("max/mean load", False, "busiest expert over the mean, mean over layers", aside=True),
        _routing("max_over_mean", 2),
    ),
]
