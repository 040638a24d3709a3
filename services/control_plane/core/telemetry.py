"""Defines all metrics for Prometheus.

Labels have few, fixed values: never an id, a key, or the name of a file or a model.
"""

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "raydpo_http_requests",
    "Answered HTTP requests, by route such as /v1/files/{file_id}.",
    ["method", "route", "status"],
)
REQUEST_SECONDS = Histogram(
    "raydpo_http_request_seconds",
    "Seconds from the arrival of an HTTP request to the start of its answer.",
    ["method", "route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180),
)
AUTH_FAILURES = Counter(
    "raydpo_auth_failures", "HTTP requests refused because of a missing, wrong or insufficient API key.", ["code"]
)
UPLOADED_BYTES = Counter("raydpo_uploaded_bytes", "Bytes of training files that were stored.")

OPEN_STREAMS = Gauge("raydpo_open_streams", "Event streams of jobs that are open in this process.")
STREAM_TABLE_READS = Counter(
    "raydpo_stream_table_reads",
    "Pages of events that streams read from the database, because they were no longer in memory.",
)
EVENTS = Counter("raydpo_events_recorded", "Recorded reports of attempts (an attempt is one run of a job).")
ATTEMPTS_ENDED = Counter(
    "raydpo_attempts_ended", "Ended attempts (runs of jobs), by end: succeeded, failed, died, or other.", ["end"]
)
QUEUE_SECONDS = Histogram(
    "raydpo_job_queue_seconds",
    "Seconds from a job's submission to its first attempt.",
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 72 * 3600),
)

TICKS = Counter(
    "raydpo_reconciler_ticks",
    "Ticks (regular looks at all jobs), by outcome: acted, stood_by (another control plane acts on jobs), or failed.",
    ["outcome"],
)
TICK_SECONDS = Histogram(
    "raydpo_reconciler_tick_seconds", "Seconds of a tick, one look at all jobs and the actions that follow."
)

BACKGROUND_FAILURES = Counter(
    "raydpo_background_failures",
    "Failed passes of parts that work in the background and try again without end, by the part's name.",
    ["part"],
)

WEBHOOK_SENDS = Counter(
    "raydpo_webhook_sends",
    "Tries to send a webhook message, by outcome: 2xx, 4xx and so on for the answer's status; unreachable: no answer.",
    ["outcome"],
)

# These gauges are read from the database when Prometheus asks, so every replica reports the same values.
JOBS = Gauge("raydpo_jobs", "Jobs by state.", ["state"])
LEASE_SECONDS = Gauge(
    "raydpo_reconciler_lease_seconds",
    "Seconds until the lease expires that lets one control plane act on jobs; below 0: no control plane acts on jobs.",
)
OUTBOX = Gauge("raydpo_outbox_messages", "Webhook messages that wait to be sent or sent again.")
OUTBOX_SECONDS = Gauge("raydpo_outbox_oldest_seconds", "Seconds since the oldest waiting webhook message was written.")

CONNECTIONS = Gauge(
    "raydpo_database_connections", "Connections of this process to the database, in use or idle.", ["state"]
)
CONNECTIONS_LIMIT = Gauge(
    "raydpo_database_connections_limit", "Maximum number of connections of this process to the database."
)
