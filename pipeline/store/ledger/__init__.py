"""Who may write, and what is done: generations, commit records, their bundles, and the state that they fold to.

    claim (generation) --> records (record) --> seal and bundle (bundles) --> what counts (ledger) --> fold (state)

All of them are columns, over sets of row addresses (rowset).

A claim lists what is visible from before; what a run of an older generation creates afterwards is in no list. A
crash leaves records, which count, and a generation that somebody takes over. `layout` says where everything lies,
`identity` what a root holds, `generation` also which tracking run wrote it.
"""
