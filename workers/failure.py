"""Why an engine did not start: from its log, one sentence for the operator."""

from __future__ import annotations

import re

# What a line of an engine's log means; the first cause that matches wins. A cause may quote what it caught.
_CAUSES = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"[Aa]ddress already in use", "its port is already in use"),
        (r"Repo id must [^\n]*: '([^'\n]+)'", "there is no model at {0}"),
        (r"Invalid repository ID or local directory specified: '([^'\n]+)'", "there is no model at {0}"),
        (r"model directory ([^\n]+) holds no", "there is no model at {0}"),
        (r"couldn't find them in the cached files", "the model is not here, nor can the hub be asked for it"),
        (r"([^\s']+) is not a local folder and is not a valid model", "there is no model called {0}"),
        (r"Value error, ([^\n]*?)(?: \[type=|\n|$)", "bad argument: {0}"),
        (r"error: ((?:unrecognized|ambiguous|argument|the following)[^\n]*)", "bad argument: {0}"),
        (r"(CUDA out of memory.*?)(?:\. |\n|$)", "out of GPU memory: {0}"),
        (r"(Free memory on device.*?)(?:\. |\n|$)", "too little GPU memory is free: {0}"),
        (r"(To serve at least one request.*?)(?:\. |\n|$)", "too little memory for the KV cache: {0}"),
        (r"(Available memory on node.*?)(?:\. |\n|$)", "too little memory for the KV cache: {0}"),
        (r"No available memory for the cache blocks", "too little memory for the KV cache"),
        (r"DefaultCPUAllocator|Cannot allocate memory|std::bad_alloc|\bMemoryError\b", "out of memory"),
    )
)

_RAISED = re.compile(r"\b([A-Z]\w*(?:Error|Exception|Exit))\b:? *(\S[^\n]*)")
# What vLLM's front process says of any failure in its engine process.
_ECHO = re.compile(r"Engine core initialization failed|EngineCore failed to start|died unexpectedly")


def explain(exit_code: int | None, log: str) -> str:
    """Why an engine did not start, by its log: a known cause, else the last thing it complained of."""
    for pattern, sentence in _CAUSES:
        if found := pattern.search(log):
            return sentence.format(*found.groups())
    if exit_code == 137:
        return "it was killed, most likely because the machine ran out of memory"
    ending = "it was not ready in time" if exit_code is None else f"it ended with status {exit_code}"
    last = _last_complaint(log)
    return f"{ending}: {last}" if last else f"{ending} and said nothing"


def _last_complaint(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and not _ECHO.search(line)]
    raised = [f"{found[1]}: {found[2]}" for line in lines if (found := _RAISED.search(line))]
    return (raised or lines or [""])[-1]
