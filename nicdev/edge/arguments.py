"""What the two programs' command lines have in common."""

from __future__ import annotations

import argparse
from typing import NoReturn

from nicdev.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """One line for a mistake, as for all others: `parse_args` raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ConfigError(message)
