"""No secret gets out, wherever it stands and wherever it is cut off; and what is none stays readable."""

from __future__ import annotations

import base64
import itertools
import re
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.evidence import Process
from pgguard.faults.sql import SqlMode, sql_text
from pgguard.faults.text import discreet_setting, process_label
from pgguard.secrets.commands import CUT_OFF, redact_command
from pgguard.secrets.names import is_secret_name
from pgguard.secrets.text import redact, redact_structure
from tests.secrets.surroundings import COMMANDS, PIECE, SQL, TEXTS, TITLES, Place

_SIGNS = string.ascii_letters + string.digits + string.punctuation + " éß日"
secrets = st.text(_SIGNS, min_size=8, max_size=24).filter(
    # What is an option all over can be told from one by nobody.
    lambda text: len(set(text)) >= PIECE and text == text.strip() and not re.fullmatch("-+[a-z-]+", text)
)


def test_there_are_more_than_a_hundred_places() -> None:
    assert len(TEXTS) + len(COMMANDS) + len(SQL) > 180


@given(st.sampled_from(TEXTS), secrets)
def test_no_secret_gets_out_of_a_text(place: Place, secret: str) -> None:
    [text] = place.holding(secret)
    shown = redact(text)
    assert place.leaks(secret, shown) == [], shown
    assert place.leaks(secret, redact(f"worker 3: {text} busy")) == []
    assert place.leaks(secret, redact(shown)) == []


@given(st.sampled_from(TEXTS), secrets, st.data())
def test_no_half_of_a_secret_gets_out_of_a_text_that_was_cut_off(
    place: Place, secret: str, data: st.DataObject
) -> None:
    [text] = place.holding(secret)
    end = data.draw(st.integers(0, len(text)))
    shown = redact(text[:end], cut=True)
    assert place.leaks(secret, shown) == [], shown


@given(st.sampled_from(COMMANDS), secrets, st.data())
def test_no_half_of_a_secret_gets_out_of_a_command_line_that_was_cut_off(
    place: Place, secret: str, data: st.DataObject
) -> None:
    """As the kernel gives no more than the beginning of one, which may end within an argument."""
    words = ["/usr/bin/env", f"LONG={'x ' * (CUT_OFF // 2)}", *place.holding(secret)]
    end = data.draw(st.integers(CUT_OFF, len(" ".join(words))))
    shown = redact_command("\0".join(words)[:end].split("\0"))
    assert place.leaks(secret, " ".join(shown[2:])) == [], shown[2:]


@given(st.sampled_from(COMMANDS), secrets)
def test_no_secret_gets_out_of_a_command_line(place: Place, secret: str) -> None:
    words = place.holding(secret)
    shown = redact_command(words)
    assert place.leaks(secret, " ".join(shown)) == [], shown
    assert place.leaks(secret, " ".join(redact_command(shown))) == []
    assert len(shown) == len(words)
    assert place.leaks(secret, process_label(Process(1, 1, 1.0, "app", words, None))) == []


@given(st.sampled_from((*COMMANDS, *TITLES)), st.text(string.ascii_letters, min_size=8, max_size=24))
def test_no_secret_gets_out_of_a_title(place: Place, secret: str) -> None:
    """A process that changes its title joins its words as they are."""
    [shown] = redact_command([" ".join(place.holding(secret))])
    assert place.leaks(secret, shown) == [], shown


@given(st.sampled_from(SQL), secrets, st.sampled_from([SqlMode.NORMALIZED, SqlMode.FULL]), st.data())
def test_no_secret_gets_out_of_sql_whole_or_cut_off(
    place: Place, secret: str, mode: SqlMode, data: st.DataObject
) -> None:
    [text] = place.holding(secret)
    encoded = text.encode()
    end = data.draw(st.integers(0, len(encoded)))
    for sql, cut in ((encoded, False), (encoded[:end], True)):
        shown = sql_text(sql, mode, cut=cut)
        assert shown is not None
        assert place.leaks(secret, shown) == [], shown


