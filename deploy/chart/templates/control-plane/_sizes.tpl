{{/* What the autoscaler may grow Ray to. KubeRay rounds a pod's CPUs up. */}}
{{- define "raydpo.maxCluster" -}}
{{- $cpus := 0.0 }}
{{- $gpus := 0.0 }}
{{- range prepend .Values.gpuWorkers .Values.cpuWorkers }}
{{- $cpus = addf $cpus (mulf (ceil (include "raydpo.amount" .cpu)) .maxReplicas) }}
{{- $gpus = addf $gpus (mulf (.gpus | default 0) .maxReplicas) }}
{{- end }}
{{- dict "CPU" $cpus "GPU" $gpus | toJson }}
{{- end -}}

{{/* A quantity of Kubernetes as a plain number. */}}
{{- define "raydpo.amount" -}}
{{- $units := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 }}
{{- mulf (regexFind "^[0-9.]+" .) (get $units (regexFind "[A-Za-z]*$" .)) }}
{{- end -}}

{{/* How many workers or models of so many GPUs the cluster holds at its largest. Each must fit into one pod; those without GPUs take a CPU pod each. Takes (root, name of the value, GPUs). */}}
{{- define "raydpo.fitting" -}}
{{- $root := index . 0 }}
{{- $each := index . 2 | default 0 | float64 }}
{{- $fitting := 0 }}
{{- if $each }}
{{- range $root.Values.gpuWorkers }}
{{- $fitting = add $fitting (mul .maxReplicas (floor (divf .gpus $each))) }}
{{- end }}
{{- if not $fitting }}
  {{- fail (printf "%s is %v, but no pod of gpuWorkers may have so many GPUs; lower it, or raise gpus or maxReplicas of a group" (index . 1) $each) }}
{{- end }}
{{- else }}
{{- $fitting = $root.Values.cpuWorkers.maxReplicas }}
{{- end }}
{{- $fitting }}
{{- end -}}

{{/* How many jobs the head has memory for. It needs 2 GiB itself and 1 GiB for each job's driver. */}}
{{- define "raydpo.drivers" -}}
{{- sub (floor (divf (include "raydpo.amount" .Values.head.memory) 1073741824.0)) 2 | max 1 }}
{{- end -}}

{{/* The settings that the chart chooses where `settings` has none. */}}
{{- define "raydpo.chosenSettings" -}}
max_running_jobs: {{ include "raydpo.fitting" (list . "settings.num_gpus_per_worker" .Values.settings.num_gpus_per_worker) | int | min (include "raydpo.drivers" . | int) | max 1 }}
max_loaded_models: {{ include "raydpo.fitting" (list . "settings.num_gpus_per_model" .Values.settings.num_gpus_per_model) | int | max 2 }}
model_idle_seconds: 1800
log_format: json
{{- end -}}
