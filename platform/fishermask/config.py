"""The settings of one run, as a tree of typed classes that validate their values. Unknown keys are errors."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fishermask.errors import InputError
from fishermask.guard import guarded, one_line, short
from fishermask.paths import check_path, check_word
from fishermask.user_modules import split_file_name

MAX_SHARDS = 10_000
MAX_COUNT = 10**9
"""Maximum number of images, epochs or labels."""
MAX_CORES = 1024
"""Maximum number of CPUs or GPUs of one process."""
MAX_SEED = 2**63 - 1
"""Largest integer that tables and TensorBoard can store."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Word = Annotated[str, AfterValidator(check_word)]
PathText = Annotated[str, AfterValidator(check_path)]


class Config(BaseModel):
    """Base of every settings class. Instances are frozen. Unknown keys and values of another type are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class StrategyParams(Config):
    """Base class of a strategy's parameters: one typed field with a default for each parameter.

    Instances are frozen. Unknown names and values of another type are errors.
    """


def _check_finite(value: Any) -> Any:
    # NaN is unequal to itself, so the settings of such a run would never equal those in its folder.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"should be a finite number, got {value}")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_finite(inner)
    return value


class NamedConfig(Config):
    """A model or a strategy: its name and its parameters. ``margin`` is short for ``{name: margin}``."""

    name: Word
    """A name that ``fishermask models`` or ``fishermask strategies`` lists, or ``./FILE.py:FUNCTION``."""
    params: dict[str, Annotated[Any, AfterValidator(_check_finite)]] = {}
    """Parameters of the model or the strategy, by name."""

    @model_validator(mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Natural(Config):
    """Keep all training images. Classes without training images are removed from the test data too."""

    kind: Literal["none"] = "none"


class Balanced(Config):
    """Keep the same number of training images of every class."""

    kind: Literal["balanced"] = "balanced"
    per_class: Count | None = None
    """Training images to keep of every class; None for the size of the smallest class."""


class Step(Config):
    """Make some classes rare: they keep ``1 / ratio`` times as many training images as the other classes."""

    kind: Literal["step"]
    ratio: float = Field(ge=1)
    """Size of a common class divided by the size of a rare class."""
    rare: Count | None = None
    """Number of rare classes; None for half of the classes."""
    rare_classes: list[int] | None = None
    """The rare classes; None to draw them with the seed."""
    per_class: Count | None = None
    """Training images to keep of a common class; None for the size of the smallest class."""


class LongTail(Config):
    """Let the class sizes fall exponentially from the largest class to the smallest."""

    kind: Literal["long_tail"]
    ratio: float = Field(ge=1)
    """Size of the largest class divided by the size of the smallest."""
    order: list[int] | None = None
    """Classes from the most common to the rarest; None to draw the order with the seed."""
    per_class: Count | None = None
    """Training images to keep of the largest class; None for the size of the data set's smallest class."""


class Counts(Config):
    """Keep a given number of training images of each named class."""

    kind: Literal["counts"]
    counts: dict[int, Count] = Field(min_length=2)
    """Class -> training images to keep. Other classes are removed from the training and the test data."""
    permute: bool = False
    """Whether the seed assigns the counts to the named classes in another order."""


IMBALANCES: dict[str, type[Config]] = {
    "none": Natural,
    "balanced": Balanced,
    "step": Step,
    "long_tail": LongTail,
    "counts": Counts,
}


def _expand_imbalance(value: Any) -> Any:
    """Return ``{"kind": "balanced"}`` for ``"balanced"``, and mappings and configs unchanged."""
    if isinstance(value, str):
        return {"kind": value}
    if not isinstance(value, Mapping | Config):
        raise ValueError(f"expected one of {', '.join(IMBALANCES)}, or {{kind: ...}}, got {short(value)}")
    return value


Imbalance = Annotated[
    Natural | Balanced | Step | LongTail | Counts, Field(discriminator="kind"), BeforeValidator(_expand_imbalance)
]
"""A rule that chooses the pool from the training images. ``balanced`` is short for ``{kind: balanced}``."""


