"""Projects, their keys, their quotas and the audit log."""
