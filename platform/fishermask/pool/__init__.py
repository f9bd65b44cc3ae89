"""The pool: cut into shards, asked for what a strategy needs, one greedy loop over all of it."""
