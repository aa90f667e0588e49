"""Whose code a call is, told by its file: the application's, or that of a library."""

from __future__ import annotations

import pytest

from pgguard.attribution.frames import Frame, code_of, place, short_path, told_apart


def is_application(file: str) -> bool:
    return told_apart([Frame("work", file, 1)])[0].application


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("/srv/app/.venv/lib/python3.12/site-packages/psycopg/cursor.py", id="the project's own venv"),
        pytest.param("/home/me/project/env/lib64/python3.9/site-packages/flask/app.py", id="lib64"),
        pytest.param("/usr/lib/python3/dist-packages/gunicorn/app/base.py", id="Debian's"),
        pytest.param("/home/me/.local/lib/python3.11/site-packages/celery/app/base.py", id="the user's"),
        pytest.param("/usr/lib/python3.11/threading.py", id="Debian's standard library"),
        pytest.param("/usr/lib64/python3.12/socketserver.py", id="Fedora's"),
        pytest.param("/root/.pyenv/versions/3.12.1/lib/python3.12/multiprocessing/process.py", id="pyenv"),
        pytest.param(
            "/home/me/.local/share/uv/python/cpython-3.13.0-linux-x86_64-gnu/lib/python3.13/asyncio/runners.py", id="uv"
        ),
        pytest.param("/opt/conda/envs/prod/lib/python3.10/concurrent/futures/thread.py", id="conda"),
        pytest.param("/usr/local/lib/python3.14t/threading.py", id="free-threaded"),
        pytest.param("/usr/lib/pypy3.10/threading.py", id="PyPy"),
        pytest.param("/usr/lib/pypy/lib-python/3/threading.py", id="an older PyPy"),
        pytest.param("/opt/embedded/python311.zip/threading.py", id="the standard library in a file"),
        pytest.param("/srv/buildout/eggs/Django-4.2-py3.11.egg/django/views/generic/base.py", id="buildout"),
        pytest.param("/root/.pex/installed_wheels/0a/flask-3.0-py3-none-any.whl/flask/app.py", id="pex"),
        pytest.param("/srv/app/__pypackages__/3.11/lib/flask/app.py", id="PDM"),
        pytest.param("/var/task/psycopg/_connection_base.py", id="psycopg among the application's own files"),
        pytest.param("/var/task/psycopg_pool/pool.py", id="its pool"),
        pytest.param("/var/task/psycopg2/extras.py", id="psycopg2"),
        pytest.param("/var/task/asyncpg/connect_utils.py", id="asyncpg"),
        pytest.param("/var/task/pg8000/core.py", id="pg8000"),
        pytest.param("/home/me/src/sqlalchemy/lib/sqlalchemy/engine/base.py", id="SQLAlchemy's sources"),
        pytest.param("/home/me/src/django/django/db/backends/utils.py", id="Django's sources"),
        pytest.param("<frozen runpy>", id="frozen"),
        pytest.param("<string>", id="without a file"),
        pytest.param("<frozen importlib._bootstrap>", id="the importer"),
    ],
)
def test_a_librarys(file: str) -> None:
    assert not is_application(file)


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("/srv/app/app.py", id="a project"),
        pytest.param("app.py", id="a relative path, before Python 3.9"),
        pytest.param("/srv/venv/app/app.py", id="beside lib in the venv"),
        pytest.param("/usr/lib/myapp/app.py", id="in /usr/lib"),
        pytest.param("/opt/python3.11/app/main.py", id="under a directory with Python's name"),
        pytest.param("/srv/app/lib/python/loader.py", id="under its own lib/python"),
        pytest.param("/home/me/src/mylib/src/mylib/db.py", id="an editable install"),
        pytest.param("/srv/app.pyz/app/main.py", id="a zipapp"),
        pytest.param("/root/.pex/unzipped_pexes/0a/app/main.py", id="in a pex"),
        pytest.param("/home/me/psycopg/app.py", id="a directory with a driver's name"),
        pytest.param("/home/me/sqlalchemy/app.py", id="or an ORM's"),
        pytest.param("/srv/django/core/views.py", id="or a framework's"),
        pytest.param("/usr/local/bin/nightly.py", id="a script that all can run"),
        pytest.param("/srv/app/bin/worker", id="the project's own bin"),
    ],
)
def test_the_applications(file: str) -> None:
    assert is_application(file)


GUNICORN = "/srv/app/.venv/lib/python3.11/site-packages/gunicorn/app/wsgiapp.py"


