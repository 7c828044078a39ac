"""One job's run of its output, the same for every job: who writes, what MLflow shows, how it ends.

    with open_run(config, "encode", root, identity=identity) as run:
        ...                      what there is to do is looked up under the claim; nothing? the block just ends
        run.track("encode photos", params={...})       the MLflow run, made or gone on with
        ...                      the work
        return run.done(result, digest=...)            its counts, and what it made

    identity of the root --claim--> a generation, whose heartbeat shows that its owner lives --> the work --> closed

A run finds another *living* run on its root: it steps back (exit code 4), in every job alike. It finds a dead one:
it fences it off and goes on, also in its MLflow run. How a run ends is said twice, to the next run (the closing note
of the generation) and to people (FINISHED, KILLED where the same command goes on, FAILED). A crash says nothing: the
next run sees that the owner is dead, or silent for too long. A job that only reads has no root: an MLflow run alone.
"""
