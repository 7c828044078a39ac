"""Pictures for people: images to bytes and back, contact sheets, and HTML pages in one style.

Functions of what they are given: nothing here reads or writes a store.
"""
