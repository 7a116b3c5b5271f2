"""The command `k2dist`. The environment is read here alone, and errors become lines and exit codes.

Exit codes: 0 success, 1 failure, 2 bad usage, 130 ended by Ctrl-C.
"""

import gc
import sys

from k2dist.cli.environment import prepare_environment

__all__ = ["main"]

# New objects before garbage is looked for. At Python's 700, looking took a tenth of the CPU time that imports
# and a load take: all that they make stays.
NUM_UNCOLLECTED = 20_000


def main() -> None:
    """What the console script runs."""
    prepare_environment()
    gc.set_threshold(NUM_UNCOLLECTED)
    try:
        from k2dist.cli.app import run  # commands import ray, which looks at the environment then

        run()
    except KeyboardInterrupt:  # nothing was started yet
        sys.exit(130)
