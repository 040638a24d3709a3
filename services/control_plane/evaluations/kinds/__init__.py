"""The kinds of evaluations, one module for each. A module does the stages of an item and summarizes the results of all
items.
"""
