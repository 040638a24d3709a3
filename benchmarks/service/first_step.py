"""Measures the time from a job's submission to its first training step, and from the job's end to its policy's first
answer.

    python -m benchmarks.service.first_step --rows 64 --jobs 2 --picture first-step.png

Starts `raydpo up` with a new home folder, waits until the machine is idle, and submits one job after the other. The
first job is cold, the later jobs are warm. Prints and draws the processes that worked for a job. With `--answer`, sends
a question to the policy of the last job.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
from rich.console import Console

from benchmarks.processes import Life, Recorder, machine_cpu_seconds
from benchmarks.rows import as_pairs, dialogues
from demo.base_model import make_base_model
from demo.rows import Shop
from demo.service import Service
from services.cli.jobs.watch import follow

QUIET_CPU = 0.3  # share of all cores below which the machine is idle; an idle Ray takes 0.15 of two slow cores
QUIET_SECONDS = 60
SIZES: dict[str, dict[str, Any]] = {
    "40M": {"hidden_size": 512, "num_layers": 8, "vocabulary": 32_000},
    "demo": {"hidden_size": 384, "num_layers": 3},
}


@dataclass
class Run:
    """The times of one job's events (`marks`), and the processes that worked for the job (`lives`)."""

    marks: dict[str, tuple[float, float]]  # event -> wall seconds since the submission, CPU seconds of the machine
    lives: list[Life]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="Number of rows per job. Default: %(default)s.")
    parser.add_argument("--data", type=Path, help="File of preference pairs to train on. Default: random pairs.")
    parser.add_argument("--model", choices=SIZES, default="40M", help="Size of the base model. Default: %(default)s.")
    jobs = "Number of jobs; the first job is cold, the later ones are warm. Default: %(default)s."
    parser.add_argument("--jobs", type=int, default=2, help=jobs)
    parser.add_argument("--batch-size", type=int, default=8, help="Rows per optimizer step. Default: %(default)s.")
    answer = "Also measure the time to the first answer of the last job's policy."
    parser.add_argument("--answer", action="store_true", help=answer)
    picture = "PNG file for a drawing of the last job's processes. Default: no file is written."
    parser.add_argument("--picture", type=Path, help=picture)
    parser.add_argument("--json", type=Path, help="JSON file for the times. Default: no file is written.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-first-step-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # If root starts PostgreSQL, PostgreSQL runs as another user, which must reach its data.
        os.chmod(folder, 0o755)
        model, files = prepare(folder, options)
        home = folder / "home"
        home.mkdir()
        service = Service(home, models={"base": str(model)}, console=Console(stderr=True))
        try:
            url, recorder = service.wait_until_ready(), Recorder(str(home))
            client = openai.OpenAI(base_url=url, api_key=(home / "api.key").read_text(), timeout=600)
            runs = [run(client, recorder, file, options, last=file is files[-1]) for file in files]
        finally:
            service.stop()
    for number, result in enumerate(runs):
        show(result, "cold" if number == 0 else f"warm, {number}")
    if options.picture:
        draw(runs[-1], options.picture)
    if options.json:
        options.json.write_text(json.dumps([result.marks for result in runs], indent=1))


def prepare(folder: Path, options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """Makes a base model, and a file of training rows for each job. Returns the model's folder and the files.

    No row occurs in two files, so that no job finds its rows in the service's cache.
    """
    model, count = folder / "model", options.rows * options.jobs
    if options.data:
        lines = options.data.read_text().splitlines()[:count]
        if len(lines) < count:
            raise SystemExit(
                f"{options.data} has {len(lines)} rows; --rows times --jobs is {count}. Lower one of them."
            )
        make_base_model(model, lines, **SIZES[options.model])
    elif options.model == "40M":
        lines = [json.dumps(pair) for row in dialogues(count, num_completions=2) for pair in as_pairs(row)]
        make_base_model(model, lines, **SIZES["40M"])
    else:
        pairs = list(Shop(num_things=15, num_held_out=8).pairs(count))
        lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in pairs]
        make_base_model(model, [text for pair in pairs for text in pair], **SIZES["demo"])
    files = [folder / f"{number}.jsonl" for number in range(options.jobs)]
    for number, file in enumerate(files):
        file.write_text("\n".join(lines[number * options.rows : (number + 1) * options.rows]) + "\n")
    return model, files


def wait_until_quiet() -> None:
    deadline = time.monotonic() + QUIET_SECONDS
    while psutil.cpu_percent(2) > 100 * QUIET_CPU:
        if time.monotonic() > deadline:
            print("The machine is not idle, so the figures include other processes.", file=sys.stderr)
            return


def run(client: openai.OpenAI, recorder: Recorder, file: Path, options: argparse.Namespace, *, last: bool) -> Run:
    wait_until_quiet()
    marks = dict[str, tuple[float, float]]()
    with file.open("rb") as rows:
        stored = client.files.create(file=rows, purpose="fine-tune")
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": options.batch_size}}}
    began, spent = time.time(), machine_cpu_seconds()

    def mark(what: str) -> None:
        marks.setdefault(what, (time.time() - began, machine_cpu_seconds() - spent))

    with recorder.recording() as lives:
        job = client.fine_tuning.jobs.create(model="base", training_file=stored.id, method=method)  # type: ignore[arg-type]
        for update in follow(client, job.id):
            _mark_event(update, mark)
        ended = client.fine_tuning.jobs.retrieve(job.id)
        if ended.status != "succeeded":
            raise SystemExit(f"the job is {ended.status}: {ended.error}")
        mark("end of the job")
        if options.answer and last:
            messages = [{"role": "user", "content": "Where do I find a red saw?"}]
            client.chat.completions.create(model=ended.fine_tuned_model, messages=messages, max_tokens=8)  # type: ignore[arg-type]
            mark("first answer")
    return Run(marks, [life.since(began) for life in lives])


def _mark_event(update: dict[str, Any], mark: Callable[[str], None]) -> None:
    match update["object"]:
        case "fine_tuning.job.progress":
            if update["progress"]:
                mark(f"{update['progress']['stage']} begins")
        case "fine_tuning.job.event" if update["type"] == "metrics":
            mark("first step")
        case "fine_tuning.job.event" if update["message"].startswith("Fine-tuning job started"):
            mark("workers are ready")


def show(result: Run, title: str) -> None:
    print(f"\n{title}\n{'seconds':>9} {'CPU s':>7}")
    for what, (seconds, cpu) in result.marks.items():
        print(f"{seconds:9.1f} {cpu:7.1f}  {what}")
    print(f"\n{'began':>7} {'imported':>8} {'useful':>7} {'ended':>7} {'CPU s':>7} {'MB':>6}  process")
    for life in sorted(result.lives, key=lambda life: life.began):
        if life.cpu_seconds < 0.05:
            continue
        times = "".join(
            f"{'' if at is None else f'{at:.1f}':>8}" for at in (life.began, life.imported, life.useful, life.ended)
        )
        print(f"{times} {life.cpu_seconds:7.1f} {life.peak_bytes / 1e6:6.0f}  {life.name}")


def draw(result: Run, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lives = sorted((life for life in result.lives if life.cpu_seconds >= 0.3), key=lambda life: life.began)
    end = max(seconds for seconds, _ in result.marks.values())
    figure, axes = pyplot.subplots(figsize=(11, 1 + 0.25 * len(lives)))
    for row, life in enumerate(lives):
        start, stop = max(0.0, life.began), min(end, life.ended or end)
        ready = min(stop, max(start, life.imported or start))
        axes.barh(row, ready - start, left=start, color="tab:orange")
        axes.barh(row, stop - ready, left=ready, color="tab:blue", alpha=0.5)
        axes.text(stop, row, f" {life.name}: {life.cpu_seconds:.1f} CPU s", va="center", fontsize=7)
    for what, (seconds, _) in result.marks.items():
        axes.axvline(seconds, color="gray", linewidth=0.6)
        axes.text(seconds, -1.2, what, rotation=30, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="seconds since the job was submitted; orange: starts and imports", yticks=[], xlim=(0, 1.35 * end))
    figure.savefig(picture, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
