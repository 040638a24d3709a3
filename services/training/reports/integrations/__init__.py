"""Sends a job's metrics to Weights & Biases, MLflow and TensorBoard.

Training does not know these integrations. Each integration reads the job's spool (its reports in storage) from the
beginning, at its own pace and in its own process. An integration that fails starts again, and continues after the last
step that its service has.
"""
