{{/* Where Ray's head keeps its state. Takes the values `gcs`. */}}
{{- define "raydpo.gcs" -}}
{{- if and (eq .backend "redis") (not .redisAddress) }}
  {{- fail "gcs.redisAddress must be Redis' host:port, because gcs.backend is redis" }}
{{- end }}
{{- if and .redisUser (not .redisSecret) }}
  {{- fail "gcs.redisSecret must name the Secret that holds redis-username, because gcs.redisUser is true" }}
{{- end }}
{{- if and .redisAddress (ne .backend "redis") }}
  {{- fail "gcs.redisAddress is set, but gcs.backend is not redis; set it to redis" }}
{{- end }}
{{- with .backend }}
gcsFaultToleranceOptions:
  {{- if eq . "redis" }}
  redisAddress: {{ $.redisAddress | quote }}
  {{- if $.redisUser }}
  redisUsername:
    valueFrom:
      secretKeyRef: { name: {{ $.redisSecret | quote }}, key: redis-username }
  {{- end }}
  {{- with $.redisSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: { name: {{ . | quote }}, key: redis-password }
  {{- end }}
  {{- else }}
  backend: rocksdb
  storage:
    size: {{ $.size | quote }}
    {{- with $.storageClass }}
    storageClassName: {{ . | quote }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end -}}
