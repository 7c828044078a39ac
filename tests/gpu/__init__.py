"""What only a GPU can show: that the real jobs run on it, compute what they should, survive it, and keep it busy.

    python -m tests.gpu [--minutes 8] [--only NAME ...] [--rehearse] [--out DIR]

Runs as many checks as fit into the minutes, most valuable first, each in a process of its own (a device that has met
an assertion is of no use to the next), prints one table and writes `gpu_checks.json`. Exit code 1 when one failed, 2
without CUDA. `--rehearse` runs them on a CPU, with tiny networks: to see that they run; its figures say nothing about
any GPU. `pytest tests/gpu -m gpu` runs the same checks.
"""
