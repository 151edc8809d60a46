"""What is made of Serve's words and configs."""

import pytest

from router.serve_rest import beside_others, sentence, without

TRACEBACK = """The deployment failed to start 2 times in a row. Error:
ray::ServeReplica:herd:Replica-m.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 1, in __init__
workers.process.EngineStartError: the vllm engine of m did not start: there is no model at /x (its log: /l)
"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (TRACEBACK, "the vllm engine of m did not start: there is no model at /x (its log: /l)"),
        ("router.errors.ListenError: Port 8000 is taken.\n", "Port 8000 is taken."),
        ("Traceback:\n  File x\nValueError: odd\n", "ValueError: odd"),
        ("", "no reason given"),
    ],
)
def test_the_one_sentence_of_a_failure(message: str, told: str) -> None:
    assert sentence(message) == told


CONFIG = {"proxy_location": "Disabled", "applications": [{"name": "herd", "args": {}}]}
DEPLOYED = {
    "herd": {"deployed_app_config": {"name": "herd", "args": {"old": 1}}},
    "other": {"deployed_app_config": {"name": "other"}},
    "by-hand": {"deployed_app_config": None},
}


def test_other_applications_stay_and_ones_own_is_replaced() -> None:
    assert beside_others(CONFIG, DEPLOYED)["applications"] == [
        {"name": "other"},
        {"name": "herd", "args": {}},
    ]


def test_withdrawing_leaves_the_others() -> None:
    assert without("herd", CONFIG, DEPLOYED)["applications"] == [{"name": "other"}]
