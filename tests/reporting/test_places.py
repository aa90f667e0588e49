"""Where in the application a fault was seen, and what the file is called there: from the record alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pgguard.attribution.frames import Frame
from pgguard.faults.fault import Role
from pgguard.reporting.places import Sources, places
from tests.faults.samples import fault
from tests.reporting.gathered import LIBRARYS, MAIN, SERVE, STACK, seen


def test_the_one_that_did_it_comes_first_and_where_the_connection_was_opened_last() -> None:
    found = places(seen(roles=(Role.REQUESTER, Role.INTRUDER), opening=(LIBRARYS, MAIN)))
    assert [(place.who, place.frame) for place in found] == [
        ("pid 4867 (puma: cluster worker 1), thread 4880", SERVE),
        ("pid 4866 (puma: cluster worker 0), thread 4871", SERVE),
        ("pid 4864 (puma 6.4.2 (tcp://0.0.0.0:9292) [app]), opening the connection", MAIN),
    ]
    assert [place.stack for place in found] == [STACK, STACK, (LIBRARYS, MAIN)]


@pytest.mark.parametrize(
    "stack",
    [
        (),
        (LIBRARYS,),
        (Frame("<module>", "<stdin>", 3, application=True),),
        # What has started an event loop says nothing of what is being waited for in it.
        (Frame("run", "/usr/lib/python3.11/asyncio/runners.py", 118), MAIN),
    ],
)
def test_whoever_was_seen_in_no_file_of_the_application_was_seen_nowhere(stack: tuple[Frame, ...]) -> None:
    assert places(seen(stack)) == []
    assert places(fault()) == []


def test_a_connection_whose_opener_is_not_known_was_still_opened_somewhere() -> None:
    what = seen((), opening=(MAIN,))
    nobody = replace(what, culprits=tuple(one for one in what.culprits if one.role is not Role.OWNER))
    assert [place.who for place in places(nobody)] == ["opening the connection"]


@pytest.mark.parametrize(
    ("root", "file", "relative"),
    [
        ("/srv/app", "/srv/app/src/app.py", "src/app.py"),
        ("/srv/app/", "//srv/app/./src/../app.py", "app.py"),
        ("/", "/srv/app.py", "srv/app.py"),
        ("/srv/app", "src/app.rb", "src/app.rb"),
        ("/srv/app", "/srv/application/app.py", None),
        ("/srv/app", "/srv/app/../secret.py", None),
        ("/srv/app", "../secret.py", None),
        ("/srv/app", "/srv/app", None),
        ("/srv/app", "", None),
    ],
)
def test_a_file_is_called_by_its_name_in_the_sources_if_it_is_there(root: str, file: str, relative: str | None) -> None:
    assert Sources(root).relative(file) == relative


@pytest.mark.parametrize(
    ("file", "uri"),
    [
        ("/srv/app/a b/ü#?.py", ("a%20b/%C3%BC%23%3F.py", True)),
        ("/srv/app/c:d.py", ("c%3Ad.py", True)),
        ("/srv/app/\udcff\ud800.py", ("%3F%3F.py", True)),
        ("/srv/app/\udcff.py", ("%FF.py", True)),
        ("/usr/lib/ruby/pg.rb", ("file:///usr/lib/ruby/pg.rb", False)),
        ("../lib/pg.rb", ("file:///lib/pg.rb", False)),
    ],
)
def test_a_uri_holds_nothing_that_a_uri_may_not(file: str, uri: tuple[str, bool]) -> None:
    assert Sources("/srv/app").uri_of(file) == uri


def test_the_root_is_a_directory() -> None:
    assert Sources("/srv/my app/").uri == "file:///srv/my%20app/"
    assert Sources("/").uri == "file:///"
