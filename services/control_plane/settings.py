"""Defines the control plane's settings, and reads them from the command line, the environment and the settings file."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from dpo_core.config import Lora
from services.control_plane.core.log_setup import LogFormat
from services.deployment_settings import DeploymentSettings, Dtype
from services.uri import check_prefix


def _model_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(
            f"the model name {name!r} is not valid; write 1 to 64 letters, digits, dots, dashes or underscores, "
            "and begin with a letter or digit"
        )
    return name


def _without_key(place: str) -> str:
    """Returns the storage URI `place`. Raises ValueError if the URI holds a password.

    A password would be exposed, because Ray's list of jobs and logs show the URI.
    """
    if "@" in urlsplit(place).netloc:
        raise ValueError(
            "the URI contains credentials before its '@'; remove them, and set them in the environment, for "
            "example as AWS_ACCESS_KEY_ID"
        )
    return place


ModelName = Annotated[str, AfterValidator(_model_name)]


def _issuer(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError("the URL has no host, or a port that is not a number; write it as https://host/path")
    return url


def _webhook_prefix(prefix: str) -> str:
    if not re.match("https://|http://[^/]", prefix):
        raise ValueError(f"{prefix!r} must begin with https://, or with http:// and a host")
    return check_prefix(prefix)


class BaseModel(pydantic.BaseModel):
    """A base model, which clients can query and from which jobs can start: where it is (`source`), the adapter that
    jobs train on it by default, and how it is served (`deployment`).
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    source: Annotated[str, AfterValidator(_without_key)]  # local folder, storage URI or hub id
    adapter: Lora | Literal["none"] = Lora()  # default of jobs that do not choose an adapter; none: all weights
    deployment: DeploymentSettings = DeploymentSettings()  # how it is served; models trained from it inherit most


def _api_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url):
        raise ValueError(
            "the URL must be the base URL of an OpenAI-compatible API, such as https://host/v1, without credentials "
            "and query; put a key into api_key"
        )
    return _issuer(url).rstrip("/").removesuffix("/chat/completions")


def _header_key(key: SecretStr) -> SecretStr:
    if not re.fullmatch("[!-~]+", key.get_secret_value()):
        raise ValueError("the key must be letters, digits and signs of ASCII, without spaces and line ends")
    return key


class JudgeAddress(pydantic.BaseModel):
    """A judge of evaluations outside of the service: the model `model` of the OpenAI-compatible API with the base URL
    `url`. The service sends `api_key` as a bearer token."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    url: Annotated[str, AfterValidator(_api_url)]
    model: str = Field(min_length=1)
    api_key: Annotated[SecretStr, AfterValidator(_header_key)] | None = None


Scope = Literal["read", "write", "inference", "admin"]  # a kind of permission


class Role(pydantic.BaseModel):
    """A role of people and programs that sign in with an OpenID Connect token. The setting `oidc_roles_claim` names a
    claim of tokens; a token has the role if this claim contains `value`. The role gives access to the project `project`
    with the scopes (permissions) `scopes`."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    value: str
    project: str
    scopes: list[Scope] = Field(min_length=1)


