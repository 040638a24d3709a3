"""What a request body may hold. Unknown fields are refused by name, values by their limits."""

import functools
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from dpo_core.config import Optim, TrainConfig, Truncation
from dpo_core.data.formats import ROLES
from dpo_core.options import OBJECTIVES, InvalidOption, Objective, RewardObjective
from services.contract import Integrations, InvalidRows, JobSpec, Mlflow, Reading, ReferenceSource, WandbIntegration
from services.control_plane.auth.keys import Scope
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.files.files import LONGEST_LIFE, LONGEST_NAME, SHORTEST_LIFE, TRAINING
from services.control_plane.files.uploads import MOST_PARTS

# Where each option of a training run stands in a request; those of the objective join the first.
HYPERPARAMETERS = {"n_epochs", "batch_size", "learning_rate", "learning_rate_multiplier"}
READING = {"columns", "invalid_rows", "max_invalid_share"}
EXTENSIONS = {
    "dataset",
    "num_workers",
    "priority",
    "max_length",
    "truncation",
    "reference",
    "max_tokens_per_pack",
    "activation_checkpointing",
    "sharding",
    "checkpoint_steps",
    "validation_share",
    "tensorboard",
    "mlflow",
    *READING,
} | {field.name for field in fields(Optim)} - HYPERPARAMETERS

Workers = Annotated[int, Field(ge=1, le=1024)]
Priority = Annotated[int, Field(ge=-10, le=10)]
Columns = dict[str, Annotated[str, StringConstraints(min_length=1, max_length=256)]]
Share = Annotated[float, Field(gt=0, le=0.5)]
Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]
Limit = Annotated[int, Field(ge=0, lt=2**31)]
Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


METHODS = [kind for kind, cls in OBJECTIVES.items() if cls not in get_args(RewardObjective)]  # these are not served


class Method(BaseModel):
    """`{"type": "dpo", "dpo": {"hyperparameters": {…}}}`: the second key is named by the first."""

    model_config = ConfigDict(extra="allow")
    type: str

    def hyperparameters(self) -> dict[str, Any]:
        options = dict(self.__pydantic_extra__ or {})
        _refuse_unknown(options, {self.type}, "method")
        own = _parse(dict[str, Any], options.get(self.type) or {}, f"method.{self.type}")
        _refuse_unknown(own, {"hyperparameters"}, f"method.{self.type}")
        return _parse(dict[str, Any], own.get("hyperparameters") or {}, f"method.{self.type}.hyperparameters")


class Reference(BaseModel):
    """`x_raydpo.reference`."""

    model_config = ConfigDict(extra="forbid")
    source: ReferenceSource = "auto"


class CreateJob(BaseModel):
    """Body of POST /fine_tuning/jobs."""

    model_config = ConfigDict(extra="forbid")
    model: Text
    training_file: Text | None = None  # may be left out where x_raydpo.dataset says it, or repeat that
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = None  # the older place for those of `supervised`
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    x_raydpo: dict[str, Any] | None = None
    integrations: Annotated[tuple[WandbIntegration, ...], Field(max_length=5)] | None = None

    def spec(self) -> JobSpec:
        """The job asked for, every value checked. Raises InvalidRequest naming the field."""
        if self.validation_file and self.validation_file == self.training_file:
            message = f"validation_file is the training file, {self.training_file}; send one with other rows."
            raise InvalidRequest(message, param="validation_file", code="invalid_validation_file")
        kind = self.method.type if self.method else "supervised"
        if kind not in METHODS:
            message = f"method.type '{kind}' is not supported; it must be one of {', '.join(METHODS)}."
            raise InvalidRequest(message, param="method.type", code="unsupported_value")
        if self.method and self.hyperparameters:
            message = "hyperparameters is the older spelling of method.<type>.hyperparameters; send one of them."
            raise InvalidRequest(message, param="hyperparameters")
        given = self.method.hyperparameters() if self.method else self.hyperparameters or {}
        where = f"method.{kind}.hyperparameters" if self.method else "hyperparameters"
        extension = self.x_raydpo or {}
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        config = train_config(kind, given, where, extension, seed)
        workers = _parse(Workers, extension.get("num_workers", 1), "x_raydpo.num_workers")
        reference = _parse(Reference, extension.get("reference", {}), "x_raydpo.reference")
        priority = _parse(Priority, extension.get("priority", 0), "x_raydpo.priority")
        how = self._reading()
        named = self.model_dump(include={"model", "validation_file", "suffix", "metadata"})
        return JobSpec(
            **named,
            training_file=self._training_file(),
            config=config,
            num_workers=workers,
            priority=priority,
            reference_source=reference.source,
            validation_share=self._validation_share(),
            invalid_rows=how.invalid_rows,
            columns=how.columns,
            integrations=self._integrations(),
        )

    def _integrations(self) -> Integrations:
        extension = self.x_raydpo or {}
        mlflow = extension.get("mlflow")
        return Integrations(
            wandb=self.integrations or (),
            mlflow=None if mlflow is None else _parse(Mlflow, mlflow, "x_raydpo.mlflow"),
            tensorboard=_parse(StrictBool, extension.get("tensorboard", False), "x_raydpo.tensorboard"),
        )

    def _validation_share(self) -> float:
        share = (self.x_raydpo or {}).get("validation_share")
        if share is None:
            return 0.0
        where = "x_raydpo.validation_share"
        if self.validation_file:
            raise InvalidRequest("validation_share and validation_file exclude each other; send one.", param=where)
        return _parse(Share, share, where)

    def _reading(self) -> Reading:
        extension = self.x_raydpo or {}
        if extension.get("dataset") is None and (given := READING.intersection(extension)):
            where = f"x_raydpo.{min(given)}"
            message = f"{where} is said when a file is uploaded, in x_raydpo there; here it is for x_raydpo.dataset."
            raise InvalidRequest(message, param=where)
        return reading(extension)

    def _training_file(self) -> str:
        """The id of an uploaded file, or a URI."""
        if (given := (self.x_raydpo or {}).get("dataset")) is not None:
            uri = _parse(Text, given, "x_raydpo.dataset")
            if "://" not in uri:
                message = f"x_raydpo.dataset is '{uri:.80}', which is no URI; an uploaded file goes into training_file."
                raise InvalidRequest(message, param="x_raydpo.dataset")
            if self.training_file not in (None, uri):
                message = "training_file and x_raydpo.dataset differ; leave one out, or send the URI in both."
                raise InvalidRequest(message, param="training_file")
            return uri
        if self.training_file is None:
            message = "Missing required parameter: 'training_file'."
            raise InvalidRequest(message, param="training_file", code="missing_required_parameter")
        if "://" in self.training_file:
            message = "training_file is a URI; send it in x_raydpo.dataset as well."
            raise InvalidRequest(message, param="training_file")
        return self.training_file


