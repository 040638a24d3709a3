"""How the built page is served; what is built here is small, and stands for the real page."""

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from services.control_plane.page import api as page_api

ROOT = Path(__file__).parents[4]
SCRIPT = "export {};\n" * 100


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html><script type=module src=./assets/index-1a2b.js></script>")
    (tmp_path / "assets" / "index-1a2b.js").write_text(SCRIPT)
    (tmp_path / "secret.txt").write_text("not an asset")
    monkeypatch.setattr(page_api, "BUILT", tmp_path)
    return tmp_path


def get(base_url: str, path: str, encoding: str = "gzip") -> httpx.Response:
    return httpx.get(f"{base_url}{path}", headers={"accept-encoding": encoding}, trust_env=False)


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere_and_nothing_inline(base_url: str, built: Path) -> None:
    answer = get(base_url, "/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.text == (built / "index.html").read_text()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-cache"


def test_an_asset_is_kept_for_a_year_and_comes_compressed_to_whoever_takes_that(base_url: str, built: Path) -> None:
    packed, plain = (get(base_url, "/assets/index-1a2b.js", encoding) for encoding in ("gzip, br", "identity"))
    assert packed.text == plain.text == SCRIPT
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) == len(gzip.compress(SCRIPT.encode()))
    assert "content-encoding" not in plain.headers
    for answer in (packed, plain):
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["content-type"].startswith("text/javascript")
        assert answer.headers["vary"] == "accept-encoding"


def test_a_page_that_was_built_anew_is_served_anew(base_url: str, built: Path) -> None:
    get(base_url, "/")
    (built / "index.html").write_text("<!doctype html><title>new</title>")
    assert "new" in get(base_url, "/").text


@pytest.mark.parametrize("path", ["/assets/gone.js", "/assets/..%2fsecret.txt", "/assets/%2e%2e", "/secret.txt"])
def test_nothing_but_assets_is_served(base_url: str, built: Path, path: str) -> None:
    answer = get(base_url, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_where_it_is_not_built_the_page_says_how(base_url: str, built: Path) -> None:
    (built / "index.html").unlink()
    answer = get(base_url, "/")
    assert answer.status_code == 404
    assert answer.text == page_api.NOT_BUILT
    assert "page:" in (ROOT / "Makefile").read_text()


def test_the_api_stands_beside_the_page(base_url: str, built: Path) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        assert get(base_url, path).status_code == 200
    assert get(base_url, "/v1/fine_tuning/jobs").status_code == 401


@pytest.mark.slow
def test_the_wheel_carries_the_built_page(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    for name in ("dpo_core", "services"):
        shutil.copytree(ROOT / name, sources / name)
    built = sources / "services" / "control_plane" / "page" / "built"
    (built / "assets").mkdir(parents=True, exist_ok=True)
    (built / "index.html").touch()
    (built / "assets" / "index-1a2b.js").touch()
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sources]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("raydpo-*.whl")
    names = [name for name in ZipFile(wheel).namelist() if "/built/" in name]
    assert {"index.html", "index-1a2b.js"} <= {re.sub(r".*/", "", name) for name in names}
