"""Times every op's cases against what the machine gave in the same run: `python -m k2kernels.bench --help`.

ceilings   a large read, a large copy, a large matrix product
work       an op's case as a call of a kernel set, on random data
peers      the same case by torch's own op, and by other projects' kernels where they are installed
"""