class DataConfig(Config):
    """The images of a run, and how they are decoded and normalized."""

    name: Word = "fashion_mnist_small"
    """Name of a data set; ``fishermask datasets`` lists them."""
    root: PathText | None = None
    """Folder of a torchvision data set."""
    download: bool = False
    """Whether torchvision may download files that are missing in ``root``."""
    train: PathText | None = None
    """Parquet file, folder or glob of the training images (data set ``parquet``)."""
    test: PathText | None = None
    """Parquet file, folder or glob of the test images (data set ``parquet``)."""
    image_column: Word | None = None
    """Parquet column with Hugging Face's image struct; None if there is only one such column."""
    label_column: Word = "label"
    """Parquet column with the integer labels."""
    channels: Literal["keep", "gray", "rgb"] = "keep"
    """Convert images to one channel (gray) or to three (rgb); keep: as many as the image with the lowest id has."""
    image_size: int | None = Field(None, ge=4, le=4096)
    """Resize images to squares with sides of this many pixels."""
    statistics: Literal["auto", "published", "pool"] = "auto"
    """Normalize with published channel statistics or with those of the run's pool; auto: published if there are any."""
    augment: bool | None = None
    """Whether to crop and flip images at random in training; None: only if they have three channels."""


class TrainingConfig(Config):
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: Count = 64
    target_accuracy: float = Field(0.99, gt=0, le=1)
    """Training ends after the first epoch whose training accuracy reaches this value."""
    max_epochs: Count = 100
    """Maximum number of epochs. Each round records whether training ended by this or by the target accuracy."""
    clip: float | None = Field(0.1, gt=0)
    """Gradients are clamped to the range from -clip to clip; None: not clamped."""


class BudgetConfig(Config):
    initial: Count = 100
    """Labels at the start, drawn at random."""
    query: Count = 100
    """Labels added in each round; the last batch is smaller if fewer labels are left."""
    total: Count = 500
    """Labels at the end."""

    @model_validator(mode="after")
    def _check_total(self) -> "BudgetConfig":
        if self.total < self.initial:
            raise ValueError(f"total {self.total} is below initial {self.initial}; raise total or lower initial")
        return self

    @property
    def num_rounds(self) -> int:
        """Number of trained models of a run: one for the initial labels and one after each batch."""
        return 1 - (self.initial - self.total) // self.query


class StrategyConfig(NamedConfig):
    """A query strategy and its parameters."""

    label: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.,=()+-]{0,79}$")
    """Name in tables, pictures and folders; by default the strategy's name, with the parameters that are set."""

    @property
    def short_name(self) -> str:
        """The name, or ``FILE:FUNCTION`` for the user's ``folder/FILE.py:FUNCTION``."""
        if (parts := split_file_name(self.name)) is None:
            return self.name
        return parts[0].stem + (f":{parts[1]}" if parts[1] else "")


class EngineConfig(Config):
    """Number formats of a query. Formats other than float32 may change the batch slightly; ``docs/performance.md``
    has measurements of the changes and of the savings."""

    storage: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which embeddings are stored."""
    scores: Literal["float32", "float64"] = "float32"
    """Type in which scores are stored and computed."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """Type in which layers compute gradients."""
    channels_last: bool = False
    """Whether gradients are computed with the channels-last memory layout."""
    drift: float = Field(1e-3, gt=0)
    """Relative error of a pick's gain, compared with float64, above which all candidates are rescored."""


MIN_AMOUNT = 1e-4
"""Smallest amount of CPUs and GPUs that Ray can reserve."""


class ResourcesConfig(Config):
    """Processors, memory and shards of a run."""

    cpus: float = Field(1, ge=MIN_AMOUNT, le=MAX_CORES)
    """CPUs of the trial, and the number of threads that train and evaluate. In-process shards use them too."""
    gpus: float = Field(0, ge=0, le=MAX_CORES)
    """GPUs of the trial; fractions are allowed."""
    shards: int | Literal["auto"] = 1
    """Number of shards; ``auto`` chooses it by pool size and cluster. The batch does not depend on it."""
    workers: Literal["in_process", "ray"] = "in_process"
    """Whether the shards are in the process of the trial or are Ray actors."""
    cpus_per_shard: float = Field(1, ge=MIN_AMOUNT, le=MAX_CORES)
    """CPUs that each Ray shard reserves. A shard computes on one thread: use more shards to use more cores."""
    gpus_per_shard: float = Field(0, ge=0, le=MAX_CORES)
    """GPUs of each Ray shard; fractions are allowed."""
    memory: float | None = Field(None, gt=0, le=1e6)
    """Memory limit in GB of the trial and of each Ray shard; by default the free memory."""
    restarts: int = Field(3, ge=0, le=1_000_000)
    """How often a run resumes after its process is lost. A sweep uses the maximum over its runs."""

    @field_validator("shards", mode="before")
    @classmethod
    def _check_shards(cls, value: Any) -> Any:
        # Pydantic would report one error for each type of the union.
        if value != "auto" and not (type(value) is int and 1 <= value <= MAX_SHARDS):
            raise ValueError(f"should be auto or a whole number from 1 to {MAX_SHARDS:,}, got {short(value)}")
        return value


