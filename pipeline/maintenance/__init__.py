"""The jobs that look after a dataset which is there: verify proves it and removes garbage, compact rewrites it,
forget withdraws what somebody asks to be removed, export writes what is visible for readers of other formats.

What they do lies in `store.maintain`, verify's deepest level in `recheck`, an export's formats in `shards`; here is
how they are run. Files to verify and shards to compact go to the workers of a cluster, or to threads of this process;
one that is killed leaves what was noted or committed, and the same command goes on.
"""
