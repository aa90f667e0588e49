"""Projects whose address isn't in the environment: pytest-django's and pytest-postgresql's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.pytest_plugin.conftest import outcomes
from tests.pytest_plugin.projects import MISDEEDS, RECORDER
from tests.servers import installations, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.pytest_plugin.conftest import Run
    from tests.servers import Server

SETTINGS = """
import os

SECRET_KEY = "x"
INSTALLED_APPS = ["shop"]
ROOT_URLCONF = "shop.urls"
ALLOWED_HOSTS = ["*"]
DATABASES = {"default": DATABASE}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
STATIC_URL = "/static/"
USE_TZ = True
"""

FROM_ENVIRONMENT = """{
    "ENGINE": "django.db.backends.postgresql",
    "NAME": "shop",
    "USER": "postgres",
    "HOST": os.environ["DB_HOST"],
    "PORT": os.environ["DB_PORT"],
    "OPTIONS": {"application_name": "shop"},
}"""

IN_FILE = """{
    "ENGINE": "django.db.backends.postgresql",
    "NAME": "shop",
    "USER": "postgres",
    "HOST": "127.0.0.1",
    "PORT": %d,
    "OPTIONS": {"application_name": "shop", "sslmode": "prefer"},
}"""

PG_CTL = """#!/bin/sh
cd /
for argument; do
    case "$argument" in
        {directory}/tmp/*/data-*)
            chown nobody "$argument"
            above=$(dirname "$argument")
            while [ "$above" != {directory} ]; do
                chmod a+rwx "$above"
                above=$(dirname "$above")
            done ;;
    esac
done
exec setpriv --reuid=nobody --clear-groups {pg_ctl} "$@"
"""

SHOP = """
import os
import urllib.request

import pytest
from django.db import connection, transaction

from shop.models import Thing


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def test_without_a_database():
    pass


@pytest.mark.django_db
def test_in_a_transaction():
    Thing.objects.create(name="one")
    assert Thing.objects.count() == 1


def test_with_real_transactions(transactional_db):
    with transaction.atomic():
        Thing.objects.create(name="two")
    assert Thing.objects.count() == 1


def test_against_a_live_server(live_server):
    Thing.objects.create(name="three")
    with urllib.request.urlopen(f"{live_server.url}/") as answer:
        assert answer.read() == b"1"


@pytest.mark.django_db
def test_forks(pgguard):
    in_child(lambda: list(Thing.objects.all()))
    assert list(Thing.objects.all()) == []


@pytest.mark.django_db(transaction=True)
def test_forks_and_closes():
    def work():
        connection.connect()
        list(Thing.objects.all())
        connection.close()

    connection.close()
    in_child(work)
    assert list(Thing.objects.all()) == []
"""


@pytest.mark.parametrize("workers", ["0", "1"], ids=["alone", "xdist"])
def test_django(pytester: pytest.Pytester, run: Run, database: Server, workers: str) -> None:
    shop = pytester.mkpydir("shop")
    (shop / "models.py").write_text(
        "from django.db import models\n\n\nclass Thing(models.Model):\n    name = models.TextField()\n"
    )
    (shop / "urls.py").write_text(
        "from django.http import HttpResponse\nfrom django.urls import path\n\nfrom shop.models import Thing\n\n"
        'urlpatterns = [path("", lambda request: HttpResponse(str(Thing.objects.count())))]\n'
    )
    port = database.tcp.port
    where = IN_FILE % port if workers == "0" else FROM_ENVIRONMENT
    pytester.makepyfile(settings=SETTINGS.replace("DATABASE}", f"{where}}}"), test_shop=SHOP)
    pytester.makeconftest(RECORDER)
    pytester.makeini("[pytest]\nDJANGO_SETTINGS_MODULE = settings\npythonpath = .\n")
    variables = {"DB_HOST": "127.0.0.1", "DB_PORT": str(port), "PGUSER": "postgres"}
    result = run("--pgguard", "-n", workers, "--create-db", plugins=["xdist", "django"], **variables)
    found, told = outcomes(pytester)
    assert {name: phases for name, phases in found.items() if phases} == {"test_forks": {"call": "failed"}}, (
        result.stdout.str()
    )
    assert told["test_forks"][0].startswith("pgguard: shared-by-processes: ")
    assert 'application_name "shop"' in told["test_forks"][1][0]


@pytest.fixture
def pg_ctl() -> Iterator[Path]:
    """PostgreSQL's program of that name, as root can't run it: as another user, who gets the cluster's directory."""
    found = [bindir for name, bindir in installations().items() if name.startswith("debian") and bindir]
    if not found:
        not_installed("Debian's PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="pgguard-test-") as name:
        directory = Path(name)
        program = directory / "pg_ctl"
        program.write_text(PG_CTL.format(directory=directory, pg_ctl=found[-1] / "pg_ctl"))
        for path in (directory, program):
            path.chmod(0o755)
        yield program if os.geteuid() == 0 else found[-1] / "pg_ctl"


def test_postgresql(pytester: pytest.Pytester, run: Run, pg_ctl: Path) -> None:
    pytester.makepyfile(
        misdeeds=MISDEEDS,
        test_own="""
        from misdeeds import *


        def test_asks(postgresql, postgresql_proc, pgguard):
            postgresql.execute("select 1")
            assert postgresql.info.port == postgresql_proc.port
            pgguard.expect_none()


        def test_forks(postgresql):
            postgresql.autocommit = True
            share(postgresql)


        def test_asks_again(postgresql):
            postgresql.execute("select 1")
        """,
    )
    pytester.makeconftest(RECORDER)
    arguments = ("--pgguard", "-n", "2", f"--postgresql-exec={pg_ctl}", f"--basetemp={pg_ctl.parent / 'tmp'}")
    result = run(*arguments, plugins=["xdist", "pytest_postgresql"], DATABASE_URL=None)
    found, told = outcomes(pytester)
    assert {name: phases for name, phases in found.items() if phases} == {"test_forks": {"call": "failed"}}, (
        result.stdout.str()
    )
    assert told["test_forks"][0].startswith("pgguard: shared-by-processes: ")
