"""`python -m k2dist`: the command `k2dist`."""

from k2dist.cli import main

main()
