"""The command `k2dist`. The environment is read here alone, and errors become lines and exit codes.

Exit codes: 0 success, 1 failure, 2 bad usage, 130 ended by Ctrl-C.
"""

import sys

from k2dist.cli.environment import prepare_environment

__all__ = ["main"]


def main() -> None:
    """What the console script runs."""
    prepare_environment()
    try:
        from k2dist.cli.app import run  # commands import ray, which looks at the environment then

        run()
    except KeyboardInterrupt:  # nothing was started yet
        sys.exit(130)
