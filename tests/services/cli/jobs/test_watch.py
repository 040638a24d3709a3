import threading
import time
from io import StringIO

import pytest
from openai import OpenAI
from rich.console import Console

from services.cli.jobs.watch import message_line, metrics_line, watch_job


def test_metrics_line_shows_what_is_there():
    dpo = {"step": 3, "train_loss": 0.51294, "train_reward_margin": 0.4821, "train_reward_accuracy": 0.9688}
    assert metrics_line(dpo) == "loss 0.5129  margin 0.482  accuracy 97%"
    assert metrics_line({"step": 3, "train_loss": 2.0, "train_reward_margin": None}) == "loss 2.0000"


def test_a_message_is_shown_as_it_is_and_moves_no_cursor():
    """The message quotes a row with terminal codes."""
    said = StringIO()
    told = {"created_at": 0, "level": "warn", "message": "Line 3: the field /\x1b[2J[/b] is no key"}
    Console(file=said, width=200).print(message_line(told))
    assert said.getvalue().rstrip().endswith("Line 3: the field /\ufffd[2J[/b] is no key")


@pytest.mark.slow
def test_a_job_is_watched_across_a_restart_of_the_service(up, home, base_model, tmp_path):
    """Every event is shown once, although the stream breaks off and is resumed."""
    first = up("--model", f"tiny={base_model}")
    first.wait_until_ready()
    port = first.url.split(":")[2].split("/")[0]
    client = OpenAI(base_url=first.url, api_key=(home / "api.key").read_text(), max_retries=8)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 10)
    with rows.open("rb") as file:
        file_id = client.files.create(file=file, purpose="fine-tune").id
    job_id = client.fine_tuning.jobs.create(model="tiny", training_file=file_id, method={"type": "dpo"}).id
    said = StringIO()
    ended = []
    watching = threading.Thread(
        target=lambda: ended.append(watch_job(client, job_id, console=Console(file=said, width=200)))
    )
    watching.start()
    while "Created" not in said.getvalue():
        assert watching.is_alive()
        time.sleep(0.05)
    began = time.monotonic()
    first.stop()
    assert time.monotonic() - began < 60  # an open stream does not hold the service up
    up("--model", f"tiny={base_model}", "--port", port).wait_until_ready()
    client.fine_tuning.jobs.cancel(job_id)
    watching.join(300)
    assert ended[0].status == "cancelled"
    for sentence in ("Created fine-tuning job", "Cancellation requested", "The job was cancelled"):
        assert said.getvalue().count(sentence) == 1