CAUGHT = [
    # what issue 9 named
    ("/*password='x'*/", "/*password=***"),
    ("db_url='postgresql://u:x@h'", "db_url='postgresql://u:***@h'"),
    ("SET app.password = hunter2", "SET app.password = ***"),
    ("ALTER ROLE joe PASSWORD hunter2 LOGIN", "ALTER ROLE joe PASSWORD *** LOGIN"),
    ("app --db-password X", "app --db-password ***"),
    ("app --pwd=X --token Y --api-key=Z", "app --pwd=*** --token *** --api-key=***"),
    ("sh -c 'app --password X'", "sh -c 'app --password ***'"),
    ('{"user": "joe", "password": "x y"}', '{"user": "joe", "password": ***}'),
    ("host=db password=a\\ X user=joe", "host=db password=*** user=joe"),
    ("postgres://u:s3/cret@db/app", "postgres://u:***@db/app"),
    # URLs and logins
    ("postgresql://app:s3c@ret@db/app", "postgresql://app:***@db/app"),
    ("postgresql:///app?user=a&password=s3cret&x=1", "postgresql:///app?user=a&password=***&x=1"),
    ("postgres://u:hunter2", "postgres://u:***"),
    ("postgres%3A%2F%2Fu%3Apw%40h%2Fdb", "postgres%3A%2F%2Fu%3A***%40h%2Fdb"),
    ('"postgres:\\/\\/u:p@h"', '"postgres:\\/\\/u:***@h"'),
    ("https://t0ken@github.com/o/r", "https://***@github.com/o/r"),
    ("worker postgres://u:p@h/db busy", "worker postgres://u:***@h/db busy"),
    ("app:s3cret@db:5432/app", "app:***@db:5432/app"),
    ("localhost:5432:*:joe:s3cret", "localhost:5432:*:joe:***"),
    # notations
    ("Server=h;Pwd=a,b;Database=d", "Server=h;Pwd=***;Database=d"),
    ("Host=h; Password=x y; Database=d", "Host=h; Password=***; Database=d"),
    ("password: my secret phrase\nuser: joe", "password: ***\nuser: joe"),
    ('{"name":"DB_PASSWORD","value":"x"}', '{"name":"DB_PASSWORD","value":***}'),
    ('{\\"password\\": \\"x y\\", \\"user\\": 1}', '{\\"password\\": ***, \\"user\\": 1}'),
    ("<password>x y</password>", "<password>***</password>"),
    ("ENV.fetch('PASSWORD', 'x y')", "ENV.fetch('PASSWORD', ***)"),
    ("p%61ssword=hunter2", "p%61ssword=***"),
    ("echo hunter2 | sudo -S ls", "echo ***| sudo -S ls"),
    ("docker login --password-stdin <<< hunter2", "docker login --password-stdin <<< ***"),
    ("curl -H 'Authorization: Bearer abcdefg' http://h/", "curl -H 'Authorization: ***' http://h/"),
    ('psql "host=h password=\'x y\'" -c "select 1"', 'psql "host=h password=***" -c "select 1"'),
    ("it's PGPASSWORD='a'\"b c\" psql", "it's PGPASSWORD=*** psql"),
    ("ALTER ROLE a PASSWORD 's3''cret' LOGIN", "ALTER ROLE a PASSWORD *** LOGIN"),
    ("CREATE USER a PASSWORD $x$s3cret$x$;", "CREATE USER a PASSWORD ***;"),
    ("ALTER ROLE a PASSWORD 's3cret", "ALTER ROLE a PASSWORD ***"),
    # by their shape
    ("AKIAIOSFODNN7EXAMPLE", "***"),
    ("a ghp_16C7e42F292c6912E7710c838347Ae178B4a b", "a *** b"),
    ("a eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln b", "a *** b"),
    ("a -----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY----- b", "a *** b"),
    ("--data dGhpcyBJcyBBIHNlY3JldCBUb2tlbiE5Nzg2NQ==", "--data ***"),
    ("SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy", "***"),
    ("md5" + "0123456789abcdef" * 2, "***"),
    ("bearer abcdef0123", "bearer ***"),
    ("https://hooks.slack.com/services/T00/B00/abcdef now", "https://hooks.slack.com/services/*** now"),
    ("https://discord.com/api/webhooks/123456/ab_cd-ef?wait=1", "https://discord.com/api/webhooks/***?wait=1"),
    # with escapes in the name
    (r'{"p\u0061ssword": "x y", "user": 1}', r'{"p\u0061ssword": ***, "user": 1}'),
    (r'log "{\"p\\u0061ssword\": \"x y\"}" now', r'log "{\"p\\u0061ssword\": ***}" now'),
    (r"{'p\x61ssword': 'x y'}", r"{'p\x61ssword': ***}"),
    (r"p\u{61}ssword = 'x y'", r"p\u{61}ssword = ***"),
    ("<p&#97;ssword>x y</p&#x61;ssword>", "<p&#97;ssword>***</p&#x61;ssword>"),
    (r"postgres:\u002f\u002fu:x\u0040h", r"postgres:\u002f\u002fu:***\u0040h"),
    # encoded as a whole
    ("cGFzc3dvcmQ9aHVudGVyMg==", "***"),
    ("--setting=cGFzc3dvcmQ9aHVudGVyMg --verbose", "--setting=*** --verbose"),
    ("echo cGFzc3dvcmQ9aHVudGVyMg== | base64 -d", "echo *** | base64 -d"),
    ("data:text/plain;base64,cGFzc3dvcmQ9aHVudGVyMg==", "data:text/plain;base64,***"),
    ("x-cGFzc3dvcmQ9aGg=", "x-***"),
    ("70617373776f72643d68756e74657232", "***"),
    (r"'\x70617373776f72643d68756e74657232'", r"'\***'"),
]


