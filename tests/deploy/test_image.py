"""Builds the control plane's image by its Dockerfile, and runs it as the chart demands, without a container daemon.

Debian with its own Python, and this machine's Node, stand in for the base images, which come from a registry. What this
proves: every step of the Dockerfile, that the pins install on a clean Python, the entrypoint, and that a read-only root
suffices. It takes minutes and 1.3 GB, and needs root, Node, and Debian's buildah, podman, runc and debootstrap.
"""

import os
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PYTHON, NODE = "docker.io/library/python:3.11-slim-bookworm", "docker.io/library/node:22-bookworm-slim"
IMAGE = "raydpo-control-plane:test"
PACKAGES = "ca-certificates,python3,python3-venv,python3-pip"
TOOLS = ("buildah", "podman", "runc", "debootstrap", "node", "npm")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to build and run images"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


@pytest.fixture(scope="module")
def store() -> Iterator[list[str]]:
    """Makes the image. Returns the options with which buildah and podman find it."""
    with TemporaryDirectory(prefix="raydpo-image-") as folder:
        options = ["--root", f"{folder}/store", "--runroot", f"{folder}/run"]
        buildah = ["buildah", *options]
        _debian(Path(folder) / "debian")
        _node(Path(folder) / "node")
        for base, added, image in (("scratch", "debian", PYTHON), (PYTHON, "node", NODE)):
            container = output(*buildah, "from", "--pull-never", base)
            output(*buildah, "add", container, f"{folder}/{added}", "/")
            output(*buildah, "config", "--env=NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt", container)
            output(*buildah, "commit", container, image)
            output(*buildah, "rm", container)
        # What reaches the package indexes here, of which an image's build knows nothing.
        given = [Path(path) for path in ("/etc/ssl/certs", "/etc/pip.conf")]
        mounts = [f"-v={path}:{path}:ro" for path in given if path.exists()]
        build = ["bud", "--isolation=chroot", "--pull-never", "--layers=false", "--network=host", *mounts]
        output(*buildah, *build, f"--file={ROOT}/docker/control-plane.Dockerfile", f"--tag={IMAGE}", str(ROOT))
        yield options
        output(*buildah, "rm", "--all")
        output(*buildah, "rmi", "--all", "--force")


def _debian(root: Path) -> None:
    """Makes a Debian in the folder `root` whose Python looks like that of the base image."""
    sites = output("apt-get", "indextargets", "--format", "$(REPO_URI)", "Codename: bookworm").splitlines()
    output("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root), *sites[:1])
    for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    for name, program in (("python", "python3"), ("pip", "pip3")):
        (root / "usr/local/bin" / name).symlink_to(f"/usr/bin/{program}")


def _node(root: Path) -> None:
    """Copies this machine's Node and npm into the folder `root`."""
    node, npm = (Path(shutil.which(name) or "").resolve() for name in ("node", "npm"))
    (root / "usr/local/bin").mkdir(parents=True)
    shutil.copy2(node, root / "usr/local/bin/node")
    shutil.copytree(npm.parents[1], root / "usr/local/lib/node_modules/npm", symlinks=True)
    (root / "usr/local/bin/npm").symlink_to("../lib/node_modules/npm/bin/npm-cli.js")


def output(*command: str) -> str:
    """Runs a command, and returns what it prints. Fails with its last lines if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command[0]} failed: {(ended.stdout + ended.stderr)[-3000:]}"
    return ended.stdout.strip()


@pytest.fixture
def database(database_url: str) -> Iterator[str]:
    """Returns the database's URL by TCP, for a user who cannot enter the folder of its socket."""
    parts = urlsplit(database_url)
    path = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.socket(socket.AF_UNIX) as server:
                server.connect(path)
                back = threading.Thread(target=copy, args=(server, self.request))
                back.start()
                copy(self.request, server)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as listening:
        threading.Thread(target=listening.serve_forever).start()
        try:
            yield f"postgresql://{parts.username}@127.0.0.1:{listening.server_address[1]}{parts.path}"
        finally:
            listening.shutdown()


def copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the other end has gone


@contextmanager
def running(store: list[str], database: str, *command: str) -> Iterator[subprocess.Popen[str]]:
    """Runs the image as the chart does: as its own user, without privileges, and with a read-only root."""
    environment = {
        "DATABASE_URL": database,
        "RAYDPO_API_KEY": "rd-from-a-secret",
        "RAYDPO_STORAGE_URL": "file:///tmp/storage",
        "RAYDPO_ADVERTISED_URL": "http://raydpo.ml.svc:8000",
        "RAYDPO_HOME": "/tmp/raydpo",
    }
    confined = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
    limits = ["--ulimit=nproc=4096:4096", "--ulimit=nofile=16384:16384"]  # raising them needs a capability
    given = [f"--env={name}={value}" for name, value in environment.items()]
    podman = ["podman", *store, "--runtime=runc", "--cgroup-manager=cgroupfs", "run", "--rm", "--pull=never"]
    run = subprocess.Popen(
        [*podman, *confined, *limits, "--tmpfs=/tmp", "--network=host", *given, IMAGE, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield run
    finally:
        run.terminate()
        run.communicate(timeout=120)


def test_the_image_migrates_and_serves_read_only_and_unprivileged(store: list[str], database: str) -> None:
    with running(store, database, "migrate") as migration:
        printed, _ = migration.communicate(timeout=600)
        assert migration.returncode == 0, printed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running(store, database, "up", "--port", str(port), "--ray-address", "http://127.0.0.1:9") as service:
        deadline = time.monotonic() + 600
        while not ready(port):
            assert service.poll() is None, service.stdout and service.stdout.read()
            assert time.monotonic() < deadline, "the service is not ready after ten minutes"
            time.sleep(1)
        service.terminate()
        printed, _ = service.communicate(timeout=120)
    assert service.returncode == 0, printed
    assert "Read-only file system" not in printed


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False, timeout=30).is_success
    except httpx.HTTPError:
        return False


def test_the_image_refuses_to_write_to_its_root(store: list[str]) -> None:
    podman = ["podman", *store, "--runtime=runc", "--cgroup-manager=cgroupfs", "run", "--rm", "--pull=never"]
    limits = ["--ulimit=nproc=4096:4096", "--ulimit=nofile=16384:16384"]
    touch = [*podman, *limits, "--read-only", "--read-only-tmpfs=false", "--network=none", "--entrypoint=touch", IMAGE]
    ended = subprocess.run([*touch, "/home/raydpo/file"], capture_output=True, text=True)
    assert "Read-only file system" in ended.stderr
