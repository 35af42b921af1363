"""`genarm-fast serve`: vLLM's OpenAI server with guided decoding, or a plan of the memory that it would take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from genarm_fast.cli import Parser
from genarm_fast.cli.loading import arm_spec, resolve

PASSES_ON = True  # unknown options go to vLLM
PLANNED = {  # vLLM's options that a plan depends on
    "--tensor-parallel-size": ("-tp", int, 1),
    "--pipeline-parallel-size": ("-pp", int, 1),
    "--gpu-memory-utilization": (None, float, 0.92),
    "--max-model-len": (None, int, 4096),
    "--kv-cache-dtype": (None, str, "auto"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "genarm-fast serve --base MODEL --arm [NAME:]MODEL[=WEIGHT] [options] [vLLM's own options]"
    parser.add_argument("--base", required=True, metavar="MODEL", help="hub id, local folder, or `demo`")
    parser.add_argument(
        "--arm",
        type=arm_spec,
        action="append",
        required=True,
        metavar="[NAME:]MODEL[=WEIGHT]",
        help="an ARM: hub id, model folder, or folder of a LoRA adapter of the base; repeat for several "
        "(default weight: 1)",
    )
    parser.add_argument(
        "--weight-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the lowest and the highest weight that a request may ask for (default: any)",
    )
    plan = parser.add_argument_group("planning")
    plan.add_argument(
        "--plan", action="store_true", help="only say what base, ARMs and caches take of each GPU; needs no vLLM"
    )
    plan.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of a GPU, for --plan (default: 80)")


def run(args: argparse.Namespace) -> int:
    from genarm_fast.models.arm import ARM

    base = resolve(args.base)
    arms = [ARM(resolve(spec.model), weight=spec.weight, name=spec.name) for spec in args.arm]
    if args.plan:
        print(planned(base, arms, args.gpu_memory * 1e9, args.rest))
        return 0
    if find_spec("vllm") is None:
        raise RuntimeError("vLLM is not installed here: pip install 'genarm-fast[vllm]'")
    return serve(base, arms, args.weight_range, args.rest)


def planned(base: str, arms: list[Any], gpu_memory: float, rest: list[str]) -> str:
    """Return a plan's table, computed with the options of vLLM that it depends on."""
    from genarm_fast.integrations.vllm.plan import plan

    parser = Parser(prog="genarm-fast serve --plan", add_help=False, allow_abbrev=False)
    for option, (short, kind, default) in PLANNED.items():
        parser.add_argument(option, *([short] if short else []), type=kind, default=default)
    asked, _ = parser.parse_known_args(rest)
    return plan(
        base,
        arms,
        gpu_memory=gpu_memory,
        tensor_parallel=asked.tensor_parallel_size,
        pipeline_parallel=asked.pipeline_parallel_size,
        utilization=asked.gpu_memory_utilization,
        cache_bytes=1 if "fp8" in asked.kv_cache_dtype else 2,
    ).table(asked.max_model_len)


def serve(base: str, arms: list[Any], weight_range: tuple[float, float] | None, rest: list[str]) -> int:
    """Run vLLM's server until it is stopped. Its processes start afresh, so they find our plugin by themselves."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from genarm_fast.integrations.vllm.arguments import served_arguments

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="genarm-fast serve ... [vLLM's own options]")).parse_args(rest)
    for name in ("model_tag", "config"):
        if getattr(args, name, None):
            raise ValueError(f"{getattr(args, name)}: expected options alone; the model is --base")
    served, settings = served_arguments(base, arms, weight_range=weight_range, hf_overrides=args.hf_overrides)
    for name, value in settings.items():
        setattr(args, name, value)
    with TemporaryDirectory() as folder:
        if (template := template_of(served.arms, args)) is not None:
            # Given as a text, vLLM would unescape the template.
            args.chat_template = os.path.join(folder, "chat_template.jinja")
            Path(args.chat_template).write_text(template, encoding="utf-8")
        validate_parsed_serve_args(args)
        if not args.headless:
            print(how_to_call(args, base, dict(zip(served.names, served.defaults))), file=sys.stderr, flush=True)
        ServeSubcommand.cmd(args)
    return 0


def template_of(arms: Sequence[Any], args: Any) -> str | None:
    """Return the base's chat template with the arguments of the ARMs' training; None if there are no such arguments.

    args: vLLM's arguments; only `model`, `tokenizer`, `tokenizer_revision`, `trust_remote_code` and `chat_template` are
    read.

    Raises:
        ValueError: ARMs that were trained with different values, a base without a chat template, or a `--chat-template`
            together with such ARMs.
    """
    from genarm_fast.integrations.vllm.prompts import load_base_tokenizer, pinned_template, trained_arguments
    from genarm_fast.text.templates import default_template

    trained = trained_arguments(arms)
    if not trained:
        return None
    if args.chat_template is not None:
        raise ValueError(
            f"--chat-template: expected none, as ARMs were trained with chat_template_kwargs={trained!r:.60} in the"
            " base's own"
        )
    trusted = {"revision": args.tokenizer_revision, "trust_remote_code": args.trust_remote_code}
    template = default_template(load_base_tokenizer(args.tokenizer or args.model, **trusted))
    if template is None:
        raise ValueError(
            f"{args.model}: expected a chat template, as ARMs were trained with chat_template_kwargs={trained!r:.60}"
        )
    return pinned_template(template, trained)


def how_to_call(args: Any, base: str, weights: dict[str, float]) -> str:
    """Return a request that steers, as a user types it."""
    model = (args.served_model_name or [base])[0]
    host = args.host if args.host not in (None, "0.0.0.0", "::") else "localhost"
    asked = ", ".join(f'"arm_weights.{name}": {weight:g}' for name, weight in weights.items())
    return (
        f"genarm-fast: ARMs {', '.join(weights)}. Once the server is up:\n"
        f"  curl http://{host}:{args.port}/v1/chat/completions -H 'Content-Type: application/json' -d '{{\n"
        f'    "model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "seed": 1,\n'
        f'    "vllm_xargs": {{{asked}}}}}\''
    )