@pytest.mark.parametrize(("text", "shown"), CAUGHT)
def test_what_is_caught(text: str, shown: str) -> None:
    assert redact(text) == shown


LEFT_ALONE = [
    "ftp --passive -p 5432 -p5432",
    "app --password-file /run/secret --token-bucket-size 5",
    "app --no-password joe",
    "app password joe, passwordless login, git pass, tokenizer.py x, python token_server.py 8080",
    "echo hunter2 | grep x; sudo -s; echo done | sudo tee /etc/x",
    "ready on 127.0.0.1:6544, unix:/run/app-pw:5432, unix:/run/pwd:5432",
    "compass=2 bypass=1 author=joe authority=x secretary=eve passenger=7",
    "primary_key=3 sort_key=name key=value public_key=abc cache_key=x keyboard=de",
    "password_encryption=scram-sha-256 max_token_length=12 token_ttl=60 passfile=/x sslkey=/y",
    "SELECT password FROM users ORDER BY token DESC",
    "password::text, u.password IS NOT NULL",
    "ALTER ROLE app PASSWORD NULL",
    "WHERE password = $1 AND token = ? AND secret = %s",
    "postgresql://db:5432/app http://[::1]:80/ tcp://0.0.0.0:9292 [app@host]",
    "unix:@name:5432 unix:/run/a@b:1 git@github.com:o/r.git joe@example.com",
    "puma 6.4 (tcp://0.0.0.0:9292) [app@host]",
    "gunicorn: master [app:application]",
    "celery: ForkPoolWorker-3 -A app worker -c 4",
    "commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904 of 550e8400-e29b-41d4-a716-446655440000",
    "traceparent='00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01'",
    "/usr/lib/python3/dist-packages/SomePackage2/ActiveRecordConnectionPool.py",
    "-XX:+HeapDumpOnOutOfMemoryError -Djava.util.logging.config.file=/etc/x",
    "postgres: joe app 127.0.0.1(53984) idle in transaction",
    "application_name=puma controller='users',action='show'",
    "data::jsonb @> x, a[1:2]",
    "password=*** --token *** postgres://u:***@h",
    "Basic authentication, bearer of news, the token bucket",
    "PasswordMessage was sent while the answer was outstanding",
    r'{"n\u0061me": "x", "passed": "\u00e4"} C:\temp\x64\u0041 &#97;bc',
    "aGVsbG8gd29ybGQ= 68656c6c6f20776f726c64 customers_by_region x=YWxsIGlzIHdlbGw=",
]


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_what_is_left_alone(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["mysql", "-u", "root", "-pX"], ["mysql", "-u", "root", "-p***"]),
        (["mysql", "-p5432"], ["mysql", "-p***"]),
        (["psql", "-p", "5432", "-d", "app"], None),
        (["psql", "-p5432"], None),
        (["app", "-p5432"], None),
        (["app", "-p", "/run/pid"], None),
        (["app", "-p", "hunter2"], ["app", "-p", "***"]),
        (["mkdir", "-p", "hunter2"], None),
        (["docker", "run", "-p", "hunter2", "login"], None),
        (["htpasswd", "-b", "users", "joe", "hunter2"], ["htpasswd", "-b", "users", "joe", "***"]),
        (["htpasswd", "-b", "-p", "users", "joe", "hunter2"], ["htpasswd", "-b", "-p", "users", "joe", "***"]),
        (["htpasswd", "users", "joe", "-v"], None),
        (["redis-cli", "-h", "cache", "-p", "6379", "GET", "authority"], None),
        (["vault", "kv", "get", "kv/app"], None),
        (["openssl", "s_client", "-connect", "db:5432"], None),
        (["sqlplus", "/", "as", "sysdba", "@/opt/x.sql"], None),
        (["sqlplus", "scott/tiger@db"], ["sqlplus", "scott/***"]),
        (["pass", "show", "mail/joe"], None),
        (["setup.exe", "/PASSWORD", "hunter2", "/quiet"], ["setup.exe", "/PASSWORD", "***", "/quiet"]),
        (["app", "/run/token", "x"], None),
        (["/usr/bin/passwd", "joe"], None),
        (["tar", "-cvu", "a:b"], ["tar", "-cvu", "a:***"]),
        (["7z", "a", "-tzip", "x.zip", "x"], None),
        (["ps", "-eu", "joe"], None),
        (["curl", "-sSu", "joe:hunter2", "https://h/"], ["curl", "-sSu", "joe:***", "https://h/"]),
        (["kubectl", "create", "configmap", "x", "--from-file=a=b"], None),
        (["app password reset"], ["app password ***"]),
        (["app password --help"], None),
        (["nginx: worker process"], None),
        (["sidekiq 7.1 app [3 of 5 busy]"], None),
        (["gunicorn: worker passwordless [app.tokenizer:main]"], None),
        (["postgres: joe app 127.0.0.1(53984) SELECT"], None),
        (["manage.py runserver --password-file /run/pw"], None),
        (["git pass"], None),
        (["java", "-Dfile.encoding=UTF-8", "-Dport=5", "x"], None),
        (["app", "-passive", "-print"], None),
        (["app", "--password", "s3cret", "-v"], ["app", "--password", "***", "-v"]),
        (["app", "--password", "-v"], None),
        (["app", "--password", "-x7$k"], ["app", "--password", "***"]),
        (["env", "PGPASSWORD=my secret words", "psql"], ["env", "PGPASSWORD=***", "psql"]),
        (["psql", "password='s3 \\'cret' user=app"], ["psql", "password=*** user=app"]),
        (["psql", "password=s3&x=1;y user=app"], ["psql", "password=*** user=app"]),
        (["psql", "postgres://u:pa ss@h/db"], ["psql", "postgres://u:***@h/db"]),
        (["git", "config", "x.token", "abc"], ["git", "config", "x.token", "***"]),
        (["curl", "-u", "joe:hunter2", "https://h:443/"], ["curl", "-u", "joe:***", "https://h:443/"]),
        (["docker", "run", "-p", "80:80", "-u", "1000:1000", "-e", "PW=x"], None),
        (["python3", "token_server.py", "8080"], None),
        (["app", "--password-file", "f", "--passive"], None),
        (["/usr/bin/python3", "-m", "gunicorn", "-b", "0.0.0.0:80", "app:app"], None),
        (["puma: cluster worker 1: 4864 [app]"], None),
        ([], None),
    ],
)
def test_command_lines(arguments: list[str], shown: list[str] | None) -> None:
    if shown is None:
        shown = [argument.replace("PW=x", "PW=***") for argument in arguments]
    assert redact_command(arguments) == shown


