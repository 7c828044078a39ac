"""The jobs that look after a dataset: verify (and garbage collection), compact, dedup, forget.

Each that changes anything does so under a generation of its own, through commits: a crash leaves what was committed.
"""
