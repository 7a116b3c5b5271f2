"""Facts of machines, links and Ray for `k2dist.doctor`: of this machine, or through Ray of every node.

Nothing here judges. Each question has a deadline, and a node that does not answer is a fact too.
"""

from k2dist.probe.gather import gather, gather_here
from k2dist.probe.machine import Wanted

__all__ = ["Wanted", "gather", "gather_here"]
