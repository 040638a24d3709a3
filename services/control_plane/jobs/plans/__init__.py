"""Plans of jobs: whether a job would fit into the memory of its workers."""
