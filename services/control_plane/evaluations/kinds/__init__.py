"""The kinds of evaluations. Each module says in which stages an item is worked on, and summarizes the results."""