@pytest.mark.parametrize(
    ("script", "function", "library", "own"),
    [
        pytest.param("/srv/app/.venv/bin/gunicorn", "<module>", GUNICORN, False, id="in a venv"),
        pytest.param(
            "/home/me/.local/bin/rq",
            "<module>",
            "/home/me/.local/lib/python3.11/site-packages/rq/cli/cli.py",
            False,
            id="the user's",
        ),
        pytest.param(
            "/usr/bin/celery", "<module>", "/usr/lib/python3/dist-packages/celery/__main__.py", False, id="Debian's"
        ),
        pytest.param(
            "/usr/local/bin/uvicorn",
            "<module>",
            "/usr/local/lib/python3.12/site-packages/click/core.py",
            False,
            id="in an image",
        ),
        pytest.param("/usr/bin/nightly", "main", "/usr/lib/python3/dist-packages/psycopg2/extras.py", True, id="works"),
        pytest.param("/srv/app/bin/worker", "<module>", GUNICORN, True, id="the project's own"),
        pytest.param("/srv/app/.venv/bin/job.py", "<module>", GUNICORN, True, id="with an extension"),
    ],
)
def test_the_script_that_starts_a_program_is_an_installers(script: str, function: str, library: str, own: bool) -> None:
    frames = told_apart([Frame("run", library, 67), Frame(function, script, 8)])
    assert [frame.application for frame in frames] == [False, own]


CODE = """import threading, psycopg
class Users:
    def load(self):
        return self.connection.execute("SELECT 1")
def main():
    work = lambda: Users().load()
    threading.Thread(target=work).start()
main()
"""
WAIT = Frame("wait", "/venv/lib/python3.11/site-packages/psycopg/waiting.py", 99)
BOOTSTRAP = Frame("Thread._bootstrap", "/usr/lib/python3.11/threading.py", 1002)


def own(*frames: Frame, code: str | None = CODE) -> list[bool]:
    return [frame.application for frame in told_apart(frames, code)]


def text(function: str, line: int) -> Frame:
    return Frame(function, "<string>", line)


@pytest.mark.parametrize("code", [CODE, None], ids=["known", "not known"])
def test_the_code_of_an_option_is_the_applications(code: str | None) -> None:
    assert own(WAIT, text("Users.load", 4), text("main", 7), text("<module>", 8), code=code) == [False, *[True] * 3]
    assert own(WAIT, Frame("load", "/srv/app.py", 3), text("<module>", 1), code=code) == [False, True, True]
    assert place(told_apart([WAIT, text("Users.load", 4), text("<module>", 8)], code)) == "<string>:4 in Users.load"


def test_so_are_its_functions_wherever_they_are_called() -> None:
    """In a thread, or by a library."""
    frames = (WAIT, text("Users.load", 4), text("main.<locals>.<lambda>", 6), BOOTSTRAP)
    assert own(*frames) == [False, True, True, False]
    assert own(*frames, code=None) == [False] * 4, "whose they are isn't known"


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(text("scalars", 2), id="SQLAlchemy's decorators"),
        pytest.param(text("__init__", 3), id="a dataclass's"),
        pytest.param(text("load", 2), id="above its definition"),
        pytest.param(text("main", 99), id="below the end"),
        pytest.param(text("<lambda>", 1), id="before there is one"),
        pytest.param(text("<listcomp>", 8), id="where there is none"),
        pytest.param(Frame("root", "<template>", 5), id="a template"),
        pytest.param(Frame("__init__", "<attrs generated methods app.User>", 5), id="attrs"),
    ],
)
def test_what_a_library_has_made_is_not(made: Frame) -> None:
    library = Frame("call", "/venv/lib/python3.11/site-packages/sqlalchemy/engine/base.py", 9)
    assert own(WAIT, made, library, text("<module>", 8)) == [False, False, False, True]
    assert own(WAIT, made, text("<module>", 8)) == [False, False, True]
    assert own(WAIT, made, Frame("<module>", "/srv/app.py", 1), code=None) == [False, False, True]
    assert own(WAIT, text("<module>", 1), library, Frame("<module>", "/srv/app.py", 1), code=None)[1] is False


@pytest.mark.parametrize(
    "file",
    [
        "/usr/lib/python3.11/multiprocessing/spawn.py",
        "/usr/lib/python3.11/multiprocessing/forkserver.py",
        "/venv/lib/python3.11/site-packages/billiard/spawn.py",
        "/venv/lib/python3.11/site-packages/execnet/gateway_base.py",
    ],
)
@pytest.mark.parametrize("code", ["from multiprocessing.spawn import spawn_main; spawn_main()", None])
def test_what_a_library_starts_its_processes_with_is_not(file: str, code: str | None) -> None:
    frames = (WAIT, Frame("load", "/srv/app.py", 3), Frame("main", file, 1), text("<module>", 8), text("<module>", 1))
    assert own(*frames, code=code) == [False, True, False, False, False]


