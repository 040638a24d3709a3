{{/* The hub ids among `models`, one a line; the others are storage URIs and folders. */}}
{{- define "raydpo.hubModels" -}}
{{- range .Values.models }}
{{- $source := kindIs "map" . | ternary (kindIs "map" . | ternary . (dict)).source . }}
{{- if not (or (contains "://" $source) (hasPrefix "/" $source)) }}
- {{ $source | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* A Job that fetches them with the hub's own command, as jobs and models would: a file that is there is not fetched again. */}}
{{- define "raydpo.warmUp" -}}
{{- $pod := include "raydpo.podValues" (list . (list .Values.ray.pod .Values.cpuWorkers.pod)) | fromJson }}
{{- $pods := dict "root" . "component" "warm-up" "pod" $pod -}}
backoffLimit: 6
template:
  metadata:
    {{- include "raydpo.podMetadata" $pods | nindent 4 }}
  spec:
    {{- include "raydpo.podSpec" $pods | nindent 4 }}
    automountServiceAccountToken: false
    restartPolicy: OnFailure
    containers:
      - name: warm-up
        image: {{ .Values.images.ray }}
        imagePullPolicy: {{ .Values.images.pullPolicy }}
        command:
          - sh
          - -c
          - >-
            for model in "$@"; do hf download "$model" --include "*.safetensors" --include "*.json" --include "*.jinja"
            --include "*.txt" --include "*.model" --include "*.tiktoken" || exit 1; done
          - warm-up
        args: {{- include "raydpo.hubModels" . | nindent 10 }}
        env: {{- include "raydpo.env" (list (include "raydpo.rayEnv" .) $pod) | nindent 10 }}
        {{- include "raydpo.envFrom" (list .Values.hub.existingSecret) | nindent 8 }}
        resources: {{- include "raydpo.resources" (dict "cpu" "1" "memory" "4Gi") | nindent 10 }}
        securityContext: {{- include "raydpo.containerSecurity" . | nindent 10 }}
        volumeMounts:
          {{- include "raydpo.mounts" (list (include "raydpo.hubMount" .) $pod) | nindent 10 }}
    volumes:
      {{- include "raydpo.volumes" (list "4Gi" $pod) | nindent 6 }}
      {{- include "raydpo.hubVolume" . | nindent 6 }}
{{- end -}}
