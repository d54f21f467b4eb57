"""A comparison of latency as tables: title, columns, rows of text."""

from collections.abc import Callable, Sequence
from typing import Any

from nmm_serve.evals.lab.document import cell_name, ratio_of, results

Table = tuple[str, list[str], list[list[str]]]
MISSING = "–"
PARTS = ("image_s", "host_s", "encoder_s", "prefill_s", "wait_s", "decode_s")


def all_tables(document: dict[str, Any]) -> list[Table]:
    """Models, the claims, times with ratios, training, parts of the time, costs."""
    rows = [row for run in document["runs"] for row in run["models"]]
    return [
        models_table(document),
        claims_table(document),
        times_table(document),
        training_table(document),
        parts_table(document),
        costs_table(document),
        ledger_table([row["ledger"] | {"model": row["model"]} for row in rows]),
    ]


def models_table(document: dict[str, Any]) -> Table:
    columns = ["group", "model", "family", "params M", "decoder M", "encoder M", "GFLOPs", "total", "FLOPs", "decoder"]
    rows = []
    for group in document["groups"]:
        for model in group["models"]:
            sizes, relative = model["sizes"], model["relative"]
            millions = [f"{sizes[name] / 1e6:.2f}" for name in ("total", "decoder", "vision")]
            ratios = [f"{relative[name]:.2f}" for name in ("total", "flops", "decoder")]
            rows.append(
                [group["label"], model["name"], model["family"], *millions, f"{sizes['flops'] / 1e9:.2f}", *ratios]
            )
    return "Models (the last three columns: relative to the first model)", columns, rows


def claims_table(document: dict[str, Any]) -> Table:
    """What the ratios say in the words of claims like "29 % lower latency" and "37 % better training efficiency"."""
    columns = [
        "group",
        "engine",
        "cell",
        "against",
        "TTFT lower by",
        "TPOT lower by",
        "E2E lower by",
        "training better by",
    ]
    rows = []
    for run in document["runs"]:
        for cell in run["cells"]:
            for model in _compared(cell):
                lower = [_lower(ratio_of(cell, model, metric)) for metric in ("ttft_s", "tpot_s", "e2e_s")]
                rows.append([run["group"], run["engine"], cell_name(cell), model, *lower, MISSING])
    for run in document["training"]:
        for cell in run["cells"]:
            name = f"{cell['resolution']} px"
            for model in _compared(cell):
                better = _better(ratio_of(cell, model, "step_s"))
                rows.append([run["group"], run["engine"], name, model, *[MISSING] * 3, better])
    return "The first model against each other one (95 % intervals; negative: it is the slower one)", columns, rows


def _compared(cell: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(ratio["model"] for ratio in cell["ratios"]))


def _lower(ratio: dict[str, Any] | None) -> str:
    return _percent(ratio, lambda value: 1 - 1 / value)


def _better(ratio: dict[str, Any] | None) -> str:
    return _percent(ratio, lambda value: value - 1)


def _percent(ratio: dict[str, Any] | None, share: Callable[[float], float]) -> str:
    if ratio is None or ratio["ratio"] is None:
        return MISSING
    text, interval = f"{100 * share(ratio['ratio']):.0f} %", ratio["interval"]
    return text + (f" [{100 * share(interval['low']):.0f}, {100 * share(interval['high']):.0f}]" if interval else "")


def training_table(document: dict[str, Any]) -> Table:
    columns = ["group", "resolution", "model", "step ms", "samples/s", "step x", "peak RSS MB", "peak GPU MB"]
    rows = []
    for run in document["training"]:
        memory = {model["model"]: model["memory"] for model in run["models"]}
        for cell in run["cells"]:
            for result in cell["results"]:
                name = result["model"]
                row = [run["group"], str(cell["resolution"]), name, _ms(result["step_s"])]
                row += [f"{result['samples_per_s']:.2f}", _ratio(ratio_of(cell, name, "step_s"))]
                peaks = memory.get(name, {"peak_rss_bytes": None, "peak_gpu_bytes": None})
                rows.append([*row, _mega(peaks["peak_rss_bytes"]), _mega(peaks["peak_gpu_bytes"])])
    return "Training steps (medians with 95 % intervals) and ratios to the first model (x)", columns, rows


