"""Faults and figures for OpenTelemetry: log records and metrics, sent to a collector over OTLP."""
