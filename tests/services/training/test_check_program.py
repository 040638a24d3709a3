import gzip
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from services import storage
from services.contract import CheckRequest, Recipe, SideJobResult
from services.control_plane.files.documents import CheckReport
from services.training.check_program import Check, answer, check, in_turn
from services.training.reports.reporting import JobFailed


@pytest.fixture
def make_recipe(model_source: str, pairs: str) -> Callable[..., Recipe]:
    def make(**fields: Any) -> Recipe:
        given = {"training_uri": pairs, "model_source": model_source, "max_length": 2048, "truncation": "drop"}
        return Recipe(**(given | fields))

    return make


def checked(recipe: Recipe, folder: Path) -> Check:
    return check(recipe, str(folder), in_turn)


def test_a_check_counts_tokens_and_shows_ten_rows_with_what_is_learned(make_recipe: Any, tmp_path: Path) -> None:
    found = checked(make_recipe(), tmp_path)
    assert (found.tokens.num_rows, found.tokens.num_kept, found.tokens.limit) == (24, 24, 128)
    assert list(found.tokens.lengths) == ["prompt", "chosen", "rejected"]
    assert [row.line for row in found.preview] == [1, 3, 5, 8, 10, 13, 15, 17, 20, 22]
    first = found.preview[0]
    prompt, chosen = (text.replace(" ", "") for text in (first.prompt, first.chosen))
    assert (prompt, chosen) == ("<|user|>Whatis0and0?<|assistant|>", "Itis0.</s>")
    assert first.rejected is not None


def test_the_api_documents_what_a_check_finds(make_recipe: Any, tmp_path: Path) -> None:
    found = checked(make_recipe(max_length=8), tmp_path).model_dump(mode="json")
    described: Any = TypeAdapter(CheckReport).validate_python({"survey": None} | found)
    assert described == {"survey": None} | found


def test_a_check_writes_nothing_and_removes_what_it_unpacked(make_recipe: Any, pairs: str, tmp_path: Path) -> None:
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(storage.read_bytes(pairs)))
    assert checked(make_recipe(training_uri=str(packed)), tmp_path) == checked(make_recipe(), tmp_path)
    assert list(tmp_path.iterdir()) == [packed]


def test_rows_that_are_left_out_and_cut_are_shown_as_such(make_recipe: Any, tmp_path: Path) -> None:
    found = checked(make_recipe(max_length=8), tmp_path)
    assert {row.dropped for row in found.preview} == {"too_long"}
    assert found.tokens.num_kept == 0
    found = checked(make_recipe(max_length=25, truncation="keep_start"), tmp_path)
    assert found.tokens.truncated["chosen"].count > 0
    assert not any(row.chosen.endswith("</s>") for row in found.preview if row.dropped is None)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "The model cannot be used: "),
        (lambda folder: (folder / "config.json").write_text("{"), "The model cannot be used: "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "The model cannot be used: "),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "The tokenizer has no chat template"),
    ],
)
def test_a_model_that_is_no_use_is_the_users_to_mend(
    make_recipe: Any, model_source: str, tmp_path: Path, damage: Any, says: str
) -> None:
    shutil.copytree(model_source, tmp_path / "broken")
    damage(tmp_path / "broken")
    recipe = make_recipe(model_source=str(tmp_path / "broken"))
    result = answer(CheckRequest(recipe=recipe, folder_uri=str(tmp_path)), in_turn)
    assert result.report is None
    assert result.error
    assert (result.error.code, result.error.param) == ("invalid_model", "model")
    assert result.error.message.startswith(says)
    assert len(result.error.message) < 400


def test_a_file_with_an_unusable_row_is_refused_by_its_line(make_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{')
    with pytest.raises(JobFailed, match="Line 2"):
        checked(make_recipe(training_uri=str(tmp_path / "f")), tmp_path)


@pytest.mark.ray
def test_on_a_cluster_a_check_leaves_its_result_beside_the_request_whatever_the_template_does(
    make_recipe: Any, model_source: str, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    shutil.copytree(model_source, tmp_path / "endless")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "endless/chat_template.jinja").write_text(endless)
    result = on_cluster(make_recipe(), tmp_path / "1", ray_environment)
    assert result.report == checked(make_recipe(), tmp_path).model_dump(mode="json")
    result = on_cluster(make_recipe(model_source=str(tmp_path / "endless")), tmp_path / "2", ray_environment)
    assert result.error
    assert "more than 10 seconds" in result.error.message


def on_cluster(recipe: Recipe, folder: Path, environment: dict[str, str]) -> SideJobResult:
    request = CheckRequest(recipe=recipe, folder_uri=folder.as_uri())
    uri = storage.join(folder.as_uri(), "request.json")
    storage.write_bytes(uri, request.model_dump_json().encode())
    subprocess.run(
        [sys.executable, "-m", "services.training.check_program", uri], env=environment, check=True, timeout=200
    )
    return SideJobResult.model_validate_json((folder / "report.json").read_bytes())
