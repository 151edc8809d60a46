"""Programs that call tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from loadtests.scenarios.session import Ask, Fork, Load, Message, Scenario, Session, around, say, setting
from loadtests.words import WORDS, words

# A branch takes so many of its session's turns.
BRANCH_SHARE = 0.2


def _tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": type_} for parameter, type_ in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = (
    _tool("read_file", "Read lines of a file.", path="string", first_line="integer"),
    _tool("search", "Find a text in all files.", text="string"),
    _tool("run_tests", "Run the tests below a folder.", path="string"),
    _tool("edit_file", "Replace a text in a file.", path="string", old="string", new="string"),
)


@dataclass(frozen=True)
class Agent(Scenario):
    """Programs that call tools: long sessions under one system prompt and the same tools. Each turn carries a
    tool's result, and somewhere in the middle a session forks into several that share its history.
    """

    name = "agent"
    load = Load(users=8)

    turns: int = setting(20, "Mean turns of a session: from half of it to half above it", 2)
    forks: int = setting(2, "Branches that a session forks into; 0: none")
    system_tokens: int = setting(400, "Words of the system prompt that all share", 1)
    result_tokens: int = setting(40, "Mean words of a tool's result", 1)
    output_tokens: int = setting(40, "Longest answer, in tokens", 1)
    tool_time: float = setting(0.5, "Mean seconds that a tool runs")

    def session(self, seed: str) -> Session:
        """One task. Which tool is called is scripted, so that a model's noise cannot end the session."""
        turns = round(around(self.turns, Random(seed).random()))
        task = say("user", words(self.result_tokens, f"{seed}/task"))
        history = [say("system", words(self.system_tokens, "agent")), task]
        yield from self._work(history, turns // 2, f"{seed}/begin")
        if self.forks:
            yield Fork(
                [self._branch(history, turns, f"{seed}/fork {number}") for number in range(self.forks)]
            )
        yield from self._work(history, turns - turns // 2, f"{seed}/end")

    def _branch(self, history: list[Message], turns: int, seed: str) -> Session:
        task = say("user", words(self.result_tokens, seed))
        return self._work([*history, task], max(1, round(turns * BRANCH_SHARE)), seed)

    def _work(self, history: list[Message], turns: int, seed: str) -> Session:
        """So many turns; what is said and done in them goes to the end of `history`."""
        chance = Random(seed)
        for turn in range(turns):
            wait = around(self.tool_time, chance.random())
            said = yield Ask(tuple(history), self.output_tokens, after=wait, tools=TOOLS)
            call_id = f"call_{chance.getrandbits(48):012x}"
            length = max(1, round(around(self.result_tokens, chance.random())))
            result = words(length, f"{seed}/{turn}")
            history.append({**say("assistant", said or ""), "tool_calls": [_call(call_id, chance)]})
            history.append({**say("tool", result), "tool_call_id": call_id})


def _call(call_id: str, chance: Random) -> dict[str, Any]:
    function = chance.choice(TOOLS)["function"]
    examples = {"string": chance.choice(WORDS), "integer": chance.randrange(1000)}
    properties = function["parameters"]["properties"]
    arguments = json.dumps({name: examples[schema["type"]] for name, schema in properties.items()})
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
