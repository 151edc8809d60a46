"""The oracle knows what a simulated engine says."""

import httpx
from support import Start, simulated_engine

from loadtests import prompts
from loadtests.oracle import Oracle
from workers import demo_model


def test_an_engine_says_what_the_oracle_foretells(start: Start) -> None:
    engine = simulated_engine(start, "--served-model-name", "m", "--speed", "100")
    oracle = Oracle(demo_model.tokenizer_dir())
    for number in range(10):
        asked = prompts.chat(2000, f"chat {number}")
        body = {"model": "m", "messages": asked, "max_tokens": 20}
        said = httpx.post(f"{engine.url}/v1/chat/completions", json=body, trust_env=False).json()
        assert said["choices"][0]["message"]["content"] == oracle.says(asked, 20)
        assert said["usage"]["prompt_tokens"] == len(oracle.tokens(asked))
