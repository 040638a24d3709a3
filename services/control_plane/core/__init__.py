"""What all parts of the control plane stand on: the database, errors, logs and measurements."""
