"""Trains models in Ray jobs. The main program of such a job, the driver, prepares the data and starts Ray Train's
workers."""
