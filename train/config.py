"""The training configuration: dataclass defaults < recipe or YAML file < `--set key=value`. Unknown keys are errors."""

import dataclasses
import difflib
import itertools
import math
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from nmm_serve.errors import ConfigError, unknown_name


@dataclass(kw_only=True)
class ModelConfig:
    preset: str = "tiny"
    family: Literal["early", "late", "moe", "late-moe"] = "early"
    match: Literal["total", "flops", "decoder"] = "total"
    """How a late model is matched to the early one of the same preset."""
    patch_size: int = 8
    image_size: int = 64
    tie_word_embeddings: bool = False
    pool_image: bool = False
    """Late fusion: one token an image, the encoder's pooled output."""
    native_resolution: bool = False
    """Images keep their aspect ratio and size, up to `image_size` squared pixels; small ones are not scaled up."""
    num_experts: int = 8
    num_experts_per_tok: int = 1
    router: Literal["learned", "modality"] = "learned"
    """`modality`: hard routing, text to one expert and image patches to another; needs num_experts 2."""
    router_z_loss_coef: float = 0.0


@dataclass(kw_only=True)
class TokenizerConfig:
    path: str | None = None
    """A tokenizer directory. Without it, one is trained on the training data."""
    vocab_size: int = 1024
    documents: int = 4000
    """Documents of each source that a new tokenizer is trained on."""


@dataclass(kw_only=True)
class DataConfig:
    root: str = "."
    """Relative paths of the sources start here."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    validation_documents: int = 128
    workers: int = 0
    """Of each process."""
    shards: int = 1
    """Streams that the documents are divided into, each packed by itself. A multiple of the number of processes lets
    every process read documents of its own; the rows of a step depend on the shards, not on the processes."""
    max_bad_share: float = 0.01


@dataclass(kw_only=True)
class StartConfig:
    """Local Hugging Face directories that a new model takes weights from. The rest of it starts from scratch."""

    decoder: str | None = None
    """A language model whose blocks are ours exactly; it brings its shape and its tokenizer."""
    encoder: str | None = None
    """CLIP or SigLIP, whole or its image side alone; it stands in for the ViT of family late or late-moe."""


@dataclass(kw_only=True)
class LoraConfig:
    """Low-rank updates of the decoder's matrices, merged into them in every checkpoint."""

    rank: int = 8
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW as in arXiv 2504.07951, appendix A: decay is fully decoupled, p <- p * (1 - weight_decay * lr / peak).

    The scales are rates of the model's parts relative to `lr`; 0 freezes a part.
    """

    lr: float | None = None
    """Peak rate. None: that of the preset, with `init_from` of the one that its model was trained with."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    grad_clip: float = 1.0
    vision_lr_scale: float = 0.01
    """Late fusion: the encoder. The paper's table 8 finds 0.01 best from scratch."""
    connector_lr_scale: float = 1.0
    """What leads into the decoder: late fusion's connector, early fusion's patch projection and positions."""
    decoder_lr_scale: float = 1.0
    """Blocks, embeddings and output layer."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Linear warm-up, constant rate, cool-down to zero as 1 - sqrt(progress) (arXiv 2405.18392)."""

    warmup_steps: int = 100
    cooldown: float = 0.2
    """Share of all steps."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work. May change when a run goes on."""

    strategy: Literal["none", "ddp", "fsdp"] = "none"
    """`ddp`: each process holds the model. `fsdp`: parameters, experts too, gradients and optimiser are sharded."""
    activation_checkpointing: bool = False
    """Run each block again in the backward pass instead of keeping its activations."""


