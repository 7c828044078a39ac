"""The jobs that look after a dataset which is there: verify proves it and removes garbage, compact rewrites it,
forget withdraws what somebody asks to be removed.

What they do is `store.maintain`'s, and of verify's deepest level `maintenance.recheck`'s; here is how they are run.
"""
