{{/* Templates here use a part of the template language that the `tombolo` command renders too, without helm. */}}

{{- define "tombolo.labels" -}}
app.kubernetes.io/name: tombolo
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- end }}

{{- define "tombolo.image" -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) | quote }}
{{- end }}

{{- define "tombolo.federatorAddress" -}}
{{ printf "tombolo-federator.%s.svc:7443" .Release.Namespace }}
{{- end }}

{{/* PodSecurity "restricted". */}}
{{- define "tombolo.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "tombolo.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- define "tombolo.env" -}}
- { name: TOMBOLO_LOG, value: {{ .Values.logs.level | quote }} }
- { name: TOMBOLO_LOG_FORMAT, value: {{ .Values.logs.format | quote }} }
- { name: HOME, value: /var/lib/tombolo }
{{- end }}

{{/* Readiness and liveness on the metrics port. */}}
{{- define "tombolo.probes" -}}
readinessProbe:
  httpGet: { path: /ready, port: metrics }
  periodSeconds: 2
  timeoutSeconds: 2
livenessProbe:
  httpGet: { path: /live, port: metrics }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{/* What a pod joins with: where to, from the federator's ConfigMap, and who it is, from its service account. */}}
{{- define "tombolo.joinVolume" -}}
- name: join
  projected:
    defaultMode: 288
    sources:
      - configMap: { name: tombolo-trust-bundle }
      - serviceAccountToken:
          path: token
          audience: {{ printf "tombolo.dev/%s" .Values.trustDomain | quote }}
          expirationSeconds: 600
{{- end }}
