"""Files and uploads, and the checks of their rows."""