def train_config(
    kind: str, hyperparameters: Mapping[str, Any], where: str, extension: Mapping[str, Any], seed: int
) -> TrainConfig:
    """The run that a request describes; `auto` means the same as leaving the option out."""
    objective_options = {field.name for field in fields(OBJECTIVES[kind])} - {"type"}
    _refuse_unknown(hyperparameters, objective_options | HYPERPARAMETERS, where)
    _refuse_unknown(extension, EXTENSIONS, "x_raydpo")
    given = {key: value for key, value in {**hyperparameters, **extension}.items() if value != "auto"}
    paths = {key: f"{where}.{key}" for key in hyperparameters} | {key: f"x_raydpo.{key}" for key in extension}

    def part(names: set[str]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key in names}

    of_optim = {field.name for field in fields(Optim)}
    if "objectives" in given:
        given["objectives"] = _parts(given["objectives"], f"{where}.objectives")
    objective = _parse(OBJECTIVES[kind], part(objective_options), where, paths)
    optim = _parse(Optim, part(of_optim), where, paths)
    rest = part({field.name for field in fields(TrainConfig)} - {"objective", "optim", "seed"})
    return _parse(TrainConfig, {"objective": objective, "optim": optim, "seed": seed, **rest}, where, paths)


def _parts(given: object, where: str) -> list[Objective]:
    """The objectives of a sum, each by its type."""
    parts = _parse(list[dict[str, Any]], given, where)
    for number, part in enumerate(parts):
        if (kind := part.get("type")) not in METHODS or kind == "mpo":
            known = ", ".join(name for name in METHODS if name != "mpo")
            message = f"{where}.{number}.type is {kind!r:.80}; it must be one of {known}."
            raise InvalidRequest(message, param=f"{where}.{number}.type", code="unsupported_value")
    return [_parse(OBJECTIVES[part["type"]], part, f"{where}.{number}") for number, part in enumerate(parts)]


def reading(extension: Mapping[str, Any]) -> Reading:
    """What x_raydpo says of a file's rows. Raises InvalidRequest naming the field."""
    return Reading(columns=_columns(extension.get("columns", {})), invalid_rows=_invalid_rows(extension))


def _columns(given: object) -> dict[str, str]:
    where = "x_raydpo.columns"
    columns: dict[str, str] = _parse(Columns, given, where)
    if unknown := sorted(columns.keys() - ROLES):
        message = f"{where} names '{unknown[0]:.80}', which is no role; the roles are {', '.join(sorted(ROLES))}."
        raise InvalidRequest(message, param=f"{where}.{unknown[0]:.80}", code="unknown_parameter")
    return columns


def _invalid_rows(extension: Mapping[str, Any]) -> InvalidRows:
    paths = {"how": "x_raydpo.invalid_rows", "max_share": "x_raydpo.max_invalid_share"}
    given = {"how": extension.get("invalid_rows"), "max_share": extension.get("max_invalid_share")}
    given = {name: value for name, value in given.items() if value is not None}
    found: InvalidRows = _parse(InvalidRows, given, "x_raydpo", paths)
    if "max_share" in given and found.how == "refuse":
        message = f"{paths['max_share']} is for invalid_rows 'drop'; send that as well."
        raise InvalidRequest(message, param=paths["max_share"])
    return found


