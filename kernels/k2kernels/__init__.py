"""The operations of one Kimi-K2 step, each with a contract, a reference and its cost. Knows nothing of k2dist."""
