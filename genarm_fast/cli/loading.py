"""The options that name the models and how to load them, and the loading itself."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from genarm_fast.cli.options import json_object, tools_list, unescaped
from genarm_fast.params import check_weights
from genarm_fast.utils.collector import collector_waits
from genarm_fast.utils.names import unique_names

if TYPE_CHECKING:
    from genarm_fast.api import GenARM
    from genarm_fast.text.given import Prompt

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ArmSpec:
    """The value of one `--arm`. name None: the ARM gets the last part of its path as name."""

    model: str
    weight: float
    name: str | None


def arm_spec(text: str) -> ArmSpec:
    """Parse `[NAME:]MODEL[=WEIGHT]`."""
    model, weight = text, 1.0
    head, found, tail = text.rpartition("=")
    if found and not os.path.exists(text):  # a folder may have "=" in its name
        try:
            model, weight = head, float(tail)
            check_weights(weight)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number after '=', got {tail!r}") from None
    match = re.fullmatch(r"([\w.-]+):(.+)", model)
    name = None
    if match and match[1] != "demo":
        name, model = match.groups()
    if not model:
        raise argparse.ArgumentTypeError(f"{text!r}: expected [NAME:]MODEL[=WEIGHT]")
    return ArmSpec(model, weight, name)


def arm_names(specs: Sequence[ArmSpec]) -> list[str]:
    """Return the names that loading gives to the ARMs.

    Raises:
        ValueError: as `unique_names`.
        FileNotFoundError: a folder that does not exist.
    """
    return unique_names([spec.name for spec in specs], [resolve(spec.model) for spec in specs])


def add_loading_arguments(
    parser: argparse.ArgumentParser, *, in_chat: bool = False, generates: bool = True, batches: bool = True
) -> None:
    """Add the options for models and loading.

    in_chat: whether it is a chat, which has neither raw prompts nor batches. generates: whether the command may draft.
    batches: whether to add the option for the batch size.
    """
    group = parser.add_argument_group("models")
    group.add_argument("--base", required=True, metavar="MODEL", help="hub id, local folder, or `demo` (SmolLM2-135M)")
    group.add_argument(
        "--arm",
        type=arm_spec,
        action="append",
        default=[],
        metavar="[NAME:]MODEL[=WEIGHT]",
        help="an ARM: hub id, model folder, adapter folder, or demo:positive, demo:concise, demo:helpful, "
        "demo:harmless, demo:small; repeat for several (default weight: 1)",
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="precision of all members (default: the files')")
    group.add_argument(
        "--quantization",
        choices=("exact", "int8", "int4"),
        help="hold the weights of bfloat16 members on the CPU in fewer bits: exact (nothing is lost), int8, int4",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is any)")
    group.add_argument("--device-map", metavar="MAP", help="spread each member over devices: auto, balanced, ...")
    group.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, flash_attention_2, ...")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the base's folder or repository brings"
    )
    group.add_argument(
        "--arm-trust-remote-code",
        action="append",
        default=[],
        metavar="ARM",
        help="the same for an ARM, by its name or model; repeat for several",
    )
    if generates:
        group.add_argument(
            "--speculation",
            choices=("auto", "off"),
            help="draft tokens where that is faster; it changes no token (default: auto; off in a job with --input, "
            "whose full batches gain little, and whose reported numbers then do not depend on timing)",
        )
    else:
        parser.set_defaults(speculation="off")
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file: the base's, and ARMs' without one"
    )
    group.add_argument(
        "--tools",
        type=tools_list,
        metavar="FILE|JSON",
        help="tools that the chat templates get: a JSON list, or a file with one",
    )
    group.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="what the chat templates get besides, e.g. '{\"enable_thinking\": false}'",
    )
    if in_chat:
        parser.set_defaults(prompt_template=None, arm_prompt_template=None, max_batch_size=1, cache_bytes=None)
        return
    group.add_argument(
        "--prompt-template", type=unescaped, metavar="TEXT", help="'...{prompt}...': the base's, around raw prompts"
    )
    group.add_argument(
        "--arm-prompt-template", type=unescaped, metavar="TEXT", help="the ARMs' (default: what training recorded)"
    )
    if batches:
        group.add_argument("--max-batch-size", type=int, default=16, metavar="N", help="decoded together (default: 16)")
    group.add_argument("--cache-bytes", type=int, metavar="N", help="most for key-value caches (default: no limit)")


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that turn a text prompt into a member's prompt."""
    group = parser.add_argument_group("prompt format")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--chat",
        action="store_true",
        default=None,
        help="a text prompt is a user's message (default where each member has a chat template and no prompt template)",
    )
    kind.add_argument("--raw", action="store_false", dest="chat", help="a text prompt is continued as it stands")
    group.add_argument("--system", metavar="TEXT", help="system message of a chat")


