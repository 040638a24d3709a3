"""Tests what is read about an adapter's base model from the adapter's folder, without torch."""

import json

import pytest

from dpo_core.models.adapter_folder import CONFIG, base_of, is_adapter


@pytest.fixture
def write(tmp_path):
    def write(**config):
        (tmp_path / CONFIG).write_text(json.dumps(config))
        return tmp_path

    return write


def test_an_adapter_names_its_base(write, tmp_path):
    assert not is_adapter(tmp_path)
    assert base_of(write(base_model_name_or_path="org/base")) == "org/base"
    assert base_of(write(base_model_name_or_path="/models/base", revision="main")) == "/models/base"
    assert is_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, f"{CONFIG} has no base_model_name_or_path; add this key"),
        ({"base_model_name_or_path": "org/base", "revision": "abc"}, "belongs to revision abc of org/base; download"),
    ],
)
def test_a_base_that_cannot_be_found_is_refused_with_the_remedy(write, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        base_of(write(**config))
