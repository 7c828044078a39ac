"""The encode job: every planned source row becomes a latent, a reject or a filtered row, exactly once.

Flow, with what travels at each arrow and what a crash leaves::

    source --list--> entries --diff with the plan--> new units --freeze--> plan version      (the listing, a plan)
    gaps of the plan --read tasks--> compressed bytes + (unit, row)                          (nothing)
    bytes --encoder actors: decode threads, VAE in batches of one shape--> latents + (unit, row)   (nothing)
    latents --write tasks: one fragment, one commit record--> visible rows                   (at most orphan files)

`plan` says what all rows share and turns a listing into plan versions. `reading` holds a dataset to one way of being
read, reads texts again beside latents that stay, and spreads the listing of a store over workers. `stages` are what
runs on workers: reading, decoding beside the device, committing. `rows` says what becomes of a row, in Python and in
the Arrow blocks between stages; `encoder` makes latents in batches that fill up across blocks: plain classes that
know no Ray. `passes` describes the Ray Data execution and repeats it over the gaps until none are left or nothing
moves; `job` plans and tracks. Ray repeats, splits and reorders what it likes: rows carry their address, fragments
are named by content, and only the ledger decides what is visible.
"""
