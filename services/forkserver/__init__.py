"""A fork server on a Ray node: workers and drivers start as forks of a process that has their imports done.

Imports of torch, transformers and Ray cost a process ten CPU seconds; a fork costs it a tenth of one. `start_ray`
gives Ray another Python to start its workers with, a client that hands the worker's command line, environment and
standard streams to the server, and ends. Where no server answers, the client runs the command itself.
"""

VARIABLE = "RAYDPO_FORKSERVER"  # the path of the server's socket
RAYLET_VARIABLE = "RAY_RAYLET_PID"  # Ray's own: the process with whose end a worker ends
