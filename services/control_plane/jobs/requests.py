"""Defines the request bodies for jobs, and turns them into specs (the complete descriptions of jobs).

Errors name the unknown field, or the wrong value and its limits.
"""

import secrets
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
)

from dpo_core.config import EarlyStop, Lora, Optim, Quantization, TrainConfig
from dpo_core.methods import COMMON, METHODS
from dpo_core.options import OBJECTIVES, Mpo, Objective, RewardObjective
from services.contract import Integrations, JobSpec, Mlflow, Policy, Reading, ReferenceSource, WandbIntegration
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.of_jobs import evaluations_of
from services.control_plane.files.requests import READING, reading
from services.control_plane.http.validation import Text, meant, parse, refuse_unknown
from services.control_plane.jobs.combinations import Asked

# Clients send HYPERPARAMETERS in `method.<type>.hyperparameters`, EXTENSIONS in `x_raydpo`.
HYPERPARAMETERS = set(COMMON)


EXTENSIONS = {
    "dataset",
    "num_workers",
    "priority",
    "max_length",
    "truncation",
    "adapter",
    "precision",
    "quantization",
    "reference",
    "max_tokens_per_pack",
    "activation_checkpointing",
    "sharding",
    "checkpoint_steps",
    "keep_checkpoints",
    "best_metric",
    "early_stop",
    "policy",
    "validation_share",
    "evaluations",
    "tensorboard",
    "mlflow",
    *READING,
} | {field.name for field in fields(Optim)} - HYPERPARAMETERS


Workers = Annotated[int, Field(ge=1, le=1024)]


Priority = Annotated[int, Field(ge=-10, le=10)]


Share = Annotated[float, Field(gt=0, le=0.5)]


Count = Annotated[int, Field(ge=1, strict=True)]
KEPT = 2  # the number of newest checkpoints that a job keeps by default
COMPARING = ("best_metric", "early_stop", "policy")  # fields of x_raydpo that compare evaluated checkpoints


Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


AskedQuantization: Any = Quantization | None
AskedPrecision: Any = Literal["auto", "float32", "bfloat16"]
AskedPolicy: Any = Policy
# The types of objectives (training methods) that can be parts of a weighted sum of objectives.
PARTS = [kind for kind, cls in OBJECTIVES.items() if cls not in (Mpo, *get_args(RewardObjective))]


class Method(BaseModel):
    """The field `method` of a job: the training method and its options, such as `{"type": "dpo", "dpo":
    {"hyperparameters": {…}}}`.

    The value of `type` is the name of the other key.
    """

    model_config = ConfigDict(extra="allow")
    type: str

    def hyperparameters(self) -> dict[str, Any]:
        options = dict(self.__pydantic_extra__ or {})
        refuse_unknown(options, {self.type}, "method")
        method = parse(dict[str, Any], options.get(self.type) or {}, f"method.{self.type}")
        refuse_unknown(method, {"hyperparameters"}, f"method.{self.type}")
        return parse(dict[str, Any], method.get("hyperparameters") or {}, f"method.{self.type}.hyperparameters")


class Reference(BaseModel):
    """The field `x_raydpo.reference` of a job: the reference model, and `source`, which says who computes its
    log-probabilities."""

    model_config = ConfigDict(extra="forbid")
    source: ReferenceSource = "auto"
    model: Text | None = None  # a base model's name or an `ft:` id; None: the model that the job starts from