class DeploymentLimits(pydantic.BaseModel):
    """The limits on how a project may serve the models that it trained: replicas, GPUs, and whether models may be kept
    loaded.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    max_replicas: int = Field(default=1, ge=1)
    max_gpus: float = Field(default=1, ge=0)
    pinned: bool = False


def _base_model(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


class Settings(BaseSettings):
    """The control plane's settings. They come from environment variables, such as `RAYDPO_STORAGE_URL` and
    `DATABASE_URL`, and from a TOML file.

    The environment overrides the file. Unknown keys in the file are refused.
    """

    model_config = SettingsConfigDict(
        env_prefix="RAYDPO_", extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True
    )

    home: Path = Field(
        default=Path("~/.raydpo"),
        description="Folder in which `raydpo up` keeps all its files, and which may hold the settings file "
        "`raydpo.toml`.",
    )
    settings_file: Path | None = Field(
        default=None, description="Path of the settings file, in TOML. If unset: `raydpo.toml` in `home`."
    )
    database_url: str = Field(
        validation_alias="DATABASE_URL",
        description="URL of the PostgreSQL database, `postgresql://user:password@host/name`. If unset, `raydpo "
        "up` starts a database.",
    )
    database_direct_url: str | None = Field(
        default=None,
        validation_alias="DATABASE_DIRECT_URL",
        description="URL that leads to the PostgreSQL server itself. Needed if `database_url` leads to a "
        "PgBouncer in transaction mode.",
    )
    database_connections: int = Field(
        default=30,
        gt=4,
        description="Maximum number of database connections of one process of the service, besides one connection that "
        "listens for notifications. While the service joins the parts of an upload, the upload holds one connection.",
    )
    storage_url: Annotated[str, AfterValidator(_without_key)] = Field(
        description="Folder in which the service stores uploaded files, checkpoints, logs and trained models: a "
        "`file://`, `s3://` or `gs://` URI. If unset, `raydpo up` uses the folder `storage` in `home`."
    )
    api_key: SecretStr = Field(
        description="First API key, which has admin rights in the default project. If unset, `raydpo up` "
        "creates a key and keeps it in the file `api.key` in `home`."
    )
    advertised_url: str = Field(
        description="URL at which the training processes of jobs reach this service from inside the cluster. If unset, "
        "`raydpo up` uses the address that it listens on."
    )
    ray_url: str = Field(
        description="URL of the Ray cluster's dashboard, such as `http://host:8265`. `raydpo up` sets it to the "
        "value of `--ray-address`, or to the dashboard of the cluster that it starts."
    )
    ray_token: SecretStr | None = Field(
        default=None,
        description="Token with which the service logs in to the Ray cluster. `raydpo up` sets it if it starts "
        "the cluster itself.",
    )
    serve_url: str | None = Field(
        default=None,
        description="URL of Ray Serve's HTTP proxy, such as `http://host:8000`. If unset, the service takes the host "
        "of `ray_url` and the port that Ray Serve reports.",
    )

    log_format: LogFormat = Field(
        default="text",
        description="Format of the service's logs: `text` writes sentences to the file `raydpo.log` in `home`, "
        "`json` writes one JSON object per line to standard error.",
    )
    oidc_issuer: Annotated[str, AfterValidator(_issuer)] | None = Field(
        default=None,
        pattern=r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])",
        description="URL of the OpenID Connect issuer whose tokens are accepted in place of API keys. If unset, "
        "only API keys are accepted.",
    )
    oidc_audience: str | None = Field(
        default=None,
        min_length=1,
        description="Audience that OpenID Connect tokens of programs must name. `oidc_issuer` needs this setting, "
        "`oidc_client_id` or both.",
    )
    oidc_client_id: str | None = Field(
        default=None,
        min_length=1,
        description="Id of the web page as a client of `oidc_issuer`. If set, people can sign in to the page at the "
        "issuer, and the issuer's ID tokens for this client are accepted. If unset, people sign in with an API key.",
    )
    oidc_client_secret: SecretStr | None = Field(
        default=None,
        description="Client secret of `oidc_client_id`, if the issuer wants one. Only the service sends the secret, "
        "never the page.",
    )
    oidc_requested_scopes: str = Field(
        default="openid profile",
        pattern=r"(^| )openid( |$)",
        description="OAuth scopes that the page asks the issuer for, with spaces between them. Some issuers put a "
        "person's groups into the token only if the scope `groups` is asked for, and renew a sign-in only with the "
        "scope `offline_access`.",
    )
    oidc_project_claim: str = Field(
        default="project", description="Name of the claim that holds the project's id in an OpenID Connect token."
    )
    oidc_scopes_claim: str = Field(
        default="scope",
        description="Name of the claim that holds the scopes in an OpenID Connect token: a list of strings, or "
        "one string with spaces between the scopes.",
    )
    oidc_roles_claim: str = Field(
        default="groups",
        description="Name of the claim in an OpenID Connect token, such as `groups`, whose values `oidc_roles` maps to "
        "permissions. The claim is a list of strings, or one string.",
    )
    oidc_roles: list[Role] = Field(
        default_factory=list,
        description="Permissions of people and programs with an OpenID Connect token: a list of roles such as `{value "
        '= "ml-team", project = "proj_default", scopes = ["read"]}`. A token has a role if the claim that '
        "`oidc_roles_claim` names contains the role's `value`. The first role that a token has decides the project; "
        "its later roles with the same project add their scopes. If `oidc_roles` is set, `oidc_project_claim` and "
        "`oidc_scopes_claim` are not read.",
    )
    requests_per_minute: int | None = Field(
        default=None,
        gt=0,
        description="Maximum number of requests per minute with an API key that has no limit of its own. Each "
        "replica of the service counts separately. If unset, there is no limit.",
    )

    tokens_per_minute: int | None = Field(
        default=None,
        gt=0,
        description="Maximum number of tokens per minute, in prompts and completions together, with an API key that "
        "has no limit of its own. Each replica of the service counts separately. If unset, there is no limit.",
    )
    requests_at_once: int = Field(
        default=200,
        gt=0,
        description="Maximum number of requests for completions or rewards that one process of the service answers at "
        "the same time for one API key. Open streams, and requests that wait until a model is loaded, count.",
    )

    models: dict[ModelName, Annotated[BaseModel, BeforeValidator(_base_model)]] = Field(
        default_factory=dict,
        description="Base models by name. A value is the model's source: a local folder, a storage URI without "
        "credentials in it, or an id on the Hugging Face hub. Or a value is a table with `source`, `adapter` (the "
        "adapter that jobs train if they do not choose one) and `deployment` (how the model is served, "
        "[fields](../use/deployments.md#settings)).",
    )
    judges: dict[ModelName, JudgeAddress] = Field(
        default_factory=dict,
        description="[Judges of evaluations](../use/evaluations.md#judges-at-an-address) outside of the service, by "
        "name. A value is a table with `url` (base URL of an OpenAI-compatible API, such as `https://host/v1`), "
        "`model` (the model's name there) and, if the API needs one, `api_key`. A name must not be that of a base "
        "model. The variable adds to the file, so the keys can be in the variable alone.",
    )
    organization: str = Field(
        default="raydpo",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Name of the organization: the third part of the names of trained policies, "
        "`ft:base:organization:…`.",
    )

    dataset_uris: list[Annotated[str, AfterValidator(check_prefix)]] = Field(
        default=["https://", "hf://datasets/"],
        description="Prefixes of the URIs from which jobs may read training data. The service reads `s3://`, `gs://` "
        "and `file://` URIs with its own credentials, not with those of the user.",
    )
    webhook_urls: list[Annotated[str, AfterValidator(_webhook_prefix)]] = Field(
        default=["https://"], description="Prefixes of the URLs to which webhooks may be sent."
    )
    max_upload_bytes: int = Field(
        default=512 * 2**20, gt=0, description="Largest file that can be uploaded in one request, in bytes."
    )
    max_file_bytes: int = Field(
        default=8 * 2**30, gt=0, description="Largest file that can be uploaded in parts, in bytes."
    )
    max_json_bytes: int = Field(
        default=4 * 2**20, gt=0, description="Largest body of a request that uploads no file, in bytes."
    )
    max_spool_bytes: int = Field(
        default=4 * 2**30,
        gt=0,
        description="Maximum disk space in the folder `TMPDIR` for uploads that are being received, in bytes. While "
        "only one upload is received, the upload may take more.",
    )
    max_requests: int = Field(
        default=1000,
        gt=0,
        description="Maximum number of requests that one process answers at the same time. Open streams of a job's "
        "events, and requests for `/metrics`, `/healthz` and `/readyz`, do not count. Reports from training processes "
        "have a limit of their own, of the same size.",
    )
    stall_seconds: float = Field(
        default=30,
        gt=0,
        description="Seconds for which a client may neither send the rest of its request nor read the answer; then the "
        "service closes the connection.",
    )
    max_running_jobs: int = Field(
        default=1, gt=0, description="Maximum number of jobs that run at the same time; further jobs wait in the queue."
    )
    max_running_checks: int = Field(
        default=2,
        gt=0,
        description="Maximum number of Ray jobs of one project that check files with a model's tokenizer or merge "
        "adapters for downloads, at the same time.",
    )
    max_running_evaluations: int = Field(
        default=2,
        gt=0,
        description="Maximum number of evaluations of one project that run at the same time; further evaluations wait.",
    )
    max_cluster: dict[Literal["CPU", "GPU"], float] = Field(
        default_factory=dict,
        description="Largest number of CPUs and GPUs to which an autoscaling cluster can grow, such as `{CPU = 64, GPU "
        "= 8}`. If unset, jobs, and models on GPUs, wait until the existing nodes have enough free CPUs and GPUs.",
    )
    max_attempts: int = Field(
        default=5,
        gt=0,
        description="A job fails after this many attempts (its runs on Ray) in a row have died without writing a new "
        "checkpoint.",
    )
    run_files_days: float = Field(
        default=7,
        ge=0,
        allow_inf_nan=False,
        description="Days after a job's end for which storage keeps what only a running job needs: the state of the "
        "optimizer in its checkpoints, and the reports of its training processes. 0 keeps them until the job is "
        "deleted. A backup of the database that you restore should not be older than this number of days.",
    )
    job_days: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="Days after its end for which a job is kept. Then the service "
        "[deletes](../use/jobs.md#delete-a-job) the job with its events, metrics, logs and result file. Its models "
        "stay, and so do jobs of sweeps and of rounds. 0 keeps all jobs.",
    )
    prepared_days: float = Field(
        default=30,
        ge=0,
        allow_inf_nan=False,
        description="Days for which prepared data (token ids, and scores of the reference) stay in storage after a job "
        "used them last. A later job on the same data makes them again. 0 keeps them for ever.",
    )
    max_loaded_models: int = Field(
        default=2,
        gt=0,
        description="Maximum number of models that are loaded at the same time. A further model waits until the "
        "least recently used model is idle, and replaces it.",
    )
    model_idle_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Seconds for which an unused model stays loaded. If unset, the model stays loaded until "
        "another model or a job needs its memory.",
    )
    model_wait_seconds: float = Field(
        default=180, gt=0, description="Maximum number of seconds for which a request waits until its model is loaded."
    )
    project_deployments: DeploymentLimits = Field(
        default=DeploymentLimits(),
        description="Limits on how a project may serve the models that it trained: `max_replicas` (replicas of one "
        "model), `max_gpus` (GPUs of all replicas of one model together) and `pinned` (whether the project may keep "
        "models loaded). Admins of the default project may exceed these limits.",
    )
    dtype: Dtype | None = Field(
        default=None,
        description="Number type in which models are served. If unset: `bfloat16` on GPUs, `float32` on CPUs.",
    )
    reference_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Number type in which the reference models of jobs compute log-probabilities. If a model is served "
        "in another number type, the service loads the model a second time as the reference model.",
    )
    num_gpus_per_worker: float = Field(
        default=0,
        ge=0,
        description="Number of GPUs for each training worker; 0 trains on CPUs. If unset, `raydpo up` sets it "
        "to 1 when it starts Ray on a machine with GPUs.",
    )
    num_gpus_per_model: float = Field(
        default=0,
        ge=0,
        description="Number of GPUs for each replica of a loaded model: a share below 1, or a whole number; 0 "
        "serves on CPUs. If unset, `raydpo up` sets it to 1 when it starts Ray on a machine with "
        "GPUs.",
    )

    @model_validator(mode="after")
    def _issuer_is_whole(self) -> Self:
        if self.oidc_issuer is not None and not self.oidc_audiences:
            raise ValueError("oidc_issuer needs oidc_audience, oidc_client_id or both; set one of them")
        if self.oidc_issuer is None and (self.oidc_audiences or self.oidc_roles):
            raise ValueError("oidc_audience, oidc_client_id and oidc_roles need oidc_issuer; set it, or unset them")
        if self.oidc_client_secret is not None and self.oidc_client_id is None:
            raise ValueError("oidc_client_secret needs oidc_client_id; set both, or neither")
        return self

    @model_validator(mode="after")
    def _deployments_work(self) -> Self:
        for name, model in self.models.items():
            own = model.deployment
            if trouble := own.trouble(num_gpus=self.num_gpus_of(own), dtype=self.dtype_of(own)):
                raise ValueError(f"models.{name}.deployment: {trouble[1]}")
        pinned = [name for name, model in self.models.items() if model.deployment.pinned]
        if len(pinned) > self.most_pinned:
            raise ValueError(
                f"the models {', '.join(pinned)} are pinned, but at most {self.most_pinned} models can be pinned, "
                "one fewer than max_loaded_models; unpin a model, or raise max_loaded_models"
            )
        return self

    @model_validator(mode="after")
    def _names_are_of_one_judge(self) -> Self:
        if both := sorted(self.judges.keys() & self.models.keys()):
            raise ValueError(f"judges and models both have the name {both[0]!r}; rename the judge")
        return self

    @classmethod
    def variable(cls, name: str) -> str:
        """Returns the name of the environment variable that sets the setting `name`: `RAYDPO_API_KEY` for `api_key`,
        for example.
        """
        return str(cls.model_fields[name].validation_alias or f"RAYDPO_{name.upper()}")

    @classmethod
    def secret_variables(cls) -> set[str]:
        """Returns the names of the environment variables that hold secrets, such as `RAYDPO_API_KEY`. `DATABASE_URL`
        and `DATABASE_DIRECT_URL` are among them, because these URLs may hold a password, and `RAYDPO_JUDGES`, because
        judges may have API keys.
        """
        types = {name: (field.annotation, *get_args(field.annotation)) for name, field in cls.model_fields.items()}
        secret = [name for name, known in types.items() if SecretStr in known]
        return {cls.variable(name) for name in ("database_url", "database_direct_url", "judges", *secret)}

    @property
    def oidc_audiences(self) -> list[str]:
        """Returns the accepted audiences. An OpenID Connect token must name at least one of them."""
        return [name for name in (self.oidc_audience, self.oidc_client_id) if name is not None]

    def num_gpus_of(self, own: DeploymentSettings) -> float:
        """Returns the number of GPUs for each replica of a model that is served with the settings `own`."""
        return self.num_gpus_per_model if own.num_gpus is None else own.num_gpus

    def dtype_of(self, own: DeploymentSettings) -> Dtype:
        """Returns the number type in which a model with the settings `own` is served."""
        return own.dtype or self.dtype or ("bfloat16" if self.num_gpus_of(own) else "float32")

    def scores_apart(self, own: DeploymentSettings) -> bool:
        """Whether a model with the settings `own` needs a second engine (model server), which computes
        log-probabilities for jobs.

        Returns True if quantization, maximum length or number type make the engine that answers requests unfit to
        compute these log-probabilities.
        """
        changed = own.quantization is not None or own.max_model_len is not None
        return changed or self.dtype_of(own) != self.reference_dtype

    @property
    def most_pinned(self) -> int:
        """Returns how many models may be pinned (always loaded): one fewer than may be loaded, so that other models can
        be loaded in turn.
        """
        return self.max_loaded_models - 1

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        given = init_settings()
        home = Path(given.get("home") or os.environ.get("RAYDPO_HOME") or "~/.raydpo").expanduser()
        named = given.get("settings_file") or os.environ.get("RAYDPO_SETTINGS_FILE")
        if named and not Path(named).is_file():
            raise FileNotFoundError(
                f"the settings file {named} does not exist; set RAYDPO_SETTINGS_FILE to an existing file, or unset it"
            )
        file = TomlConfigSettingsSource(settings_cls, toml_file=named or home / "raydpo.toml")
        return (init_settings, env_settings, file)
