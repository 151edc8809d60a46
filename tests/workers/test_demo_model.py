"""The demo model's files, its tokenizer and its chat template, without an engine."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import fastokens
import jinja2.sandbox
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import demo_model

AWKWARD = [
    "",
    " ",
    "\n\n\t  \r\n",
    "don't they'll I'VE   spaces   at the end   ",
    "naïve café Straße Ångström e\u0301 \u0130stanbul",
    "日本語の文章、中文。한국어 ไทย हिन्दी العربية עברית",
    "👩‍💻👨‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽 \u200b\u200d\ufeff\u00a0\u2028",
    "\x00\x01\x7f\u0085\ufffd\U0010ffff",
    "1234567890 3.14 1e-9 0xDEADBEEF",
    'def f(x):\n    return {"a": [1, 2]}  # ok\n',
    "<|im_start|>user\n<|im_end|> <|begin|><|im_end|",
    "a" * 500 + "🐑" * 100,
]

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_model.ensure(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def both(folder):
    path = str(folder / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(path), fastokens.Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def render(folder):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((folder / "chat_template.jinja").read_text())
    return lambda messages, **options: template.render(messages=messages, bos_token="<|begin|>", **options)


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_both_tokenizers_agree_and_give_the_text_back(both, text):
    reference, fast = both
    ids = reference.encode(text, add_special_tokens=False).ids
    assert fast.encode(text).ids == ids
    assert reference.decode(ids, skip_special_tokens=False) == text


@given(st.text())
@settings(max_examples=300)
def test_both_tokenizers_agree_on_any_text(both, text):
    reference, fast = both
    assert fast.encode(text).ids == reference.encode(text, add_special_tokens=False).ids


def test_a_bare_text_begins_with_bos(both):
    reference, fast = both
    ids = reference.encode("Hello").ids
    assert ids[0] == demo_model.BOS_ID
    assert fast.encode("Hello", add_special_tokens=True).ids == ids


def test_the_special_tokens_are_one_token_each(both, folder):
    reference, _ = both
    assert [reference.token_to_id(token) for token in demo_model.SPECIAL] == [0, 1, 2]
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == demo_model.END_ID
    assert reference.get_vocab_size() == demo_model.VOCABULARY


def test_its_own_text_takes_fewer_tokens_than_characters(both):
    text = (Path(demo_model.__file__).parent / "demo_text.txt").read_text()
    assert len(both[0].encode(text).ids) < len(text) / 2


def test_a_conversation_with_tools_renders(render):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "no", "tool_call_id": "1"},
    ]
    tool = json.dumps(TOOL)
    assert render(messages, tools=[TOOL], add_generation_prompt=True) == (
        "<|begin|><|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>\n"
        f"{tool}\n</tools>\nFor each call write one JSON object within tags:\n"
        '<tool_call>\n{"name": <function name>, "arguments": <arguments object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nRain?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>tool\n<tool_response>\nno\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_a_conversation_is_a_prefix_of_its_continuation(render, tools, system):
    first = [*system, {"role": "user", "content": "a"}]
    longer = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    begun = render(first, tools=tools, add_generation_prompt=True)
    assert render(longer, tools=tools).startswith(begun + "b<|im_end|>\n")


def test_the_weights_are_26_7_million_and_sound(folder):
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    weights = sum(math.prod(tensor["shape"]) for tensor in header.values())
    assert weights == demo_model.parameters() == 26_747_392
    assert max(tensor["data_offsets"][1] for tensor in header.values()) == len(data) - 8 - length
    bits = np.frombuffer(data, np.uint16, offset=8 + length).astype(np.uint32) << 16
    assert np.isfinite(bits.view(np.float32)).all()


def test_two_processes_at_once_make_one_and_the_same_model(folder, tmp_path):
    argv = [sys.executable, "-c", MAKER, str(tmp_path)]
    makers = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    made = {maker.communicate(timeout=60)[0].strip() for maker in makers}
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert made == {str(tmp_path / folder.name)}
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert digest(tmp_path / folder.name) == digest(folder)


MAKER = """
import sys, pathlib
from workers import demo_model
print(demo_model.ensure(pathlib.Path(sys.argv[1])))
"""


def test_the_tokenizer_alone_is_the_models(folder):
    alone = demo_model.tokenizer_dir(folder.parent)
    assert names(folder) - names(alone) == {"model.safetensors"}
    assert (alone / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_is_there_is_not_made_again(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert demo_model.ensure(folder.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        demo_model.ensure(tmp_path / "file" / "cache")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    assert demo_model.tokenizer_dir().parent == tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()
