{{- define "raydpo.controlPlaneEnv" -}}
{{ include "raydpo.databaseUrl" . }}
- name: RAYDPO_STORAGE_URL
  value: {{ required "storage.url must be the s3:// or gs:// folder of files, runs and models" .Values.storage.url | quote }}
- name: RAYDPO_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ required "api.existingSecret must name the Secret that holds the API key" .Values.api.existingSecret | quote }}
      key: {{ .Values.api.key | quote }}
- name: RAYDPO_RAY_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.ray.existingSecret | default (include "raydpo.ray" .) | quote }}
      key: auth_token
- name: RAYDPO_ADVERTISED_URL
  value: http://{{ include "raydpo.controlPlane" . }}.{{ .Release.Namespace }}.svc:8000
- name: RAYDPO_MAX_CLUSTER
  value: {{ include "raydpo.maxCluster" . | quote }}
- name: RAYDPO_HOME
  value: /tmp/raydpo
- name: RAYDPO_SETTINGS_FILE
  value: /etc/raydpo/raydpo.toml
{{- include "raydpo.traces" . }}
{{- end -}}

{{/* Where the control plane and Ray send traces, as an item of `env`. */}}
{{- define "raydpo.traces" -}}
{{- with .Values.observability.otlpEndpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}
