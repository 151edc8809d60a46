"""What the router relies on in an engine, run unchanged against the simulated engine and real vLLM."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from engine_wire import MODEL, KVEvents, RunningEngine, events_of, shape
from support import eventually

from router.http.token_chunk import without_ids
from workers import demo_model
from workers.simulated.events import wire_hash
from workers.simulated.kv_cache import block_keys
from workers.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
BLOCK = 32

USAGE = "usage:{prompt_tokens,total_tokens,completion_tokens"
DETAILED_USAGE = (
    USAGE + ",prompt_tokens_details:{cached_tokens,created_cache_tokens,multimodal_tokens},"
    "completion_tokens_details}"
)
HEAD = "{id,object,created,model,choices"
MESSAGE = "{role,content,refusal,annotations,audio,function_call,%sreasoning}"

# What vLLM 0.32 sends, key by key.
SHAPES = {
    "chat": f"{HEAD}:[{{index,message:{MESSAGE % ''},logprobs,finish_reason,stop_reason,token_ids,"
    f"routed_experts}}],service_tier,system_fingerprint,{DETAILED_USAGE},prompt_logprobs,prompt_token_ids,"
    "prompt_text,kv_transfer_params,ec_transfer_params,metrics}",
    "completion": f"{HEAD}:[{{index,text,logprobs,finish_reason,stop_reason,token_ids,prompt_logprobs,"
    f"prompt_token_ids,routed_experts}}],service_tier,system_fingerprint,{DETAILED_USAGE},"
    "kv_transfer_params,ec_transfer_params,metrics}",
    "role chunk": HEAD
    + ":[{index,delta:{role,content},logprobs,finish_reason}],prompt_token_ids,prompt_text}",
    "text chunk": HEAD + ":[{index,delta:{content},logprobs,finish_reason,token_ids}]}",
    "last chunk": HEAD
    + ":[{index,delta:{content},logprobs,finish_reason,stop_reason,token_ids}],system_fingerprint}",
    "last chunk before usage": HEAD
    + ":[{index,delta:{content},logprobs,finish_reason,stop_reason,token_ids}]}",
    "usage chunk": HEAD
    + f",{USAGE},prompt_tokens_details:{{cached_tokens,created_cache_tokens}}}},system_fingerprint}}",
    "completion chunk": HEAD
    + ":[{index,text,logprobs,finish_reason,stop_reason,prompt_token_ids,token_ids}]}",
    "model": "{object,data:[{id,object,created,owned_by,root,parent,max_model_len,permission:[{id,object,"
    "created,allow_create_engine,allow_sampling,allow_logprobs,allow_search_indices,allow_view,"
    "allow_fine_tuning,organization,group,is_blocking}]}]}",
    "message": "{id,type,role,content:[{type,text}],model,stop_reason,usage:{input_tokens,output_tokens,"
    "cache_creation_input_tokens,cache_read_input_tokens}}",
}

MESSAGE_EVENTS = {
    "message_start": "{type,message:{id,type,role,content,model,stop_reason,stop_sequence,"
    "usage:{input_tokens,output_tokens}}}",
    "content_block_start": "{type,content_block:{type,text},index}",
    "content_block_delta": "{type,delta:{type,text},index}",
    "content_block_stop": "{type,index}",
    "message_delta": "{type,delta:{stop_reason,stop_sequence},usage:{input_tokens,output_tokens,"
    "cache_creation_input_tokens,cache_read_input_tokens}}",
    "message_stop": "{type}",
}

RESPONSE_BODY = (
    "{id,created_at,incomplete_details%s,instructions,metadata,model,object,output%s,parallel_tool_calls,"
    "temperature,tool_choice,tools,top_p,background,max_output_tokens,max_tool_calls,previous_response_id,"
    "prompt,reasoning,service_tier,status,text,top_logprobs,truncation,usage%s,user,presence_penalty,"
    "frequency_penalty,kv_transfer_params,ec_transfer_params,input_messages,output_messages}"
)
OUTPUT_ITEM = "{id,content:[{annotations,text,type,logprobs}],role,status,type,phase}"
RESPONSE = RESPONSE_BODY % (
    ":{reason}",
    f":[{OUTPUT_ITEM}]",
    ":{input_tokens,input_tokens_details:{cached_tokens,cache_write_tokens,input_tokens_per_turn,"
    "cached_tokens_per_turn},output_tokens,output_tokens_details:{reasoning_tokens,tool_output_tokens,"
    "output_tokens_per_turn,tool_output_tokens_per_turn},total_tokens}",
)
STARTED = "{response:" + RESPONSE_BODY % ("", "", "") + ",sequence_number,type}"
PART = "part:{annotations,text,type,logprobs}"
RESPONSE_EVENTS = {
    "response.created": STARTED,
    "response.in_progress": STARTED,
    "response.output_item.added": "{item:{id,content,role,status,type,phase},output_index,"
    "sequence_number,type}",
    "response.content_part.added": f"{{content_index,item_id,output_index,{PART},sequence_number,type}}",
    "response.output_text.delta": "{content_index,delta,item_id,logprobs,output_index,sequence_number,type}",
    "response.output_text.done": "{content_index,item_id,logprobs,output_index,sequence_number,text,type}",
    "response.content_part.done": f"{{content_index,item_id,output_index,{PART},sequence_number,type}}",
    "response.output_item.done": f"{{item:{OUTPUT_ITEM},output_index,sequence_number,type}}",
    "response.completed": f"{{response:{RESPONSE},sequence_number,type}}",
}

WEATHER = {
    "name": "weather",
    "description": "The weather of a town",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["unit"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": WEATHER}


def terse() -> dict[str, int]:
    """A logit_bias for grammars: no blanks, and the end as soon as it is allowed. The demo model is noise.

    "><" is banned because it crosses that end: a call may follow on a call.
    """
    tokenizer = Tokenizer(demo_model.tokenizer_dir())
    texts = enumerate(tokenizer.decode_each(range(tokenizer.vocab_size)))
    banned = {str(token): -100 for token, text in texts if text and (not text.strip() or "><" in text)}
    return banned | {str(tokenizer.eos_token_id): 100}


def forced(choice: Any) -> dict[str, Any]:
    """The fields that make a chat end in a tool call."""
    return {"tools": [TOOL], "tool_choice": choice, "logit_bias": terse(), "ignore_eos": False}


def chat(text: str, max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    """A greedy chat, of exactly this many tokens unless a field says otherwise."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def long_text(name: str, words: int = 120) -> str:
    """A text of several blocks that no other test sends."""
    return f"{name}: " + " ".join(f"animal {n} is in pasture {n * 7 % 13}" for n in range(words // 6))


def prompt_ids(engine: RunningEngine, text: str) -> list[int]:
    """The prompt that a chat of this text becomes."""
    reply = engine.post("/tokenize", {"messages": [{"role": "user", "content": text}]})
    return reply.json()["tokens"]


def test_says_which_model_it_serves(engine: RunningEngine) -> None:
    models = engine.get("/v1/models")
    assert shape(models) == SHAPES["model"]
    assert (models["data"][0]["id"], models["data"][0]["max_model_len"]) == (MODEL, 2048)
    assert engine.get("/version")["version"]


def test_chat_answers_with_all_of_vllms_fields(engine: RunningEngine) -> None:
    reply = engine.post(CHAT, chat("hello"), headers={"x-request-id": "my-request"})
    body = reply.json()
    assert shape(body) == SHAPES["chat"]
    assert body["id"] == "chatcmpl-my-request"
    assert (body["model"], body["choices"][0]["finish_reason"]) == (MODEL, "length")
    assert body["usage"]["completion_tokens"] == 8
    assert body["usage"]["prompt_tokens"] == len(prompt_ids(engine, "hello"))


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_has_vllms_events(engine: RunningEngine, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    reply = engine.post(CHAT, chat("hello", stream=True, **options))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    names_and_data = events_of(reply.text)
    assert [name for name, _ in names_and_data] == [""] * len(names_and_data)
    events = [data for _, data in names_and_data]
    assert events.pop() == "[DONE]"
    assert shape(events.pop(0)) == SHAPES["role chunk"]
    if usage:
        last = events.pop()
        assert shape(last) == SHAPES["usage chunk"]
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)
    last_shape = shape(events.pop()).replace("delta:{}", "delta:{content}")  # its text may be empty
    assert last_shape == SHAPES["last chunk before usage" if usage else "last chunk"]
    assert {shape(event) for event in events} == {SHAPES["text chunk"]}


def test_continuous_usage_counts_up(engine: RunningEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = events_of(engine.post(CHAT, chat("hello", stream=True, stream_options=options)).text)
    counts = [data["usage"]["completion_tokens"] for _, data in events[:-1]]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_stream_and_answer_say_the_same_tokens_and_text(engine: RunningEngine) -> None:
    request = chat("tell me of the herd", 24, return_token_ids=True)
    body = engine.post(CHAT, request).json()
    events = [data for _, data in events_of(engine.post(CHAT, {**request, "stream": True}).text)[:-1]]
    assert events[0]["prompt_token_ids"] == body["prompt_token_ids"]
    assert body["prompt_token_ids"] == prompt_ids(engine, "tell me of the herd")
    choices = [event["choices"][0] for event in events[1:]]
    assert [token for choice in choices for token in choice["token_ids"]] == body["choices"][0]["token_ids"]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == body["choices"][0]["message"]["content"]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_nearly_every_event_takes_the_routers_short_way(engine: RunningEngine, path: str) -> None:
    """It knows vLLM's bytes by heart: when a release writes them otherwise, only the router's cost tells."""
    asked = chat("tell me of the herd", 64, stream=True, return_token_ids=True, ignore_eos=True)
    body = engine.post(path, {**asked, "prompt": "tell me of the herd"}).content
    events = [event + b"\n\n" for event in body.split(b"\n\n") if b'"token_ids":[' in event]
    ordinary = [event for event in events if without_ids(b"%x\r\n%b\r\n" % (len(event), event))]
    assert len(events) > 20
    # The others: the first of a completion, the last, and those that say nothing yet (half a character).
    assert len(ordinary) > len(events) / 2, events[1]


def test_forwarded_token_ids_replace_the_messages(engine: RunningEngine) -> None:
    ids = prompt_ids(engine, "the text that counts")
    request = chat("the text that counts", 12, return_token_ids=True)
    by_text = engine.post(CHAT, request).json()
    forwarded = {**chat("something else", 12), "kv_transfer_params": {"prompt_token_ids": ids}}
    by_ids = engine.post(CHAT, {**forwarded, "return_token_ids": True}).json()
    assert by_ids["prompt_token_ids"] == ids
    assert by_ids["choices"][0]["token_ids"] == by_text["choices"][0]["token_ids"]


def test_a_continuation_goes_on_token_for_token(engine: RunningEngine) -> None:
    request = {"prompt": prompt_ids(engine, "a long story"), "temperature": 0, "ignore_eos": True}
    whole = engine.post("/v1/completions", {**request, "max_tokens": 20, "return_token_ids": True}).json()
    said = whole["choices"][0]["token_ids"]
    rest = {**request, "prompt": request["prompt"] + said[:7], "max_tokens": 13, "return_token_ids": True}
    assert engine.post("/v1/completions", rest).json()["choices"][0]["token_ids"] == said[7:]


def test_completions_of_text_and_of_ids_agree(engine: RunningEngine) -> None:
    ids = engine.post("/tokenize", {"prompt": "over the hills"}).json()["tokens"]
    common = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    by_text = engine.post("/v1/completions", {"prompt": "over the hills", **common}).json()
    by_ids = engine.post("/v1/completions", {"prompt": ids, **common}).json()
    assert shape(by_text) == SHAPES["completion"]
    assert by_text["id"].startswith("cmpl-")
    assert by_text["choices"] == by_ids["choices"]


def test_several_prompts_and_choices_are_numbered(engine: RunningEngine) -> None:
    request = {"prompt": [[5, 6, 7], [8, 9]], "n": 2, "max_tokens": 3, "ignore_eos": True, "seed": 1}
    choices = engine.post("/v1/completions", request).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    events = events_of(engine.post("/v1/completions", {**request, "stream": True}).text)[:-1]
    assert {data["choices"][0]["index"] for _, data in events} == {0, 1, 2, 3}


def test_a_completion_stream_has_vllms_events(engine: RunningEngine) -> None:
    request = {"prompt": "go", "max_tokens": 5, "ignore_eos": True, "stream": True, "return_token_ids": True}
    events = [data for _, data in events_of(engine.post("/v1/completions", request).text)[:-1]]
    assert {shape(event) for event in events[:-1]} == {SHAPES["completion chunk"]}
    assert shape(events[-1]) == SHAPES["completion chunk"][:-1] + ",system_fingerprint}"
    prompts = [event["choices"][0]["prompt_token_ids"] for event in events]
    assert prompts[0]
    assert not any(prompts[1:])


def test_tokenize_and_detokenize_are_inverse(engine: RunningEngine) -> None:
    text = "naïve café, 日本 🐄 and\ttabs"
    body = engine.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert list(body) == ["count", "max_model_len", "tokens", "token_strs"]
    assert body["count"] == len(body["tokens"])
    assert engine.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": text}


def test_reports_cached_tokens_of_a_repeated_prompt(engine: RunningEngine) -> None:
    text = long_text("repeat")
    first = engine.post(CHAT, chat(text)).json()["usage"]
    again = engine.post(CHAT, chat(text)).json()["usage"]
    tokens = again["prompt_tokens"]
    assert tokens > 3 * BLOCK
    # A few first tokens may be cached already: every chat begins alike.
    assert first["prompt_tokens_details"]["cached_tokens"] < BLOCK
    assert again["prompt_tokens_details"]["cached_tokens"] == (tokens - 1) // BLOCK * BLOCK


def test_a_salt_keeps_caches_apart(engine: RunningEngine) -> None:
    text = long_text("salted")
    cached = [
        engine.post(CHAT, chat(text, cache_salt=salt)).json()["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        for salt in ("a", "b", "a")
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_a_disconnect_frees_the_sequence_at_once(engine: RunningEngine) -> None:
    request = {"model": MODEL, **chat("never ending", 1900, stream=True)}
    with engine.client() as client, client.stream("POST", CHAT, json=request) as reply:
        lines = reply.iter_lines()  # closing it would close the connection
        next(lines)
        eventually(lambda: engine.metric("vllm:num_requests_running") == 1)
    eventually(lambda: engine.metric("vllm:num_requests_running") == 0)
    eventually(lambda: engine.metric("vllm:kv_cache_usage_perc") == 0)


ERRORS: dict[str, tuple[str, dict[str, Any], int, str | None, str]] = {
    "unknown model": (CHAT, chat("x", model="nope"), 404, "model", "The model `nope` does not exist."),
    "too long": (CHAT, chat("word " * 4000), 400, "input_tokens", "maximum context length is 2048 tokens"),
    "too many ids": (
        "/v1/completions",
        {"prompt": [5] * 3000},
        400,
        "input_tokens",
        "contains 3000 input tokens",
    ),
    "too many tokens": (
        CHAT,
        chat("x", 5000),
        400,
        "max_tokens",
        "cannot be greater than max_model_len=2048",
    ),
    "no tokens": (CHAT, chat("x", 0), 400, "max_tokens", "max_tokens must be at least 1, got 0."),
    "no messages": (CHAT, {"max_tokens": 1}, 400, "body.messages", "Field required"),
    "empty chat": (CHAT, {"messages": []}, 400, None, "empty conversation"),
    "wrong type": (CHAT, chat("x", max_tokens="many"), 400, "body.max_tokens", "valid integer"),
    "cold": (CHAT, chat("x", temperature=-1), 400, "temperature", "temperature must be non-negative"),
    "no choices": (CHAT, chat("x", n=0), 400, None, "n must be at least 1, got 0."),
    "not in the vocabulary": (
        CHAT,
        chat("x", kv_transfer_params={"prompt_token_ids": [10**6]}),
        400,
        "kv_transfer_params.prompt_token_ids",
        "out of vocabulary",
    ),
    "usage without a stream": (
        CHAT,
        chat("x", stream_options={"include_usage": True}),
        400,
        "stream_options",
        "only be defined when `stream=True`",
    ),
    "no tools": (CHAT, chat("x", tools=[]), 400, "tools", "must not be an empty array"),
    "no such tool": (
        CHAT,
        chat("x", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "nope"}}),
        400,
        "tool_choice",
        "does not match any",
    ),
    "more at least than at most": (CHAT, chat("x", min_tokens=99), 400, None, "min_tokens must be less than"),
    "no prompt": ("/v1/completions", {}, 400, "prompt", "must be provided and non-empty"),
    "no input": ("/v1/responses", {}, 400, "body.input", "Field required"),
    "no such response": (
        "/v1/responses",
        {"input": "x", "previous_response_id": "resp_0"},
        404,
        "response_id",
        "Response with id 'resp_0' not found.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_refuses_with_vllms_error_body(engine: RunningEngine, case: str) -> None:
    path, body, status, param, message = ERRORS[case]
    reply = engine.post(path, body)
    assert reply.status_code == status
    assert shape(reply.json()) == "{error:{message,type,param,code}}"
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (status, param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"{not json", "application/json", "JSON decode error"),
        (b"", "application/json", "Field required"),
        (b"[1]", "application/json", "valid dictionary"),
        (b"{}", "text/plain", "Unsupported Media Type"),
    ],
)
def test_refuses_what_is_not_a_json_object(
    engine: RunningEngine, body: bytes, content_type: str, expected: str
) -> None:
    with engine.client() as client:
        reply = client.post(CHAT, content=body, headers={"content-type": content_type})
    assert reply.status_code == 400
    assert expected in reply.json()["error"]["message"]


def test_unknown_paths_and_methods(engine: RunningEngine) -> None:
    with engine.client() as client:
        unknown, wrong = client.get("/nope"), client.get(CHAT)
    assert (unknown.status_code, unknown.json()) == (404, {"detail": "Not Found"})
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})


def test_announces_blocks_whose_hashes_can_be_computed_outside(engine: RunningEngine) -> None:
    text = long_text("announced")
    with engine.events() as events:
        reply = engine.post(CHAT, chat(text, BLOCK + 8, return_token_ids=True)).json()
        tokens = reply["prompt_token_ids"] + reply["choices"][0]["token_ids"]
        expected = [wire_hash(key) for key in block_keys(tokens[:-1], BLOCK)]  # the last is never computed
        stored = eventually(lambda: stored_chain(events, expected))
    assert [h for event in stored for h in event["block_hashes"]] == expected
    assert [t for event in stored for t in event["token_ids"]] == tokens[: len(expected) * BLOCK]
    assert stored[0]["parent_block_hash"] is None
    assert {event["block_size"] for event in stored} == {BLOCK}
    assert len(stored) > 1  # the output filled a block of its own
    for before, after in pairwise(stored):
        assert after["parent_block_hash"] == before["block_hashes"][-1]
    required = [
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
    ]
    assert [key for key in stored[0] if key in ("type", *required)] == ["type", *required]
    assert (stored[0]["medium"], stored[0]["group_idx"]) == ("GPU", 0)
    assert stored[0]["kv_cache_spec_kind"] == "full_attention"


def stored_chain(events: KVEvents, hashes: list[int]) -> list[dict[str, Any]]:
    """The events that stored these blocks, once all have come."""
    events.replay()
    stored = [e for e in events.all("BlockStored") if set(e["block_hashes"]) & set(hashes)]
    return stored if {h for e in stored for h in e["block_hashes"]} >= set(hashes) else []


def test_announces_the_salt_of_the_first_block(engine: RunningEngine) -> None:
    with engine.events() as events:
        reply = engine.post(
            CHAT, chat(long_text("tenant"), 1, cache_salt="t-1", return_token_ids=True)
        ).json()
        expected = [wire_hash(key) for key in block_keys(reply["prompt_token_ids"], BLOCK, "t-1")]
        stored = eventually(lambda: stored_chain(events, expected))
    extra = [keys for event in stored for keys in event["extra_keys"]]
    assert extra == [["t-1"]] + [None] * (len(expected) - 1)


def test_replay_is_contiguous_and_joins_the_live_events(engine: RunningEngine) -> None:
    with engine.events() as events:
        engine.post(CHAT, chat(long_text("replayed"), 1))
        numbers = eventually(events.replay)
        assert numbers == list(range(len(numbers)))
        assert events.replay(start=len(numbers) - 1)[0] == len(numbers) - 1

        engine.post(CHAT, chat(long_text("followed"), 1))
        live = eventually(events.poll)
        assert live[-1] >= len(numbers)
        assert sorted(events.batches) == list(range(max(events.batches) + 1))


def test_tells_its_cache_in_a_metric(engine: RunningEngine) -> None:
    text = httpx.get(f"{engine.url}/metrics", trust_env=False).text
    line = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    labels = dict(part.split("=", 1) for part in line[line.index("{") + 1 : line.rindex("}")].split('",'))
    assert labels["block_size"].strip('"') == str(BLOCK)
    assert int(labels["num_gpu_blocks"].strip('"')) >= 2048 // BLOCK
    assert labels["enable_prefix_caching"].strip('"') == "True"
    assert labels["prefix_caching_hash_algo"].strip('"') == "sha256"


def test_counts_requests_by_path_and_status(engine: RunningEngine) -> None:
    def counted(path: str, status: str) -> float:
        return engine.metric("http_requests_total", handler=path, method="POST", status=status)

    engine.post(CHAT, chat("counted", 1))
    engine.post(CHAT, {"messages": 1})
    engine.post("/v1/nothing", {})
    series = ((CHAT, "2xx"), (CHAT, "4xx"), ("none", "4xx"))
    before = [counted(*labels) for labels in series]
    engine.post(CHAT, chat("counted", 1))
    engine.post(CHAT, {"messages": 1})
    engine.post("/v1/nothing", {})
    assert [counted(*labels) for labels in series] == [count + 1 for count in before]


COUNTERS = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
    "vllm:request_generation_tokens_count",
    "vllm:iteration_tokens_total_count",
)
GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:admission_rejections_total",
    "vllm:external_prefix_cache_hits_total",
)


