"""Tests the picture of a sweep's frontier."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import typer

from services.cli.jobs.frontier_picture import draw


def point(method: str, beta: float, kl: float, reward: float, on_frontier: bool) -> dict[str, Any]:
    return {
        "method": method,
        "parameters": {"method.type": method, "method.*.hyperparameters.beta": beta},
        "kl": {"value": kl, "low": kl - 0.5, "high": kl + 0.5},
        "reward": {"value": reward, "low": reward - 0.1, "high": reward + 0.1},
        "on_frontier": on_frontier,
    }


POINTS = [point("dpo", 0.5, 1, 0.5, True), point("ipo", 0.1, 2, 0.4, False), point("dpo", 0.1, 3, 0.9, True)]
FRONTIER = {"sweep_id": "sweep-1", "kl": "moved/kl_per_sequence", "reward": "polite/score", "data": POINTS}


def test_a_drawing_names_its_axes_methods_and_trials_as_text(tmp_path: Path) -> None:
    draw(FRONTIER, tmp_path / "frontier.svg")
    text = " ".join(ElementTree.parse(tmp_path / "frontier.svg").getroot().itertext())
    for said in ("moved/kl_per_sequence", "polite/score", "dpo", "ipo", "beta 0.5", "beta 0.1"):
        assert said in text
    assert "method.type" not in text
    before = (tmp_path / "frontier.svg").read_bytes()
    draw(FRONTIER, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == before  # nothing but the points changes it


def test_a_png_and_a_pdf_are_what_they_say(tmp_path: Path) -> None:
    draw(FRONTIER, tmp_path / "a.png")
    draw(FRONTIER, tmp_path / "a.PDF")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.PDF").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("name", "data", "said"), [("a.gif", POINTS, ".svg, .png, .pdf"), ("a.svg", [], "nothing to draw")]
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: list[Any], said: str
) -> None:
    with pytest.raises(typer.Exit):
        draw({**FRONTIER, "data": data}, tmp_path / name)
    assert said in capsys.readouterr().err
