"""Tests the machines that the other tests of this folder run on."""

import subprocess
from pathlib import Path

import psutil
import pytest

from services import storage
from tests.cluster.machines import VOLUME, Network, running_network
from tests.services.s3 import running_s3

CONNECTS = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2]))"
LISTENS = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("listens", flush=True)
    while True:
        server.accept()[0].close()
"""


def test_a_path_of_one_machine_leads_nowhere_on_another(network: Network, tmp_path: Path) -> None:
    one, two = network.add("one"), network.add("two")
    one.run("touch", "/tmp/mine", "/dev/shm/mine")
    assert two.run("find", "/tmp", "/dev/shm") == "/tmp\n/dev/shm\n"
    assert not one.run("sh", "-c", f"test -e {tmp_path} || true")
    for folder in ("/", "/root", "/var/tmp", "."):
        with pytest.raises(AssertionError, match="Read-only file system"):
            one.run("touch", f"{folder}/mine")
    assert one.run("hostname") == "one\n"
    assert one.run("python", "-c", "import services.storage, os; print(os.getcwd())") == "/mnt/code\n"


def test_killed_machines_lose_all_but_their_volume(network: Network, tmp_path: Path) -> None:
    (volume := tmp_path / "volume").mkdir()
    machine = network.add("kept", volume=volume)
    machine.run("touch", "/tmp/gone", f"{VOLUME}/kept")
    program = machine.spawn("sh", "-c", "setsid sleep 1000 & sleep 1000", log=tmp_path / "log")
    while len(found := machine.processes("sleep 1000")) < 3:
        assert program.poll() is None
    machine.kill()
    assert program.returncode
    assert not any(map(psutil.Process.is_running, found))
    machine.start()
    assert machine.run("find", "/tmp", VOLUME, "-type", "f") == f"{VOLUME}/kept\n"


def test_a_machine_is_cut_off_and_healed(network: Network, tmp_path: Path) -> None:
    server, client = network.add("server"), network.add("client")
    log = tmp_path / "log"
    server.spawn("python", "-c", LISTENS, server.address, log=log)
    while log.read_text() != "listens\n":
        assert server.processes("listens")
    client.run("python", "-c", CONNECTS, server.address, "60")
    server.cut()
    with pytest.raises(AssertionError, match=r"timed out|unreachable|No route"):
        client.run("python", "-c", CONNECTS, server.address, "0.5")
    server.heal()
    client.run("python", "-c", CONNECTS, server.address, "60")


@pytest.mark.slow
def test_machines_share_only_the_object_store(network: Network) -> None:
    writer, reader = network.add("writer"), network.add("reader")
    with running_s3(network.host) as s3:
        place = storage.join(s3.new_folder(), "file")
        writes = "import sys; from services import storage; storage.write_bytes(sys.argv[1], b'seen')"
        writer.run("python", "-c", writes, place, environment=s3.environment)
        reads = "import sys; from services import storage; print(storage.read_bytes(sys.argv[1]))"
        assert reader.run("python", "-c", reads, place, environment=s3.environment) == "b'seen'\n"


def test_a_network_leaves_nothing_behind(network: Network) -> None:
    def devices() -> str:
        return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout

    with running_network() as another:
        machine = another.add("short")
        sleep = machine.spawn("sleep", "1000", log=Path("/dev/null"))
        assert another.cable in devices()
    assert sleep.returncode
    assert another.cable not in devices()