@pytest.mark.parametrize(
    "file",
    ["<stdin>", "<console>", "<python-input-3>", "<ipython-input-3-0a1b>", "<bpython-input-3>", "<doctest a[1]>"],
)
def test_what_is_piped_or_typed_is_the_applications(file: str) -> None:
    prompt = Frame("runcode", "/usr/lib/python3.11/code.py", 90)
    assert own(WAIT, Frame("load", file, 3), Frame("<module>", file, 9), prompt, code=None) == [
        False,
        True,
        True,
        False,
    ]
    assert own(WAIT, Frame("load", file, 3), BOOTSTRAP, code=None) == [False, True, False]


def test_what_djangos_shell_is_given_is_the_applications() -> None:
    shell = Frame("handle", "/venv/lib/python3.11/site-packages/django/core/management/commands/shell.py", 99)
    manage = Frame("<module>", "/srv/app/manage.py", 22)
    assert own(WAIT, text("load", 2), text("<module>", 3), shell, manage, code=None) == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("cmdline", "code"),
    [
        (("python3", "-c", "work()"), "work()"),
        (("python3", "-X", "dev", "-Wignore", "-uc", "work()", "-c", "x"), "work()"),
        (("python3", "-cwork()"), "work()"),
        (("python3", "-c"), None),
        (("python3", "-m", "app", "-c", "x"), None),
        (("python3", "-um", "app", "-c", "x"), None),
        (("python3", "app.py", "-c", "x"), None),
        (("python3", "-", "-c", "x"), None),
        (("gunicorn: worker [app]",), None),
        ((), None),
    ],
)
def test_which_code_an_interpreter_runs(cmdline: tuple[str, ...], code: str | None) -> None:
    assert code_of(cmdline) == code


def test_such_a_script_is_not_looked_for_in_the_middle() -> None:
    """Of a script that is run by another one it isn't known who has made it."""
    frames = told_apart([Frame("<module>", "/usr/bin/job", 8), Frame("run", "/usr/lib/python3.11/runpy.py", 3)])
    assert frames[0].application


def test_the_place_is_the_applications_innermost_call() -> None:
    frames = told_apart(
        [
            Frame("wait", "/venv/lib/python3.11/site-packages/psycopg/waiting.py", 99),
            Frame("Users.load_user", "/srv/app/users.py", 23),
            Frame("handle", "/srv/app/views.py", 7),
            Frame("<module>", "/venv/bin/gunicorn", 8),
        ]
    )
    assert place(frames) == "users.py:23 in Users.load_user"


@pytest.mark.parametrize(
    ("frame", "where"),
    [
        (Frame("<module>", "/srv/app/app.py", 60), "app.py:60"),
        (Frame("connect", "/srv/app/users/__init__.py", 3), "users/__init__.py:3 in connect"),
        (Frame("<module>", "/srv/app/users/__main__.py", 3), "users/__main__.py:3"),
        (Frame("<module>", "__main__.py", 3), "__main__.py:3"),
    ],
)
def test_a_place_says_what_it_needs_to(frame: Frame, where: str) -> None:
    assert place(told_apart([frame])) == where


@pytest.mark.parametrize(
    "loop",
    [
        "/usr/lib/python3.11/asyncio/base_events.py",
        "/venv/lib/python3.11/site-packages/trio/_core/_run.py",
        "/venv/lib/python3.11/site-packages/gevent/hub.py",
        "/venv/lib/python3.11/site-packages/eventlet/hubs/hub.py",
    ],
)
def test_what_has_started_an_event_loop_is_not_where_the_application_is(loop: str) -> None:
    """But what the loop has called, and hasn't returned yet, is."""
    waits, works = Frame("select", "/usr/lib/python3.11/selectors.py", 468), Frame("handle", "/srv/app.py", 30)
    main = (Frame("run", loop, 600), Frame("<module>", "/srv/app.py", 99))
    assert place(told_apart([waits, *main])) is None
    assert place(told_apart([waits, works, *main])) == "app.py:30 in handle"


def test_without_a_call_of_its_own_the_application_is_nowhere() -> None:
    assert place(told_apart([Frame("run", "/usr/lib/python3.11/threading.py", 1)])) is None
    assert place(told_apart([])) is None
    assert place(told_apart([Frame("x", "", 1)])) is None


@pytest.mark.parametrize(
    ("file", "short"),
    [
        ("/srv/app/.venv/lib/python3.12/site-packages/psycopg/cursor.py", "psycopg/cursor.py"),
        ("/usr/lib/python3/dist-packages/gunicorn/app/base.py", "gunicorn/app/base.py"),
        ("/root/.pyenv/versions/3.12.1/lib/python3.12/selectors.py", "selectors.py"),
        ("/usr/lib/pypy3.10/asyncio/runners.py", "asyncio/runners.py"),
        ("/srv/app/app.py", "/srv/app/app.py"),
        ("<frozen runpy>", "<frozen runpy>"),
    ],
)
def test_of_a_librarys_file_it_is_enough_where_it_is_in_the_library(file: str, short: str) -> None:
    assert short_path(told_apart([Frame("work", file, 1)])[0]) == short
