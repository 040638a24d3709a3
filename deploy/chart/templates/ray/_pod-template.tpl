{{/* A pod of the Ray cluster. Takes root, values (of the group), image and head (whether this is the head). KubeRay adds `ray start`, probes, /dev/shm, the token and, on workers, the wait for the head. */}}
{{- define "raydpo.rayPodTemplate" -}}
{{- $pod := include "raydpo.podValues" (list .root (list .root.Values.ray.pod .values.pod)) | fromJson -}}
{{- $pods := dict "root" .root "component" "ray" "pod" $pod -}}
metadata:
  # Without a version: one that changed would restart the cluster.
  {{- include "raydpo.podMetadata" $pods | nindent 2 }}
spec:
  {{- include "raydpo.podSpec" $pods | nindent 2 }}
  serviceAccountName: {{ include "raydpo.ray" .root }}
  # Only the autoscaler, on the head, speaks to Kubernetes.
  automountServiceAccountToken: {{ .head }}
  containers:
    - name: {{ .head | ternary "ray-head" "ray-worker" }}
      image: {{ .image }}
      imagePullPolicy: {{ .root.Values.images.pullPolicy }}
      env: {{- include "raydpo.env" (list (printf "%s%s" (include "raydpo.rayEnv" .root) (include "raydpo.copiesEnv" .values.scratch)) $pod) | nindent 8 }}
      {{- include "raydpo.envFrom" (list .root.Values.storage.existingSecret .root.Values.hub.existingSecret (.head | ternary .root.Values.integrations.existingSecret "")) | nindent 6 }}
      ports:
        - { name: metrics, containerPort: 8080 }
        {{- if .head }}
        - { name: gcs-server, containerPort: 6379 }
        - { name: dashboard, containerPort: 8265 }
        - { name: serve, containerPort: 8000 }
        {{- end }}
      resources: {{- include "raydpo.resources" .values | nindent 8 }}
      securityContext: {{- include "raydpo.containerSecurity" . | nindent 8 }}
      volumeMounts:
        {{- include "raydpo.mounts" (list (print (include "raydpo.hubMount" .root) (.head | ternary (include "raydpo.rayLogs" .) "")) $pod) | nindent 8 }}
  volumes:
    {{- include "raydpo.volumes" (list .values.scratch $pod) | nindent 4 }}
    {{- include "raydpo.hubVolume" .root | nindent 4 }}
{{- end -}}

{{/* Without a mount at exactly this path KubeRay adds a volume without a limit to the head. */}}
{{- define "raydpo.rayLogs" -}}
- { name: scratch, mountPath: /tmp/ray, subPath: ray }
{{- end -}}

{{/* What the chart sets in the environment of each of Ray's containers. */}}
{{- define "raydpo.rayEnv" -}}
- name: HOME
  value: /tmp
# With these four a node that was cut off is noticed in a minute: docs/operate/reliability.md.
- name: RAY_grpc_client_keepalive_time_ms
  value: "20000"
- name: RAY_grpc_client_keepalive_timeout_ms
  value: "20000"
- name: RAY_health_check_timeout_ms
  value: "3000"
- name: RAY_health_check_failure_threshold
  value: "3"
{{- if .Values.hub.cacheClaim }}
- name: HF_HOME
  value: /models
{{- end }}
{{- include "raydpo.traces" . }}
{{- end -}}

{{/* How much of a pod's /tmp may hold fetched models: 60 percent. Takes the size of its scratch. */}}
{{- define "raydpo.copiesEnv" }}
- name: RAYDPO_COPIES_BYTES
  value: {{ mulf 0.6 (include "raydpo.amount" .) | int64 | quote }}
{{- end -}}

{{- define "raydpo.hubMount" -}}
{{- if .Values.hub.cacheClaim -}}
- { name: hub, mountPath: /models }
{{ end }}
{{- end -}}

{{- define "raydpo.hubVolume" -}}
{{- with .Values.hub.cacheClaim }}
- name: hub
  persistentVolumeClaim:
    claimName: {{ . | quote }}
{{- end }}
{{- end -}}
