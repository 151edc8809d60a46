"""Where the tokenizer of an engine that Herd starts comes from: its flags."""

import pytest

from router.config import parse
from router.tokenizer_config import TokenizerConfig
from workers.engine import EngineSpec


def of(**engine_args):
    return TokenizerConfig.of_engine(
        EngineSpec(engine="vllm", name="m", source="/models/m", engine_args=engine_args)
    )


@pytest.mark.parametrize(
    ("flags", "config"),
    [
        ({}, {"source": "/models/m"}),
        ({"--tokenizer": "/models/t"}, {"source": "/models/t"}),
        ({"tokenizer-mode": "hf"}, {"source": "/models/m"}),
        ({"chat-template": "t.jinja"}, {"source": "/models/m", "chat_template": "t.jinja"}),
        (
            {"chat_template_content_format": "openai"},
            {"source": "/models/m", "chat_template_content_format": "openai"},
        ),
        (
            {"default-chat-template-kwargs": '{"enable_thinking": false}'},
            {"source": "/models/m", "default_chat_template_kwargs": {"enable_thinking": False}},
        ),
        (
            {"exclude-tools-when-tool-choice-none": True},
            {"source": "/models/m", "exclude_tools_when_tool_choice_none": True},
        ),
    ],
)
def test_flags_of_vllm_that_shape_prompts(flags, config):
    assert of(**flags) == TokenizerConfig(**{"exclude_tools_when_tool_choice_none": False, **config})


@pytest.mark.parametrize("flags", [{"tokenizer-mode": "mistral"}, {"skip-tokenizer-init": True}])
def test_flags_that_are_not_followed(flags):
    assert of(**flags) is None


def test_a_fleet_knows_the_tokenizers_of_its_models():
    model = {"name": "m", "engine": "simulated", "source": "demo"}
    other = {"name": "other", "engine": "simulated", "source": "/models/o"}
    fleet = parse({"models": [model, other], "router": {"tokenizers": {"other": {"source": "/here"}}}})
    assert {name: config.source for name, config in fleet.tokenizers.items()} == {
        "m": "demo",
        "other": "/here",
    }
