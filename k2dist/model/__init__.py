"""The mathematics of Kimi K2: functions of frozen weights, with communicators and kernels passed in.

Read decoder.py first, then mla.py and moe.py.
"""
