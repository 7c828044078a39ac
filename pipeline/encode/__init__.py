"""The encode job: every planned source row becomes a latent, a reject or a filtered row, exactly once.

Flow, with what travels at each arrow and what a crash leaves::

    source --list--> entries --diff with the plan--> new units --freeze--> plan version      (nothing, or a plan)
    gaps of the plan --read tasks--> compressed bytes + (unit, row)                          (nothing)
    bytes --encoder actors: decode threads, VAE in batches of one shape--> latents + (unit, row)   (nothing)
    latents --write tasks: one fragment, one commit record--> visible rows                   (at most orphan files)

`planning` turns a listing into plan versions. `encoder` is the work on the device, a plain class that knows no
Ray. `blocks` are the Arrow schemas between stages. `graph` describes the Ray Data execution; `job` wires it and
repeats it over the gaps until none are left or nothing moves. Ray repeats, splits and reorders what it likes: rows
carry their address, fragments are named by content, and only the ledger decides what is visible.
"""
