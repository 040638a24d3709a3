"""Tests `raydpo models download` through connections that break, and `push` to a stand-in for the hub on loopback."""

import base64
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer

from services.cli.models import weights
from tests.services.proxy import Proxy
from tests.services.web import running

WEIGHTS = os.urandom(1 << 20) * 12
FILES = {"model.safetensors": WEIGHTS, "chat_template.jinja": b"template", "sub/part.json": b"{}"}


@pytest.fixture
def policy(raydpo, database, service):
    """Returns the name of a trained policy with all weights, whose files are in the service's storage."""
    job_id = raydpo(
        "jobs", "create", "--model", "tiny", "--file", "hf://datasets/org/name/[/red]/a.jsonl"
    ).stdout.strip()
    folder = service.home / "storage" / "runs" / job_id / "export"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    name = f"ft:tiny:raydpo::{job_id[6:]}"
    columns = "id, source, root, project_id, job_id"
    row = (name, folder.as_uri(), job_id)
    database.execute(f"INSERT INTO models ({columns}) VALUES (%s, %s, 'tiny', 'proj_default', %s)", row)
    database.commit()
    yield name
    raydpo("jobs", "cancel", job_id)
    raydpo("models", "delete", name)


@pytest.fixture
def proxy(service) -> Iterator[Proxy]:
    proxy = Proxy(("127.0.0.1", urlsplit(service.url).port))
    yield proxy
    proxy.close()


def assert_downloaded(folder: Path) -> None:
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    about = json.loads(found.pop("raydpo.json"))
    assert (found, about["format"]) == (FILES, "merged")
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]


@pytest.mark.slow
def test_a_download_goes_on_after_its_connection_broke(raydpo, policy, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "RESUME_SECONDS", 0.1)
    proxy.delay_seconds = 0.01  # of 64 KiB
    cuts: list[int] = []
    ended = threading.Event()

    def cut_twice() -> None:
        for least in (1 << 20, 5 << 20):
            while not any(part.stat().st_size > least for part in tmp_path.glob(".out.*.part")):
                if ended.wait(0.005):
                    return
            cuts.append(next(tmp_path.glob(".out.*.part")).stat().st_size)
            proxy.cut()

    thread = threading.Thread(target=cut_twice)
    thread.start()
    done = raydpo("models", "download", policy, tmp_path / "out", "--url", f"{proxy.url}/v1")
    ended.set()
    thread.join()
    assert done.exit_code == 0, done.output
    assert done.stderr.count("The connection broke") >= 1
    assert len(WEIGHTS) > cuts[1] > cuts[0]
    assert_downloaded(tmp_path / "out")


def part_of(tmp_path: Path, content: bytes, etag: str) -> Path:
    part = tmp_path / f".out.{etag}.part"
    part.write_bytes(content)
    return part


def tar_of(service, policy) -> tuple[bytes, str]:
    import httpx

    key = {"authorization": f"Bearer {(service.home / 'api.key').read_text()}"}
    answer = httpx.get(f"{service.url}/models/{policy}/content", headers=key)
    return answer.content, answer.headers["etag"].strip('"')


@pytest.mark.parametrize("length", [700_000, None])
def test_what_an_earlier_command_left_is_not_asked_for_again(raydpo, policy, service, tmp_path, length):
    tar, etag = tar_of(service, policy)
    part_of(tmp_path, tar[:length], etag)
    assert raydpo("models", "download", policy, tmp_path / "out").exit_code == 0
    assert_downloaded(tmp_path / "out")


def test_what_was_left_of_other_weights_is_not_mixed_in(raydpo, policy, tmp_path):
    part_of(tmp_path, b"x" * 1000, "0" * 32)
    assert raydpo("models", "download", policy, tmp_path / "out").exit_code == 0
    assert_downloaded(tmp_path / "out")