def is_chat(args: argparse.Namespace, model: GenARM) -> bool:
    """Whether a text prompt is a user's message (--chat), not text to be continued (--raw)."""
    if args.chat is not None:
        return args.chat
    # The other members read prompts in the format of their training.
    free = [member for member in model.members if member.prompt_format is None]
    return all(member.chat_template and member.prompt_template is None for member in free)


def formatted(args: argparse.Namespace, model: GenARM, prompt: Prompt) -> Prompt:
    """Return a text prompt as chat messages if the options ask for a chat; other prompts as they are."""
    given = {"tools": args.tools, "chat_template_kwargs": args.chat_template_kwargs}
    given = {name: value for name, value in given.items() if value is not None}
    if not isinstance(prompt, str) and (not given or not isinstance(prompt[0], dict)):
        return prompt
    if not prompt:
        raise ValueError("prompt: expected text, got none")
    if isinstance(prompt, str):
        from genarm_fast.text.messages import check_plain

        check_plain("prompts[0]", prompt)
    if not isinstance(prompt, str) or is_chat(args, model):
        from genarm_fast.text.given import as_prompts

        system: list[Any] = [{"role": "system", "content": args.system}] if args.system else []
        messages = [*system, {"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return as_prompts([messages], **given)[0]
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option} {value!r:.80}: expected a chat, but text is continued as it stands (see --chat)")
    if args.system:
        raise ValueError(f"--system {args.system!r}: expected a chat, but text is continued as it stands (see --chat)")
    return prompt


def read_text(path: Path) -> str:
    """Return the text of a file, without the byte order mark that Windows writes.

    Raises:
        ValueError: a file that is not UTF-8. The message names it.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text: {error}") from error


def load(args: argparse.Namespace) -> GenARM:
    """Load the base and ARMs that the options name. Raises FileNotFoundError for a model that is found nowhere."""
    base = resolve(args.base)
    arms = [(spec, resolve(spec.model)) for spec in args.arm]
    trusted = set(args.arm_trust_remote_code)
    if unknown := trusted - {name for spec in args.arm for name in (spec.name, spec.model, Path(spec.model).name)}:
        raise ValueError(f"--arm-trust-remote-code {min(unknown)}: expected the name or the model of an --arm")
    chat_template = read_text(args.chat_template) if args.chat_template else None
    console = Console(stderr=True)
    with console.status("loading torch and transformers ..."), collector_waits():
        import transformers

        from genarm_fast.api import GenARM
        from genarm_fast.models.arm import ARM
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        return GenARM.from_pretrained(
            base,
            [
                ARM(
                    model,
                    weight=spec.weight,
                    name=spec.name,
                    prompt_template=args.arm_prompt_template,
                    trust_remote_code=bool(trusted & {spec.name, spec.model, Path(spec.model).name}),
                )
                for spec, model in arms
            ],
            trust_remote_code=args.trust_remote_code,
            prompt_template=args.prompt_template,
            chat_template=chat_template,
            dtype=args.dtype,
            quantization=args.quantization,
            device=args.device,
            device_map=args.device_map,
            attn_implementation=args.attn_implementation,
            max_batch_size=args.max_batch_size,
            cache_bytes=args.cache_bytes,
            speculation=args.speculation or ("off" if getattr(args, "input", None) else "auto"),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{_hint(model for _, model in arms)}") from error


def _hint(models: Iterable[str]) -> str:
    """Return a hint for names that match no model: similar names of demo ARMs."""
    from genarm_fast import demo

    lost = [model for model in models if not os.path.isdir(model)]
    near = {f"demo:{name}" for model in lost for name in get_close_matches(model, demo.arm_names())}
    return f"; is {' or '.join(sorted(near))} meant?" if near else ""


def resolve(source: str) -> str:
    """Return the folder or hub id for a name on the command line. The demo's base is fetched if it is missing."""
    if source == "demo" or source.startswith("demo:"):
        from genarm_fast import demo

        return str(demo.base() if source == "demo" else demo.arm(source.removeprefix("demo:")))
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"{source}: expected a model's folder, found none there")
    return source
