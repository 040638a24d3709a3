"""Reads the control plane's settings from the command line, else the environment, else the settings file."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self
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
        raise ValueError(f"model name {name!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
    return name


def _without_key(place: str) -> str:
    """Raises ValueError if a storage URI holds a key, because Ray's list of jobs, rows and logs show the URI."""
    if "@" in urlsplit(place).netloc:
        raise ValueError("holds a key before its '@'; leave that out, and give it as AWS_ACCESS_KEY_ID or the like")
    return place


ModelName = Annotated[str, AfterValidator(_model_name)]


def _webhook_prefix(prefix: str) -> str:
    if not re.match("https://|http://[^/]", prefix):
        raise ValueError(f"{prefix!r} must begin with https://, or with http:// and a host")
    return check_prefix(prefix)


class BaseModel(pydantic.BaseModel):
    """A base model, which jobs can start from."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    source: Annotated[str, AfterValidator(_without_key)]  # local folder, storage URI or hub id
    adapter: Lora | Literal["none"] = Lora()  # default of jobs that do not choose an adapter; none: all weights
    deployment: DeploymentSettings = DeploymentSettings()  # how it is served; its policies inherit most of this


class DeploymentLimits(pydantic.BaseModel):
    """What a project may choose for the deployments of its own models."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    max_replicas: int = Field(default=1, ge=1)
    max_gpus: float = Field(default=1, ge=0)
    pinned: bool = False


