"""raydpo chat: talk to a base model or a trained policy."""

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
        model: Annotated[str, typer.Argument(help="A base model or a trained policy.")],
        prompt: Annotated[
            str | None, typer.Argument(help="One question. Default: a conversation, from standard input.")
        ] = None,
        system: Annotated[
            str | None, typer.Option(help="A system message before the conversation. Default: none.")
        ] = None,
        temperature: Annotated[
            float, typer.Option(help="0 always takes the likeliest token; higher is more random.", min=0.0, max=2.0)
        ] = 1.0,
        max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.", min=1)] = 256,
    ) -> None:
        """Talk to a model. Its answers are printed as they are written."""
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
    """The next line that is not empty; None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            err.print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()
