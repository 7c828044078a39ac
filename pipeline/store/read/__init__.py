"""A dataset as a reader sees it: the state of one moment, its live rows and their row groups.

    Dataset.open --state--> visible files, dead rows --readable--> row groups --pages--> columns, straight from pages

`pins` keeps a state for a training that goes on for weeks, `external` reads what rows name beside the Parquet files.
Nothing here writes but a pin.
"""
