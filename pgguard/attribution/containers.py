"""In which container a process runs, and in which pod: by its control group, and by what its variables say.

The kernel puts each process of a container in a control group that the container's runtime has made, and names it in
``/proc/PID/cgroup``: cgroups(7). The names are the runtimes' conventions: :data:`_FORMS` lists them. The id in them is
the one that ``docker ps``, ``crictl ps`` and ``podman ps`` know. A name that is none of these tells nothing.

The path is relative to the root of the reader's own cgroup namespace, and begins with ``/..`` for what is beside or
above that: cgroup_namespaces(7). So a guard in a container of its own sees the container of a neighbour in the same
pod, but not the pod. That it is the same one follows from both having the same parent.

A pod's uid is in its control group's name. Its name and its namespace are nowhere in ``/proc``, but a pod may give them
to its containers as variables, by the downward API: "Expose Pod Information to Containers Through Environment
Variables" in the Kubernetes documentation. Their names are free: :data:`_VARIABLES` lists those of that page, those of
the OpenTelemetry operator, and the attributes that ``OTEL_RESOURCE_ATTRIBUTES`` may hold instead. A process's variables
are those that it was started with, unless it has changed its own memory, so they are what it says about itself.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.evidence import Container, Pod
from pgguard.attribution.hangs import reading

if TYPE_CHECKING:
    from collections.abc import Mapping

_ID: Final = r"(?P<id>[0-9a-f]{64})"
_TASK: Final = r"(?P<id>[0-9a-f]{32}-\d+)"
"""An id of Amazon's Fargate, which has no others."""
_FORMS: Final = (
    # What systemd makes of a runtime's name and a container's id, and the same where the runtime makes it itself.
    (rf"docker-{_ID}\.scope", "docker"),
    (rf"cri-containerd-{_ID}\.scope", "containerd"),
    (rf"nerdctl-{_ID}\.scope", "containerd"),
    (rf"crio-{_ID}(?:\.scope)?", "cri-o"),
    (rf"libpod-{_ID}(?:\.scope)?", "podman"),
    # containerd with systemd's names where systemd isn't used: SLICE:PREFIX:ID.
    (rf"[^/:]*:cri-containerd:{_ID}", "containerd"),
    # Without systemd: an id alone, in a directory of the runtime's, or in one of whoever has started it.
    (rf"(?<=/docker/){_ID}", "docker"),
    (rf"(?<=/libpod_parent/){_ID}", "podman"),
    (_ID, None),
    (_TASK, None),
)
"""Names of containers' control groups, each with the runtime that calls them so; ``None``: several do."""
_CONTAINER: Final = tuple((re.compile(form), runtime) for form, runtime in _FORMS)
_POD: Final = re.compile(
    r"(?:[a-z-]*-)?pod(?P<uid>[0-9a-f]{8}(?P<dash>[-_])(?:[0-9a-f]{4}(?P=dash)){3}[0-9a-f]{12}|[0-9a-f]{32})"
    r"(?:\.slice(?::[^/]*)?)?"
)
"""Names of pods' control groups: ``pod…`` below ``kubepods``, or ``kubepods-burstable-pod….slice`` with systemd, which
has ``_`` for ``-``. The uid of a static pod is a digest: 32 digits alone."""
_BESIDE: Final = re.compile(r"/\.\./[^./][^/]*(?:/|$)")
"""Where what has the same parent as the reader's own control group is."""
_LINE: Final = re.compile(r"^\d+:(?P<controllers>[^:]*):(?P<path>/.*?)(?: \(deleted\))?$", re.MULTILINE)
_LIMIT: Final = 1 << 16
"""Bytes that are read of a process's variables, at most."""

