"""Tests what an attempt (one run of a job) reports if an earlier attempt has prepared its data."""

from pathlib import Path

from dpo_core.config import TrainConfig
from services import storage
from services.contract import USED, AttemptSpec, ReferenceReleased, Report
from services.training.data import cache
from services.training.data.dataset import Dataset
from services.training.preparation import Prepared, prepare


def test_an_attempt_that_finds_its_data_prepared_releases_the_reference_it_was_given(tmp_path: Path) -> None:
    run = tmp_path.as_uri()
    prepared = Prepared(training=Dataset(uri=run, parts=()), validation=None)
    cache.save(storage.join(run, "prepared"), prepared)
    uris = dict.fromkeys(("training_uri", "run_uri", "cache_uri"), run)
    spec = AttemptSpec(
        job_id="job",
        attempt=2,
        config=TrainConfig(),
        num_workers=1,
        model_source="/m",
        reference="base-1a2b3c4d",
        events_url="http://127.0.0.1:9",
        **uris,
    )
    reports: list[Report] = []
    assert prepare(spec, reports.append) == prepared
    assert reports == [ReferenceReleased()]
    assert storage.exists(storage.join(run, USED))  # the data of the run lie in this folder
