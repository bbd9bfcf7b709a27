{{/* Names. A StatefulSet has at most 52 characters (its pods carry a label with 11 more), a pool 12, "-worker-" 8. */}}
{{- define "conclave.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 32 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 32 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "conclave.cluster" -}}
{{- .Values.cluster | default (printf "%s.%s" .Release.Namespace (include "conclave.fullname" .) | trunc 63 | trimSuffix "-") }}
{{- end }}

{{- define "conclave.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "conclave.fullname" .) }}
{{- else }}
{{- required "serviceAccount.name is needed where serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* What a selector may name: it never changes. Takes (list root component). */}}
{{- define "conclave.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "conclave.labels" -}}
{{- $root := index . 0 -}}
{{ include "conclave.selector" . }}
app.kubernetes.io/part-of: conclave
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Of pods: what changes with a release of the chart alone must not restart them. */}}
{{- define "conclave.podLabels" -}}
{{ include "conclave.selector" . }}
app.kubernetes.io/part-of: conclave
{{- end }}

{{/*
The line `replicas`. Where an autoscaler looks after them: as many as there are now, since left out, an upgrade that switches
autoscaling on would shrink them to 1 first; none where nothing is there yet. Takes (list root kind name values).
*/}}
{{- define "conclave.replicas" -}}
{{- $values := index . 3 -}}
{{- if not $values.autoscaling.enabled }}
replicas: {{ $values.replicas }}
{{- else }}
{{- with lookup "apps/v1" (index . 1) (index . 0).Release.Namespace (index . 2) }}
replicas: {{ .spec.replicas }}
{{- end }}
{{- end }}
{{- end }}

{{/* Takes (list image default-tag). */}}
{{- define "conclave.imageName" -}}
{{- $image := index . 0 -}}
{{- if $image.digest }}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else }}
{{- printf "%s:%s" $image.repository ($image.tag | default (index . 1)) }}
{{- end }}
{{- end }}

{{/* image and imagePullPolicy of a container; takes (list root image-that-differs). */}}
{{- define "conclave.image" -}}
{{- $root := index . 0 -}}
{{- $own := index . 1 -}}
{{- $image := mergeOverwrite (deepCopy $root.Values.image) $own -}}
{{- /* A tag of its own means that tag, not the digest of all the others. */ -}}
{{- if and $own.tag (not $own.digest) }}{{ $_ := set $image "digest" "" }}{{ end -}}
image: {{ include "conclave.imageName" (list $image $root.Chart.AppVersion) | quote }}
imagePullPolicy: {{ $image.pullPolicy }}
{{- end }}

{{/* All pools by name; the one without a name is there where none is named. */}}
{{- define "conclave.pools" -}}
{{- $pools := dict -}}
{{- range $name, $pool := (.Values.workerPools | default (dict "" (dict))) }}
{{- $_ := set $pools $name (mergeOverwrite (deepCopy $.Values.worker) ($pool | default dict)) }}
{{- end }}
{{- $pools | toJson }}
{{- end }}

{{/* Workers that the first plan waits for. */}}
{{- define "conclave.minWorkers" -}}
{{- $all := 0 -}}
{{- range include "conclave.pools" . | fromJson }}
{{- $all = add $all (ternary .autoscaling.minReplicas .replicas .autoscaling.enabled) }}
{{- end }}
{{- .Values.placement.minWorkers | default $all | int | max 1 }}
{{- end }}

{{- define "conclave.etcdPeers" -}}
{{- printf "%s-etcd.%s.svc" (include "conclave.fullname" .) .Release.Namespace }}
{{- end }}

{{- define "conclave.store" -}}
{{- if .Values.etcd.bundled.enabled }}
{{- if .Values.etcd.endpoints }}
{{- fail "etcd.endpoints and etcd.bundled.enabled: one etcd is enough" }}
{{- end }}
{{- $urls := list }}
{{- range until (int .Values.etcd.bundled.replicas) }}
{{- $urls = append $urls (printf "http://%s-etcd-%d.%s:2379" (include "conclave.fullname" $) . (include "conclave.etcdPeers" $)) }}
{{- end }}
{{- printf "etcd=%s" (join "," $urls) }}
{{- else if .Values.etcd.endpoints }}
{{- printf "etcd=%s" (join "," .Values.etcd.endpoints) }}
{{- else }}
{{- fail "etcd.endpoints is empty and etcd.bundled.enabled is false: there must be an etcd" }}
{{- end }}
{{- end }}

{{/* Environment that routers and workers share: what the chart decides for them. */}}
{{- define "conclave.env" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: CONCLAVE_ID
  value: $(POD_NAME)
- name: CONCLAVE_CLUSTER
  value: {{ include "conclave.cluster" . | quote }}
- name: CONCLAVE_STORE
  value: {{ include "conclave.store" . | quote }}
- name: CONCLAVE_MODEL
  value: {{ printf "/models/%s" .Values.model.name | quote }}
- name: CONCLAVE_LOG_FORMAT
  value: {{ .Values.logFormat }}
{{- end }}

{{/* An address that others reach this pod at, without the port. */}}
{{- define "conclave.podAddress" -}}
{{- eq .Values.bindAddress "[::]" | ternary "[$(POD_IP)]" "$(POD_IP)" }}
{{- end }}

{{/* Flags given by name; takes the map. */}}
{{- define "conclave.settings" -}}
{{- range $flag, $value := . }}
- name: CONCLAVE_{{ $flag | replace "-" "_" | upper }}
  {{- /* YAML's numbers are floats here, and a large whole one would be written with an exponent. */}}
  {{- $whole := and (kindIs "float64" $value) (eq (floor $value) $value) }}
  value: {{ $whole | ternary (printf "%.0f" $value) (toString $value) | quote }}
{{- end }}
{{- end }}

{{- define "conclave.modelMount" -}}
- name: model
  mountPath: {{ printf "/models/%s" .Values.model.name | quote }}
  {{- with .Values.model.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
  readOnly: true
{{- end }}

{{- define "conclave.modelVolume" -}}
{{- $volume := .Values.model.volume -}}
- name: model
  {{- if eq $volume.kind "existingClaim" }}
  persistentVolumeClaim:
    claimName: {{ $volume.claimName | quote }}
    readOnly: true
  {{- else if eq $volume.kind "hostPath" }}
  hostPath:
    path: {{ $volume.path | quote }}
    type: Directory
  {{- else }}
  {{- if $volume.sizeLimit }}
  emptyDir:
    sizeLimit: {{ $volume.sizeLimit | quote }}
  {{- else }}
  emptyDir: {}
  {{- end }}
  {{- end }}
{{- end }}

{{/* What fills an emptyDir before the process starts. */}}
{{- define "conclave.fetch" -}}
{{- if eq .Values.model.volume.kind "emptyDir" }}
initContainers:
  - name: fetch
    image: {{ .Values.model.fetch.image | quote }}
    command:
      {{- toYaml .Values.model.fetch.command | nindent 6 }}
    {{- with .Values.model.fetch.env }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .Values.model.fetch.resources }}
    resources:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "conclave.containerSecurity" . | nindent 6 }}
    terminationMessagePolicy: FallbackToLogsOnError
    volumeMounts:
      - name: model
        mountPath: /volume
      # Downloaders keep caches and locks.
      - name: scratch
        mountPath: /tmp
{{- end }}
{{- end }}

{{- define "conclave.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "conclave.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/*
Pod fields that routers and workers share; takes (list root values selector). No service links: they would put CONCLAVE_*
variables of Services into the environment, where flags are looked for.
*/}}
{{- define "conclave.pod" -}}
{{- $root := index . 0 -}}
{{- $values := index . 1 -}}
{{- $selector := index . 2 -}}
serviceAccountName: {{ include "conclave.serviceAccountName" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- include "conclave.podSecurity" $root | nindent 2 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or $values.spread.host $values.spread.zone }}
topologySpreadConstraints:
  {{- range $key, $rule := dict "kubernetes.io/hostname" $values.spread.host "topology.kubernetes.io/zone" $values.spread.zone }}
  {{- if $rule }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: {{ $rule }}
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
  {{- end }}
  {{- end }}
{{- end }}
{{- with include "conclave.fetch" $root | trim }}
{{ . }}
{{- end }}
volumes:
  {{- include "conclave.modelVolume" $root | nindent 2 }}
  {{- if eq $root.Values.model.volume.kind "emptyDir" }}
  - name: scratch
    emptyDir: {}
  {{- end }}
{{- end }}

{{/*
Startup: what the process itself needs is in, a router's weights among it; readiness: a worker has the experts that it was
given, a router reaches every expert; liveness: the process alone. Neither startup nor liveness looks at etcd or at peers:
restarting what waits for them would help nobody. Takes the seconds that the start may take.
*/}}
{{- define "conclave.probes" -}}
startupProbe:
  httpGet: {path: /startupz, port: admin}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ divf . 5 | ceil | int }}
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}