@pytest.mark.parametrize(
    "name",
    [
        *("password", "PGPASSWORD", "db-pass", "dbPassword", "passwd2", "pwd", "SecretAccessKey", "apikey", "API_KEY"),
        *("x-api-key", "authToken", "token", "private_key", "client_secret", "Cookie", "Authorization", "requirepass"),
        *("Pass-Wort", "hasło", "heslo", "mot_de_passe", "salasana", "Şifre", "κωδικός", "лозинка", "upw"),
        *("sslpassword", "PASSWORT", "contraseña", "пароль", "密码", "userpw", "JWT", "credentials", "masterauth"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name) == (name != "userpw")


@pytest.mark.parametrize(
    "name",
    [
        *("compass", "passive", "author", "primary_key", "key", "sort_key", "token_type", "password_file", "tokenizer"),
        *("upward", "Hessen", "password_policy"),
        *("passfile", "passwordless", "secretary", "monkey", "keyword", "authority", "signal", "pinned", "option"),
        *("max_tokens_per_minute_limit", "", "1", "%", "pass_count"),
    ],
)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "beginning",
    [
        *(["app", "--password", word] for word in ("-v", "--verbose", "--a-b", "***")),
        *(["app", "-p", word] for word in ("5", "-v", "/run", "no:x")),
        *(["app", f"-p{value}"] for value in ("5", "assive", "/run")),
        *(["curl", "-u", f"joe:{value}"] for value in ("5", "/x")),
        *(["env", f"PGPASSWORD={value}"] for value in ("no", "on", "$1", "true")),
        ["sh", "-c", "app --password --verbose"],
        ["sh", "-c", "exec 'app --password --verbose"],
        ["app", "password: none"],
    ],
)
def test_what_a_secret_looks_like_that_was_cut_off_says_nothing(beginning: list[str]) -> None:
    """An option, a port, a word that stands for nothing: it may be how a secret begins."""
    command = ["x" * CUT_OFF, *beginning]
    shown = redact_command(command)
    assert shown[:-1] == command[:-1]
    assert shown[-1].endswith("***")
    assert redact_command(beginning) == beginning


@given(st.sampled_from(TEXTS), secrets, st.integers(1, 3))
def test_no_secret_gets_out_that_is_encoded_with_its_name(place: Place, secret: str, padding: int) -> None:
    [text] = place.holding(secret)
    # Of a name that stands at its end a text needs no more than a few letters more.
    data = f"{text}{' ' * padding}".encode()
    for written in (base64.b64encode(data), base64.urlsafe_b64encode(data), base64.b64encode(data).rstrip(b"=")):
        assert redact(f"run {written.decode()} now").startswith("run ***")
        assert redact_command(["run", f"--with={written.decode()}"]) == ["run", "--with=***"]
    assert redact(f"run {data.hex()} now").startswith("run ***")
    assert "***" in redact(base64.encodebytes(b"x" * 80 + b" " + data).decode())


@given(st.sampled_from([place for place in TEXTS if '"password"' in place.words[0]]), secrets, st.data())
def test_no_secret_gets_out_whose_name_is_escaped(place: Place, secret: str, data: st.DataObject) -> None:
    letters = [data.draw(st.sampled_from([letter, f"\\u{ord(letter):04x}"])) for letter in "password"]
    [text] = place.holding(secret)
    escaped = text.replace('"password"', f'"{"".join(letters)}"', 1)
    assert place.leaks(secret, redact(escaped)) == []


def test_a_port_may_be_half_of_a_password() -> None:
    assert redact("postgres://u:123", cut=True) == "postgres://u:***"
    assert redact("postgres://u:123") == "postgres://u:123"
    command = ["app", "x" * CUT_OFF, "postgres://u:123"]
    assert redact_command(command)[2] == "postgres://u:***"


@given(st.text(max_size=60), st.booleans())
def test_any_text_gives_some_text(text: str, cut: bool) -> None:
    shown = redact(text, cut=cut)
    assert redact_structure(shown) == shown
    redact_command(text.split(" "))


@given(st.text("pw= :'\"\\@/-,;{[(x\n$%&", max_size=40), st.sampled_from(["pw=", "pw: ", "a://b:", "--pw "]))
def test_what_has_been_hidden_stays_hidden(text: str, before: str) -> None:
    once = redact(f"{text}{before}{text}")
    again = redact(once)
    assert once.count("x") >= again.count("x")
    assert ("***" in once) <= ("***" in again)


_PIECES = [
    *("a:", "pw=", "pwd ", "pw", "a:a@", "x://u:", "password='", "\\", "--password ", "-' \"", "%70", "access key "),
    *("pw=(", "{pw:a,", '"pw",', "aA1", "basic ", "eyJ", "alter role password ", "a:1:", '\\"pw\\":\\"', " ", "$a$"),
    *("_", "-", "\\'", "https://a", "%3A%2F%2Fu%3A", "-----BEGIN PRIVATE KEY-----", "''", "x='", "/*", "pw /*"),
    *(
        ",",
        ";",
        ")",
        "'",
        '"',
        "}",
        "@",
        "+a",
        '"x://u:',
        '\\"x://u:',
        "\\u0070",
        "&#97;",
        "cHc9eHB3PXh4 ",
        "echo x | sudo -S y ",
        "echo ",
        "|",
        "sudo -S ",
        "htpasswd -b ",
        "a.",
        "=",
        "\n",
    ),
    *(
        "password to ",
        "set ",
        "pw='x'",
        "<pw>",
        "`",
        "%25",
        "cGFzc3dvcmQ5 ",
        "7077 ",
        "-----END",
        "password = password.a",
    ),
]
_TEXTS = [
    *(("", piece) for piece in _PIECES),
    # what took a second
    *(
        ("", piece)
        for piece in ('/pwd:5"" ', "/pwd:5432 ", "/pwd:5\t", "x://u:@", "x://a: ", "--pw ''", "password: null ")
    ),
    *(("-x ", piece) for piece in (",", ";", ")", "'", '"')),
    ("(pw=a", ")"),
    ("'pw=a", "'"),
    (";pwd=a;", " "),
    ("x://u:" * 100, "@"),
    ("??? ", "?"),
]


_NUMBERS = itertools.count()


def _seconds(beginning: str, piece: str, size: int) -> float:
    """The processor time that it takes; another thread's isn't counted."""
    text = f"{beginning}{piece * (size // len(piece))}x{next(_NUMBERS)}"  # none is remembered
    began = time.thread_time()
    redact(text)
    redact_command([text, *text.split(" ")])
    sql_text(text[: size // 4].encode(), SqlMode.FULL)
    discreet_setting(text)
    return time.thread_time() - began


@pytest.mark.parametrize("part", range(4))
def test_a_longer_text_takes_no_longer_for_each_character(part: int) -> None:
    """A client writes what it likes, and whoever waits for its record waits for everybody.

    What is looked through anew for each piece of a text takes 64 times as long for eight times as many.
    """
    slow = []
    for beginning, piece in _TEXTS[part::4]:
        taken = _seconds(beginning, piece, 16384)
        if taken > 0.05:  # of less, half is the machine's
            fewer = min(_seconds(beginning, piece, size) for size in (2048,) * 3)
            taken = min(taken, _seconds(beginning, piece, 16384))
            if taken > 24 * fewer:
                slow.append((beginning, piece, taken, fewer))
    assert slow == []


@pytest.mark.parametrize(
    "text",
    [
        "Server=db;Pwd={xHx}};<6Ln;Ud;m=0m89>};Database=app",
        "ALTER ROLE joe PASSWORD 'x_Q2C\\'';m=0m89>' VALID UNTIL 'infinity'",
        "database:\n  password: 'x_Q2C\\'';m=0m89>'\n  user: app",
    ],
)
def test_what_doubles_a_sign_to_mean_it_goes_on_behind_it(text: str) -> None:
    assert "m=0m89" not in redact(text)
    assert redact(text) != text
