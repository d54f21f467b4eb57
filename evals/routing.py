"""How a mixture-of-experts model shares its tokens among experts: by modality, by load, layer by layer.

From a checkpoint over documents, or from a training log. The scores are those of arXiv 2504.07951.

Legend: R resamples, C clusters (images), L layers, M modalities (image, text), E experts.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nmm_serve.errors import CheckpointError, DataError, NMMError
from nmm_serve.evals import stats
from nmm_serve.evals.records import publish
from nmm_serve.evals.stats import Array

if TYPE_CHECKING:
    from nmm_serve.engines.torch import TorchEngine
    from nmm_serve.processor import Encoded

MODALITIES = ("image", "text")
BATCH_SIZE = 16
LOG_STEPS = 10
"""Logged steps at the end of a training log that are pooled; one step is one small batch."""

PUBLISHED = ("experts", "routed_tokens", "specialisation_floor", "overall", "layers", "by_source")
DEFINITIONS = {
    "image_tokens, text_tokens": "tokens that each expert was given, one a chosen expert; image: patches; text: all "
    "others, special tokens and the marks around an image too; padding is left out",
    "specialisation": "mean over experts of 1 - H2(p), p the share of image tokens among an expert's tokens, H2 the "
    "binary entropy in bits: 0 when each expert is given half and half, 1 when each is given one modality; an expert "
    "without tokens is left out (arXiv 2504.07951, figures 12 and 13)",
    "specialisation_floor": "1 - H2(image share of all tokens): the specialisation of a router that ignores modality; "
    "the paper's score is not corrected for it",
    "image_skew, text_skew": "mean over experts of |share of a modality's tokens that the expert was given - 1/E| "
    "(arXiv 2504.07951, appendix E.2)",
    "max_over_mean": "tokens of the busiest expert over the mean of all: 1 when balanced, E when one is given all",
    "load_entropy": "entropy of the experts' shares of all tokens over log E: 1 when balanced, 0 when one is given all",
    "dead": "experts that were given no token",
}
NUMBERS = ("specialisation", "image_skew", "text_skew", "max_over_mean", "load_entropy")


class Document(Protocol):
    """What the model reads: parts with the role that says each, and the images for its image slots in order."""

    @property
    def parts(self) -> Sequence[tuple[str, Any]]: ...

    @property
    def images(self) -> Sequence[Any]: ...


class Reading(Protocol):
    """A document that has not been read yet. `read` raises an NMMError for one that cannot be."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def read(self) -> Callable[[], Document]: ...


def layer_numbers(counts_RLME: Array) -> dict[str, Array]:
    """Each of NUMBERS for each layer, [R, L]; NaN where there are no tokens to tell from."""
    counts = counts_RLME.astype(float)
    total_RLE = counts.sum(2)
    E = counts.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        used_RLE = total_RLE > 0
        score_RLE = np.where(used_RLE, 1 - _binary_entropy(counts[:, :, 0] / total_RLE), 0.0)
        share_RLME = counts / counts.sum(-1, keepdims=True)
        skew_RLM = np.abs(share_RLME - 1 / E).mean(-1)
        load_RLE = total_RLE / total_RLE.sum(-1, keepdims=True)
        entropy_RL = -np.where(load_RLE > 0, load_RLE * np.log(load_RLE), 0.0).sum(-1) / np.log(E)
        return {
            "specialisation": score_RLE.sum(-1) / used_RLE.sum(-1),
            "image_skew": skew_RLM[:, :, 0],
            "text_skew": skew_RLM[:, :, 1],
            "max_over_mean": load_RLE.max(-1) * E,
            "load_entropy": np.where(total_RLE.sum(-1) > 0, entropy_RL, np.nan),
        }


