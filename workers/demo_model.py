"""The demo model: a Llama of 26.7 million random weights with a real tokenizer, made on first use.

Nothing is downloaded: the byte-level BPE tokenizer is trained on the text beside this module and the
weights come from a fixed bit stream, so every machine makes the same model. Its output is noise, but it
costs what a model costs: prefill, KV cache and decode are real, and so are its chat template and its tools.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache as memo
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

NAME = "herd-demo"

BOS, TURN, END = SPECIAL = ("<|begin|>", "<|im_start|>", "<|im_end|>")
BOS_ID, TURN_ID, END_ID = range(3)

# The smallest shape whose prefill is slow enough on one CPU core for a cached prefix to show in the time to
# first token: 1 to 2 s cold against 0.05 s cached for 2,000 tokens.
VOCABULARY = 2560
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 512, 1536, 8, 8, 2
HEAD = HIDDEN // HEADS
CONTEXT = 8192

SEED = 20_26
# Queries and keys this large make attention sharp, so that a far token can change the next one.
SHARPNESS = 2.0
# Standard deviation of the logits: sampling at temperature 1 then draws from some hundred tokens.
LOGIT_SPREAD = 3.0
# The end token's logits spread this much wider than the others', so that a reply ends after some 300 tokens.
END_SPREAD = 1.1

_HERE = Path(__file__).parent
_TEXT = _HERE / "demo_text.txt"
_TEMPLATE = _HERE / "demo_chat_template.jinja"


def ensure(cache: Path | None = None) -> Path:
    """The model's directory under `cache`, made on the first call: 0.3 s, 53 MB.

    Safe to call from several processes at once.
    """
    return _made("model", cache, _write_model)


def tokenizer_dir(cache: Path | None = None) -> Path:
    """The same without weights: a directory with the tokenizer, its chat template and the configuration."""
    return _made("tokenizer", cache, _write_tokenizer)


def parameters() -> int:
    """How many weights the model has."""
    return sum(math.prod(shape) for _, shape, _ in _tensors())


def cache_home() -> Path:
    """Where Herd keeps what it can make again: `$HERD_CACHE`, else `~/.cache/herd`."""
    return Path(os.environ.get("HERD_CACHE") or Path.home() / ".cache" / "herd")


def _made(kind: str, cache: Path | None, write: Callable[[Path], None]) -> Path:
    """The directory of this kind for this version of the inputs; built aside and moved into place whole."""
    home = cache or cache_home()
    final = home / f"{NAME}-{kind}-{_version()}"
    if final.is_dir():
        return final
    home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=home))
    try:
        write(draft)
        draft.chmod(0o755)
        draft.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


@memo
def _version() -> str:
    """A hash over all that shapes the model: this module, its text, its template and the BPE trainer."""
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for source in (Path(__file__), _TEXT, _TEMPLATE):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _write_model(where: Path) -> None:
    _write_tokenizer(where)
    _write_safetensors(where / "model.safetensors")


def _write_tokenizer(where: Path) -> None:
    _tokenizer().save(str(where / "tokenizer.json"))
    shutil.copyfile(_TEMPLATE, where / "chat_template.jinja")
    for name, content in (
        ("config.json", _CONFIG),
        ("generation_config.json", _GENERATION_CONFIG),
        ("tokenizer_config.json", _TOKENIZER_CONFIG),
    ):
        (where / name).write_text(json.dumps(content, indent=2) + "\n")


def _tokenizer() -> Tokenizer:
    """Byte-level BPE; a bare text gets BOS in front, as with Llama (the chat template writes its own)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = _TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,  # tied, it would mostly repeat its last token
    "bos_token_id": BOS_ID,
    "eos_token_id": END_ID,
}

_GENERATION_CONFIG: dict[str, Any] = {"bos_token_id": BOS_ID, "eos_token_id": END_ID}

_TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": END,
    "pad_token": END,
    "model_max_length": CONTEXT,
    "clean_up_tokenization_spaces": False,
}


def _tensors() -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of every weight; 0 stands for a norm's ones."""
    unit = HIDDEN**-0.5  # keeps a unit-variance vector at unit variance
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN), 1.0
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (HIDDEN,), 0.0
        yield prefix + "self_attn.q_proj.weight", (HIDDEN, HIDDEN), SHARPNESS * unit
        yield prefix + "self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN), SHARPNESS * unit
        yield prefix + "self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN), unit
        yield prefix + "self_attn.o_proj.weight", (HIDDEN, HIDDEN), unit
        yield prefix + "post_attention_layernorm.weight", (HIDDEN,), 0.0
        yield prefix + "mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN), unit
        yield prefix + "mlp.up_proj.weight", (INTERMEDIATE, HIDDEN), unit
        yield prefix + "mlp.down_proj.weight", (HIDDEN, INTERMEDIATE), INTERMEDIATE**-0.5
    yield "model.norm.weight", (HIDDEN,), 0.0
    yield "lm_head.weight", (VOCABULARY, HIDDEN), LOGIT_SPREAD * unit


def _weight(bits: np.random.PCG64, name: str, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """One tensor as bfloat16 in uint16. Raw bits, because only their stream is the same in every numpy."""
    if deviation == 0.0:
        values = np.ones(shape, np.float32)
    else:
        count = math.prod(shape)
        uniform = bits.random_raw(-(-count // 4)).view(np.int16)[:count].astype(np.float32) / 2**15
        values = (uniform * np.float32(deviation * math.sqrt(3))).reshape(shape)
    if name == "lm_head.weight":
        values[[BOS_ID, TURN_ID]] = 0
        values[END_ID] *= END_SPREAD
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_safetensors(path: Path) -> None:
    """The safetensors format: length of the header (8 bytes), header (JSON), then the tensors end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in _tensors():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    bits = np.random.PCG64(SEED)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape, deviation in _tensors():
            file.write(_weight(bits, name, shape, deviation).tobytes())
