"""The `raydpo evaluations lm-eval` command: runs tasks of EleutherAI's lm-evaluation-harness on a model of the service.

The harness, called lm_eval, is a program with an environment of its own. It runs on the user's machine, and asks the
model through the service's OpenAI routes.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer
from rich.status import Status

from services.cli.client import api_command, err, fail, message_of, safe

if TYPE_CHECKING:
    from openai import OpenAI

REQUIREMENT = "lm_eval[api,ifeval]==0.4.13"  # the one of the extra `lm-eval`
NUM_CONCURRENT = 8  # requests at a time, as many as an evaluation in the service sends
ANSWER_SECONDS = 600  # the service waits as long for a model's answer
TRIES = 12  # of a request. The pauses between them add up to 76 seconds, so a limit of tokens per minute has passed
LOAD_SECONDS = 1800.0  # how long the model may take to load before the command gives up


def register(app: typer.Typer) -> None:
    @api_command(app, "lm-eval")
    def lm_eval(
        client: "OpenAI",
        model: Annotated[str, typer.Argument(help="Name of the policy, checkpoint or base model to evaluate.")],
        tasks: Annotated[
            str, typer.Option(help="Names of lm_eval's tasks, separated by commas, such as gsm8k,ifeval.")
        ],
        options: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="LM_EVAL_OPTION",
                help="Further options of `lm-eval run`, after `--`, such as `-- --limit 100 --include_path my-tasks`.",
            ),
        ] = None,
        tokenizer: Annotated[
            str | None,
            typer.Option(
                help="The model's tokenizer, as a local folder or an id on the Hugging Face hub. With a tokenizer, "
                "lm_eval sends token ids to /v1/completions, and all tasks work. Default: none; lm_eval sends messages "
                "to /v1/chat/completions, and tasks that ask how likely an answer is, as multiple choice does, fail."
            ),
        ] = None,
        output: Annotated[Path, typer.Option(help="Folder to write lm_eval's results and all answers to.")] = Path(
            "lm-eval"
        ),
    ) -> None:
        """Run tasks of EleutherAI's lm-evaluation-harness (lm_eval) on a model, and print lm_eval's table of results.

        lm_eval must be installed on this machine. If the command is interrupted, run it again: lm_eval continues with
        the answers that it has.
        """
        program = _program()
        _wait_for_an_answer(client, model, is_chat=tokenizer is None)
        service = sha256(str(client.base_url).encode()).hexdigest()[:8]  # another one has other answers of this name
        unfinished = output / f"{quote(model, safe='')}.{service}.unfinished"
        command = [program, "run", *_model_options(client, model, tokenizer), "--tasks", tasks]
        command += ["--output_path", str(output), "--log_samples", "--use_cache", str(unfinished), *(options or [])]
        ended = subprocess.run(command, env=os.environ | {"OPENAI_API_KEY": client.api_key})
        if ended.returncode:
            advice = "" if tokenizer else " Tasks that ask how likely answers are need --tokenizer."
            fail(f"lm_eval ended with status {ended.returncode}. The same command continues where it stopped.{advice}")
        Path(f"{unfinished}_rank0.db").unlink(missing_ok=True)  # a later run asks the model anew


def _program() -> str:
    """Returns the path of the program `lm-eval`, which lies beside this Python interpreter or in PATH.

    Exits with an error if there is none.
    """
    beside = str(Path(sys.executable).parent)
    return shutil.which("lm-eval", path=os.pathsep.join([beside, os.environ.get("PATH", "")])) or fail(
        f"the program lm-eval was not found; install it in an environment of its own, with `uv tool install "
        f"'{REQUIREMENT}' --with transformers` or as docs/use/evaluations.md says."
    )


def _wait_for_an_answer(client: "OpenAI", model: str, *, is_chat: bool) -> None:
    """Asks the model for one token, on the route that lm_eval will use, until the model is loaded and answers.

    Exits with the service's own message if the service refuses the request; lm_eval would repeat such a request.
    """
    from openai import APIStatusError

    once, deadline = client.with_options(max_retries=0), time.monotonic() + LOAD_SECONDS
    with Status(f"waiting until {model} answers", console=err) as status:
        while True:
            try:
                if is_chat:
                    once.chat.completions.create(model=model, messages=[{"role": "user", "content": "?"}], max_tokens=1)
                else:
                    once.completions.create(model=model, prompt="?", max_tokens=1)
                return
            except APIStatusError as error:
                is_final = error.response.headers.get("x-should-retry") == "false"
                if error.status_code not in (429, 503) or is_final or time.monotonic() > deadline:
                    raise
                status.update(safe(message_of(error)))
                time.sleep(float(error.response.headers.get("retry-after", 1)))


def _model_options(client: "OpenAI", model: str, tokenizer: str | None) -> list[str]:
    """Returns the options of `lm-eval run` that name the model, and say how to ask the model."""
    asked = {"model": model, "num_concurrent": NUM_CONCURRENT, "max_retries": TRIES, "timeout": ANSWER_SECONDS}
    if tokenizer is None:
        asked |= {"base_url": f"{client.base_url}chat/completions"}
        return ["--model", "local-chat-completions", "--apply_chat_template", "--model_args", json.dumps(asked)]
    asked |= {"base_url": f"{client.base_url}completions", "tokenizer": tokenizer, "tokenizer_backend": "huggingface"}
    return ["--model", "local-completions", "--model_args", json.dumps(asked)]
