"""Advice that fits the software: which row of the tables is chosen, and that what it says can be pasted."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from pgguard.attribution.runtime import Language, Library, Runtime, Server
from pgguard.faults.advice import advice_for, advised
from pgguard.faults.advice.answers import ANSWERS
from pgguard.faults.advice.forks import CALLS, HOOKS
from pgguard.faults.advice.rows import TAKEN_ALONG, Answer, Call, Hook
from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.text import printable
from pgguard.session.verdicts import Kind
from tests.servers import not_installed

if TYPE_CHECKING:
    from pathlib import Path

    from pgguard.faults.catalogue import Advice

SHARED = Kind.SHARED_BY_PROCESSES
PUMA = Runtime(Language.RUBY, Server.PUMA)


def runtime(language: Language, server: Server | None, *libraries: Library) -> Runtime:
    return Runtime(language, server, frozenset(libraries))


def code(advice: Advice) -> str:
    assert advice.code is not None
    return advice.code


ALL = sorted({advice_for(kind, [shown]) for kind in Kind for shown in advised(kind)})


@pytest.mark.parametrize("kind", Kind)
def test_without_knowledge_the_advice_is_the_catalogues(kind: Kind) -> None:
    assert advice_for(kind, []) == CATALOGUE[kind].advice
    assert advice_for(kind, [Runtime(), Runtime()]) == CATALOGUE[kind].advice


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook.language}-{hook.server}-{hook.side.name}")
def test_each_hook_is_what_a_library_of_its_side_gets(hook: Hook) -> None:
    for call in CALLS:
        if call.language is hook.language and call.side is hook.side and call.only:
            advice = advice_for(SHARED, [runtime(hook.language, hook.server, call.library)])
            assert advice.text.startswith(hook.text)
            assert call.text in advice.text
            assert set(advice.sources) == {*hook.sources, *call.sources}
            for line in call.code.splitlines():
                assert line in code(advice)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.library)
@pytest.mark.parametrize("kind", sorted(TAKEN_ALONG))
def test_each_call_is_what_a_process_with_its_library_gets(call: Call, kind: Kind) -> None:
    advice = advice_for(kind, [runtime(call.language, None, call.library)])
    assert call.text in advice.text
    assert call.code in code(advice) or len(call.code.splitlines()) > 1
    if call.elsewhere is not None:
        assert code(advice).endswith(call.elsewhere)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.advice.title)
def test_each_answer_is_what_a_process_that_shows_it_gets(answer: Answer) -> None:
    libraries = () if answer.library is None else (answer.library,)
    for kind in answer.kinds:
        advice = advice_for(kind, [runtime(answer.language, None, *libraries)])
        assert advice.text.startswith(answer.advice.text)
        assert advice.code == answer.advice.code


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("language", [Language.DOTNET, None])
def test_software_of_which_nothing_is_known_gets_the_general_advice(kind: Kind, language: Language | None) -> None:
    libraries = frozenset({Library.SEQUEL, Library.SQLALCHEMY})
    assert advice_for(kind, [Runtime(language, Server.PUMA, libraries)]) == CATALOGUE[kind].advice


@pytest.mark.parametrize("language", [Language.NODE, Language.JAVA, Language.GO])
def test_what_does_not_fork_gets_no_advice_about_hooks(language: Language) -> None:
    assert advice_for(SHARED, [Runtime(language)]) == CATALOGUE[SHARED].advice


def test_a_library_of_another_language_does_not_match() -> None:
    advice = advice_for(SHARED, [runtime(Language.PYTHON, Server.GUNICORN, Library.SEQUEL)])
    assert advice == advice_for(SHARED, [runtime(Language.PYTHON, Server.GUNICORN)])


def test_what_several_processes_show_is_taken_together() -> None:
    """A worker has its title, its master has not set one yet; a ``psql`` in between says nothing about either."""
    seen = [Runtime(), PUMA, Runtime(Language.PERL), runtime(Language.RUBY, None, Library.SEQUEL)]
    assert advice_for(SHARED, seen) == advice_for(SHARED, [runtime(Language.RUBY, Server.PUMA, Library.SEQUEL)])


def test_a_server_without_a_hook_of_its_own_gets_those_for_whatever_forks() -> None:
    advice = advice_for(SHARED, [runtime(Language.RUBY, Server.UWSGI, Library.SEQUEL)])
    assert advice == advice_for(SHARED, [runtime(Language.RUBY, None, Library.SEQUEL)])


def test_puma_with_sequel() -> None:
    advice = advice_for(SHARED, [runtime(Language.RUBY, Server.PUMA, Library.PG, Library.SEQUEL, Library.SEQUEL_PG)])
    assert advice.code == "# config/puma.rb\nbefore_fork do\n  Sequel::DATABASES.each(&:disconnect)\nend"
    assert "before_fork" in advice.text


def test_puma_with_rom_in_a_hanami_application_needs_a_stop_hook() -> None:
    bundle = Library.HANAMI, Library.ROM, Library.SEQUEL
    written_by_hand = advice_for(SHARED, [runtime(Language.RUBY, Server.PUMA, *bundle)])
    assert "before_fork do\n  Hanami.shutdown\nend" in code(written_by_hand)
    assert 'stop do\n  target["persistence.rom"].disconnect\nend' in code(written_by_hand)
    built_in = advice_for(SHARED, [runtime(Language.RUBY, Server.PUMA, *bundle, Library.HANAMI_DB)])
    assert built_in.code == "# config/puma.rb\nbefore_fork do\n  Hanami.shutdown\nend"
    assert "built-in" in built_in.text


def test_sequel_is_suspected_before_active_record_which_takes_care_of_forks() -> None:
    advice = advice_for(SHARED, [runtime(Language.RUBY, Server.PUMA, Library.ACTIVE_RECORD, Library.SEQUEL)])
    assert "Sequel::DATABASES" in code(advice)


@pytest.mark.parametrize("server", [Server.GUNICORN, Server.UWSGI, Server.CELERY, Server.MULTIPROCESSING, None])
def test_django_closes_in_the_parent_and_sqlalchemy_forgets_in_the_child(server: Server | None) -> None:
    """The other way round, Django would send Terminate on the parent's connection."""
    django = advice_for(SHARED, [runtime(Language.PYTHON, server, Library.DJANGO, Library.PSYCOPG)])
    assert "connections.close_all()" in code(django)
    assert not re.search("post_?fork|process_init|initializer|after_in_child", code(django))
    sqlalchemy = advice_for(SHARED, [runtime(Language.PYTHON, server, Library.SQLALCHEMY, Library.PSYCOPG2)])
    assert "engine.dispose(close=False)" in code(sqlalchemy)
    assert re.search("post_?fork|process_init|initializer|after_in_child", code(sqlalchemy))


