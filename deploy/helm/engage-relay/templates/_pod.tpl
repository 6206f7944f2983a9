{{/* What every command needs that reads the settings. */}}
{{- define "engage-relay.settingsMounts" -}}
# The whole folder: single files that are mounted don't change with the ConfigMap.
- { name: config, mountPath: /etc/engage-relay, readOnly: true }
- { name: auth, mountPath: /run/secrets/auth, readOnly: true }
{{- if .Values.tls.existingSecret }}
- { name: tls, mountPath: /run/secrets/tls, readOnly: true }
{{- end }}
{{- range $index, $name := .Values.secretFiles }}
- { name: secret-{{ $index }}, mountPath: /run/secrets/{{ $name }}, readOnly: true }
{{- end }}
{{- end }}

{{- define "engage-relay.settingsVolumes" -}}
- name: config
  configMap: { name: {{ include "engage-relay.fullname" . }} }
- name: auth
  secret: { secretName: {{ .Values.auth.existingSecret }}, defaultMode: 0440 }
{{- with .Values.tls.existingSecret }}
- name: tls
  secret: { secretName: {{ . }}, defaultMode: 0440 }
{{- end }}
{{- /* A Secret's name may have dots and be longer than a volume's. */}}
{{- range $index, $name := .Values.secretFiles }}
- name: secret-{{ $index }}
  secret: { secretName: {{ $name }}, defaultMode: 0440 }
{{- end }}
{{- end }}

{{/* The pod, which a StatefulSet and a Deployment have in common. */}}
{{- define "engage-relay.pod" -}}
metadata:
  annotations:
    # The relay reads its rules again by itself, but not all settings.
    checksum/settings: {{ include "engage-relay.settings" . | sha256sum }}
    {{- with .Values.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
  labels:
    {{- include "engage-relay.labels" . | nindent 4 }}
    {{- include "engage-relay.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
spec:
  serviceAccountName: {{ include "engage-relay.fullname" . }}
  automountServiceAccountToken: false
  # A service of the same namespace called `relay` would set RELAY_… variables.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "engage-relay.grace" . }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: relay
      image: {{ include "engage-relay.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [run, --config, /etc/engage-relay/relay.toml]
      {{- with .Values.env }}
      env: {{ toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - { name: http, containerPort: 8080 }
        - { name: admin, containerPort: 9090 }
      # Before it serves, the relay checks its journal, which may take a while.
      startupProbe:
        httpGet: { path: /healthz, port: admin }
        periodSeconds: 2
        failureThreshold: 150
      livenessProbe:
        httpGet: { path: /healthz, port: admin }
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      readinessProbe:
        httpGet: { path: /readyz, port: admin }
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 1
      {{- $drain := include "engage-relay.drainSeconds" . | int }}
      {{- if $drain }}
      lifecycle:
        preStop:
          exec:
            command:
              - /usr/local/bin/engage-relay
              - drain
              - --config=/etc/engage-relay/relay.toml
              - --timeout={{ $drain }}s
      {{- end }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      volumeMounts:
        {{- include "engage-relay.settingsMounts" . | nindent 8 }}
        {{- if eq (include "engage-relay.journal" .) "disk" }}
        - { name: data, mountPath: /var/lib/engage-relay }
        {{- end }}
        # For SQLite, where it has more than fits into memory.
        - { name: tmp, mountPath: /tmp }
  volumes:
    {{- include "engage-relay.settingsVolumes" . | nindent 4 }}
    {{- if and (eq (include "engage-relay.journal" .) "disk") (not .Values.persistence.enabled) }}
    - name: data
      emptyDir: { sizeLimit: {{ .Values.persistence.size }} }
    {{- end }}
    - name: tmp
      emptyDir: {}
  topologySpreadConstraints:
    {{- if .Values.topologySpreadConstraints }}
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "engage-relay.selector" $ | nindent 10 }}
    {{- end }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations: {{ toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