def _binary_entropy(p: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return -(np.where(p > 0, p * np.log2(p), 0.0) + np.where(p < 1, (1 - p) * np.log2(1 - p), 0.0))


def summarise(counts_CLME: Array, *, unit: str | None, seed: int = 0) -> dict[str, Any]:
    """Numbers of each layer and their mean over layers, with intervals over clusters. `unit` None: no intervals."""
    C, L, M, E = counts_CLME.shape
    pooled_LME = counts_CLME.sum(0)
    values = {name: value_RL[0] for name, value_RL in layer_numbers(pooled_LME[None]).items()}
    resampled: dict[str, Array] = {}
    if unit is not None and C > 1:
        flat_CF = counts_CLME.reshape(C, -1).astype(float)
        draws = [
            layer_numbers((counts_RC @ flat_CF).reshape(-1, L, M, E))
            for counts_RC in stats.draw_counts(C, stats.RESAMPLES, seed)
        ]
        resampled = {name: np.concatenate([draw[name] for draw in draws]) for name in NUMBERS}

    def number(name: str, layer: int | None) -> dict[str, Any]:
        value = values[name].mean() if layer is None else values[name][layer]
        interval = None
        if name in resampled:
            drawn_R = resampled[name].mean(1) if layer is None else resampled[name][:, layer]
            interval = stats.percentile_interval(drawn_R, C, unit or "")
        return {
            "value": None if np.isnan(value) else float(value),
            "interval": None if interval is None else interval.as_dict(),
        }

    tokens_M = pooled_LME[0].sum(-1)  # every layer sees the same tokens
    image_share = float(tokens_M[0] / tokens_M.sum())
    return {
        "experts": E,
        "routed_tokens": dict(zip(MODALITIES, map(int, tokens_M), strict=True)),
        "specialisation_floor": float(1 - _binary_entropy(np.array(image_share))),
        "overall": {name: number(name, None) for name in NUMBERS},
        "layers": [
            {
                "layer": layer,
                "image_tokens": pooled_LME[layer, 0].tolist(),
                "text_tokens": pooled_LME[layer, 1].tolist(),
                "dead": np.flatnonzero(pooled_LME[layer].sum(0) == 0).tolist(),
                **{name: number(name, layer) for name in NUMBERS},
            }
            for layer in range(L)
        ],
    }


def check_sparse(model: str) -> None:
    """Raises CheckpointError for a checkpoint without experts."""
    if not is_sparse(model):
        from nmm_serve.checkpoint import load_config

        raise CheckpointError(
            f"{model} is a dense model (family {load_config(model).family!r}), so it routes nothing; give a checkpoint "
            "of a mixture-of-experts family, moe or late-moe"
        )


def is_sparse(model: str) -> bool:
    """Whether the checkpoint has experts. Raises CheckpointError for a directory that is no checkpoint."""
    from nmm_serve.checkpoint import load_config

    return load_config(model).num_experts > 0


def measure(
    engine: "TorchEngine",
    readings: Sequence[Reading],
    *,
    total: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """The record's routing section: each document is read once, as in training, and its routed tokens are counted.

    Documents of one image are one cluster of the bootstrap. A text longer than the model's context is read in pieces;
    a document with images that is longer, or one that cannot be read, is a failed item. `total`: documents in the data,
    where `readings` are only some of them.
    """
    check_sparse(engine.model)
    counts: list[Array] = []
    owners: list[int] = []  # of each piece, the document's place in the two lists below
    clusters: list[Any] = []
    sources: list[str] = []
    images: set[str] = set()
    errors: list[dict[str, Any]] = []

    def pieces() -> Iterator[tuple[int, "Encoded"]]:
        for reading in readings:
            try:
                document = reading.read()
                encoded = _encode(engine, document)
            except NMMError as error:
                errors.append({"id": reading.name, "error": str(error)})
                progress(1)
                continue
            keys = [
                str(image) if isinstance(image, str | Path) else f"{reading.name}#{position}"
                for position, image in enumerate(document.images)
            ]
            images.update(keys)
            sources.append(reading.source)
            clusters.append(keys[0] if keys else reading.name)
            for piece in encoded:
                yield len(sources) - 1, piece

    batch: list[tuple[int, Encoded]] = []

    def flush() -> None:
        if batch:
            counts.extend(_count(engine, [piece for _, piece in batch]))
            progress(len({owner for owner, _ in batch}.difference(owners[-1:])))  # less the one half-read before
            owners.extend(owner for owner, _ in batch)
            batch.clear()

    for item in pieces():
        batch.append(item)
        if len(batch) == batch_size:
            flush()
    flush()

    numbers = None
    if counts:
        counts_NLME = _by_cluster(counts, owners)
        unit = "image" if images else "document"
        numbers = summarise(_by_cluster(counts_NLME, clusters), unit=unit, seed=seed)
        numbers["by_source"] = {}
        for source in dict.fromkeys(sources):
            own = [i for i, name in enumerate(sources) if name == source]
            of_source = _by_cluster(counts_NLME[own], [clusters[i] for i in own])
            numbers["by_source"][source] = {
                "documents": len(own), **summarise(of_source, unit=unit, seed=seed)["overall"],
            }  # fmt: skip
    section = {
        "definitions": DEFINITIONS,
        "from": "checkpoint",
        "n": len(readings),
        "n_total": len(readings) if total is None else total,
        "complete": total is None or total == len(readings),
        "images": len(images),
        "failed": len(errors),
        "errors": errors,
    }
    return publish(section, numbers, PUBLISHED)


def _by_cluster(counts: Sequence[Any] | Array, clusters: Sequence[Any]) -> Any:
    """counts_CLME: the pieces of one document, or the documents of one cluster (chats about one image), added up."""
    index_N, num_clusters = stats.cluster_index(clusters)
    counts_NLME = np.stack(list(counts))
    counts_CLME = np.zeros((num_clusters, *counts_NLME.shape[1:]), dtype=np.int64)
    np.add.at(counts_CLME, index_N, counts_NLME)
    return counts_CLME


def _encode(engine: "TorchEngine", document: Document) -> list["Encoded"]:
    """The pieces that training makes of the document: one, or for a text longer than the context several."""
    from nmm_serve.images import load_image

    images = [load_image(image) for image in document.images]
    encoded, _ = engine.processor.encode_parts([part for _, part in document.parts], images)
    ids, context = encoded.input_ids, engine.context_length
    if not images:
        return [replace(encoded, input_ids=ids[start : start + context]) for start in range(0, len(ids), context)]
    if len(ids) > context:
        raise DataError(f"the document has {len(ids)} tokens with its images, over the model's context of {context}")
    return [encoded]


def _count(engine: "TorchEngine", prompts: Sequence["Encoded"]) -> list[Array]:
    """counts_LME of each prompt."""
    import torch

    from nmm_serve.routing import count_routed, modality_groups

    batch = {k: v.to(engine.device) for k, v in engine.processor.collate(prompts).items()}
    with torch.inference_mode():
        output = engine.network(**batch, use_cache=False, output_router_logits=True, logits_to_keep=1)
    ids_BT, mask_BT = batch["input_ids"], batch["attention_mask"]
    B, T = ids_BT.shape
    group_N = modality_groups(engine.network.model.is_image(ids_BT), mask_BT)
    row_N = torch.arange(B, device=group_N.device).repeat_interleave(T)
    cell_N = torch.where(group_N < 0, -1, row_N * len(MODALITIES) + group_N)
    top_k = engine.network.config.num_experts_per_tok
    counts_LGE = count_routed(output.router_logits, cell_N, B * len(MODALITIES), top_k)
    L, _, E = counts_LGE.shape
    return list(counts_LGE.view(L, B, len(MODALITIES), E).transpose(0, 1).cpu().numpy())


def from_log(path: Path) -> dict[str, Any]:
    """The record's routing section from a run's `log.jsonl` (or the run's folder): the last logged steps pooled, and
    how each number went. There are no intervals: a log holds no documents.

    Raises DataError for a log that tells nothing of experts.
    """
    file = path / "log.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{file} does not exist; give a run's folder or its log.jsonl") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not a training log: it is not UTF-8 text") from None
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except ValueError:
            if number == len(lines):
                break  # the run was killed while writing its last line, or is writing it now
            raise DataError(f"{file}, line {number} is not JSON; expected a run's log.jsonl") from None
        if isinstance(event, dict) and event.get("event") == "train" and "routed" in event:
            steps.append(event)
    if not steps:
        raise DataError(
            f"{file} tells nothing of experts: the model is dense, or the run is from before routing was logged; "
            "measure a checkpoint with --model and --data"
        )
    counts_SLME = np.array([[event["routed"][m] for m in MODALITIES] for event in steps]).transpose(0, 2, 1, 3)
    by_step = layer_numbers(counts_SLME)
    pooled = min(LOG_STEPS, len(steps))
    numbers = summarise(counts_SLME[-pooled:].sum(0, keepdims=True), unit=None)
    return {
        "definitions": DEFINITIONS,
        "from": "training log",
        "n": len(steps),
        "pooled_steps": [event["step"] for event in steps[-pooled:]],
        "interval_reason": "a training log holds no documents to draw from",
        "failed": 0,
        "errors": [],
        **numbers,
        "history": [
            {
                "step": event["step"],
                "tokens": event["tokens"],
                **{name: [None if np.isnan(v) else float(v) for v in by_step[name][i]] for name in NUMBERS},
            }
            for i, event in enumerate(steps)
        ],
    }
