"""What is to be done: frozen versions of a plan, each a diff of the source with the one before.

    listing --plan_diff--> new and changed entries, retired rows --plan--> parts and a header --work--> gaps as units

Versions are only ever added. A crash before the header leaves parts that nothing names.
"""
