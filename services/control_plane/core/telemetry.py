"""Defines all metrics for Prometheus.

Labels have few, fixed values: never an id, a key, or the name of a file or a model.
"""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("raydpo_http_requests", "Requests answered, by route template.", ["method", "route", "status"])
REQUEST_SECONDS = Histogram(
    "raydpo_http_request_seconds",
    "Seconds from a request to the start of its answer.",
    ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180),
)
AUTH_FAILURES = Counter("raydpo_auth_failures", "Requests refused for their key.", ["code"])
UPLOADED_BYTES = Counter("raydpo_uploaded_bytes", "Bytes of training files that were stored.")

OPEN_STREAMS = Gauge("raydpo_open_streams", "Event streams of jobs that are open in this process.")
STREAM_TABLE_READS = Counter("raydpo_stream_table_reads", "Pages that streams read from the table, not from memory.")
EVENTS = Counter("raydpo_events_recorded", "Reports of attempts that were recorded.")
ATTEMPTS_ENDED = Counter("raydpo_attempts_ended", "Attempts that ended: succeeded, failed, died, or other.", ["end"])
QUEUE_SECONDS = Histogram(
    "raydpo_job_queue_seconds",
    "Seconds from a job's submission to its first attempt.",
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600),
)

TICKS = Counter("raydpo_reconciler_ticks", "Ticks: acted, stood_by (another holds the lease), or failed.", ["outcome"])
TICK_SECONDS = Histogram("raydpo_reconciler_tick_seconds", "Seconds that a tick took.")

WEBHOOK_SENDS = Counter("raydpo_webhook_sends", "Sends by the class of the answer, or unreachable.", ["outcome"])

# These gauges are read from the database when Prometheus asks, so every replica reports the same values.
JOBS = Gauge("raydpo_jobs", "Jobs by state.", ["state"])
LEASE_SECONDS = Gauge(
    "raydpo_reconciler_lease_seconds", "Seconds until the reconciler's lease ends; below 0 no control plane acts."
)
OUTBOX = Gauge("raydpo_outbox_messages", "Webhook messages that wait to be sent.")
OUTBOX_SECONDS = Gauge("raydpo_outbox_oldest_seconds", "Seconds since the oldest message that waits was written.")

CONNECTIONS = Gauge("raydpo_database_connections", "Connections of the pool, in use or idle.", ["state"])
CONNECTIONS_LIMIT = Gauge("raydpo_database_connections_limit", "The most that the pool opens.")