class CreateJob(BaseModel):
    """The JSON body of POST /v1/fine_tuning/jobs, which creates a job: the model, the data, the training method and all
    other options.
    """

    model_config = ConfigDict(extra="forbid")
    model: Text
    training_file: Text | None = None  # optional if x_raydpo.dataset is given, whose URI it may repeat
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: dict[str, Any] | None = None  # OpenAI's older place for the hyperparameters of `supervised`
    suffix: Suffix | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    x_raydpo: dict[str, Any] | None = None
    integrations: Annotated[tuple[WandbIntegration, ...], Field(max_length=5)] | None = None

    def spec(self) -> JobSpec:
        """Returns the complete description of the job that the body asks for. Raises InvalidRequest, which names the
        invalid field."""
        if self.validation_file and self.validation_file == self.training_file:
            message = (
                f"validation_file and training_file are both {self.training_file}; "
                "send a validation file with other rows."
            )
            raise InvalidRequest(message, param="validation_file", code="invalid_validation_file")
        kind = self.method.type if self.method else "supervised"
        if kind not in METHODS:
            what = f"method.type '{kind}' is not supported.{meant(kind, METHODS)}"
            message = f"{what} It must be one of {', '.join(METHODS)}."
            raise InvalidRequest(message, param="method.type", code="unsupported_value")
        if self.method and self.hyperparameters:
            message = "hyperparameters is the older form of method.<type>.hyperparameters; send only one of the two."
            raise InvalidRequest(message, param="hyperparameters")
        given = self.method.hyperparameters() if self.method else self.hyperparameters or {}
        where = f"method.{kind}.hyperparameters" if self.method else "hyperparameters"
        extension = self.x_raydpo or {}
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        config = train_config(kind, given, where, extension, seed)
        workers = parse(Workers, extension.get("num_workers", 1), "x_raydpo.num_workers")
        reference = parse(Reference, extension.get("reference", {}), "x_raydpo.reference")
        priority = parse(Priority, extension.get("priority", 0), "x_raydpo.priority")
        keep = extension.get("keep_checkpoints", KEPT)
        policy: Any = parse(AskedPolicy, extension.get("policy", "last"), "x_raydpo.policy")
        how = self._reading()
        named = self.model_dump(include={"model", "validation_file", "suffix", "metadata"})
        return JobSpec(
            **named,
            training_file=self._training_file(),
            config=config,
            keep_checkpoints=keep if keep == "all" else parse(Count, keep, "x_raydpo.keep_checkpoints"),
            policy=policy,
            num_workers=workers,
            priority=priority,
            reference_source=reference.source,
            reference_model=reference.model,
            validation_share=self._validation_share(),
            invalid_rows=how.invalid_rows,
            columns=how.columns,
            integrations=self._integrations(),
            evaluations=evaluations_of(extension.get("evaluations"), self.model),
        )

    def asked(self) -> Asked:
        """Returns the values that the body has for the adapter, the precision, the quantization and the maximum length.

        The value `auto` means that the service chooses. The result also holds the names of those fields of the body
        that compare checkpoints, such as `best_metric`. Raises InvalidRequest, which names the invalid field.
        """
        extension = self.x_raydpo or {}
        precision: Any = parse(AskedPrecision, extension.get("precision", "auto"), "x_raydpo.precision")
        quantization: Any = parse(AskedQuantization, extension.get("quantization"), "x_raydpo.quantization")
        comparing = frozenset(name for name in COMPARING if extension.get(name) not in (None, "auto", "last"))
        length = extension.get("max_length", "auto")
        return Asked(_adapter(extension.get("adapter", "auto")), precision, quantization, length, comparing)

    def _integrations(self) -> Integrations:
        extension = self.x_raydpo or {}
        mlflow = extension.get("mlflow")
        return Integrations(
            wandb=self.integrations or (),
            mlflow=None if mlflow is None else parse(Mlflow, mlflow, "x_raydpo.mlflow"),
            tensorboard=parse(StrictBool, extension.get("tensorboard", False), "x_raydpo.tensorboard"),
        )

    def _validation_share(self) -> float:
        share = (self.x_raydpo or {}).get("validation_share")
        if share is None:
            return 0.0
        return parse(Share, share, "x_raydpo.validation_share")

    def _reading(self) -> Reading:
        extension = self.x_raydpo or {}
        if extension.get("dataset") is None and (given := READING.intersection(extension)):
            where = f"x_raydpo.{min(given)}"
            message = (
                f"{where} can be given for a job only with x_raydpo.dataset; "
                "for an uploaded file give it with the upload."
            )
            raise InvalidRequest(message, param=where)
        return reading(extension)

    def _training_file(self) -> str:
        """Returns the id of the uploaded training file, or the URI of the dataset, that the body names.

        Raises InvalidRequest if the body names neither, or two different ones.
        """
        if (given := (self.x_raydpo or {}).get("dataset")) is not None:
            uri = parse(Text, given, "x_raydpo.dataset")
            if "://" not in uri:
                message = (
                    f"x_raydpo.dataset is '{uri:.80}', which is not a URI; "
                    "give the id of an uploaded file as training_file."
                )
                raise InvalidRequest(message, param="x_raydpo.dataset")
            if self.training_file not in (None, uri):
                message = (
                    "training_file and x_raydpo.dataset name different data; "
                    "leave one out, or send the same URI in both."
                )
                raise InvalidRequest(message, param="training_file")
            return uri
        if self.training_file is None:
            message = "Missing required parameter: 'training_file'."
            raise InvalidRequest(message, param="training_file", code="missing_required_parameter")
        if "://" in self.training_file:
            message = f"training_file is the URI {self.training_file:.80}; send the URI in x_raydpo.dataset as well."
            raise InvalidRequest(message, param="training_file")
        return self.training_file


