{{/* What a pod may have besides its container: `pods`, and over it each of `layers`. Tables are merged, other values replaced. Takes (root, layers). */}}
{{- define "raydpo.podValues" -}}
{{- $merged := deepCopy (index . 0).Values.pods -}}
{{- range $layer := index . 1 -}}
  {{- range $name, $value := $layer -}}
    {{- if kindIs "map" $value }}{{ $value = merge (dict) $value (get $merged $name) }}{{ end -}}
    {{- $_ := set $merged $name $value -}}
  {{- end -}}
{{- end -}}
{{- toJson $merged -}}
{{- end -}}

{{/* The metadata of a pod. Takes root, component, pod (raydpo.podValues) and annotations of the chart itself. */}}
{{- define "raydpo.podMetadata" -}}
labels:
  {{- with .pod.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- include "raydpo.selector" (list .root .component) | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) .pod.annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Who runs a pod, where, and how its image is pulled. Takes root, component and pod. */}}
{{- define "raydpo.podSpec" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  # Claims are writable by this group.
  fsGroup: 1000
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
# Without this a Service named `vllm` would set VLLM_PORT, which vLLM reads.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .pod.terminationGracePeriodSeconds }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $name := list "nodeSelector" "tolerations" "affinity" }}
{{- with get $.pod $name }}
{{ $name }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- range $name := list "priorityClassName" "runtimeClassName" "schedulerName" }}
{{- with get $.pod $name }}
{{ $name }}: {{ . | quote }}
{{- end }}
{{- end }}
{{- with .pod.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range . }}
  {{- $own := dict "labelSelector" (dict "matchLabels" (include "raydpo.selector" (list $.root $.component) | fromYaml)) }}
  - {{- merge (dict) . $own | toYaml | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The environment of a container: the chart's own and `extraEnv`. Takes (own items, raydpo.podValues). */}}
{{- define "raydpo.env" -}}
{{- $own := list "RAY_enable_autoscaler_v2" }}
{{- range index . 0 | fromYamlArray }}
{{- $own = append $own .name }}
{{- end }}
{{- index . 0 }}
{{- range $name, $value := (index . 1).extraEnv }}
{{- if has $name $own }}
  {{- fail (printf "extraEnv: the chart sets %s itself; leave it out" $name) }}
{{- end }}
{{- if has $name (list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME") }}
  {{- fail (printf "extraEnv: KubeRay refuses a cluster with %s; use gcs.redisAddress and gcs.redisSecret" $name) }}
{{- end }}
- name: {{ $name }}
  {{- if kindIs "map" $value }}
  valueFrom: {{- toYaml $value | nindent 4 }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What a container mounts: /tmp, its only writable place, the chart's own and `extraVolumeMounts`. Takes (own items, raydpo.podValues). */}}
{{- define "raydpo.mounts" -}}
{{- $own := printf "- { name: scratch, mountPath: /tmp }\n%s" (index . 0) | trim }}
{{- $paths := list }}
{{- range fromYamlArray $own }}
{{- $paths = append $paths .mountPath }}
{{- end }}
{{- $known := list "scratch" "settings" "hub" }}
{{- $pod := index . 1 }}
{{- range $pod.extraVolumes }}
  {{- if has .name $known }}
    {{- fail (printf "extraVolumes: the name %s is the chart's own; give the volume another one" .name) }}
  {{- end }}
  {{- $known = append $known .name }}
{{- end }}
{{- range $pod.extraVolumeMounts }}
  {{- if not (has .name $known) }}
    {{- fail (printf "extraVolumeMounts: there is no volume %s; add it to extraVolumes of the same pod" .name) }}
  {{- end }}
  {{- $path := clean .mountPath }}
  {{- if has $path $paths }}
    {{- fail (printf "extraVolumeMounts: something is mounted at %s already; choose another mountPath" $path) }}
  {{- end }}
  {{- $paths = append $paths $path }}
{{- end -}}
{{ $own }}
{{- with $pod.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The volumes of these mounts. Takes (size of /tmp, raydpo.podValues). */}}
{{- define "raydpo.volumes" -}}
{{- $size := index . 0 | quote -}}
- name: scratch
  {{- with (index . 1).scratchStorageClass }}
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        storageClassName: {{ . | quote }}
        resources: { requests: { storage: {{ $size }} } }
  {{- else }}
  emptyDir:
    sizeLimit: {{ $size }}
  {{- end }}
{{- with (index . 1).extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
