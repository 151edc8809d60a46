"""Token ids beside tokenizers' own, and what a model directory changes of them beside transformers'."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from chats import TEXTS
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from workers import demo_model
from workers.tokenizer import PROBES, Encoder, Tokenizer, ids_of, load, read_config, special_tokens
from workers.vllm_engine import find

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
# What tokenizer_config.json may hold beside what the demo model's does.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "ends that transformers leaves to tokenizer.json": {"add_bos_token": False, "add_eos_token": True},
    "tokens that are added": {
        "added_tokens_decoder": {
            "2560": {"content": "<extra>", **FLAGS, "rstrip": True, "special": False},
            "2561": {"content": "<tool>", **FLAGS, "lstrip": True, "special": True},
        }
    },
    "other flags": {"added_tokens_decoder": {"1": {"content": "<|im_start|>", **FLAGS, "lstrip": True}}},
    "tokens with names": {"image_token": "<image>", "unk_token": "<unk>"},
    "tokens with names of their own": {"extra_special_tokens": {"audio_token": "<audio>"}},
    "tokens without names": {"extra_special_tokens": ["<a>", "<b>"]},
    "tokens with an old name for having none": {"additional_special_tokens": ["<x>"]},
    "a token with flags": {"bos_token": {"__type": "AddedToken", "content": "<|begin|>", **FLAGS}},
}
WITH_TOKENS = [
    "hello world <|im_start|> x",
    "a <extra> b<tool> c <image> <unk> <cls> <audio> <a><b> <x>",
    "",
]
# A text of every kind, and what the model's own tokens do in it.
ANY_TEXT = st.lists(
    st.one_of(TEXTS, st.sampled_from(demo_model.SPECIAL), st.sampled_from(PROBES)), max_size=8
).map("".join)


def demo(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    """The demo model's directory with this in its configuration, and with these files of JSON."""
    shutil.copytree(demo_model.tokenizer_dir(), folder, dirs_exist_ok=True)
    changed = read_config(folder) | config
    for name, content in {"tokenizer_config": changed, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def reference() -> tokenizers.Tokenizer:
    directory = demo_model.tokenizer_dir()
    return load(directory, read_config(directory))


@pytest.fixture(scope="module")
def encoder(reference: tokenizers.Tokenizer) -> Encoder:
    return Encoder(reference)


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4), special=st.booleans())
def test_ids_are_those_of_tokenizers(
    reference: tokenizers.Tokenizer, encoder: Encoder, texts: list[str], special: bool
) -> None:
    """Of texts that grow, as conversations do, so that parts of them were seen before."""
    assert encoder.fast
    for end in range(1, len(texts) + 1):
        text = "".join(texts[:end])
        expected = reference.encode(text, add_special_tokens=special).ids
        assert ids_of(encoder.encode(text, special)) == expected


def test_what_fastokens_cannot_read_is_encoded_by_tokenizers() -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "herd": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = Encoder(words)
    assert not encoder.fast
    assert ids_of(encoder.encode("a herd moves", False)) == [1, 2, 0]
    assert encoder.encode("", False) == b""


def test_what_fastokens_reads_otherwise_is_encoded_by_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastokens

    class Other:
        """As fastokens would be with a fault that a word brings out."""

        def __init__(self, json: str) -> None:
            self._honest = fastokens.Tokenizer(json)

        from_json_str = classmethod(lambda cls, json: cls(json))

        def enable_segment_cache(self, size: int) -> None:
            self._honest.enable_segment_cache(size)

        def encode_batch_flat(self, texts: Sequence[str], special: bool) -> Any:
            return self._honest.encode_batch_flat([t.replace("naïve", "native") for t in texts], special)

    directory = demo_model.tokenizer_dir()
    reference = load(directory, read_config(directory))
    monkeypatch.setattr("fastokens.Tokenizer", Other)
    encoder = Encoder(reference)
    assert not encoder.fast
    assert ids_of(encoder.encode("naïve", False)) == reference.encode("naïve", add_special_tokens=False).ids


def test_a_text_that_is_no_unicode_is_refused(encoder: Encoder) -> None:
    with pytest.raises((ValueError, TypeError)):
        encoder.encode("\ud800", False)


@pytest.mark.parametrize("text", PROBES)
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = Tokenizer(demo_model.tokenizer_dir())
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_truncation_and_padding_of_the_file_are_not_for_prompts(tmp_path: Path) -> None:
    other = tokenizers.Tokenizer.from_file(str(demo_model.tokenizer_dir() / "tokenizer.json"))
    other.enable_truncation(2)
    other.enable_padding(length=50)
    folder = demo(tmp_path / "model", {}, tokenizer=json.loads(other.to_str()))
    ids = Tokenizer(folder).encode("The herd moves as one.", add_special_tokens=True)
    assert ids == Tokenizer(demo_model.tokenizer_dir()).encode(
        "The herd moves as one.", add_special_tokens=True
    )
    assert 2 < len(ids) < 50


@pytest.mark.parametrize(("content", "says"), [(None, "holds no tokenizer.json"), ("{}", "is no tokenizer")])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        Tokenizer(tmp_path)


def test_added_tokens_are_one_token_each(tmp_path: Path) -> None:
    folder = demo(tmp_path / "model", CONFIGURATIONS["tokens that are added"])
    tokenizer = Tokenizer(folder)
    assert tokenizer.vocab_size == demo_model.VOCABULARY + 2
    assert tokenizer.encode("<extra><tool>", add_special_tokens=False) == [2560, 2561]


@pytest.mark.vllm
def test_directories_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    installation = find()
    if installation is None:
        pytest.skip("vLLM is not installed")
    folders = [demo(tmp_path / str(place), config) for place, config in enumerate(CONFIGURATIONS.values())]
    old = {"special_tokens_map": {"cls_token": {"content": "<cls>", **FLAGS}, "unk_token": "<unk>"}}
    folders.append(demo(tmp_path / "old", {}, **old))
    argv = [installation.executable.with_name("python"), "-c", READ, json.dumps(WITH_TOKENS), *folders]
    env = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    told = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=240).stdout
    for name, folder, line in zip([*CONFIGURATIONS, "old"], folders, told.splitlines(), strict=True):
        theirs = json.loads(line)
        ours = Tokenizer(folder)
        ids = [[ours.encode(t, add_special_tokens=s) for s in (False, True)] for t in WITH_TOKENS]
        assert ids == theirs["ids"], name
        assert special_tokens(folder, read_config(folder)) == theirs["special"], name


READ = """
import json, sys
from transformers import AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [
        [tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True)]
        for text in json.loads(sys.argv[1])
    ]
    print(json.dumps({"ids": ids, "special": tokenizer.special_tokens_map}))
"""
