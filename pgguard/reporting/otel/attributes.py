"""A fault as the attributes of a log record, by OpenTelemetry's semantic conventions, without OpenTelemetry itself.

What a convention has a name for is called by it: "Database", "Process", "Container" and "Kubernetes" in
https://opentelemetry.io/docs/specs/semconv/. ``process.*``, ``thread.*``, ``container.*`` and ``k8s.*`` are those of
the process that did it; the guard's own are the resource's. All else is called ``pgguard.…``. What isn't known is left
out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.containers import own_place, own_pod
from pgguard.faults.policy import Action
from pgguard.faults.rejection import SQLSTATE
from pgguard.reporting.jsonl import encode
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.attribution.evidence import Container, Pod
    from pgguard.faults.fault import Culprit, Fault, Request

Value = str | int | bool | tuple[str, ...]

EVENT: Final = "pgguard.fault"
"""What kind of event such a record is."""
_TOO_MANY_CONNECTIONS: Final = "53300"
_EXISTS: Final = "42P05"
_DOES_NOT_EXIST: Final = "26000"
_ATTRIBUTES: Final = "OTEL_RESOURCE_ATTRIBUTES"
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})")
"""https://www.w3.org/TR/trace-context/, "traceparent Header": all of its versions begin like version 00."""


class Trace(NamedTuple):
    """The trace that a request is part of."""

    trace_id: int
    span_id: int
    flags: int


def attributes_of(fault: Fault) -> dict[str, Value]:
    """What a log record says of a fault."""
    session = fault.session
    host, _, port = (session.client or "").rpartition(":")
    told: dict[str, Value | None] = {
        "db.system.name": "postgresql",
        "db.namespace": session.database,
        "db.query.text": _query(fault),
        "db.response.status_code": _status_code(fault),
        "network.transport": session.transport,
        "client.address": host.strip("[]") or None,
        "client.port": int(port) if port.isdecimal() else None,
        "pgguard.fault.id": fault.id,
        "pgguard.fault.kind": fault.kind.value,
        "pgguard.fault.action": fault.action.value,
        "pgguard.fault.cause": fault.cause,
        "pgguard.fault.repeat_of": fault.repeat_of,
        "pgguard.fault.suppressed": fault.suppressed,
        "pgguard.fault.advice": None if fault.repeat_of is not None else fault.advice.title,
        "pgguard.session.id": session.id,
        "pgguard.session.user": session.user,
        "pgguard.session.application_name": session.application_name,
        "pgguard.session.through": session.through,
        "pgguard.session.backend_pid": session.backend_pid,
    }
    culprit = next((one for one in fault.culprits if one.pid is not None), None)
    if culprit is not None:
        told |= _culprit(culprit)
    # As it stands in the file of faults: nothing is lost.
    told["pgguard.fault.record"] = encode(fault).decode().rstrip("\n")
    return {key: value for key, value in told.items() if value is not None}


def _culprit(culprit: Culprit) -> dict[str, Value | None]:
    process = culprit.process
    told: dict[str, Value | None] = {
        "process.pid": culprit.pid,
        "thread.id": culprit.tid,
        "thread.name": culprit.thread_name,
        "pgguard.culprit.role": culprit.role.value,
        "pgguard.culprit.evidence": culprit.evidence.value,
    }
    if process is not None:
        told |= {
            "process.parent_pid": process.ppid,
            "process.vpid": process.namespace_pid,
            "process.executable.name": process.name,
            "process.command_args": process.cmdline or None,
            **_place(process.container, process.pod),
        }
    return told


def _place(container: Container | None, pod: Pod | None) -> dict[str, Value | None]:
    told: dict[str, Value | None] = {}
    if container is not None:
        told |= {"container.id": container.id, "container.runtime.name": container.runtime}
    if pod is not None:
        told |= {
            "k8s.pod.name": pod.name,
            "k8s.namespace.name": pod.namespace,
            "k8s.pod.uid": pod.uid,
            "k8s.node.name": pod.node,
        }
    return told


def _query(fault: Fault) -> str | None:
    """The SQL of the request that the culprit sent last, or of the last one at all."""
    sender = fault.sent_by
    own = [one for one in fault.requests if sender is not None and one.pid == sender.pid]
    requests: list[Request] = own or list(fault.requests)
    return requests[-1].sql if requests else None


def _status_code(fault: Fault) -> str | None:
    """The SQLSTATE that the client has got for it: the server's, or the guard's own."""
    if fault.action is Action.REJECTED:
        return SQLSTATE
    if fault.kind is Kind.SESSION_STATE_LOST and fault.libpq is not None:
        return _EXISTS if fault.libpq.endswith(" already exists") else _DOES_NOT_EXIST
    return _TOO_MANY_CONNECTIONS if fault.kind is Kind.CONNECTION_EXHAUSTION else None


def trace_of(fault: Fault) -> Trace | None:
    """The trace of which a request of the first culprit's says that it is part, in a comment; see sqlcommenter."""
    for culprit in fault.culprits:
        match = _TRACEPARENT.match((culprit.declared or {}).get("traceparent", ""))
        if match is not None and int(match["trace"], 16) and int(match["span"], 16):
            return Trace(int(match["trace"], 16), int(match["span"], 16), int(match["flags"], 16))
    return None


def own_attributes(variables: Mapping[str, str], *, version: str, run: str) -> dict[str, Value]:
    """What is said of the guard itself, as the resource; OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME come first.

    Args:
        variables: Its environment.
        version: The guard's.
        run: What tells this run of it from any other.
    """
    told: dict[str, Value | None] = {
        "service.version": version,
        "service.instance.id": run,
        **_place(own_place().container, own_pod()),
    }
    named = any(part.partition("=")[0].strip() == "service.name" for part in variables.get(_ATTRIBUTES, "").split(","))
    if not variables.get("OTEL_SERVICE_NAME") and not named:
        told["service.name"] = "pgguard"
    return {key: value for key, value in told.items() if value is not None}
