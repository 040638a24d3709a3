"""Sends a job's metrics to Weights & Biases, MLflow and TensorBoard.

Training itself does not call these services. For each service, a separate process reads the job's reports in storage
(the spool) from the beginning, and sends the metrics at its own pace. If sending fails, the process tries again, and
continues after the last step that its service has.
"""