def times_table(document: dict[str, Any]) -> Table:
    columns = [
        "group",
        "engine",
        "cell",
        "model",
        "TTFT ms",
        "TPOT ms",
        "E2E ms",
        "p99 E2E",
        "tok/s",
        "TTFT x",
        "TPOT x",
    ]
    columns += ["E2E x", "failed"]
    rows = []
    for run, cell, result in results(document):
        rate = result["output_tokens_per_s"]
        row = [run["group"], run["engine"], cell_name(cell), result["model"]]
        row += [_ms(result[metric]) for metric in ("ttft_s", "tpot_s", "e2e_s")]
        row += [_ms(result["e2e_s"], "p99"), MISSING if rate is None else f"{rate:.1f}"]
        row += [_ratio(ratio_of(cell, result["model"], metric)) for metric in ("ttft_s", "tpot_s", "e2e_s")]
        rows.append([*row, str(result["failed"])])
    return "Times (medians with 95 % intervals) and ratios to the first model (x)", columns, rows


def parts_table(document: dict[str, Any]) -> Table:
    columns = ["group", "engine", "cell", "model", *(name.removesuffix("_s") + " ms" for name in PARTS)]
    rows = [
        [
            run["group"],
            run["engine"],
            cell_name(cell),
            result["model"],
            *(_ms(result["parts"][p], only=True) for p in PARTS),
        ]
        for run, cell, result in results(document)
    ]
    return "Where the time goes (medians)", columns, rows


def costs_table(document: dict[str, Any]) -> Table:
    columns = [
        "group",
        "engine",
        "model",
        "start-up s",
        "export s",
        "peak RSS MB",
        "peak GPU MB",
        "files",
        "artefact MB",
    ]
    rows = []
    for run in document["runs"]:
        for model in run["models"]:
            memory, artefact = model["memory"], model["artefact"]
            rows.append(
                [
                    run["group"], run["engine"], model["model"], f"{model['startup_s']:.1f}",
                    MISSING if model["export_s"] is None else f"{model['export_s']:.1f}",
                    _mega(memory["peak_rss_bytes"]), _mega(memory["peak_gpu_bytes"]), str(artefact["files"]),
                    _mega(artefact["bytes"]),
                ]
            )  # fmt: skip
    return "Memory, start and artefact", columns, rows


def ledger_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [
        "model",
        "engine",
        "family",
        "build steps",
        "graphs",
        "graph nodes",
        "compiled",
        "prefill ops",
        "ops/token",
        "caches",
    ]
    columns += ["KV B/token", "engine knobs", "model fields", "code lines", "family lines"]
    found = []
    for row in rows:
        calls, nodes = row["operator_calls"], row["graphs"]["nodes"]
        found.append(
            [
                row["model"], row["engine"], row["family"], str(len(row["build"])), str(row["graphs"]["count"]),
                MISSING if nodes is None else " + ".join(f"{name} {count}" for name, count in nodes.items()),
                ", ".join(row.get("compiled", ())) or MISSING,  # older records do not tell
                _count(calls["prefill"]), _count(calls["decode_step"]), ", ".join(row["caches"]),
                str(row["caches"]["kv"]["float32_bytes_per_token"]), str(len(row["knobs"]["engine"])),
                str(row["knobs"]["model_fields"]), str(row["code_lines"]), str(row["family_lines"]),
            ]
        )  # fmt: skip
    return "Deployment ledger", columns, found


def _count(value: int | None) -> str:
    return MISSING if value is None else str(value)


def _mega(value: int | None) -> str:
    return MISSING if value is None else f"{value / 1e6:.1f}"


def _ms(number: dict[str, Any], quantile: str = "p50", only: bool = False) -> str:
    if number.get(quantile) is None:
        return MISSING
    text = f"{1000 * number[quantile]:.2f}"
    interval = number.get(f"{quantile}_interval")
    if only or not interval:
        return text
    return f"{text} [{1000 * interval['low']:.2f}, {1000 * interval['high']:.2f}]"


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None or ratio["ratio"] is None:
        return MISSING
    interval = ratio["interval"]
    return f"{ratio['ratio']:.2f}" + (f" [{interval['low']:.2f}, {interval['high']:.2f}]" if interval else "")