SHARDING = {"shards", "workers", "cpus_per_shard", "gpus_per_shard", "memory", "restarts"}
"""Settings of ``resources`` that do not change a run's rounds."""


class ExperimentConfig(Config):
    """All settings of one run."""

    data: DataConfig = DataConfig()
    imbalance: Imbalance = Natural()
    model: NamedConfig = NamedConfig(name="small_cnn")
    """thin_resnet18, small_cnn, mlp, or ``package.module:factory``, called with ``params`` and ``num_classes``."""
    training: TrainingConfig = TrainingConfig()
    budget: BudgetConfig = BudgetConfig()
    strategy: StrategyConfig = StrategyConfig(name="fisher_mask")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Determines every random choice of the run."""
    engine: EngineConfig = EngineConfig()
    resources: ResourcesConfig = ResourcesConfig()


def hash_json(value: Any) -> str:
    """Return a hash, 16 hexadecimal digits, of a tree of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


ConfigT = TypeVar("ConfigT", bound=Config)
MAX_MISTAKES = 20
"""Maximum number of mistakes that the error of one file lists."""


def parse(kind: type[ConfigT], value: Any, where: str = "", owner: str = "it") -> ConfigT:
    """Validate ``value`` as a ``kind``.

    Args:
        where: dotted path of ``value``, or ``FILE:``; messages begin with it.
        owner: name of the model or the strategy whose parameters ``value`` holds.

    Raises:
        InputError: one line for each mistake, with the dotted path, the expected value and the actual value.
    """
    if not isinstance(value, Mapping | str):
        raise InputError(f"{where.rstrip(':') or 'the file'}: expected keys and values, got {short(value)}")
    # The validators of a strategy's parameters are the user's code.
    with guarded(where.rstrip(":") or "the file", "cannot be checked"):
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            mistakes = error.errors()[:MAX_MISTAKES]
        lines = [_describe_mistake(kind, detail, where, owner) for detail in mistakes]
        raise InputError("\n".join(lines))


def _describe_mistake(kind: type[Config], detail: Any, where: str, owner: str) -> str:
    model, path = _resolve(kind, detail["loc"])
    field = ".".join(path)
    if where:
        field = f"{where} {field}".strip(" :") if where.endswith(":") else ".".join([where, *path])
    field = field or "the file"
    match detail["type"]:
        case "extra_forbidden" if not model.model_fields:
            return f"{field}: {owner} has no parameters; remove it"
        case "extra_forbidden":
            text = f"{field}: unknown key; there are {', '.join(model.model_fields)}"
            if model in IMBALANCES.values():
                kind_name = model.model_fields["kind"].annotation
                text += f"; imbalance='{{kind: {get_args(kind_name)[0]}}}' replaces all keys"
            return text
        case "missing":
            return f"{field}: missing"
        case "union_tag_invalid" | "union_tag_not_found":
            value = detail["input"]
            value = value.get("kind", value) if isinstance(value, Mapping) else value
            return f"{field}.kind: expected one of {', '.join(IMBALANCES)}, got {short(value)}"
        case "string_pattern_mismatch":
            expected = "letters, digits and . _ -, a letter or digit first"
            return f"{field}: expected {expected}, got {short(detail['input'])}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{field}: expected keys and values, got {short(detail['input'])}"
        case "value_error":
            return f"{field}: {one_line(detail['msg'].removeprefix('Value error, '))}"
    message = one_line(detail["msg"].removeprefix("Input "))
    return f"{field}: {message}, got {short(detail['input'])}"


def _resolve(kind: type[Config], location: tuple[Any, ...]) -> tuple[type[Config], list[str]]:
    """Return the settings class with the last key of pydantic's ``location``, and the path as the user wrote it."""
    path: list[str] = []
    for part in location:
        if part == "[key]":  # pydantic's mark after a key of the wrong type
            continue
        if path == ["imbalance"] and part in IMBALANCES and kind not in IMBALANCES.values():
            kind = IMBALANCES[part]  # pydantic names the union's member; the user's file has no such key
            continue
        path.append(one_line(str(part), 80) or "''")
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        if isinstance(annotation, type) and issubclass(annotation, Config):
            kind = annotation
    return kind, path
