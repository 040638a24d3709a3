"""The control plane's settings: command line over environment over settings file over defaults."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from services.control_plane.core.log_setup import LogFormat
from services.uri import check_prefix


def _model_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"model name {name!r} must be 1 to 64 letters, digits, dots, dashes or underscores")
    return name


def _webhook_prefix(prefix: str) -> str:
    if not re.match("https://|http://[^/]", prefix):
        raise ValueError(f"{prefix!r} must begin with https://, or with http:// and a host")
    return check_prefix(prefix)


class Settings(BaseSettings):
    """Read from `RAYDPO_*` (and `DATABASE_URL`), then from the TOML file; unknown keys in the file are refused."""

    model_config = SettingsConfigDict(env_prefix="RAYDPO_", extra="forbid", frozen=True, populate_by_name=True)

    home: Path = Field(default=Path("~/.raydpo"), description="state of the embedded stack; settings file raydpo.toml")
    settings_file: Path | None = Field(default=None, description="TOML; None: raydpo.toml in home")
    database_url: str = Field(validation_alias="DATABASE_URL", description="postgresql://…")
    database_direct_url: str | None = Field(
        default=None,
        validation_alias="DATABASE_DIRECT_URL",
        description="of the server itself, where database_url is that of a PgBouncer in transaction mode",
    )
    database_connections: int = Field(
        default=30,
        gt=4,
        description="of one process at most, beside one that listens; each upload being joined holds one",
    )
    storage_url: str = Field(description="file://, s3:// or gs:// folder of files, runs and models")
    api_key: SecretStr
    advertised_url: str = Field(description="where training inside the cluster reaches this service")
    ray_url: str = Field(description="Ray's dashboard, http://host:8265")
    ray_token: SecretStr | None = None
    serve_url: str | None = Field(
        default=None, description="Ray Serve's proxy; None: Ray's host, port as Serve reports"
    )

    log_format: LogFormat = Field(
        default="text", description="text: to raydpo.log in home; json: an object a line, to standard error"
    )
    oidc_issuer: str | None = Field(
        default=None,
        pattern=r"^(https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/])",
        description="whose tokens are taken in place of keys; None: nobody's",
    )
    oidc_audience: str | None = Field(default=None, description="whom those tokens must be meant for")
    oidc_project_claim: str = Field(default="project", description="claim that names a project by its id")
    oidc_scopes_claim: str = Field(default="scope", description="claim that holds scopes: a list, or a text")
    requests_per_minute: int | None = Field(
        default=None, gt=0, description="of a key that has no limit of its own, in each replica; None: no limit"
    )

    models: dict[Annotated[str, AfterValidator(_model_name)], str] = Field(
        default_factory=dict, description="base models: name = local folder, storage URI or hub id"
    )
    organization: str = Field(default="raydpo", pattern=r"^[A-Za-z0-9_-]+$", description="second part of ft: names")

    dataset_uris: list[Annotated[str, AfterValidator(check_prefix)]] = Field(
        default=["https://", "hf://datasets/"], description="prefixes of the URIs that a job may train on"
    )
    webhook_urls: list[Annotated[str, AfterValidator(_webhook_prefix)]] = Field(
        default=["https://"], description="prefixes of the URLs that webhooks may be sent to"
    )
    max_upload_bytes: int = Field(default=512 * 2**20, gt=0, description="of a file sent in one request")
    max_file_bytes: int = Field(default=8 * 2**30, gt=0, description="of a file sent in parts")
    max_json_bytes: int = Field(default=4 * 2**20, gt=0, description="of any other request body")
    max_spool_bytes: int = Field(default=4 * 2**30, gt=0, description="of TMPDIR, for uploads that are being received")
    max_requests: int = Field(
        default=1000, gt=0, description="answered at once by one process; open streams not counted"
    )
    stall_seconds: float = Field(
        default=30, gt=0, description="a client that sends or reads nothing for so long is cut off"
    )
    max_running_jobs: int = Field(default=1, gt=0, description="jobs that train at once; others wait in order")
    max_running_checks: int = Field(
        default=2, gt=0, description="of one project: checks of files with a model, each a Ray job"
    )
    max_cluster: dict[Literal["CPU", "GPU"], float] = Field(
        default_factory=dict, description="what an autoscaling cluster may grow to; {}: it is as large as it is"
    )
    max_attempts: int = Field(
        default=5, gt=0, description="launches in a row that die without a new checkpoint before their job fails"
    )
    max_loaded_models: int = Field(default=2, gt=0, description="models served at once; the least recently used stops")
    model_wait_seconds: float = Field(default=180, gt=0, description="a request waits so long for a loading model")
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    num_gpus_per_worker: float = Field(default=0, ge=0)
    num_gpus_per_model: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _issuer_has_audience(self) -> Self:
        if (self.oidc_issuer is None) != (self.oidc_audience is None):
            raise ValueError("oidc_issuer and oidc_audience go together; set both, or neither")
        return self

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
