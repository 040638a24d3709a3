{{/* A pod of the Ray cluster. Takes root, values (of the group), image and head (whether this is the head). KubeRay adds `ray start`, probes, /dev/shm, the token and, on workers, the wait for the head. */}}
{{- define "raydpo.rayPodTemplate" -}}
metadata:
  # Without a version: one that changed would restart the cluster.
  labels: {{- include "raydpo.selector" (list .root "ray") | nindent 4 }}
spec:
  {{- include "raydpo.pod" (list .root .values) | nindent 2 }}
  serviceAccountName: {{ include "raydpo.ray" .root }}
  # Only the autoscaler, on the head, speaks to Kubernetes.
  automountServiceAccountToken: {{ .head }}
  containers:
    - name: {{ .head | ternary "ray-head" "ray-worker" }}
      image: {{ .image }}
      imagePullPolicy: {{ .root.Values.images.pullPolicy }}
      env:
        - name: HOME
          value: /tmp
        {{- include "raydpo.traces" .root | nindent 8 }}
      {{- with list .root.Values.storage.existingSecret (.head | ternary .root.Values.integrations.existingSecret "") | compact }}
      envFrom:
        {{- range . }}
        - secretRef: { name: {{ . | quote }} }
        {{- end }}
      {{- end }}
      {{- if .head }}
      ports:
        - { name: gcs-server, containerPort: 6379 }
        - { name: dashboard, containerPort: 8265 }
        - { name: serve, containerPort: 8000 }
      {{- end }}
      resources: {{- include "raydpo.resources" .values | nindent 8 }}
      securityContext: {{- include "raydpo.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - { name: scratch, mountPath: /tmp }
  volumes:
    {{- include "raydpo.scratch" .values | nindent 4 }}
{{- end -}}
