"""The kinds of evaluations, one module for each.

Each module does the work for each item (prompt) of an evaluation, and summarizes the results of all items.
"""
