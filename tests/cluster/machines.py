"""Makes several machines of one: each has its own address, files, processes and name, and all are on one network.

A machine is a set of Linux namespaces that its first process holds. The machine sees the system's files and this
repository read-only, and can write only to its own `/tmp` and `/dev/shm`. So a path of one machine leads nowhere on
another. The network is a bridge in a namespace of its own. All this ends with its processes, also if the tests are
killed.
"""

import ipaddress
import json
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests import reaper

ROOT = Path(__file__).parents[2]
CODE = "/mnt/code"  # where a machine sees this repository
VOLUME = "/mnt/volume"  # where a machine sees its volume, which outlives the machine
PROGRAMS = Path(sys.prefix).resolve() / "bin"
NAMESPACES = ("--net", "--mount", "--pid", "--uts")

# What the first process of a machine does: it lays out the machine's files, and then only holds the namespaces.
SET_UP = f"""set -e
mount -t tmpfs tmpfs /mnt
mkdir {CODE} {VOLUME}
mount --bind "$1" {CODE}
test -z "$3" || mount --bind "$3" {VOLUME}
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
printf '127.0.0.1 localhost\\n%s %s\\n' "$4" "$2" > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
mount -o remount,bind,ro {CODE}
mount -o remount,bind,ro /mnt
mount -o remount,bind,ro /
hostname "$2"
ip link set lo up
echo ready
exec env --ignore-signal=CHLD sleep infinity  # so the kernel reaps the orphans that this process inherits
"""


class NoNamespaces(Exception):
    """Raised if this system lets nobody make machines of namespaces. The message is the system's."""


class _Namespaces:
    """Holds new namespaces with a process, whose number outside of them is `pid`."""

    def __init__(self, kinds: Sequence[str], program: Sequence[str]) -> None:
        command = ["unshare", *kinds, "--fork", "--kill-child", *program]
        environment = {name: os.environ[name] for name in ("PATH", reaper.MARK) if name in os.environ}
        self._outer = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._outer.stdout
        if self._outer.stdout.readline() != "ready\n":
            raise NoNamespaces(self._outer.communicate()[1].strip())
        (inner,) = psutil.Process(self._outer.pid).children()
        self.pid = inner.pid

    def end(self) -> None:
        """Kills the process, and with it all processes of its namespace of process ids, if it has one."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        self._outer.communicate()

    def enter(self, *command: str, kinds: Sequence[str] = NAMESPACES) -> list[str]:
        return ["nsenter", f"--target={self.pid}", *kinds, "--", *command]


class Machine:
    """A machine of a network. It is on from its creation until `kill`, and may be started again after that.

    `volume` is a folder of the host that the machine sees at VOLUME, as it was when the machine is started again.
    """

    def __init__(self, name: str, address: str, switch: _Namespaces, volume: Path | None) -> None:
        self.name, self.address = name, address
        self._switch, self._volume = switch, volume
        self._space: _Namespaces | None = None
        self._programs: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Turns the machine on, with empty `/tmp`, and plugs its cable in."""
        assert self._space is None, f"{self.name} runs already"
        arguments = [str(ROOT), self.name, str(self._volume or ""), self.address]
        program = ["--mount-proc", "sh", "-c", SET_UP, "sh", *arguments]
        self._space = _Namespaces(NAMESPACES, program)
        _call(
            *self._switch.enter(
                *("ip", "link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns"),
                str(self._space.pid),
                kinds=["--net"],
            )
        )
        _call(*self._space.enter("ip", "address", "add", f"{self.address}/24", "dev", "eth0", kinds=["--net"]))
        _call(*self._space.enter("ip", "link", "set", "eth0", "up", kinds=["--net"]))
        _call(*self._switch.enter("ip", "link", "set", self.name, "master", "bridge", "up", kinds=["--net"]))

    def kill(self) -> None:
        """Turns the machine off: kills all its processes at once, and its files are gone. Does nothing if it is off."""
        if self._space:
            self._space.end()
            self._space = None
        for program in self._programs:
            program.wait()
        self._programs.clear()

    def cut(self) -> None:
        """Pulls the machine's cable: nothing comes or goes, but all its processes run on."""
        self._set_link("down")

    def heal(self) -> None:
        """Plugs the machine's cable in again."""
        self._set_link("up")

    def _set_link(self, state: str) -> None:
        _call(*self._switch.enter("ip", "link", "set", self.name, state, kinds=["--net"]))

    def spawn(self, *command: str, log: Path, environment: Mapping[str, str] = {}) -> "subprocess.Popen[bytes]":
        """Starts a program on the machine, in the folder of this repository, and returns its process.

        The program has the variables in `environment` and a few of the system's. Its output goes to the end of `log`,
        a file of the host.
        """
        with log.open("ab") as output:
            program = subprocess.Popen(
                self._entering(command), env=_environment(environment), stdout=output, stderr=output
            )
        self._programs.append(program)
        return program

    def run(self, *command: str, environment: Mapping[str, str] = {}) -> str:
        """Runs a program on the machine to its end, and returns what it printed. Raises AssertionError if it fails."""
        return _call(*self._entering(command), environment=_environment(environment))

    def _entering(self, command: Sequence[str]) -> list[str]:
        assert self._space is not None, f"{self.name} is off"
        return self._space.enter("sh", "-c", f'cd {CODE} && exec "$@"', "sh", *command)

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Returns the machine's processes whose command line contains `word`."""
        if self._space is None:
            return []
        found = []
        for process in [*psutil.Process(self._space.pid).children(recursive=True), *self._entered()]:
            try:
                if process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def _entered(self) -> Iterator[psutil.Process]:
        """Yields the processes that came in from outside, with what they started."""
        for program in self._programs:
            if program.poll() is None:
                yield from psutil.Process(program.pid).children(recursive=True)


