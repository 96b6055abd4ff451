{{- define "cloudcore.labels" -}}
app.kubernetes.io/name: cloudcore
app.kubernetes.io/part-of: cloudcore
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "cloudcore.selector" -}}
app.kubernetes.io/name: cloudcore
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* constrained or direct: auto follows the version in which the feature came on by default. */ -}}
{{- define "cloudcore.impersonation" -}}
{{- if has .Values.impersonation (list "constrained" "direct") -}}
{{ .Values.impersonation }}
{{- else if ne .Values.impersonation "auto" -}}
{{ fail "impersonation must be auto, constrained or direct" }}
{{- else if semverCompare ">=1.36.0-0" .Capabilities.KubeVersion.Version -}}
constrained
{{- else -}}
direct
{{- end -}}
{{- end }}