def test_where_no_library_shows_the_ruby_code_calls_those_that_are_there() -> None:
    """A gem in plain Ruby maps nothing, so the code finds out when it runs; pasted as it stands, it works."""
    assert code(advice_for(SHARED, [PUMA])).splitlines() == [
        "# config/puma.rb",
        "before_fork do",
        "  Hanami.shutdown if defined?(Hanami)",
        "  Sequel::DATABASES.each(&:disconnect) if defined?(Sequel)",
        "  ActiveRecord::Base.connection_pool.disconnect! if defined?(ActiveRecord::Base)",
        "  $connection.close if $connection && !$connection.finished?",
        "end",
        "",
        "on_worker_boot do # before_worker_boot from Puma 7 on",
        '  $connection = PG.connect(ENV.fetch("DATABASE_URL")) if $connection',
        "end",
    ]


@pytest.mark.parametrize("server", [Server.PUMA, Server.UNICORN, Server.PASSENGER, Server.RESQUE, None])
def test_a_bare_connection_in_ruby_is_closed_before_the_fork_and_made_anew_after_it(server: Server | None) -> None:
    """The gem alone shows, as Sequel in plain Ruby doesn't: so what owns the connection is found out at run time."""
    lines = code(advice_for(SHARED, [runtime(Language.RUBY, server, Library.PG)])).splitlines()
    closes, connects = (
        next(n for n, line in enumerate(lines) if text in line) for text in ("$connection.close", "PG.connect")
    )
    assert closes < connects
    assert any("Sequel::DATABASES" in line for line in lines)


