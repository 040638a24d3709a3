{{/* The alerts of the runbook, by name. The Prometheus operator gives the metrics of this release these two labels. */}}
{{- define "raydpo.alerts" -}}
{{- $own := printf "job=%q,namespace=%q" (include "raydpo.controlPlane" .) .Release.Namespace -}}
RaydpoDown:
  expr: absent(up{ {{- $own -}} } == 1)
  for: 2m
  severity: critical
  summary: No control plane answers Prometheus.
  section: no-control-plane-answers
RaydpoNobodyReconciles:
  expr: max(raydpo_reconciler_lease_seconds{ {{- $own -}} }) < 0
  for: 1m
  severity: critical
  summary: No control plane acts on jobs; they neither start nor end.
  section: nobody-acts-on-jobs
RaydpoDatabaseAway:
  expr: raydpo_outbox_messages{ {{- $own -}} } != raydpo_outbox_messages{ {{- $own -}} } # NaN: the database did not answer
  for: 1m
  severity: critical
  summary: The database does not answer a control plane.
  section: the-database-is-away
RaydpoReconcilerFails:
  expr: sum(increase(raydpo_reconciler_ticks_total{ {{- $own -}} ,outcome="failed"}[10m])) > 5
  for: 0m
  severity: warning
  summary: The reconciler meets errors.
  section: nobody-acts-on-jobs
RaydpoBackgroundFails:
  expr: sum by (part) (increase(raydpo_background_failures_total{ {{- $own -}} }[10m])) > 5
  for: 0m
  severity: warning
  summary: A part that works in the background fails again and again.
  section: alerts
RaydpoServerErrors:
  expr: sum(rate(raydpo_http_requests_total{ {{- $own -}} ,status=~"5.."}[5m])) / sum(rate(raydpo_http_requests_total{ {{- $own -}} }[5m])) > 0.05
  for: 10m
  severity: warning
  summary: More than 5 percent of the answers are 5xx.
  section: alerts
RaydpoAttemptsDie:
  expr: sum(increase(raydpo_attempts_ended_total{ {{- $own -}} ,end="died"}[1h])) > 5
  for: 0m
  severity: warning
  summary: More than five attempts of jobs died in an hour.
  section: attempts-die
RaydpoJobsWait:
  expr: max(raydpo_jobs{ {{- $own -}} ,state="queued"}) > 0 and max(raydpo_jobs{ {{- $own -}} ,state="running"}) == 0
  for: 30m
  severity: warning
  summary: Jobs wait, and none runs.
  section: workers-do-not-come
RaydpoWebhooksWait:
  expr: max(raydpo_outbox_oldest_seconds{ {{- $own -}} }) > 3600
  for: 5m
  severity: warning
  summary: A webhook has waited for an hour.
  section: webhooks-wait
RaydpoConnectionsUsedUp:
  expr: raydpo_database_connections{ {{- $own -}} ,state="in_use"} > ignoring(state) 0.9 * raydpo_database_connections_limit{ {{- $own -}} }
  for: 10m
  severity: warning
  summary: A control plane uses more than 90 percent of its connections to the database.
  section: alerts
RaydpoKeysRefused:
  expr: sum(rate(raydpo_auth_failures_total{ {{- $own -}} }[10m])) > 1
  for: 10m
  severity: warning
  summary: More than one request a second comes with a wrong key.
  section: alerts
RaydpoMemoryUsedUp:
  expr: process_resident_memory_bytes{ {{- $own -}} } > {{ mulf 0.9 (include "raydpo.amount" .Values.controlPlane.memory) | int64 }}
  for: 10m
  severity: warning
  summary: A control plane uses more than 90 percent of its memory.
  section: alerts
{{- end -}}
