"""The pool in shards: the computations that strategies need, and the greedy selection loop."""
