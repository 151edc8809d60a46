"""The command line of the simulated engine: vLLM's flags where it has them, checked when they are read."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import msgspec

from workers.simulated.core import EngineConfig
from workers.simulated.events import KVEventsConfig
from workers.simulated.step_time import PRESETS, StepTime

PROGRAM = "herd engine simulated"

DEFAULT_PRESET = "8b-h100"

# The context of the models that the presets stand for, where the model directory names none.
DEFAULT_MAX_MODEL_LEN = 131_072


class OptionsError(ValueError):
    """An option that makes no sense; the message is a sentence that names it."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to run one simulated engine."""

    model: Path | None = None
    chat_template: Path | None = None
    served_model_name: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    kv_offloading_size: float | None = None
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    enable_prompt_tokens_details: bool = False
    max_num_queued_reqs: int | None = None
    kv_events_config: KVEventsConfig = field(default_factory=KVEventsConfig)
    shutdown_timeout: float = 0.0
    seed: int = 0
    preset: str = DEFAULT_PRESET
    step_time: StepTime = PRESETS[DEFAULT_PRESET].step_time
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise OptionsError(f"--port must be between 1 and 65535, not {self.port}")
        for flag, value, least in (
            ("--max-num-queued-reqs", self.max_num_queued_reqs, 1),
            ("--num-gpu-blocks-override", self.num_gpu_blocks_override, 2),
            ("--max-model-len", self.max_model_len, 1),
            ("--block-size", self.block_size, 1),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--max-num-batched-tokens", self.max_num_batched_tokens, 1),
            ("--shutdown-timeout", self.shutdown_timeout, 0),
        ):
            if value is not None and value < least:
                raise OptionsError(f"{flag} must be at least {least}, not {value}")
        if not self.speed > 0:
            raise OptionsError(f"--speed must be above 0, not {self.speed}")
        if self.kv_offloading_size is not None and not self.num_cpu_blocks:
            raise OptionsError(f"--kv-offloading-size {self.kv_offloading_size} has no room for one block")

    @property
    def num_gpu_blocks(self) -> int:
        """KV blocks: the override, else as many as the preset's GPUs hold."""
        return self.num_gpu_blocks_override or PRESETS[self.preset].kv_tokens // self.block_size + 1

    @property
    def num_cpu_blocks(self) -> int:
        """KV blocks in host memory, each as large as the preset's model has them."""
        return int((self.kv_offloading_size or 0) * 2**30) // (
            PRESETS[self.preset].kv_bytes * self.block_size
        )

    def context(self, of_model: int | None) -> int:
        """The longest sequence. OptionsError if --max-model-len does not fit into the KV cache."""
        room = (self.num_gpu_blocks - 1) * self.block_size
        if self.max_model_len is None:
            return min(of_model or DEFAULT_MAX_MODEL_LEN, room)
        if self.max_model_len > room:
            raise OptionsError(
                f"--max-model-len {self.max_model_len} does not fit into the KV cache of {room} tokens"
            )
        return self.max_model_len

    def engine_config(self) -> EngineConfig:
        """The sizes that the core works with."""
        return EngineConfig(
            step_time=self.step_time.at_speed(self.speed),
            num_gpu_blocks=self.num_gpu_blocks,
            num_cpu_blocks=self.num_cpu_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_prefix_caching=self.enable_prefix_caching,
        )


def parse(argv: Sequence[str]) -> Options:
    """Options from a command line. A bad flag ends the program with one sentence and exit code 2."""
    try:
        return read(argv)
    except OptionsError as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        sys.exit(2)


def read(argv: Sequence[str]) -> Options:
    """The same, but a bad flag raises OptionsError."""
    given = {name: value for name, value in vars(_parser().parse_args(argv)).items() if value is not None}
    for name in ("served_model_name", "api_key"):
        if name in given:
            given[name] = tuple(given[name])
    preset = given.get("preset", DEFAULT_PRESET)
    given.setdefault("step_time", PRESETS[preset].step_time)
    return Options(**given)


class _Parser(argparse.ArgumentParser):
    """A parser that complains by an exception."""

    def error(self, message: str) -> NoReturn:
        raise OptionsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="An engine with vLLM's wire and a modelled clock and cache.")
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="directory with tokenizer.json (default: the demo model's)")
    add("--chat-template", type=Path, metavar="FILE", help="chat template, instead of the model directory's")
    add("--served-model-name", nargs="+", metavar="NAME", help="names that requests may use")
    add("--host")
    add("--port", type=int)
    add("--api-key", nargs="+", metavar="KEY", help="keys, one of which /v1 requests must bear")
    add("--max-num-seqs", type=int, metavar="N", help="sequences in one batch")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens computed in one step")
    add("--block-size", type=int, metavar="N", help="tokens in one KV block")
    add("--num-gpu-blocks-override", type=int, metavar="N", help="KV blocks, instead of the preset's")
    add(
        "--kv-offloading-size",
        type=float,
        metavar="GIB",
        help="host memory that takes copies of prompts' KV blocks, to be loaded when the GPU has lost them",
    )
    add("--max-model-len", type=int, metavar="N", help="prompt and output tokens of one sequence")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    add("--enable-prompt-tokens-details", action="store_true", default=None, help="report cached tokens")
    add("--max-num-queued-reqs", type=int, metavar="N", help="refuse more unfinished sequences than this")
    add("--kv-events-config", type=_events_config, metavar="JSON", help="publish KV cache events over ZMQ")
    add("--shutdown-timeout", type=float, metavar="S", help="how long SIGTERM waits for running requests")
    add("--seed", type=int, help="another seed gives other outputs")
    add("--preset", choices=sorted(PRESETS), help="the model and GPUs whose speed and memory to model")
    add("--step-time", type=_step_time, metavar="A,B,C,D[,E[,F]]", help="seconds, instead of the preset's")
    add("--speed", type=float, metavar="FACTOR", help="clock factor: 2 runs twice as fast as modelled")
    return parser


def _step_time(text: str) -> StepTime:
    try:
        return StepTime(*(float(part) for part in text.split(",")))
    except (TypeError, ValueError) as error:
        message = f"{text!r} is not four to six durations a,b,c,d[,e[,f]] in seconds ({error})"
        raise argparse.ArgumentTypeError(message) from error


def _events_config(text: str) -> KVEventsConfig:
    try:
        return msgspec.json.decode(text, type=KVEventsConfig)
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