def _base_model(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


class Settings(BaseSettings):
    """The control plane's settings, from `RAYDPO_*` and `DATABASE_URL` in the environment, and from the TOML file.

    The environment overrides the file. Unknown keys in the file are refused.
    """

    model_config = SettingsConfigDict(
        env_prefix="RAYDPO_", extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True
    )

    home: Path = Field(
        default=Path("~/.raydpo"), description="Folder of all that `raydpo up` keeps, and of the file `raydpo.toml`."
    )
    settings_file: Path | None = Field(
        default=None, description="The settings file, in TOML. Without it: `raydpo.toml` in `home`."
    )
    database_url: str = Field(
        validation_alias="DATABASE_URL",
        description="The database, `postgresql://user:password@host/name`. Without it `raydpo up` starts one.",
    )
    database_direct_url: str | None = Field(
        default=None,
        validation_alias="DATABASE_DIRECT_URL",
        description="The server's own URL, if `database_url` leads to a PgBouncer in transaction mode.",
    )
    database_connections: int = Field(
        default=30,
        gt=4,
        description="Most connections of one process, beside one that listens. "
        "Each upload that is being joined holds one.",
    )
    storage_url: Annotated[str, AfterValidator(_without_key)] = Field(
        description="Folder of files, runs and models: `file://`, `s3://` or `gs://`. "
        "Without it `raydpo up` uses `storage` in `home`."
    )
    api_key: SecretStr = Field(
        description="The first key: an admin of the default project. "
        "Without it `raydpo up` makes one and keeps it in `api.key` in `home`."
    )
    advertised_url: str = Field(
        description="Where attempts inside the cluster reach this service. "
        "Without it `raydpo up` uses the address where it listens."
    )
    ray_url: str = Field(
        description="Ray's dashboard, `http://host:8265`. `raydpo up` sets it: `--ray-address`, or that of its own Ray."
    )
    ray_token: SecretStr | None = Field(
        default=None, description="Ray's token. `raydpo up` sets it if it starts Ray itself."
    )
    serve_url: str | None = Field(
        default=None,
        description="Ray Serve's proxy. Without it: the host of `ray_url`, and the port that Serve reports.",
    )

    log_format: LogFormat = Field(
        default="text",
        description="`text` writes sentences to `raydpo.log` in `home`, `json` an object a line to standard error.",
    )
    oidc_issuer: str | None = Field(
        default=None,
        pattern=r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])",
        description="The OpenID Connect issuer whose tokens are accepted in place of keys. Without it: none.",
    )
    oidc_audience: str | None = Field(
        default=None, description="The audience that those tokens must name. It goes with `oidc_issuer`."
    )
    oidc_project_claim: str = Field(default="project", description="The claim that holds the id of a project.")
    oidc_scopes_claim: str = Field(
        default="scope", description="The claim that holds the scopes: a list, or a text with spaces."
    )
    requests_per_minute: int | None = Field(
        default=None,
        gt=0,
        description="Limit of a key that has none of its own. Each replica counts for itself. Without it: none.",
    )

    tokens_per_minute: int | None = Field(
        default=None,
        gt=0,
        description="Limit of the tokens of completions, with their prompts, of a key that has none of its own. "
        "Each replica counts for itself. Without it: none.",
    )

    models: dict[ModelName, Annotated[BaseModel, BeforeValidator(_base_model)]] = Field(
        default_factory=dict,
        description="Base models, by name: a local folder, a storage URI without a key in it, or a hub id; or a table "
        "of `source`, `adapter`, which is what jobs train that do not say it, and `deployment`, which is how it is "
        "served ([fields](../use/deployments.md#settings)).",
    )
    organization: str = Field(
        default="raydpo", pattern=r"^[A-Za-z0-9_-]+$", description="The second part of the names of policies, `ft:…`."
    )

    dataset_uris: list[Annotated[str, AfterValidator(check_prefix)]] = Field(
        default=["https://", "hf://datasets/"],
        description="Prefixes of the URIs that a job may train on. "
        "The service reads `s3://`, `gs://` and `file://` with its own rights.",
    )
    webhook_urls: list[Annotated[str, AfterValidator(_webhook_prefix)]] = Field(
        default=["https://"], description="Prefixes of the URLs that webhooks may be sent to."
    )
    max_upload_bytes: int = Field(default=512 * 2**20, gt=0, description="Size of a file that comes in one request.")
    max_file_bytes: int = Field(default=8 * 2**30, gt=0, description="Size of a file that comes in parts.")
    max_json_bytes: int = Field(default=4 * 2**20, gt=0, description="Size of any other body of a request.")
    max_spool_bytes: int = Field(
        default=4 * 2**30,
        gt=0,
        description="What uploads that are being received may take of `TMPDIR`. One that is alone may take more.",
    )
    max_requests: int = Field(
        default=1000,
        gt=0,
        description="Requests that one process answers at once. Open event streams, reports of attempts and `/metrics` "
        "do not count.",
    )
    stall_seconds: float = Field(
        default=30, gt=0, description="How long a client may send or read nothing before the service cuts it off."
    )
    max_running_jobs: int = Field(default=1, gt=0, description="Jobs that run at once; the others wait.")
    max_running_checks: int = Field(
        default=2,
        gt=0,
        description="Checks of files with a model, and merges of adapters, that run at once for one project. "
        "Each is a Ray job.",
    )
    max_cluster: dict[Literal["CPU", "GPU"], float] = Field(
        default_factory=dict,
        description="What an autoscaling cluster may grow to, such as `{CPU = 64, GPU = 8}`. "
        "Without it, jobs, and models on GPUs, wait until the nodes that are there are enough.",
    )
    max_attempts: int = Field(
        default=5,
        gt=0,
        description="Attempts in a row that die without a new checkpoint before their job fails.",
    )
    max_loaded_models: int = Field(
        default=2,
        gt=0,
        description="Models that are loaded at once; others wait for the least recently used one that is idle.",
    )
    model_idle_seconds: float | None = Field(
        default=None,
        gt=0,
        description="How long a model stays loaded that nobody uses. "
        "Without it: until another one, or a job, needs its place.",
    )
    model_wait_seconds: float = Field(
        default=180, gt=0, description="How long a request waits for a model that loads, or waits for a place."
    )
    project_deployments: DeploymentLimits = Field(
        default=DeploymentLimits(),
        description="What a project may choose for the deployments of its own models: `max_replicas`, `max_gpus` of "
        "all replicas of a model, and whether it may keep models loaded (`pinned`). Admins of the default project may "
        "choose more.",
    )
    dtype: Dtype | None = Field(
        default=None,
        description="The type in which models are served. Without it: `bfloat16` on GPUs, `float32` on CPUs.",
    )
    reference_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="The type in which references of jobs are scored. "
        "Where a model is served in another one, its reference has an engine of its own.",
    )
    num_gpus_per_worker: float = Field(
        default=0,
        ge=0,
        description="GPUs of each training worker; 0 trains on CPUs. "
        "Without it `raydpo up` gives it 1 where it starts Ray on a machine with GPUs.",
    )
    num_gpus_per_model: float = Field(
        default=0,
        ge=0,
        description="GPUs of each loaded model: a share below 1, or a whole number; 0 serves on CPUs. "
        "Without it `raydpo up` gives it 1, likewise.",
    )

    @model_validator(mode="after")
    def _issuer_has_audience(self) -> Self:
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            raise ValueError("oidc_issuer and oidc_audience go together; set both, or neither")
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
                f"{', '.join(pinned)} are pinned, and of {self.max_loaded_models} places for models one stays free; "
                "unpin one, or raise max_loaded_models"
            )
        return self

    def num_gpus_of(self, own: DeploymentSettings) -> float:
        """Returns the GPUs of each replica of a deployment."""
        return self.num_gpus_per_model if own.num_gpus is None else own.num_gpus

    def dtype_of(self, own: DeploymentSettings) -> Dtype:
        """Returns the type in which a deployment is served."""
        return own.dtype or self.dtype or ("bfloat16" if self.num_gpus_of(own) else "float32")

    def scores_apart(self, own: DeploymentSettings) -> bool:
        """Whether a deployment's engine cannot score references, so that they have an engine of their own."""
        changed = own.quantization is not None or own.max_model_len is not None
        return changed or self.dtype_of(own) != self.reference_dtype

    @property
    def most_pinned(self) -> int:
        """Returns how many models may be pinned: one place stays free for all others."""
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
            raise FileNotFoundError(f"settings file {named} does not exist; RAYDPO_SETTINGS_FILE names it")
        file = TomlConfigSettingsSource(settings_cls, toml_file=named or home / "raydpo.toml")
        return (init_settings, env_settings, file)
