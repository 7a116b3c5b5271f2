"""One rank of a large layout acted out on one device: real shapes and kernels, made-up weights and peers.

`measure` gives the figures, `k2dist rehearse` prints them.
"""
