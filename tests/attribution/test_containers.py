"""Containers and pods, by the names that runtimes give to control groups, and by what variables say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from pgguard.attribution import containers
from pgguard.attribution.containers import Place, find_place, own_pod, place_of, said_by
from pgguard.attribution.evidence import Container, Pod
from pgguard.attribution.processes import ProcessBook
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]

ID = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970"
INNER = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d"
UID = "ac04f3f2-1f2c-11e9-b015-1ebee232acfa"
SLICES = "kubepods.slice/kubepods-burstable.slice"
POD_SLICE = f"kubepods-burstable-pod{UID.replace('-', '_')}.slice"
STATIC = "0f2b6c5d7a8e49d1b3c2a1908f7e6d5c"


@pytest.mark.parametrize(
    ("path", "container", "pod"),
    [
        # by themselves
        (f"/docker/{ID}", (ID, "docker"), None),
        (f"/system.slice/docker-{ID}.scope", (ID, "docker"), None),
        (f"/docker/{ID}/docker/{INNER}", (INNER, "docker"), None),
        (f"/docker/{ID}/system.slice/sshd.service", (ID, "docker"), None),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope", (ID, "docker"), None),
        (f"/system.slice/nerdctl-{ID}.scope", (ID, "containerd"), None),
        (f"/machine.slice/libpod-{ID}.scope", (ID, "podman"), None),
        (f"/machine.slice/libpod-{ID}.scope/container", (ID, "podman"), None),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container", (ID, "podman"), None),
        (f"/libpod_parent/libpod-{ID}", (ID, "podman"), None),
        (f"/machine.slice/machine-libpod_pod_{INNER}.slice/libpod-{ID}.scope", (ID, "podman"), None),
        (f"/default/{ID}", (ID, None), None),
        (f"/{ID}", (ID, None), None),
        (f"/ecs/5a3c8f1e2b7d4c6a9e0f1d2c3b4a5968/{ID}", (ID, None), None),
        (f"/ecs/{STATIC}/{STATIC}-3054012820", (f"{STATIC}-3054012820", None), None),
        # in Kubernetes: with systemd, and without
        (f"/{SLICES}/{POD_SLICE}/cri-containerd-{ID}.scope", (ID, "containerd"), UID),
        (f"/{SLICES}/{POD_SLICE}/crio-{ID}.scope", (ID, "cri-o"), UID),
        (f"/{SLICES}/{POD_SLICE}/crio-{ID}.scope/container", (ID, "cri-o"), UID),
        (f"/{SLICES}/{POD_SLICE}/docker-{ID}.scope", (ID, "docker"), UID),
        (f"/kubepods.slice/{POD_SLICE.replace('-burstable', '')}/cri-containerd-{ID}.scope", (ID, "containerd"), UID),
        (f"/kubepods/besteffort/pod{UID}/{ID}", (ID, None), UID),
        (f"/kubepods/pod{UID}/{ID}", (ID, None), UID),
        (f"/kubepods/burstable/pod{UID}/crio-{ID}", (ID, "cri-o"), UID),
        (f"/kubepods/burstable/pod{STATIC}/{ID}", (ID, None), STATIC),
        (f"/system.slice/containerd.service/{POD_SLICE}:cri-containerd:{ID}", (ID, "containerd"), UID),
        (
            f"/kubelet.slice/kubelet-kubepods.slice/kubelet-{POD_SLICE}/cri-containerd-{ID}.scope",
            (ID, "containerd"),
            UID,
        ),
        # kind: a pod's container, in a container that is the node
        (f"/docker/{INNER}/kubelet/kubepods/besteffort/pod{UID}/{ID}", (ID, None), UID),
        (f"/kubepods/besteffort/pod{UID}", None, UID),
        # seen from a cgroup namespace of the guard's own
        (f"/../cri-containerd-{ID}.scope", (ID, "containerd"), None),
        (f"/../../pod{UID}/{ID}", (ID, None), UID),
        # what isn't one
        ("/", None, None),
        ("/init.scope", None, None),
        ("/user.slice/user-1000.slice/session-3.scope", None, None),
        ("/system.slice/docker.service", None, None),
        (f"/machine.slice/libpod-conmon-{ID}.scope", None, None),
        (f"/{SLICES}/{POD_SLICE}/crio-conmon-{ID}.scope", None, UID),
        (f"/system.slice/docker-{ID[:12]}.scope", None, None),
        (f"/system.slice/docker-{ID.upper()}.scope", None, None),
        ("/lxc.payload.web", None, None),
        ("/system.slice/podman.service", None, None),
        ("/system.slice/pod0123.service", None, None),
    ],
)
def test_what_runtimes_call_control_groups(
    path: str, container: tuple[str, str | None] | None, pod: str | None
) -> None:
    place = place_of(f"0::{path}\n")
    assert (place.container, place.pod_uid) == (None if container is None else Container(*container), pod)


def test_version_1_has_a_line_for_each_hierarchy() -> None:
    lines = [
        "12:perf_event:/",
        f"11:cpu,cpuacct:/kubepods/burstable/pod{UID}/{ID}",
        f"10:memory:/kubepods/burstable/pod{UID}/{ID}",
        "2:misc:/",
        f"1:name=systemd:/kubepods/burstable/pod{UID}/{ID}",
    ]
    assert place_of("\n".join([*lines, ""])) == Place(Container(ID, None), UID)


def test_with_both_version_2_comes_first_if_it_tells() -> None:
    first = f"1:name=systemd:/docker/{INNER}\n"
    assert place_of(f"{first}0::/system.slice/docker-{ID}.scope\n").container == Container(ID, "docker")
    assert place_of(f"{first}0::/\n").container == Container(INNER, "docker")


def test_one_that_has_been_removed_is_still_the_one_that_it_was() -> None:
    assert place_of(f"0::/system.slice/docker-{ID}.scope (deleted)\n").container == Container(ID, "docker")


@pytest.mark.parametrize("content", ["", "\n", "0::\n", "rubbish", "0::/\ufffd\n", ":::::\n"])
def test_what_can_not_be_read_tells_nothing(content: str) -> None:
    assert place_of(content) == Place()


# The downward API


@pytest.mark.parametrize(
    ("variables", "pod"),
    [
        (
            {"POD_NAME": "web-7d9c5f6b8-x2x4z", "POD_NAMESPACE": "shop", "POD_UID": UID, "NODE_NAME": "node-1"},
            Pod("web-7d9c5f6b8-x2x4z", "shop", UID, "node-1"),
        ),
        ({"MY_POD_NAME": "web", "MY_NODE_NAME": "n"}, Pod("web", None, None, "n")),
        ({"OTEL_RESOURCE_ATTRIBUTES": "k8s.pod.name=web, k8s.namespace.name=shop,x"}, Pod("web", "shop", None, None)),
        ({"POD_NAME": "web", "OTEL_RESOURCE_ATTRIBUTES": "k8s.pod.name=other"}, Pod("web", None, None, None)),
        ({"HOSTNAME": "web-7d9c5f6b8-x2x4z", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        # What can't be a name may be anything: a secret, what a terminal obeys.
        ({"POD_NAME": "postgresql://app:hunter2@db/app"}, None),
        ({"POD_NAME": "\x1b[31m", "POD_UID": "x", "NODE_NAME": "n" * 300}, None),
        ({}, None),
    ],
)
def test_what_variables_say(variables: dict[str, str], pod: Pod | None) -> None:
    assert said_by(variables) == pod


@pytest.fixture
def _no_pod(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The guard's own variables are what a test says."""
    for *_, names in containers._VARIABLES:
        for name in (*names, "OTEL_RESOURCE_ATTRIBUTES"):
            monkeypatch.delenv(name, raising=False)
    own_pod.cache_clear()
    yield
    own_pod.cache_clear()


