{{- define "engage-relay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* Short enough for what is put behind it. */}}
{{- define "engage-relay.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "engage-relay.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "engage-relay.name" .) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* What tells this release's pods from others. It can't be changed later. */}}
{{- define "engage-relay.instance" -}}
app.kubernetes.io/name: {{ include "engage-relay.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "engage-relay.selector" -}}
{{ include "engage-relay.instance" . }}
app.kubernetes.io/component: relay
{{- end }}

{{- define "engage-relay.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "engage-relay.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end }}

{{- define "engage-relay.path" -}}
{{- dig "path" "/webhooks/engage" (.Values.settings.ingress | default dict) -}}
{{- end }}

{{/* Where events are stored: "disk" or "kafka". */}}
{{- define "engage-relay.journal" -}}
{{- dig "kind" "disk" (.Values.settings.journal | default dict) -}}
{{- end }}

{{/* Only what has volumes has to be a StatefulSet. */}}
{{- define "engage-relay.kind" -}}
{{- if and (eq (include "engage-relay.journal" .) "disk") .Values.persistence.enabled }}StatefulSet{{ else }}Deployment{{ end -}}
{{- end }}

{{/* For how many seconds a pod that is taken away delivers what it has. What is on Kafka the others deliver. */}}
{{- define "engage-relay.drainSeconds" -}}
{{- if eq (include "engage-relay.journal" .) "disk" }}{{ int .Values.shutdown.drain }}{{ else }}0{{ end -}}
{{- end }}

{{/* How many seconds a pod may take to end. */}}
{{- define "engage-relay.grace" -}}
{{- add (include "engage-relay.drainSeconds" . | int) (int .Values.shutdown.delay) (int .Values.shutdown.grace) 10 -}}
{{- end }}

{{/* One value as TOML: text, numbers, lists and inline tables. JSON's text is TOML's too. */}}
{{- define "engage-relay.toml" -}}
{{- if kindIs "map" . -}}
{ {{- range $index, $key := keys . | sortAlpha }}{{ if $index }},{{ end }} {{ include "engage-relay.tomlKey" $key }} = {{ include "engage-relay.toml" (get $ $key) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{ range $index, $value := . }}{{ if $index }}, {{ end }}{{ include "engage-relay.toml" $value }}{{ end }}]
{{- else if and (kindIs "float64" .) (eq (floor .) .) -}}
{{/* YAML has no other numbers; most settings want whole ones. */ -}}
{{ int64 . }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* A key as TOML: with dots, as Kafka's properties have them, it is one key only in quotes. */}}
{{- define "engage-relay.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{/* relay.toml: what the chart sets, and `settings`. */}}
{{- define "engage-relay.settings" -}}
{{- $onDisk := eq (include "engage-relay.journal" .) "disk" -}}
{{- $tokens := list -}}
{{- range .Values.auth.tokens -}}
{{- $tokens = append $tokens (dict "name" .name "value" (printf "${file:/run/secrets/auth/%s}" .key)) -}}
{{- end -}}
{{- $auth := dict "header" .Values.auth.header "tokens" $tokens -}}
{{- $own := dict "ingress" (dict "listen" "0.0.0.0:8080" "auth" $auth) -}}
{{- if .Values.tls.existingSecret -}}
{{- $tls := dict "cert" "/run/secrets/tls/tls.crt" "key" "/run/secrets/tls/tls.key" -}}
{{- if .Values.tls.clientCertificates }}{{ $_ := set $tls "client_ca" "/run/secrets/tls/ca.crt" }}{{ end -}}
{{- $_ := set $own.ingress "tls" $tls -}}
{{- end -}}
{{- $adminToken := printf "${file:/run/secrets/auth/%s}" .Values.auth.adminTokenKey -}}
{{- $_ := set $own "admin" (dict "listen" "0.0.0.0:9090" "token" $adminToken) -}}
{{- with .Values.shutdown -}}
{{- $_ := set $own "shutdown" (dict "delay" (printf "%ds" (int .delay)) "grace" (printf "%ds" (int .grace))) -}}
{{- end -}}
{{- $defaults := ternary (dict "journal" (dict "max_disk" "8GiB")) dict $onDisk -}}
{{- $tables := mergeOverwrite $defaults (deepCopy .Values.settings) $own -}}
{{- if $onDisk }}data_dir = "/var/lib/engage-relay"
{{ end -}}
routes = "/etc/engage-relay/routes.toml"
{{- range $name := keys $tables | sortAlpha }}
{{- with get $tables $name }}

[{{ $name }}]
{{- range $key := keys . | sortAlpha }}
{{ $key }} = {{ include "engage-relay.toml" (get (get $tables $name) $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* What can't be right. */}}
{{- define "engage-relay.check" -}}
{{- if not .Values.auth.existingSecret }}
{{- fail "auth.existingSecret: name a Secret with the senders' tokens and the admin token. To make one:\n  kubectl create secret generic engage-relay --from-literal=ingress-token=\"$(openssl rand -hex 24)\" --from-literal=admin-token=\"$(openssl rand -hex 24)\"\nand then --set auth.existingSecret=engage-relay" }}
{{- end }}
{{- if not .Values.auth.tokens }}
{{- fail "auth.tokens: name at least one token of the Secret. Without any, each replica would make up its own" }}
{{- end }}
{{- $journal := .Values.settings.journal | default dict }}
{{- if eq (include "engage-relay.journal" .) "kafka" }}
{{- if not $journal.brokers }}
{{- fail "settings.journal.brokers: name Kafka's brokers, as host:port. settings.journal.kind=kafka needs them" }}
{{- end }}
{{- range list "durability" "segment" "max_disk" "min_free_disk" }}
{{- if hasKey $journal . }}
{{- fail (printf "settings.journal.%s: it has no meaning with settings.journal.kind=kafka, since nothing is kept on the pod's disk. Leave it out" .) }}
{{- end }}
{{- end }}
{{- if hasKey (.Values.settings.ingress | default dict) "dedup" }}
{{- fail "settings.ingress.dedup: it has no meaning with settings.journal.kind=kafka, since an event that is sent again may come to another replica. Leave it out" }}
{{- end }}
{{- else }}
{{- range list "brokers" "prefix" "partitions" "replication" "min_insync" "key" "timeout" "options" }}
{{- if hasKey $journal . }}
{{- fail (printf "settings.journal.%s: it is for settings.journal.kind=kafka. Set that, or leave it out" .) }}
{{- end }}
{{- end }}
{{- if and (not .Values.persistence.enabled) (not .Values.acceptLossOfEvents) }}
{{- fail "persistence.enabled: without volumes, events that were answered 200 are lost with a pod. Leave it on, set acceptLossOfEvents=true, or keep the journal on Kafka (settings.journal.kind=kafka)" }}
{{- end }}
{{- end }}
{{- end }}
