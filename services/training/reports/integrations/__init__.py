"""Sends a job's metrics to Weights & Biases, MLflow and TensorBoard.

Training does not know these services. For each of them, a separate process reads the job's reports in storage (the
spool) from the beginning, and sends the metrics at its own pace. A process that fails starts again, and continues after
the last step that its service has.
"""