def test_damaged_bytes_are_noticed_and_not_unpacked(raydpo, policy, service, tmp_path):
    tar, etag = tar_of(service, policy)
    part = part_of(tmp_path, tar[:1_000_000] + b"damage" + tar[1_000_006:2_000_000], etag)
    refused = raydpo("models", "download", policy, tmp_path / "out")
    assert refused.exit_code == 1
    assert "the download was damaged on its way and was deleted" in refused.stderr
    assert not part.exists()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_a_base_model_and_a_format_that_is_not_are_refused(raydpo, policy, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    for arguments, said in (
        ((policy, tmp_path / "full"), "is not an empty folder"),
        (("tiny", tmp_path / "out"), "'tiny' is a base model"),
        ((policy, tmp_path / "out", "--format", "adapter"), "has no adapter, because its job trained all weights"),
        (("ft:none", tmp_path / "out"), "does not exist"),
    ):
        refused = raydpo("models", "download", *arguments)
        assert refused.exit_code == 1
        assert said in refused.stderr.replace("\n", " ")
    assert [each.name for each in tmp_path.iterdir()] == ["full"]


def linked(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../outside"),
        tarfile.TarInfo("/tmp/outside"),
        tarfile.TarInfo("a/../../outside"),
        linked("a", tarfile.SYMTYPE, "/etc/passwd"),
        linked("a", tarfile.LNKTYPE, "../outside"),
        linked("a", tarfile.FIFOTYPE, ""),
    ],
    ids=lambda member: f"{member.name} {member.type!r}",
)
def test_a_tar_that_would_write_elsewhere_is_not_unpacked(member, tmp_path, capsys):
    with tarfile.open(tmp_path / "tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("first"), io.BytesIO())
        tar.addfile(member)
    with pytest.raises(typer.Exit):
        weights._unpack(tmp_path / "tar", tmp_path / "out")
    assert "not a plain file inside its folder" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["tar"]


# --- the hub ---------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """A stand-in for the Hugging Face hub that accepts uploads. It refuses repositories of the organization
    `theirs`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.created: list[dict[str, object]] = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(404, {"error": "Not found"})

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self._chunks()
        hub, path = self.server, urlsplit(self.path).path
        hub.tokens.add(self.headers["Authorization"])
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked.get("organization") == "theirs":
                return self._answer(403, {"error": "You don't have the rights to create a model under theirs"})
            hub.created.append(asked)
            return self._answer(200, {"url": f"{hub.url}/{asked.get('organization')}/{asked['name']}"})
        if "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer(200, {"commitUrl": f"{hub.url}/mine/polite/commit/1", "commitOid": "1"})
        return self._answer(404, {"error": f"no {path}"})

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def push(service, hub_url: str, *arguments: str, token: str | None, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "RAYDPO_"))}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    environment |= {"RAYDPO_HOME": str(service.home)} | ({"HF_TOKEN": token} if token else {})
    command = [sys.executable, "-c", "from services.cli.app import app; app()", "models", "push", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_weights_are_pushed_with_the_users_token(policy, service, tmp_path):
    with running(Hub()) as hub:
        done = push(service, hub.url, policy, "hf://mine/polite", token="hf_of_the_user", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{hub.url}/mine/polite/commit/1"
        about = json.loads(hub.files.pop("raydpo.json"))
        assert (hub.files, about["model"]) == (FILES, policy)
        assert hub.tokens == {"Bearer hf_of_the_user"}
        (created,) = hub.created
        assert (created["organization"], created["name"], created["visibility"]) == ("mine", "polite", "private")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "token", "said"),
    [
        ("mine/polite", "hf_x", "must be hf://organization/name"),
        ("hf://mine/polite", None, "there is no token for the Hugging Face hub; set HF_TOKEN"),
        (
            "hf://theirs/polite",
            "hf_x",
            "refuses the repository theirs/polite with status 403: You don't have the rights",
        ),
    ],
)
def test_a_refused_push_names_what_is_missing(policy, service, tmp_path, target, token, said):
    with running(Hub()) as hub:
        refused = push(service, hub.url, policy, target, token=token, home=tmp_path)
        assert refused.returncode == 1
        assert said in refused.stderr.replace("\n", " ")
        assert hub.files == {}