@dataclass(kw_only=True)
class TrainConfig:
    name: str = "run"
    objective: Literal["pretrain", "sft"] = "pretrain"
    """`pretrain`: loss on every text token. `sft`: on the assistant's answers."""
    init_from: str | None = None
    """A checkpoint to start from; it brings its model and tokenizer."""
    start: StartConfig = field(default_factory=StartConfig)
    lora: LoraConfig | None = None
    soft_token: bool = False
    """Train the embedding of `<|image_start|>`, which stands before every image, in a frozen decoder."""
    seed: int = 0
    steps: int = 1000
    context_length: int = 512
    rows: int = 16
    """Packed sequences in one forward pass."""
    accumulate: int = 1
    """Forward passes in one step. Several processes divide a step's passes, and then the rows of each pass."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    compile: bool = False
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    keep: int = 2
    """Resume checkpoints to keep."""
    save_at: tuple[int, ...] = ()
    """Steps whose resume checkpoints are kept for good: where runs with another budget branch off."""
    max_bad_steps: int = 5
    """Stop after so many steps in a row with a NaN or infinite loss or gradient."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def validate(self) -> None:
        counts = ("steps", "context_length", "rows", "accumulate", "log_every", "eval_every", "save_every", "keep")
        for name in (*counts, "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for section, name in (("data", "shards"), ("data", "validation_documents"), ("tokenizer", "documents")):
            if (value := getattr(getattr(self, section), name)) < 1:
                raise ConfigError(f"{section}.{name} must be at least 1, not {value}")
        if any(not 1 <= step <= self.steps for step in self.save_at):
            raise ConfigError(f"save_at {list(self.save_at)} must name steps from 1 to {self.steps}")
        if not self.data.sources:
            raise ConfigError("data.sources is empty; name at least one source (see the recipes: nmm-train recipes)")
        self._validate_optimizer()
        self._validate_start()
        self._validate_adapters()
        if self.schedule.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps must be 0 or more, not {self.schedule.warmup_steps}")
        if not 0 <= self.schedule.cooldown <= 1:
            raise ConfigError(f"schedule.cooldown is a share of the steps, 0 to 1, not {self.schedule.cooldown}")
        if self.schedule.warmup_steps + self.schedule.cooldown * self.steps > self.steps:
            raise ConfigError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} and a cool-down over {self.schedule.cooldown:.0%} "
                f"of {self.steps} steps do not fit into the run; shorten one or raise steps"
            )

    def _validate_optimizer(self) -> None:
        optimizer = self.optimizer
        for name in ("vision_lr_scale", "connector_lr_scale", "decoder_lr_scale"):
            if getattr(optimizer, name) < 0:
                raise ConfigError(f"optimizer.{name} must be 0 (frozen) or more, not {getattr(optimizer, name)}")
        if optimizer.lr is not None and optimizer.lr <= 0:
            raise ConfigError(
                f"optimizer.lr must be over 0, not {optimizer.lr:g}; leave it out for the preset's rate, or freeze a "
                "part with optimizer.PART_lr_scale=0"
            )
        if optimizer.grad_clip <= 0:
            raise ConfigError(
                f"optimizer.grad_clip is the largest norm of the gradient, over 0, not {optimizer.grad_clip:g}; to "
                "switch clipping off, give a huge one such as 1e9"
            )
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            raise ConfigError(f"optimizer.betas must be 0 or more and below 1, not {list(optimizer.betas)}")
        if optimizer.eps <= 0:
            raise ConfigError(f"optimizer.eps must be over 0, not {optimizer.eps:g}")
        if optimizer.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay must be 0 (off) or more, not {optimizer.weight_decay:g}")

    def _validate_adapters(self) -> None:
        given = [name for name in ("lora", "soft_token") if getattr(self, name)]
        if not given:
            return
        if self.optimizer.decoder_lr_scale != 0:
            raise ConfigError(f"{given[0]} is for a decoder that itself stays; set optimizer.decoder_lr_scale to 0")
        if self.lora is not None and (self.lora.rank < 1 or self.lora.alpha <= 0 or not self.lora.targets):
            raise ConfigError(
                f"lora needs a rank of at least 1, an alpha over 0 and at least one target, not {self.lora}"
            )

    def _validate_start(self) -> None:
        if self.model.pool_image and not self.model.family.startswith("late"):
            raise ConfigError(f"model.pool_image needs an encoder and family {self.model.family!r} has none; use late")
        given = [name for name in ("decoder", "encoder") if getattr(self.start, name) is not None]
        if given and self.init_from is not None:
            raise ConfigError(f"init_from brings a whole model, so start.{given[0]} has no place beside it; remove one")
        if self.init_from is not None and self.tokenizer.path is not None:
            raise ConfigError("init_from brings its own tokenizer; remove tokenizer.path")
        if self.start.encoder is not None and not self.model.family.startswith("late"):
            raise ConfigError(
                f"start.encoder is an image encoder for model.family late or late-moe, not {self.model.family!r}"
            )
        if self.start.decoder is None:
            return
        if self.tokenizer.path is not None:
            raise ConfigError("start.decoder brings its own tokenizer; remove tokenizer.path")
        if self.optimizer.lr is None:
            raise ConfigError("start.decoder has no preset to take a rate from; set optimizer.lr")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def recipe_names() -> list[str]:
    folder = resources.files("nmm_serve.train.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def recipe_about(name: str) -> str:
    """What the comment at its top says."""
    text = (resources.files("nmm_serve.train.recipes") / f"{name}.yaml").read_text()
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def read_config_text(path: Path) -> str:
    """Raises ConfigError for a file that is no text."""
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file; expected YAML in UTF-8") from None


def load_config(recipe: str, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """A recipe's name or a YAML file, with `key.sub=value` overrides (values are YAML).

    Raises ConfigError naming the key, the value and what was expected.
    """
    path = Path(recipe)
    if recipe in recipe_names():
        text = (resources.files("nmm_serve.train.recipes") / f"{recipe}.yaml").read_text()
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"config file {path} does not exist")
        text = read_config_text(path)
    else:
        raise ConfigError(unknown_name("recipe", recipe, recipe_names()) + "; or give a .yaml file")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{recipe} must be a mapping of keys to values, not a {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} is not of the form key=value")
        target = values
        *parents, last = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {key}: {parent!r} is not a section")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {value!r} is not valid YAML; quote it, or close its brackets") from None
    return config_from(values)


def config_from(values: dict[str, Any]) -> TrainConfig:
    """The configuration that nested keys describe. Raises ConfigError naming the key."""
    config: TrainConfig = _build(TrainConfig, values, "")
    config.validate()
    return config


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')} must be a section of keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else f" Known here: {', '.join(hints)}"
            raise ConfigError(f"unknown config key {prefix}{key}.{hint}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, name + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{name}: {unknown_name('value', str(value), map(str, args))}")
        return value
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, name)
    if origin is tuple and args[-1] is ...:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return tuple(_convert(args[0], v, name) for v in value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            raise ConfigError(f"{name} must be a list of {len(args)} values, not {value!r}")
        return tuple(_convert(a, v, name) for a, v in zip(args, value, strict=True))
    if origin is list:
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise ConfigError(f"{name} must be a list of sections, not {value!r}")
        return value
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {hint.__name__}, not {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, not {value!r}")
    return value
