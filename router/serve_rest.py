"""Ray Serve's REST interface on the dashboard: what `serve deploy`, `serve status` and `serve delete` use."""

from __future__ import annotations

import re
from typing import Any, Self

import httpx

from router.errors import HerdError

# Errors whose message is a sentence for whoever started the fleet, as they stand in a Serve traceback.
ERRORS = ("EngineStartError", "VllmNotFoundError", "UnsupportedError", "ListenError", "ConfigError")
SENTENCE = re.compile(rf"(?:{'|'.join(ERRORS)})\S*: (.+)")
APPLICATIONS = "/api/serve/applications/"
# The first config starts Serve's controller, which takes seconds on a busy machine.
DEPLOY_S = 120.0
LOOK_S = 10.0


class ServeError(HerdError):
    """Serve refused or failed; the message is one sentence."""


class ServeRest:
    """One Ray cluster's Serve, through its dashboard."""

    def __init__(self, dashboard: str, token: str | None) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=dashboard, headers=headers, trust_env=False)

    def deploy(self, document: dict[str, Any]) -> None:
        """Makes the cluster run exactly the applications of a Serve config."""
        self._call("PUT", DEPLOY_S, json=document)

    def applications(self) -> dict[str, Any]:
        """Every application by name, with its status, deployments and replicas."""
        return dict(self._call("GET", LOOK_S).json()["applications"])

    def shut_down(self, timeout_s: float) -> None:
        """Ends Serve with all its applications; returns when they are gone."""
        self._call("DELETE", timeout_s)

    def _call(self, method: str, timeout_s: float, **more: Any) -> httpx.Response:
        try:
            reply = self._http.request(method, APPLICATIONS, timeout=timeout_s, **more)
        except httpx.TransportError as error:
            raise ServeError(f"Ray Serve does not answer: {error}") from error
        if reply.status_code != 200:
            raise ServeError(f"Ray Serve refuses: {sentence(reply.text)}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


def beside_others(document: dict[str, Any], applications: dict[str, Any]) -> dict[str, Any]:
    """The config with what others have deployed: Serve drops every application that a config leaves out."""
    own = {application["name"] for application in document["applications"]}
    return {**document, "applications": [*_deployed(applications, except_for=own), *document["applications"]]}


def without(name: str, document: dict[str, Any], applications: dict[str, Any]) -> dict[str, Any]:
    """The config that withdraws one application and keeps the others."""
    return {**document, "applications": _deployed(applications, except_for={name})}


def _deployed(applications: dict[str, Any], except_for: set[str]) -> list[dict[str, Any]]:
    configs = {name: application.get("deployed_app_config") for name, application in applications.items()}
    return [config for name, config in configs.items() if config and name not in except_for]


def sentence(message: str) -> str:
    """The one sentence in Serve's report of a failure: ours, else the last line of the traceback."""
    if found := SENTENCE.findall(message):
        return str(found[-1]).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
