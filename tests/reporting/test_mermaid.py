"""The sequence diagram: Mermaid's own parser reads what was put in, whatever others say, within its limits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from pgguard.faults.policy import Action
from pgguard.faults.text import printable
from pgguard.identity import Sender
from pgguard.reporting.mermaid import ARROWS, LIMIT, diagram, label
from pgguard.session.verdicts import Kind
from tests.faults.samples import FACTS, KERNEL, OUTSTANDING, OVERLAP, WORKER_1, fault, verdict
from tests.languages import npm_directory
from tests.servers import not_installed

PARSER = """
import { JSDOM } from "jsdom";
const { window } = new JSDOM("<!doctype html><body></body>");
Object.assign(globalThis, { window, document: window.document });
const { default: mermaid } = await import("mermaid");
mermaid.initialize({ startOnLoad: false });
let text = "";
for await (const chunk of process.stdin) text += chunk;
const read = [];
for (const one of JSON.parse(text)) {
  const { type, db } = await mermaid.mermaidAPI.getDiagramFromText(one);
  read.push({
    type,
    actors: [...db.getActors().values()].map((actor) => actor.description),
    texts: db.getMessages().filter((message) => message.from).map((message) => message.message),
    arrows: db.getMessages().filter((message) => [0, 1, 3].includes(message.type)).length,
  });
}
process.stdout.write(JSON.stringify(read), () => process.exit(0));
"""
SHARED = fault()
HOSTILE = (
    "a;b",
    "x #59; #quot; y",
    "end",
    "end\nend",
    "%%{init: {'theme': 'dark'}}%% %% no comment",
    "a<br/>b<br>c",
    "<script>alert(1)</script>",
    "style a:b#35; classDef x:y#1;",
    "ﬂ°°60¶ß",
    "participant X as Y",
    "L0->>L1: x",
    "wrap: a",
    "nowrap:a",
    ": ::",
    "```\n~~~ `",
    "$$x$$",
    '@{ "type": "database" }',
    "autonumber\nactivate L0",
    "\\n \\t",
    "日本 ü",
    "rect rgb(0,0,0)",
    "\x1b[2J\u202e\u2028\udcff",
)


def parsed(*diagrams: str) -> list[dict[str, Any]]:
    """What Mermaid reads."""
    node = shutil.which("node")
    if node is None:
        not_installed("Node.js")
    done = subprocess.run(
        [node, "--input-type=module", "--eval", PARSER],
        input=json.dumps(diagrams),
        cwd=npm_directory("mermaid@11.17.2", "jsdom@29.1.1"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read: list[dict[str, Any]] = json.loads(done.stdout)
    return read


def shown(text: str) -> str:
    """A label as it is drawn: ``decodeEntities()`` in Mermaid's ``utils.ts``, and lines one behind the other."""
    assert not re.search(r"<(?!br/>)", text)
    return re.sub(r"ﬂ°°(\d+)¶ß", lambda found: chr(int(found[1])), text.replace("<br/>", " "))


def drawn(what: Any) -> str:
    found = diagram(what)
    assert found is not None
    return "\n".join(found.lines)


def test_both_sides_the_guard_and_the_server_have_lanes_and_what_is_wrong_is_marked() -> None:
    text = drawn(SHARED)
    assert text.startswith("sequenceDiagram\n    participant L0 as pid 4864<br/>puma 6.4.2")
    marked = re.search(r"    rect .*\n(.*\n)+?    end\n", text)
    assert marked is not None
    assert "L2->>L4: +12.50 s sends Query" in marked.group()
    assert "L1->>L4: +12.50 s sends request 41: Query: SELECT" in text.partition("rect")[0]
    assert re.search(r"Note over L0,L4: \d+\.\d\d s later\n", text)


def test_what_the_guard_has_stopped_does_not_arrive() -> None:
    text = drawn(replace(SHARED, action=Action.REJECTED))
    assert "L2-xL3: +12.50 s sends Query" in text
    assert "L3->>L2: pgguard ends the session" in text


def test_a_fault_of_which_nothing_else_is_known_has_none() -> None:
    assert diagram(replace(fault(verdict(Kind.IDLE_IN_TRANSACTION)), story=(), culprits=())) is None


def test_mermaid_reads_what_was_put_in_whatever_others_say() -> None:
    """All in one process, which takes a second to load it."""
    small = [
        f"sequenceDiagram\n participant L0 as {label(t)}\n L0->>L0: {label(t)}\n L0-xL0: {label(t)}" for t in HOSTILE
    ]
    whole = []
    for text in HOSTILE:
        request = replace(OUTSTANDING, sql=f"SELECT {text}".encode("utf-8", "replace"))
        worker = replace(WORKER_1, cmdline=("program", text))
        what = fault(replace(OVERLAP, requests=(request,), reason=text), facts=replace(FACTS, client=text))
        what = replace(what, culprits=tuple(replace(one, process=worker, thread_name=text) for one in what.culprits))
        whole.append(drawn(what))
    told = fault(verdict(Kind.INHERITED_CONNECTION))
    *read, largest, plain = parsed(*small, *whole, drawn(_large()), drawn(told))
    for text, one in zip(HOSTILE, read, strict=False):
        expected = " ".join(printable(text).split())
        assert one["type"] == "sequence"
        assert [" ".join(shown(said).split()) for said in [*one["actors"], *one["texts"]]] == [expected] * 3
    for text, one in zip(HOSTILE, read[len(HOSTILE) :], strict=True):
        assert len(one["actors"]) == 5
        assert any(" ".join(printable(text).split()) in " ".join(shown(said).split()) for said in one["texts"])
        assert any(printable(text)[:5] in shown(said) for said in one["actors"])
    assert largest["arrows"] <= ARROWS
    assert plain["type"] == "sequence"


def _large() -> Any:
    """Many requests of many, who all may have read each answer, with as long texts as there may be."""
    workers = {4000 + n: replace(WORKER_1, pid=4000 + n, cmdline=("x" * 50, "%" * 200)) for n in range(40)}
    requests = tuple(
        replace(OUTSTANDING, n=n, sender=Sender(4000 + n % 40, 9000 + n), sql=b"%" * 4000, at_rest=True)
        for n in range(1, 200)
    )
    return fault(
        replace(OVERLAP, requests=requests, reason="%" * 4000),
        replace(KERNEL, senders={**KERNEL.senders, **workers}, holders=(*(KERNEL.holders or ()), *workers.values())),
    )


def test_it_is_no_larger_than_mermaid_draws() -> None:
    assert 1000 < len(drawn(_large())) < LIMIT


@pytest.mark.parametrize("limit", [2500, 4000])
def test_what_goes_beyond_the_limit_is_left_out_from_the_beginning(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgguard.reporting.mermaid.LIMIT", limit)
    text = drawn(_large())
    assert len(text) <= limit
    assert ": what came before is left out\n" in text
    assert "rect rgba" in text
