"""What simulated users do. One module per scenario; docs/loadtests.md tells what each stands for."""

from __future__ import annotations

from loadtests.scenarios.agent import Agent
from loadtests.scenarios.batch import Batch
from loadtests.scenarios.chat import Chat
from loadtests.scenarios.flash_crowd import FlashCrowd
from loadtests.scenarios.rag import Rag
from loadtests.scenarios.replay import Replay
from loadtests.scenarios.session import Scenario
from loadtests.scenarios.tenants import Tenants

SCENARIOS: tuple[type[Scenario], ...] = (Chat, Agent, Rag, Batch, Tenants, FlashCrowd, Replay)
