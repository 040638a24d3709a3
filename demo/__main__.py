"""Runs a supervised job and a DPO job with a service, and evaluates what DPO changed in the policy's answers.

    MODEL=… DATA=… SIZE=small KEEP=1 python -m demo

All environment variables are optional. MODEL is a base model's folder or hub id, DATA a file of preference pairs;
without them, the demo makes both. SIZE=small makes less data. KEEP=1 keeps the service running after the demo. The demo
calls the service's REST API with the unmodified `openai` client.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console

from demo.base_model import make_base_model
from demo.report import Curve, draw, print_answers, read_curves
from demo.rows import IS_COURTEOUS, Shop
from demo.service import Service
from dpo_core.data.feedback import read_groups
from dpo_core.data.jsonl import read_lines
from dpo_core.data.messages import Text
from services.cli.jobs.watch import metrics_line, watch_job
from services.cli.models.evaluations import print_evaluation, wait_until_ended

SHOWN_ANSWERS = 6
TEMPERATURE, MAX_TOKENS = 0.7, 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of the demo: how many rows it makes, how large its own base model is, and for how many epochs it
    trains.
    """

    num_things: int
    num_demonstrations: int
    num_pairs: int = 640
    hidden_size: int = 384
    num_layers: int = 3
    num_prompts: int = 64
    supervised_epochs: int = 4


