{{/* A group of workers. Takes root, name, values and image. `replicas` is the autoscaler's: an upgrade keeps what it set last, between the bounds. */}}
{{- define "raydpo.rayGroup" -}}
{{- if lt (int .values.maxReplicas) (int .values.minReplicas) }}
  {{- fail (printf "the group %s has minReplicas %d above maxReplicas %d, which KubeRay refuses; lower minReplicas" .name (int .values.minReplicas) (int .values.maxReplicas)) }}
{{- end -}}
groupName: {{ .name }}
{{- $live := lookup "ray.io/v1" "RayCluster" .root.Release.Namespace (include "raydpo.ray" .root) }}
{{- range dig "spec" "workerGroupSpecs" list $live }}
{{- if and (eq .groupName $.name) (hasKey . "replicas") }}
replicas: {{ .replicas | int | max (int $.values.minReplicas) | min (int $.values.maxReplicas) }}
{{- end }}
{{- end }}
minReplicas: {{ .values.minReplicas }}
maxReplicas: {{ .values.maxReplicas }}
{{- range $name := list "priority" "idleTimeoutSeconds" }}
{{- with get $.values $name }}
{{ $name }}: {{ . | int }}
{{- end }}
{{- end }}
{{- with .values.gpus }}
# Said here as well, because Ray's autoscaler knows no MIG by its name.
rayStartParams:
  num-gpus: {{ . | quote }}
{{- else }}
rayStartParams: {}
{{- end }}
template:
  {{- include "raydpo.rayPodTemplate" (dict "root" .root "values" .values "image" .image "head" false) | nindent 2 }}
{{- end -}}
