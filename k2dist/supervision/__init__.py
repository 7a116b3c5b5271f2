"""Who lives, in which generation, and what to do about it: a pure table; `cluster/` is the shell round it."""