_NAME: Final = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?"
"""What Kubernetes calls pods and nodes: a DNS subdomain name, "Object Names and IDs"."""
_UID: Final = r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|[0-9a-f]{32}"
_VARIABLES: Final[tuple[tuple[str, str, str, tuple[str, ...]], ...]] = (
    ("name", _NAME, "k8s.pod.name", ("POD_NAME", "MY_POD_NAME", "OTEL_RESOURCE_ATTRIBUTES_POD_NAME")),
    ("namespace", _NAME, "k8s.namespace.name", ("POD_NAMESPACE", "MY_POD_NAMESPACE")),
    ("uid", _UID, "k8s.pod.uid", ("POD_UID", "MY_POD_UID", "OTEL_RESOURCE_ATTRIBUTES_POD_UID")),
    ("node", _NAME, "k8s.node.name", ("NODE_NAME", "MY_NODE_NAME", "OTEL_RESOURCE_ATTRIBUTES_NODE_NAME")),
)
"""What pods say of themselves: what it may look like, OpenTelemetry's attribute, and the variables that hold it."""
_ATTRIBUTES: Final = "OTEL_RESOURCE_ATTRIBUTES"


class Place(NamedTuple):
    """Where a control group is; what isn't known is ``None``."""

    container: Container | None = None
    pod_uid: str | None = None
    is_beside: bool = False
    """It has the same parent as the reader's own."""


def place_of(cgroup: str) -> Place:
    """Read the content of ``/proc/PID/cgroup``, of version 2, of version 1, or of both at once."""
    found = [(line["controllers"], line["path"]) for line in _LINE.finditer(cgroup)]
    # Version 2's has no controllers. With both, one of them may be systemd's alone.
    places = [_place(path) for _, path in sorted(found, key=lambda one: one[0] != "")]
    return next((place for place in places if place.container is not None or place.pod_uid is not None), Place())


def _place(path: str) -> Place:
    """The innermost container of a path, and the pod around it."""
    container, pod_uid = None, None
    begin = 0
    for name in path.split("/"):
        pod = _POD.fullmatch(name)
        if pod is not None:
            container, pod_uid = None, pod["uid"].replace("_", "-")
        for form, runtime in _CONTAINER:
            if (match := form.fullmatch(path, begin, begin + len(name))) is not None:
                container = Container(match["id"], runtime)
                break
        begin += len(name) + 1
    return Place(container, pod_uid, _BESIDE.match(path) is not None)


def said_by(variables: Mapping[str, str]) -> Pod | None:
    """The pod that variables of the downward API tell of; ``None`` if there are none."""
    pairs = (pair.partition("=") for pair in variables.get(_ATTRIBUTES, "").split(","))
    attributes = {name.strip(): value.strip() for name, _, value in pairs}
    said: dict[str, str | None] = {}
    for key, form, attribute, names in _VARIABLES:
        values = [*(variables.get(name, "") for name in names), attributes.get(attribute, "")]
        said[key] = next((value for value in values if re.fullmatch(form, value)), None)
    return Pod(**said) if any(said.values()) else None


@functools.cache
def own_pod() -> Pod | None:
    """The pod that the guard itself is in, or the node at least, as its own variables say."""
    return said_by(os.environ)


def own_place() -> Place:
    """Where the guard itself is, as far as that is seen from within."""
    return _read_place("self")


def find_place(pid: int) -> tuple[Container | None, Pod | None]:
    """Find out in which container and in which pod a process runs; what isn't known is ``None``.

    Costs 20 µs for a process that is in neither, and for any other twice that. Whoever asks sees to it that the pid is
    still the same process's.
    """
    place = _read_place(pid)
    if place.container is None and place.pod_uid is None:
        return None, None
    return place.container, _pod(place, pid)


def _read_place(pid: int | str) -> Place:
    try:
        return place_of(Path(f"/proc/{pid}/cgroup").read_text(errors="replace"))
    except OSError:
        return Place()


def _pod(place: Place, pid: int) -> Pod | None:
    """The pod of a control group: by the guard's own variables if it is the same, or else by the process's."""
    own, uid = own_pod() or Pod(), place.pod_uid
    if uid is None and place.is_beside:
        uid = own.uid
    if uid is not None and uid == own.uid:
        return own
    said = said_by(_variables_of(pid)) or Pod()
    if uid is not None and said.uid not in (None, uid):
        said = Pod()  # it has its variables from somewhere else
    pod = said._replace(uid=uid or said.uid, node=own.node or said.node)
    return None if pod.uid is None and pod.name is None else pod


def _variables_of(pid: int) -> dict[str, str]:
    """The variables that a process was started with; none if they can't be read."""
    try:
        with reading(pid), Path(f"/proc/{pid}/environ").open("rb") as file:
            content = file.read(_LIMIT)
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in content.split(b"\0"))
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs}
