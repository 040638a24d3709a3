from collections.abc import Callable

import pytest

from dpo_core.config import TrainConfig
from services.contract import AttemptSpec, Integrations
from services.training.reports.integrations import actors, following
from tests.services.training.spool import Spool


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets up an environment without keys of W&B or MLflow, in which their libraries contact nobody."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**actors.ENVIRONMENT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "PERIOD_SECONDS", 0.05)
    monkeypatch.setattr(following, "RETRY_SECONDS", 0.1)


@pytest.fixture
def spec(make_spec: Callable[..., AttemptSpec]) -> AttemptSpec:
    """Returns the settings of a job's second attempt."""
    config = TrainConfig(batch_size=4, n_epochs=1)
    name = "ft:tiny:raydpo::12345678"
    return make_spec(attempt=2, config=config, fine_tuned_model=name, integrations=Integrations())


@pytest.fixture
def spool(spec: AttemptSpec) -> Spool:
    return Spool(spec)
