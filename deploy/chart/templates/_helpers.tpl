{{/* At most 36 characters: KubeRay cuts what it derives from the RayCluster's name, `<name>-head-svc`, at 50. Starts with a letter, as a Service must. */}}
{{- define "raydpo.fullname" -}}
{{- $release := .Release.Name | replace "." "-" -}}
{{- hasPrefix "raydpo" $release | ternary $release (printf "raydpo-%s" $release) | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{- define "raydpo.controlPlane" -}}{{ include "raydpo.fullname" . }}-control-plane{{- end -}}
{{- define "raydpo.ray" -}}{{ include "raydpo.fullname" . }}-ray{{- end -}}

{{/* The labels that select pods. Takes (root, component). */}}
{{- define "raydpo.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: raydpo
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "raydpo.labels" -}}
{{- $root := index . 0 -}}
{{ include "raydpo.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: raydpo
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "raydpo.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Requests are the limits: Ray believes in what it is given. */}}
{{- define "raydpo.resources" -}}
requests: {{- include "raydpo.quantities" . | nindent 2 }}
limits: {{- include "raydpo.quantities" . | nindent 2 }}
{{- end -}}

{{- define "raydpo.quantities" -}}
cpu: {{ .cpu | quote }}
memory: {{ .memory | quote }}
{{- with .gpus }}
{{ $.gpuResource }}: {{ . }}
{{- end }}
{{- range $name, $amount := .resources }}
{{ $name }}: {{ $amount | quote }}
{{- end }}
{{- end -}}

{{- define "raydpo.databaseUrl" -}}
- name: DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ required "database.existingSecret must name the Secret that holds the PostgreSQL URL" .Values.database.existingSecret | quote }}
      key: {{ .Values.database.key | quote }}
{{- with .Values.database.directKey }}
- name: DATABASE_DIRECT_URL
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.database.existingSecret | quote }}
      key: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* Environment variables from Secrets. Takes their names, of which some may be empty. */}}
{{- define "raydpo.envFrom" -}}
{{- with compact . }}
envFrom:
  {{- range . }}
  - secretRef: { name: {{ . | quote }} }
  {{- end }}
{{- end }}
{{- end -}}