def test_counts_what_it_does(engine: RunningEngine) -> None:
    text = long_text("counted")
    engine.post(CHAT, chat(text))
    before = {name: engine.metric(name) for name in COUNTERS}
    engine.post(CHAT, chat(text))
    for name in COUNTERS:
        eventually(lambda name=name: engine.metric(name) > before[name])
    for name in GAUGES:
        assert engine.metric(name) == 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_tool_call_fits_the_schema(engine: RunningEngine, choice: Any) -> None:
    request = chat("how is it?", 120, **forced(choice))
    body = engine.post(CHAT, request).json()["choices"][0]
    assert body["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
    (call,) = body["message"]["tool_calls"]
    assert shape(body["message"]) == (MESSAGE % "tool_calls:[{id,type,function:{name,arguments}}],")
    assert call["id"].startswith("chatcmpl-tool-")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["unit"] in ("celsius", "fahrenheit")


def test_a_tool_call_streams_its_name_then_its_arguments(engine: RunningEngine) -> None:
    request = chat("how is it?", 120, stream=True, **forced("required"))
    events = [data for _, data in events_of(engine.post(CHAT, request).text)[:-1]]
    deltas = [event["choices"][0]["delta"] for event in events[1:]]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert deltas[-1] == {}
    assert all(list(delta) == ["content", "tool_calls"] for delta in deltas[:-1])
    calls = [delta["tool_calls"][0] for delta in deltas[:-1]]
    assert shape(calls[0]) == "{id,type,index,function:{name}}"
    assert {shape(call) for call in calls[1:]} == {"{index,function:{arguments}}"}
    arguments = "".join(call["function"]["arguments"] for call in calls[1:])
    assert json.loads(arguments)["unit"] in ("celsius", "fahrenheit")


def test_stop_strings_are_cut_off_and_named(engine: RunningEngine) -> None:
    whole = engine.post(CHAT, chat("where to stop", 24)).json()["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    body = engine.post(CHAT, chat("where to stop", 24, stop=[stop])).json()["choices"][0]
    assert body["message"]["content"] == whole[: whole.index(stop)]
    assert (body["finish_reason"], body["stop_reason"]) == ("stop", stop)


def test_a_stop_token_is_not_text_and_is_named(engine: RunningEngine) -> None:
    said = engine.post(CHAT, chat("which token", 12, return_token_ids=True)).json()["choices"][0]["token_ids"]
    stop = said[5]
    fields = {"stop_token_ids": [stop], "return_token_ids": True, "stream": True}
    events = [data for _, data in events_of(engine.post(CHAT, chat("which token", 12, **fields)).text)[:-1]]
    choices = [event["choices"][0] for event in events[1:]]
    assert [t for choice in choices for t in choice["token_ids"]] == said[: said.index(stop) + 1]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)


def test_messages_in_anthropics_form(engine: RunningEngine) -> None:
    request = {"max_tokens": 6, "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}
    body = engine.post("/v1/messages", request).json()
    assert shape(body) == SHAPES["message"]
    assert (body["role"], body["usage"]["output_tokens"]) == ("assistant", 6)
    events = events_of(engine.post("/v1/messages", {**request, "stream": True}).text)
    assert {name: shape(data) for name, data in events} == MESSAGE_EVENTS
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert text == body["content"][0]["text"]
    refused = engine.post("/v1/messages", {**request, "model": "nope"})
    assert (refused.status_code, shape(refused.json())) == (404, "{type,error:{type,message}}")


def test_messages_count_their_tokens(engine: RunningEngine) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    body = engine.post("/v1/messages/count_tokens", {"messages": messages}).json()
    assert shape(body) == "{input_tokens,context_management:{original_input_tokens}}"
    assert body["input_tokens"] == len(prompt_ids(engine, "hello"))


def test_responses(engine: RunningEngine) -> None:
    request = {"input": "hello", "max_output_tokens": 6, "temperature": 0}
    body = engine.post("/v1/responses", request).json()
    assert shape(body) == RESPONSE
    assert (body["status"], body["usage"]["output_tokens"]) == ("incomplete", 6)
    events = events_of(engine.post("/v1/responses", {**request, "stream": True}).text)
    assert {name: shape(data) for name, data in events} == RESPONSE_EVENTS
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    assert text == body["output"][0]["content"][0]["text"]


def test_a_response_has_the_id_that_it_was_given(engine: RunningEngine) -> None:
    """By which the router knows who keeps it; the X-Request-Id that goes along has no part in it."""
    request = {"input": "hello", "max_output_tokens": 3, "request_id": "resp_herd_0_0"}
    header = {"x-request-id": "another"}
    assert engine.post("/v1/responses", request, headers=header).json()["id"] == "resp_herd_0_0"
    streamed = engine.post("/v1/responses", {**request, "stream": True}, headers=header)
    events = [data for _, data in events_of(streamed.text) if "response" in data]
    assert {data["response"]["id"] for data in events} == {"resp_herd_0_0"}
    assert engine.get("/v1/responses/resp_herd_0_0")["id"] == "resp_herd_0_0"
    following = engine.post("/v1/responses", {"input": "more", "previous_response_id": "resp_herd_0_0"})
    assert following.json()["previous_response_id"] == "resp_herd_0_0"


def test_the_openai_client_streams_tools_and_text(engine: RunningEngine) -> None:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none") as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, stream=True)
        finish = [chunk.choices[0].finish_reason for chunk in stream]
        assert finish[-1] in ("length", "stop")
        assert not any(finish[:-1])
        tool: Any = {"tools": [TOOL], "tool_choice": "required", "logit_bias": terse()}
        called = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=120, temperature=0, **tool
        )
        assert called.choices[0].message.tool_calls
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nope", messages=messages)


def test_queue_limit_answers_503(engine: RunningEngine) -> None:
    rejected = engine.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs")
    reply = engine.post("/v1/completions", {"prompt": "x", "n": 65, "max_tokens": 1})
    assert reply.status_code == 503
    assert reply.json()["error"]["type"] == "Service Unavailable"
    assert "engine is currently busy" in reply.json()["error"]["message"]
    assert engine.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs") == rejected + 1


def test_zz_ends_with_sigterm(engine: RunningEngine) -> None:
    """The last one: the engine does not outlive it."""
    engine.process.process.terminate()
    eventually(lambda: engine.process.process.poll() is not None, timeout=20)
