"""Trains models in Ray jobs. A job's main program, the driver, prepares the data and starts Ray Train's workers."""
