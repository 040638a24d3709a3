"""Tests how the options of a job are described."""

import json

from dpo_core.config import Lora, TrainConfig
from services.control_plane.jobs.options import OWN, described
from services.control_plane.jobs.requests import EXTENSIONS

OPTIONS = {each["id"]: each for each in described()}


def test_every_option_that_a_job_takes_is_described_once_in_json() -> None:
    names = {name.partition(".")[0] for name in OPTIONS}
    assert len(OPTIONS) == len(described())
    assert names == set(EXTENSIONS) | {name.partition(".")[0] for name in OWN}
    for option in json.loads(json.dumps(described())):
        assert option["object"] == "option"
        assert option["description"].endswith((".", "2305.14314.")), option["id"]


def test_defaults_are_those_of_training_and_of_adapters() -> None:
    assert OPTIONS["max_length"]["default"] == TrainConfig().max_length
    assert OPTIONS["adapter.r"]["default"] == Lora().r
    assert (OPTIONS["num_workers"]["default"], OPTIONS["priority"]["default"]) == (1, 0)


def test_few_values_are_a_choice_and_ranges_are_words() -> None:
    assert OPTIONS["truncation"]["choices"] == ["drop", "keep_start", "keep_end"]
    assert OPTIONS["precision"]["choices"][0] == "auto"
    assert "choices" not in OPTIONS["num_workers"]
    assert OPTIONS["num_workers"]["range"] == "from 1 to 1024"