OTHER = "11111111-2222-3333-4444-555555555555"
NAMED = {"POD_NAME": "web", "POD_NAMESPACE": "shop", "POD_UID": UID}
OWN = {"POD_NAME": "guard", "POD_NAMESPACE": "pgguard", "POD_UID": OTHER, "NODE_NAME": "node-1"}


@pytest.mark.usefixtures("_no_pod")
@pytest.mark.parametrize(
    ("place", "own", "its", "pod"),
    [
        # As one guard for each node sees another pod.
        (Place(None, UID), OWN, NAMED, Pod("web", "shop", UID, "node-1")),
        (Place(None, UID), {}, NAMED | {"NODE_NAME": "n"}, Pod("web", "shop", UID, "n")),
        (Place(None, UID), OWN, {}, Pod(None, None, UID, "node-1")),
        (Place(None, UID), {}, {}, Pod(None, None, UID, None)),
        # Its variables are another pod's: whoever has started it has passed them on.
        (Place(None, UID), {}, NAMED | {"POD_UID": OTHER}, Pod(None, None, UID, None)),
        # As a sidecar sees its own pod, from outside or from within its cgroup namespace, whatever the process says.
        (Place(None, OTHER), OWN, NAMED, Pod("guard", "pgguard", OTHER, "node-1")),
        (Place(None, None, is_beside=True), OWN, NAMED, Pod("guard", "pgguard", OTHER, "node-1")),
        (Place(None, None, is_beside=True), {}, NAMED, Pod("web", "shop", UID, None)),
        # Outside of Kubernetes.
        (Place(Container(ID, "docker")), {}, {}, None),
        (Place(Container(ID, "docker")), {"NODE_NAME": "n"}, {}, None),
    ],
)
def test_which_pod_it_is(
    place: Place, own: dict[str, str], its: dict[str, str], pod: Pod | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(containers, "_variables_of", lambda _: its)
    assert containers._pod(place, 1) == pod


# Real processes


def test_a_process_in_no_container_is_in_none() -> None:
    """Nor is this one, or it is in the one in which all tests are."""
    container, pod = find_place(os.getpid())
    assert find_place(os.getppid()) == (container, pod)
    assert find_place(2**22 + 1) == (None, None)


@pytest.mark.usefixtures("_no_pod")
def test_the_variables_of_a_process(puppet: Puppets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "web")
    child = puppet()
    assert containers._variables_of(child.pid)["POD_NAME"] == "web"
    assert containers._variables_of(2**22 + 1) == {}


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A control group by a name that containerd gives, if one can be made here; by either version of them."""
    roots = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
    for root in roots:
        path = root / f"pgguard-{uuid4().hex}" / f"pod{UID}" / f"cri-containerd-{ID}.scope"
        with suppress(OSError):
            path.mkdir(parents=True)
            if (path / "cgroup.procs").exists():
                yield path
                for one in (path, path.parent, path.parent.parent):
                    one.rmdir()
                return
            for one in (path, path.parent, path.parent.parent):
                one.rmdir()
    pytest.skip("no control group can be made here")


@pytest.mark.usefixtures("_no_pod")
def test_a_process_in_a_control_group_by_such_a_name(
    cgroup: Path, puppet: Puppets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POD_NAME", "web")
    child = puppet()
    (cgroup / "cgroup.procs").write_text(str(child.pid))
    book = ProcessBook()
    seen = book.look(child.pid)
    (cgroup.parents[2] / "cgroup.procs").write_text(str(child.pid))
    assert seen is not None
    assert seen.container == Container(ID, "containerd")
    assert seen.pod == Pod("web", None, UID, None)
    # It is found out once: what moves later on has been started there all the same.
    assert book.look(child.pid) == seen
