"""Sends a job's metrics to Weights & Biases, MLflow and TensorBoard.

Training does not know of them. Each integration reads the job's spool from the beginning, at its own pace and in its
own process. One that fails starts again, and continues after the last step that its service has.
"""