class CheckDataset(BaseModel):
    """Body of POST /x/datasets/check."""

    model_config = ConfigDict(extra="forbid")
    training_file: Text
    model: Text | None = None
    max_length: int | None = None
    truncation: Truncation | None = None

    def config(self) -> TrainConfig:
        """What a job with these options would use. Raises InvalidRequest naming the field."""
        given = self.model_dump(include={"max_length", "truncation"}, exclude_none=True)
        if given and self.model is None:
            (name, *_) = given
            message = f"{name} is of tokens, and only a model tells these; send model too."
            raise InvalidRequest(message, param=name)
        return _parse(TrainConfig, given, "", {name: name for name in given})


class ExpiresAfter(BaseModel):
    """How long a file lives. In forms its parts are `expires_after[anchor]` and `expires_after[seconds]`."""

    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_LIFE, le=LONGEST_LIFE)]


class CreateFile(BaseModel):
    """The fields of POST /files beside the file itself."""

    model_config = ConfigDict(extra="forbid")
    purpose: Text
    expires_after: ExpiresAfter | None = None
    x_raydpo: dict[str, Any] | None = None

    @field_validator("purpose")
    @classmethod
    def _check_purpose(cls, purpose: str) -> str:
        if purpose != TRAINING:
            message = f"purpose '{purpose:.80}' is not supported; it must be '{TRAINING}'."
            raise InvalidRequest(message, param="purpose", code="unsupported_value")
        return purpose

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        return _parse(cls, fields, "")

    @property
    def life_seconds(self) -> int | None:
        return self.expires_after.seconds if self.expires_after else None

    def reading(self) -> Reading:
        """Raises InvalidRequest naming the field."""
        extension = self.x_raydpo or {}
        _refuse_unknown(extension, READING, "x_raydpo")
        return reading(extension)


class CreateUpload(CreateFile):
    """Body of POST /uploads."""

    filename: Text
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, StringConstraints(max_length=LONGEST_NAME, pattern=r"^[ -~]+$")]


class CompleteUpload(BaseModel):
    """Body of POST /uploads/{id}/complete. The parts in their order."""

    model_config = ConfigDict(extra="forbid")
    part_ids: Annotated[list[Text], Field(min_length=1, max_length=MOST_PARTS)]
    md5: Text | None = None


class CreateKey(BaseModel):
    """Body of POST /x/keys."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    project_id: Text | None = None  # the caller's own
    scopes: Annotated[list[Scope], Field(min_length=1)] = ["read", "write", "inference"]
    requests_per_minute: Annotated[int, Field(gt=0, le=1_000_000)] | None = None
    expires_at: Annotated[int, Field(lt=2**33)] | None = None  # Unix seconds

    @field_validator("expires_at")
    @classmethod
    def _is_to_come(cls, value: int | None) -> int | None:
        if value is not None and value <= time.time():
            raise ValueError(f"{value} is past; it must be Unix seconds to come.")
        return value


class UpdateProject(BaseModel):
    """Body of POST /x/projects/{id}: what is left out stays."""

    model_config = ConfigDict(extra="forbid")
    name: Name = ""
    weight: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    max_running_jobs: Limit | None = None
    max_queued_jobs: Limit | None = None
    max_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_accelerator_hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class CreateProject(UpdateProject):
    """Body of POST /x/projects."""

    name: Name


class InferenceBody(BaseModel):
    """The part of an inference body that the control plane reads; the rest is the server's to judge."""

    model_config = ConfigDict(extra="allow")
    model: Text
    stream: bool | None = False


# --- refusals ------------------------------------------------------------------------------

Parsed = TypeVar("Parsed")


@functools.cache  # to make one takes milliseconds
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _parse(kind: type[Parsed], value: Any, where: str, paths: Mapping[str, str] | None = None) -> Parsed:
    try:
        parsed: Parsed = _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # a type is hashable
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(first, first["loc"], where, paths) from None
    return parsed


def refused(
    error: Mapping[str, Any], location: Sequence[str | int], where: str = "", paths: Mapping[str, str] | None = None
) -> InvalidRequest:
    """A pydantic error as OpenAI words it: the dotted path of the field, a code, and what is wrong."""
    cause = error.get("ctx", {}).get("error")
    path = [cause.field] if isinstance(cause, InvalidOption) else [str(part) for part in location]
    param = (paths or {}).get(path[-1]) if path else None
    param = param or ".".join([*([where] if where else []), *path])
    if error["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if error["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reason = str(cause) if cause else f"{error['msg']}, but it is {error['input']!r:.80}."
    return InvalidRequest(f"Invalid value for '{param}': {reason}", param=param)


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise InvalidRequest(
                f"Unknown parameter: '{where}.{name}'. Known here: {', '.join(sorted(known))}.",
                param=f"{where}.{name}",
                code="unknown_parameter",
            )