class Network:
    """A network of machines. `host` is the address under which the machines reach the programs of this process."""

    def __init__(self) -> None:
        self._switch = _Namespaces(["--net"], ["sh", "-c", "echo ready; exec sleep infinity"])
        self._machines: list[Machine] = []
        self._subnet = _free_subnet()
        self.host = str(self._subnet[1])
        self.cable = f"rd{secrets.token_hex(5)}"  # the device of the host that leads to the bridge
        try:
            self._lay_out()
        except AssertionError as error:
            self.close()
            raise NoNamespaces(str(error)) from None

    def _lay_out(self) -> None:
        inside = [["link", "add", "bridge", "type", "bridge"], ["link", "set", "bridge", "up"]]
        for command in inside:
            _call(*self._switch.enter("ip", *command, kinds=["--net"]))
        _call("ip", "link", "add", self.cable, "type", "veth", "peer", "name", "host", "netns", str(self._switch.pid))
        _call(*self._switch.enter("ip", "link", "set", "host", "master", "bridge", "up", kinds=["--net"]))
        _call("ip", "address", "add", f"{self.host}/24", "dev", self.cable)
        _call("ip", "link", "set", self.cable, "up")

    def add(self, name: str, *, volume: Path | None = None) -> Machine:
        """Adds a machine to the network, turns it on, and returns it. `name` has at most 15 characters."""
        machine = Machine(name, str(self._subnet[10 + len(self._machines)]), self._switch, volume)
        self._machines.append(machine)
        machine.start()
        return machine

    def close(self) -> None:
        for machine in self._machines:
            machine.kill()
        subprocess.run(["ip", "link", "delete", self.cable], capture_output=True)  # otherwise it goes a little later
        self._switch.end()


@contextmanager
def running_network() -> Iterator[Network]:
    """Yields a network, and ends it with all its machines after the block. Raises NoNamespaces where none can be
    made."""
    network = Network()
    try:
        yield network
    finally:
        network.close()


def _free_subnet() -> ipaddress.IPv4Network:
    """Returns a private network of 254 addresses to which this system has no route yet."""
    routes = [route["dst"] for route in json.loads(_call("ip", "-json", "route")) if route["dst"] != "default"]
    taken = [ipaddress.ip_network(route) for route in routes]
    while True:
        subnet = ipaddress.IPv4Network(f"10.{random.randint(128, 250)}.{random.randint(0, 255)}.0/24")
        if not any(subnet.overlaps(each) for each in taken):
            return subnet


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    mark = {reaper.MARK: os.environ[reaper.MARK]} if reaper.MARK in os.environ else {}
    path = f"{PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/tmp", "PYTHONPATH": CODE, "LANG": "C.UTF-8"} | mark | dict(given)


def _call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout
