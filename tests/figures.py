"""Prints what a run of all tests cost, in wall time and CPU seconds of the machine, beside what it costs elsewhere."""

import time
from collections import Counter

import pytest

from benchmarks.processes import machine_cpu_seconds

# Of `make test` on two cores, in wall and CPU seconds.
KNOWN = {"AMD EPYC without AMX": (1637, 2614)}
MUCH = 1.5  # times the most that is known, beyond which the files are named
NUM_NAMED = 10


class Figures:
    """A plugin of pytest that adds up the seconds of all tests. It runs in the process to which the others report."""

    def __init__(self, config: pytest.Config) -> None:
        self._began, self._cpu = time.monotonic(), machine_cpu_seconds()
        self._seconds = Counter[str]()
        chosen = config.option.keyword or config.getoption("lf", False)  # without a cache pytest has no lf
        self._is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        wall, cpu = time.monotonic() - self._began, machine_cpu_seconds() - self._cpu
        terminalreporter.section("figures")
        terminalreporter.line(f"this run: {wall:.0f} s, {cpu:.0f} CPU seconds of the whole machine")
        if not self._is_whole:
            return
        for machine, (known_wall, known_cpu) in KNOWN.items():
            terminalreporter.line(f"two cores, {machine}: {known_wall} s, {known_cpu} CPU seconds")
        if cpu > MUCH * max(known_cpu for _, known_cpu in KNOWN.values()):
            terminalreporter.line("That is much. The files that took longest, in seconds:")
            for file, seconds in self._seconds.most_common(NUM_NAMED):
                terminalreporter.line(f"{seconds:8.0f}  {file}")
