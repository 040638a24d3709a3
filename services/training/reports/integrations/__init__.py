"""Where else a job is followed: Weights & Biases, MLflow, TensorBoard.

Training knows nothing of it. What it reports stands in the spool; each integration reads that from the job's
beginning, at its own pace and in a process of its own. One that fails starts over and goes on after what it has.
"""
