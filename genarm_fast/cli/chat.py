"""`genarm-fast chat`: a conversation whose sampling parameters, weights included, can change between answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from genarm_fast.cli.display import console, reward_table
from genarm_fast.cli.loading import add_loading_arguments, arm_names, load
from genarm_fast.cli.options import add_sampling_arguments, parse_field, sampling_fields, sampling_params, weight_text
from genarm_fast.cli.process import typed
from genarm_fast.errors import GenerationError
from genarm_fast.params import SamplingParams, check_weights

if TYPE_CHECKING:
    from genarm_fast.api import GenARM

UNUSED = ("n", "logprobs")
HISTORY_LINES = 1000
HELP = """\
/weights W [W ...]  weights of the ARMs from the next answer on; one number is for all of them
/temperature X      likewise /seed N, /top_p X, /max_new_tokens N and every other sampling parameter;
                    without a value: show it; with `none`: its default
/rewards on         show the rewards of each answer; /rewards off
/retry              answer the last message again
/system TEXT        set the system message and start over
/reset              forget the conversation
/help, /quit        Ctrl-C stops an answer, Ctrl-D quits"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for models and sampling. All other settings are commands in the chat."""
    parser.epilog = f"{HELP}\n\n{parser.epilog}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_loading_arguments(parser, in_chat=True)
    add_sampling_arguments(parser, without=UNUSED, max_new_tokens=512)


def run(args: argparse.Namespace) -> int:
    """Talk until /quit or the end of the input: a terminal, or a pipe with one message or command on each line."""
    params = sampling_params(args, arm_names(args.arm))
    model = load(args)
    for member in model.members:
        if member.chat_template is None:
            raise ValueError(f"{member.name}: expected a model with a chat template, or --chat-template")
    arguments = {name: getattr(args, name) for name in ("tools", "chat_template_kwargs")}
    chat = ChatSession(model, params, args.system, arguments)
    lines = _typed_lines() if sys.stdin.isatty() else (typed(line).rstrip("\n") for line in sys.stdin)
    if sys.stdin.isatty():
        chat.console.print(f"base {args.base}, {chat.describe('weights')}; /help lists the commands", style="dim")
    for line in lines:
        if line.strip() == "/quit":
            break
        chat.take(line)
    return 0


class ChatSession:
    """A conversation. Answers go to stdout, all other output to stderr."""

    def __init__(
        self, model: GenARM, params: SamplingParams, system: str | None, arguments: dict[str, Any] | None = None
    ) -> None:
        self.model, self.arguments = model, arguments or {}
        self.params = params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.console = console(stderr=True)

    def take(self, line: str) -> None:
        """Answer a message, or carry out a command."""
        try:
            if line.startswith("/"):
                name, _, text = line[1:].partition(" ")
                self.command(name, text.strip())
            elif line.strip():
                self.answer([*self.messages, {"role": "user", "content": line}])
        except (ValueError, TypeError, GenerationError) as error:
            self.console.print(str(error), style="red")
        except KeyboardInterrupt:  # before an answer's first token, or after its last
            print()

    def command(self, name: str, text: str) -> None:
        """Carry out a command. Raises ValueError for an unknown command or a bad value."""
        fields = {field.name: field for field in sampling_fields(UNUSED)}
        if name == "help":
            self.console.print(HELP)
        elif name == "reset":
            self.messages = []
        elif name == "system":
            self.system, self.messages = text or None, []
        elif name == "retry":
            if not self.messages:
                raise ValueError("/retry: expected a message before it")
            self.answer(self.messages[:-1])
        elif name in fields:
            if text:
                value = parse_field(fields[name], text)
                if name == "weights" and value is not None:
                    check_weights(value, len(self.model.arms))
                self.params = self.params.override(**{name: value})
            self.console.print(self.describe(name), style="dim")
        else:
            raise ValueError(f"/{name}: expected a command that /help lists")

    def answer(self, messages: list[dict[str, str]]) -> None:
        """Stream an answer. Ctrl-C keeps the text so far. The conversation does not change if the answer fails."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        chat = [*system, *messages]
        with self.model.stream(chat, self.params, **self.arguments) as stream:
            try:
                for chunk in stream:
                    print(chunk.text, end="", flush=True)
            except KeyboardInterrupt:
                pass
            finally:
                print()
        output = stream.output
        if output.finish_reason != "stop":
            tokens = len(output.token_ids)
            self.console.print(f"({output.finish_reason} after {tokens} token{'s' * (tokens != 1)})", style="dim")
        self.messages = [*messages, {"role": "assistant", "content": output.text}]
        if output.rewards:
            self.console.print(reward_table(output.rewards))

    def describe(self, name: str) -> str:
        """Return a parameter and its value as text, weights by ARM."""
        value = getattr(self.params, name)
        if isinstance(value, bool):
            return f"{name}: {'on' if value else 'off'}"
        if name != "weights":
            return f"{name}: {value}"
        weights = zip(self.model.arm_names, self.model.expand_weights(value))
        return "weights: " + (", ".join(f"{arm}={weight_text(weight)}" for arm, weight in weights) or "no ARM")


def _typed_lines() -> Iterator[str]:
    """Yield lines typed at a terminal. Their history is kept from chat to chat."""
    import readline  # gives input() its line editing

    from genarm_fast.utils.records import cache_dir

    history = cache_dir() / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    with suppress(OSError):  # no history yet
        readline.read_history_file(history)
    try:
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:  # noqa: PERF203
                print()  # drops the line
    except EOFError:
        print()
    finally:
        with suppress(OSError):  # a chat needs no writable cache
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)