@pytest.mark.parametrize("server", [Server.CELERY, Server.RQ, Server.MULTIPROCESSING, None])
@pytest.mark.parametrize("call", [call for call in CALLS if call.language is Language.PYTHON], ids=lambda c: c.library)
def test_where_children_leave_through_os_exit_the_code_says_what_closes_what_they_open(
    server: Server | None, call: Call
) -> None:
    advice = advice_for(SHARED, [runtime(Language.PYTHON, server, call.library)])
    assert call.closing is not None
    for line in call.closing.splitlines():
        assert line in code(advice)
    assert "os._exit" in advice.text


def test_where_no_library_shows_the_python_code_offers_those_of_the_language() -> None:
    lines = code(advice_for(SHARED, [runtime(Language.PYTHON, Server.GUNICORN)])).splitlines()
    offered = [line for line in lines if line.startswith("    # ")]
    assert any("engine.dispose(close=False)" in line for line in offered)
    assert lines[-1] == "    pass"


@pytest.mark.parametrize(
    ("language", "library", "says"),
    [
        (Language.PERL, Library.DBD_PG, "AutoInactiveDestroy => 1"),
        (Language.RUBY, Library.SEQUEL, "exit!"),
        (Language.PYTHON, Library.SQLALCHEMY, "os._exit"),
    ],
)
def test_a_foreign_terminate_is_also_avoided_by_how_a_child_leaves(
    language: Language, library: Library, says: str
) -> None:
    assert says in advice_for(Kind.FOREIGN_TERMINATE, [runtime(language, None, library)]).text


def test_a_one_way_hand_over_is_said_to_be_harmless_whatever_the_software() -> None:
    for shown in Runtime(), PUMA, runtime(Language.PYTHON, None, Library.ASYNCPG):
        assert "this is harmless: set this kind to ignore" in advice_for(Kind.INHERITED_CONNECTION, [shown]).text


@pytest.mark.parametrize("advice", ALL, ids=lambda advice: advice.title)
def test_texts_are_single_lines_and_complete(advice: Advice) -> None:
    """They are the hint of an ErrorResponse too."""
    for text in advice.title, advice.text:
        assert text == " ".join(text.split()) == printable(text)
    assert advice.text.endswith(".")
    assert not advice.title.endswith(".")
    assert len(advice.text) < 900
    assert json.loads(json.dumps(advice._asdict())).keys() == {"title", "text", "code", "sources"}


@pytest.mark.parametrize("advice", ALL, ids=lambda advice: advice.title)
def test_every_claim_has_its_source(advice: Advice) -> None:
    assert advice.sources
    assert len(set(advice.sources)) == len(advice.sources)
    for source in advice.sources:
        assert urlsplit(source).scheme == "https"


SNIPPETS = sorted({part for advice in ALL if advice.code for part in re.split(r"\n\n(?=# \S+\.\S+)", advice.code)})


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_code_can_be_pasted(snippet: str, tmp_path: Path) -> None:
    """It names its file, and its language understands it there."""
    head = snippet.splitlines()[0]
    file = re.search(r"([\w/.]+\.(?:rb|ru|py|pl|php|yml|go))\b", head)
    assert file is not None, head
    assert "{" + "calls}" not in snippet
    suffix = file[1].rpartition(".")[2]
    if suffix == "py":
        ast.parse(snippet)
        return
    if suffix == "yml":
        assert re.fullmatch(r"# .*\n(?: *\w+:(?: .+)?\n?)+", snippet)
        return
    program, option = {
        "rb": ("ruby", "-c"),
        "ru": ("ruby", "-c"),
        "pl": ("perl", "-c"),
        "php": ("php", "-l"),
        "go": ("gofmt", "-e"),
    }[suffix]
    if shutil.which(program) is None:
        not_installed(program)
    path = tmp_path / f"snippet.{suffix}"
    path.write_text(snippet + "\n")
    command = [program, option] if suffix == "go" else [program, option, str(path)]  # gofmt takes a part from there
    if suffix == "pl":  # some of its modules load within Apache alone, and threads in a Perl that was built for them
        for module in set(re.findall(r"^use ((?:Apache2|threads)\b[\w:]*)", snippet, re.MULTILINE)):
            stand_in = tmp_path.joinpath("lib", *module.split("::")).with_suffix(".pm")
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.write_text("1;\n")
        command.insert(1, f"-I{tmp_path}/lib")
    done = subprocess.run(command, input=snippet, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
