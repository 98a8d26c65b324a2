# SPDX-License-Identifier: Apache-2.0
"""Run a model: answers, chats, a server, and what they cost. The program is `dsv4-run`."""

from .engine import Answer, Engine
from .settings import Settings
from .stats import RunStats

__all__ = ["Answer", "Engine", "RunStats", "Settings"]
