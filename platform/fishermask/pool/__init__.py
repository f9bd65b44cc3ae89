"""The pool, divided into shards: the computations that strategies need, and the greedy selection loop."""
