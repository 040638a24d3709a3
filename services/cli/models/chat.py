"""The `raydpo chat` command: talk to a base model or a trained policy."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.cli.client import api_command, err

if TYPE_CHECKING:
    from openai import OpenAI


def register(app: typer.Typer) -> None:
    @api_command(app)
    def chat(
        client: "OpenAI",
        model: Annotated[str, typer.Argument(help="Name of the base model or trained policy to talk to.")],
        prompt: Annotated[
            str | None,
            typer.Argument(
                help="Single question to answer. Default: hold a conversation with questions from standard input."
            ),
        ] = None,
        system: Annotated[
            str | None, typer.Option(help="System message that starts the conversation. Default: none.")
        ] = None,
        temperature: Annotated[
            float,
            typer.Option(
                help="Sampling temperature: 0 always chooses the most likely token; higher values are more random.",
                min=0.0,
                max=2.0,
            ),
        ] = 1.0,
        max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in one answer.", min=1)] = 256,
    ) -> None:
        """Talk to a model. Each answer is printed while the model generates it."""
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        while (question := prompt or _question()) is not None:
            messages.append({"role": "user", "content": question})
            stream = client.chat.completions.create(
                model=model, messages=messages, temperature=temperature, max_tokens=max_tokens, stream=True
            )
            answer = ""
            for chunk in stream:
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                answer += piece
                typer.echo(piece, nl=False)
            typer.echo()
            if prompt is not None:
                return
            messages.append({"role": "assistant", "content": answer})


def _question() -> str | None:
    """Returns the next line of standard input that is not empty, or None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            err.print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()