def _adapter(given: object) -> Lora | Literal["none", "auto"]:
    """Parses `given`, the field `x_raydpo.adapter` of a job, which is `{"type": "lora", …}`, "none" or "auto".

    Raises InvalidRequest for any other value.
    """
    where = "x_raydpo.adapter"
    if given in ("none", "auto"):
        return given
    options = parse(dict[str, Any], given, where)
    if (kind := options.pop("type", "lora")) != "lora":
        message = (
            f"{where}.type is {kind!r:.80}, but only 'lora' is supported; send 'none' as {where} to train all weights."
        )
        raise InvalidRequest(message, param=f"{where}.type", code="unsupported_value")
    refuse_unknown(options, {field.name for field in fields(Lora)}, where)
    return parse(Lora, options, where)


def is_local(file: str) -> bool:
    """Whether `file` is the name of a file on the client's machine: neither the id of an uploaded file nor a URI."""
    return not file.startswith("file-") and "://" not in file


class ValidateJob(CreateJob):
    """The JSON body of POST /v1/x/jobs/validate, which checks a job without creating it.

    The fields for files may name files on the client's machine, which the client uploads once the body is valid.
    """

    def _reading(self) -> Reading:
        if is_local(self.training_file or ""):
            return reading(self.x_raydpo or {})
        return super()._reading()


def train_config(
    kind: str, hyperparameters: Mapping[str, Any], where: str, extension: Mapping[str, Any], seed: int
) -> TrainConfig:
    """Returns the training config that a request describes, with the defaults of options that the request leaves out.

    `kind` is the training method, `where` the path of its hyperparameters for error messages, and `extension` the field
    `x_raydpo`. `seed` is the seed of the job. The value `auto` means the same as leaving an option out. Raises
    InvalidRequest, which names the invalid field.
    """
    objective_options = {field.name for field in fields(OBJECTIVES[kind])} - {"type"}
    refuse_unknown(hyperparameters, objective_options | HYPERPARAMETERS, where)
    refuse_unknown(extension, EXTENSIONS, "x_raydpo")
    given = {key: value for key, value in {**hyperparameters, **extension}.items() if value != "auto"}
    paths = {key: f"{where}.{key}" for key in hyperparameters} | {key: f"x_raydpo.{key}" for key in extension}

    def part(names: set[str]) -> dict[str, Any]:
        return {key: value for key, value in given.items() if key in names}

    of_optim = {field.name for field in fields(Optim)}
    if "objectives" in given:
        given["objectives"] = _parts(given["objectives"], f"{where}.objectives")
    if given.get("early_stop") is not None:
        given["early_stop"] = parse(EarlyStop, given["early_stop"], paths["early_stop"])
    objective = parse(OBJECTIVES[kind], part(objective_options), where, paths)
    optim = parse(Optim, part(of_optim), where, paths)
    rest = part({field.name for field in fields(TrainConfig)} - {"objective", "optim", "seed"})
    return parse(TrainConfig, {"objective": objective, "optim": optim, "seed": seed, **rest}, where, paths)


def _parts(given: object, where: str) -> list[Objective]:
    """Parses `given`, a list of objectives (training methods) whose weighted sum a job minimizes. Each objective has
    its name in `type`.

    `where` is the path of the list in the request, for error messages. Raises InvalidRequest for an objective that
    cannot be part of a sum.
    """
    parts = parse(list[dict[str, Any]], given, where)
    for number, part in enumerate(parts):
        if (kind := part.get("type")) not in PARTS:
            known = ", ".join(PARTS)
            message = f"{where}.{number}.type is {kind!r:.80}; it must be one of {known}."
            raise InvalidRequest(message, param=f"{where}.{number}.type", code="unsupported_value")
    return [parse(OBJECTIVES[part["type"]], part, f"{where}.{number}") for number, part in enumerate(parts)]
