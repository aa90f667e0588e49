"""Which of Ruby's calls are the application's own, by real paths of gems, of Ruby's and of applications."""

from __future__ import annotations

import pytest

from pgguard.attribution.frames import Frame, place, short_path
from pgguard.attribution.ruby.frames import told_apart

LIBRARIES = {
    "/usr/local/bundle/gems/sequel-5.84.0/lib/sequel/database/query.rb": "sequel-5.84.0/lib/sequel/database/query.rb",
    "/srv/app/vendor/bundle/ruby/3.2.0/gems/pg-1.5.9/lib/pg/connection.rb": "pg-1.5.9/lib/pg/connection.rb",
    "/home/me/.rbenv/versions/3.3.5/lib/ruby/gems/3.3.0/gems/puma-6.4.3/lib/puma/server.rb": (
        "puma-6.4.3/lib/puma/server.rb"
    ),
    "/usr/local/bundle/bundler/gems/rails-5b1e3c1/activerecord/lib/active_record.rb": (
        "rails-5b1e3c1/activerecord/lib/active_record.rb"
    ),
    "/usr/share/rubygems-integration/all/gems/activerecord-6.1.7.10/lib/active_record/base.rb": (
        "activerecord-6.1.7.10/lib/active_record/base.rb"
    ),
    "/usr/lib/ruby/vendor_ruby/sequel/core.rb": "sequel/core.rb",
    "/usr/lib/ruby/3.1.0/monitor.rb": "monitor.rb",
    "/usr/local/lib/ruby/site_ruby/3.3.0/rubygems.rb": "rubygems.rb",
    "/usr/lib/x86_64-linux-gnu/ruby/3.1.0/socket.rb": "socket.rb",
    "/usr/lib64/ruby/3.2.0/socket.rb": "socket.rb",
    "<internal:kernel>": "<internal:kernel>",
    "(eval)": "(eval)",
    "(eval at /srv/app/models.rb:7)": "(eval at /srv/app/models.rb:7)",
    "": "",
}
OWN = [
    "/srv/app/models/user.rb",
    "/srv/app/gems/billing/lib/billing.rb",
    "/srv/ruby/app.rb",
    "/home/ruby/app/lib/ruby_things/job.rb",
    "config.ru",
    "app.rb",
    "-e",
    "-",
    "(irb)",
]


def marks(*frames: tuple[str, str, int]) -> list[bool]:
    return [frame.application for frame in told_apart([Frame(*frame) for frame in frames])]


@pytest.mark.parametrize("file", LIBRARIES)
def test_what_was_installed_is_not_the_applications(file: str) -> None:
    assert marks(("query", file, 3), ("<main>", "/srv/app/app.rb", 1)) == [False, True]
    assert short_path(Frame("query", file, 3)) == LIBRARIES[file]


@pytest.mark.parametrize("file", OWN)
def test_all_else_is(file: str) -> None:
    assert marks(("work", file, 3)) == [True]


def test_a_method_in_c_has_its_callers_place_and_is_not_the_applications() -> None:
    stack = [
        ("PG::Connection#exec", "/srv/app.rb", 7),
        ("block in Shop#load", "/srv/app.rb", 7),
        ("Array#each", "/srv/app.rb", 7),
        ("Shop#load", "/srv/app.rb", 7),
        ("<main>", "/srv/app.rb", 12),
    ]
    assert marks(*stack) == [False, True, False, True, True]
    assert place(told_apart([Frame(*one) for one in stack])) == "app.rb:7 in block in Shop#load"


@pytest.mark.parametrize("function", ["<main>", "<top (required)>"])
def test_of_what_is_in_no_method_the_place_is_told_alone(function: str) -> None:
    assert place(told_apart([Frame(function, "/srv/app/config.ru", 5)])) == "config.ru:5"


@pytest.mark.parametrize(
    ("script", "loads"),
    [
        ("/usr/bin/puma", "load"),
        ("/usr/local/bundle/bin/sidekiq", "Kernel#load"),
        ("/srv/app/bin/rails", "require"),
    ],
)
def test_a_script_that_only_loads_a_program_is_none_of_the_applications(script: str, loads: str) -> None:
    gem = "/usr/local/bundle/gems/puma-6.4.3/bin/puma"
    assert marks(("run", gem, 7), (loads, script, 25), ("<main>", script, 25)) == [False, False, False]
    assert marks(("work", "/srv/app/bin/worker", 7), ("<main>", "/srv/app/bin/worker", 9)) == [True, True]


def test_within_an_event_loop_nobody_is_seen_to_wait() -> None:
    reactor = "/usr/local/bundle/gems/async-2.21.1/lib/async/scheduler.rb"
    stack = told_apart([Frame("select", reactor, 9), Frame("block in <main>", "/srv/app.rb", 3)])
    assert place(stack) is None