SIZES = {
    "full": Size(num_things=30, num_demonstrations=2000),
    "small": Size(num_things=15, num_demonstrations=1600),
}
OWN_RATES = {"supervised": 2e-3, "dpo": 6e-5}  # learning rates for the demo's own base model with random weights
GIVEN_RATES = {"supervised": 2e-4, "dpo": 2e-5}  # learning rates for an adapter on a pretrained model


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The training files of the demo's two jobs (supervised and DPO), the prompts that both trained policies answer,
    and texts to train a tokenizer on."""

    demonstrations: Path
    pairs: Path
    prompts: list[str]
    text: list[str]  # the texts on which the demo's own tokenizer is trained


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    size, data, model = SIZES[os.environ.get("SIZE") or "full"], os.environ.get("DATA"), os.environ.get("MODEL")
    started = time.monotonic()

    def step(title: str) -> None:
        console.print(f"\n[bold]{title}[/bold]  [dim]{time.monotonic() - started:.0f} s[/dim]")

    home = Path(tempfile.mkdtemp(prefix="raydpo-demo-"))
    shop = Shop(num_things=size.num_things, num_held_out=size.num_prompts)
    rows = users_rows(Path(data), home) if data else shop_rows(shop, size, home)
    if not model:
        step("1. A base model")
        model = str(home / "base")
        weights = make_base_model(Path(model), rows.text, hidden_size=size.hidden_size, num_layers=size.num_layers)
        console.print(f"{weights / 1e6:.1f} million random weights in {model}, of which jobs train all")
    given = bool(os.environ.get("MODEL"))
    rates, adapter = (GIVEN_RATES, "auto") if given else (OWN_RATES, "none")
    step("2. The service: PostgreSQL, Ray, the control plane")
    service = Service(home, models={"base": model}, console=console)
    keep = False
    try:
        client = OpenAI(base_url=service.wait_until_ready(), api_key=(home / "api.key").read_text(), timeout=600)
        step("3. A supervised job on demonstrations")
        schedule = {"n_epochs": size.supervised_epochs, "batch_size": 32, "learning_rate": rates["supervised"]}
        supervised = train(client, console, "base", rows.demonstrations, "supervised", schedule, adapter=adapter)
        step("4. A DPO job on preference pairs, with two workers")
        schedule = {"beta": 0.5, "n_epochs": 1, "batch_size": 16, "learning_rate": rates["dpo"]}
        start = supervised.fine_tuned_model or ""
        dpo = train(client, console, start, rows.pairs, "dpo", schedule, adapter=adapter, num_workers=2)
        policies = (supervised.fine_tuned_model or "", dpo.fine_tuned_model or "")
        step("5. Both policies answer the same prompts")
        shown = rows.prompts[:SHOWN_ANSWERS]
        print_answers(console, shown, *(ask(client, console, policy, shown) for policy in policies))
        report_curves(client, console, supervised, dpo)
        step("6. Evaluations: how far has DPO moved the policy, and are its answers better?")
        evaluate(client, "drift", policies[1], rows.prompts, sampling={"max_tokens": MAX_TOKENS})
        passed = bool(data) or judge(client, console, shop, rows.prompts, *policies) or given
        keep = bool(os.environ.get("KEEP"))
    finally:
        if keep:
            service.leave()
        else:
            step("7. Stopping everything")
            service.stop()
    if keep:
        print_how_to_chat(console, service, client, dpo.fine_tuned_model or "", rows.prompts[0])
    else:
        shutil.rmtree(home, ignore_errors=True)
    step("Done")
    sys.exit(0 if passed else 1)


def shop_rows(shop: Shop, size: Size, folder: Path) -> Rows:
    """Writes training files with rows that `shop` makes to `folder`, and returns the files and prompts of the same
    shop, so that `shop` can judge the answers to them."""
    demonstrations, pairs = list(shop.demonstrations(size.num_demonstrations)), list(shop.pairs(size.num_pairs))
    return Rows(
        demonstrations=write_rows(
            folder / "demonstrations.jsonl",
            ({"messages": [*user_message(prompt), assistant_message(answer)]} for prompt, answer in demonstrations),
        ),
        pairs=write_rows(
            folder / "pairs.jsonl",
            (
                {
                    "input": {"messages": user_message(prompt)},
                    "preferred_output": [assistant_message(chosen)],
                    "non_preferred_output": [assistant_message(rejected)],
                }
                for prompt, chosen, rejected in pairs
            ),
        ),
        prompts=shop.held_out_prompts(),
        text=[text for row in [*demonstrations, *pairs] for text in row],
    )


def users_rows(file: Path, folder: Path) -> Rows:
    """Returns the rows for a demo on the user's file of preference pairs: the file itself, demonstrations made of its
    chosen answers, and its first prompts.

    The file may have any format that the service reads.
    """
    with file.open("rb") as lines:
        groups = list(read_groups(read_lines(lines)))
    if len(groups[0].completions) < 2:
        raise SystemExit(f"{file} has one answer per prompt; DATA must name a file of preference pairs.")
    messages = [(as_messages(group.prompt, "user"), as_messages(group.completions[0], "assistant")) for group in groups]
    text = [message["content"] for prompt, chosen in messages for message in [*prompt, *chosen]]
    return Rows(
        demonstrations=write_rows(
            folder / "demonstrations.jsonl", ({"messages": [*prompt, *chosen]} for prompt, chosen in messages)
        ),
        pairs=file,
        prompts=[prompt[-1]["content"] for prompt, _ in messages[:SHOWN_ANSWERS]],
        text=text,
    )


def train(
    client: OpenAI,
    console: Console,
    model: str,
    file: Path,
    method: str,
    hyperparameters: dict[str, Any],
    *,
    adapter: str,
    num_workers: int = 1,
) -> FineTuningJob:
    """Uploads a file, submits a job, shows the job's progress and returns the ended job.

    `adapter` is the option that says whether the job trains an adapter or all weights. Ends the demo if the job does
    not succeed.
    """
    with file.open("rb") as rows:
        stored = client.files.create(file=rows, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=stored.id,
        method={"type": method, method: {"hyperparameters": hyperparameters}},  # type: ignore[misc, arg-type]
        extra_body={"x_raydpo": {"num_workers": num_workers, "adapter": adapter}},
        seed=0,
    )
    job = watch_job(client, job.id, console=console)
    if job.status != "succeeded":
        raise SystemExit(f"the job is {job.status}: {job.error.message if job.error else ''}")
    return job


def ask(client: OpenAI, console: Console, model: str, prompts: Sequence[str]) -> list[str]:
    def answer(prompt: str) -> str:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], temperature=TEMPERATURE, max_tokens=MAX_TOKENS
        )
        return reply.choices[0].message.content or ""

    with console.status(f"{model} is loaded and answers"), ThreadPoolExecutor(16) as asking:
        return [answer(prompts[0]), *asking.map(answer, prompts[1:])]  # the first waits until the model is loaded


def report_curves(client: OpenAI, console: Console, supervised: FineTuningJob, dpo: FineTuningJob) -> None:
    curves: list[Curve] = [read_curves(client.files.content(job.result_files[0]).text) for job in (supervised, dpo)]
    picture = Path("demo-output").resolve() / "curves.png"
    picture.parent.mkdir(exist_ok=True)
    draw(*curves, picture)
    last = {column: values[-1] for column, values in curves[1].items()}
    console.print(f"DPO, first step: loss {curves[1]['train_loss'][0]:.6f}; last step: {metrics_line(last)}")
    console.print(f"curves: {picture}")


def evaluate(client: OpenAI, kind: str, model: str, prompts: Sequence[str], **options: Any) -> dict[str, Any]:
    """Evaluates a model on prompts, prints the results and returns the evaluation. `kind` is the kind of evaluation,
    such as `compare`, and `options` are further fields of the request. Ends the demo if the evaluation fails."""
    rows = [{"prompt": user_message(prompt)} for prompt in prompts]
    body = {"kind": kind, "model": model, "rows": rows} | options
    created: Any = client.post("/x/evaluations", body=body, cast_to=object)
    found = wait_until_ended(client, created["id"])
    print_evaluation(found)
    if found["status"] != "succeeded":
        raise SystemExit(f"the evaluation is {found['status']}: {found['error']}")
    return dict(found)


def judge(client: OpenAI, console: Console, shop: Shop, prompts: Sequence[str], before: str, after: str) -> bool:
    """Compares answers of the policy after DPO (`after`) with those of the policy before DPO (`before`). A courteous
    answer wins over a curt one.

    The demo has three goals: enough answers win, few answers lose, and enough answers are well-formed, as `shop`
    judges. Prints which goals are reached. Returns whether all are reached.
    """
    sampling = {"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}
    rule = {"type": "regex", "pattern": IS_COURTEOUS}
    found = evaluate(client, "compare", after, prompts, baseline=before, judge=rule, sampling=sampling)
    win_rate, losses = found["results"]["win_rate"], found["results"]["num_losses"] / len(prompts)
    told: Any = client.get(f"/x/evaluations/{found['id']}/items?limit={len(prompts)}", cast_to=object)
    answers = [item["found"]["answer"]["text"] for item in told["data"]]
    formed = mean(shop.is_well_formed(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    marks = {
        f"the answers after DPO win, at least {win_rate['low']:.0%} with a tie as half a win": win_rate["low"] > 0.5,
        f"at most one answer in ten loses: {losses:.0%}": losses <= 0.1,
        f"at least nine answers in ten are well-formed: {formed:.0%}": formed >= 0.9,
    }
    for mark, reached in marks.items():
        console.print(f"{'reached' if reached else 'MISSED'}: {mark}", style=None if reached else "bold red")
    return all(marks.values())


def print_how_to_chat(console: Console, service: Service, client: OpenAI, policy: str, prompt: str) -> None:
    command = Path(sys.executable).parent / "raydpo"
    console.print(f"\nThe service still runs at {client.base_url}; its key is in {service.home / 'api.key'}. Try:")
    console.print(f"  export RAYDPO_HOME={service.home}", highlight=False, soft_wrap=True)
    console.print(f"  {command} models", highlight=False, soft_wrap=True)
    console.print(f'  {command} chat {policy} "{prompt}"', highlight=False, soft_wrap=True, emoji=False)
    page = str(client.base_url).removesuffix("v1/")
    console.print(f"Or open {page} in a browser, and paste the key there.")
    console.print(f"To stop the service, run: kill {service.pid}")


def user_message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def assistant_message(answer: str) -> dict[str, str]:
    return {"role": "assistant", "content": answer}


def as_messages(text: Text, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def mean(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
