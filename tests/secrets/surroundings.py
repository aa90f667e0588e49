"""More than a hundred places that a secret can stand in, with the way in which each of them writes it down."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote
from xml.sax.saxutils import escape as xml

PIECE: Final = 6
"""Characters of a secret, in a row, that mustn't get out."""


def pieces_of(text: str) -> set[str]:
    """What a text is made of."""
    return {text[n : n + PIECE] for n in range(max(1, len(text) - PIECE + 1))}


Escape = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Place:
    """A place for a secret: words, in which ``{}`` is the secret as it is written down there."""

    words: tuple[str, ...]
    written: Escape

    def __str__(self) -> str:
        return " ".join(self.words)

    def holding(self, secret: str) -> tuple[str, ...]:
        return tuple(word.replace("{}", self.written(secret)) for word in self.words)

    def leaks(self, secret: str, shown: Container[str]) -> list[str]:
        """The pieces of a secret, forwards, backwards and as they are written there, that are in what is shown.

        That is a text, or the pieces of one.
        """
        without = " ".join(self.holding(""))
        pieces = pieces_of(secret) | pieces_of(secret[::-1]) | pieces_of(self.written(secret))
        return sorted(
            piece
            for piece in pieces
            if piece in shown and piece not in without and len(re.sub(r"[\"'\\]|%2[Ff]", "", piece)) > PIECE - 3
        )


def raw(text: str) -> str:
    return text


def in_double_quotes(text: str) -> str:
    return '"' + re.sub(r'(["\\$`])', r"\\\1", text) + '"'


def in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def in_ascii_json(text: str) -> str:
    return json.dumps(text)


def in_sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def in_escaped_sql(text: str) -> str:
    return "E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def in_dollars(text: str) -> str:
    return f"$pw${text.replace('$', '')}$pw$"


def in_sql_between_dollars(text: str) -> str:
    """Two dollars would end what it stands in."""
    return in_sql(text.replace("$", ""))


def encoded(text: str) -> str:
    return quote(text, safe="")


def twice_encoded(text: str) -> str:
    return quote(quote(text, safe=""), safe="")


def in_conninfo(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def bare_in_conninfo(text: str) -> str:
    return "x" + re.sub(r"([\s'\\])", r"\\\1", text)


def in_braces(text: str) -> str:
    return "{" + text.replace("}", "}}") + "}"


def in_xml(text: str) -> str:
    return xml(text, {'"': "&quot;"})


def one_word(text: str) -> str:
    """As where blanks and quotes end it, so that nobody has a secret with any."""
    return re.sub(r"[\s\"'`\\;&|()<>{}\[\],]", "x", text)


def in_comment(text: str) -> str:
    return one_word(text).replace("*", "x")


def word_of_letters(text: str) -> str:
    """As in a bare word of SQL's."""
    return "w" + re.sub(r"\W", "x", text)


def within(escape: Escape, before: str, inner: Escape, after: str = "") -> Escape:
    """A secret in a text that is itself quoted."""
    return lambda text: escape(f"{before}{inner(text)}{after}")


def _texts() -> Iterator[Place]:
    for before, escape, after in _TEXTS:
        yield Place((f"{before}{{}}{after}",), escape)


_TEXTS: Final[tuple[tuple[str, Escape, str], ...]] = (
    ("host=db password=", in_conninfo, " user=app"),
    ("host=db password = ", in_conninfo, " user=app"),
    ("host=db password=", bare_in_conninfo, " user=app"),
    ("sslpassword=", bare_in_conninfo, ""),
    ("postgresql://app:", encoded, "@db:5432/app?sslmode=prefer"),
    ("dsn 'postgresql://app:", encoded, "@db/app' is used"),
    ("postgres://app:", one_word, "@db/app"),
    ("postgresql://db/app?user=app&password=", encoded, "&connect_timeout=3"),
    ("jdbc:postgresql://db/app?user=app&password=", encoded, ""),
    ("mysql+pymysql://app:", encoded, "@db:3306/app"),
    ("redis://:", encoded, "@cache:6379/0"),
    ("amqp://guest:", encoded, "@mq/%2F"),
    ("mongodb+srv://app:", encoded, "@cluster0.example/app?retryWrites=true"),
    ("https://app:", encoded, "@example.com/path"),
    ("git clone https://", encoded, "@github.com/o/r.git"),
    ("https://example.com/?next=postgres%3A%2F%2Fapp%3A", twice_encoded, "%40db%2Fapp&page=2"),
    ("https://example.com/hook?token=", encoded, "&page=2"),
    ("https://s.blob.example/c?sv=2020&sig=", encoded, ""),
    ("app:", one_word, "@db:5432/app"),
    ("db:5432:app:joe:", lambda text: one_word(text).replace(":", r"\:"), ""),
    ('{"host": "db", "password": ', in_json, ', "user": "app"}'),
    ('{"password":', in_ascii_json, ',"user":"app"}'),
    ('{"db": {"apiKey": ', in_json, "}}"),
    ("payload ", within(in_json, '{"password": ', in_json, ', "user": "app"}'), " taken"),
    ('{"name":"DB_PASSWORD","value":', in_json, "}"),
    ("[{'name': 'DB_PASSWORD', 'value': ", repr, "}]"),
    ("password: ", in_json, "\nuser: app"),
    ("database:\n  password: ", in_sql, "\n  user: app"),
    ("- name: API_TOKEN\n  value: ", in_json, "\n"),
    ("password: |\n  ", one_word, "\n"),
    ("{host: db, password: ", in_json, ", user: app}"),
    ("password = ", in_json, "\n"),
    ('password = """', one_word, '"""\n'),
    ("connect(host='db', password=", repr, ", user='app')"),
    ("config['password'] = ", repr, "; run()"),
    ("config.setPassword(", in_json, ");"),
    ("ENV.fetch('DB_PASSWORD', ", in_sql, ")"),
    ("os.environ.setdefault('SECRET_KEY', ", repr, ")"),
    (":password => ", in_json, ", :user => 'app'"),
    ("$db_pass = ", in_json, ";"),
    ("const token = `", one_word, "`;"),
    ("if password == ", in_json, ":"),
    ("<password>", in_xml, "</password>"),
    ('<add key="Password" value="', in_xml, '"/>'),
    ('<db password="', in_xml, '" user="app"/>'),
    ("Server=db;Pwd=", in_braces, ";Database=app"),
    ("Server=db;Password=", one_word, ";Database=app"),
    ("Host=db; Username=app; Password=", in_sql, "; Database=app"),
    ("AccountName=x;AccountKey=", one_word, ";EndpointSuffix=y"),
    ("Authorization: Bearer ", one_word, ""),
    ("Authorization: Basic ", one_word, "\r\nHost: db"),
    ("X-Api-Key: ", one_word, ""),
    ("Cookie: session=", one_word, "; path=/"),
    ("worker --db-password ", shlex.quote, " --verbose"),
    ("worker --db-password=", shlex.quote, " --verbose"),
    ("worker --token ", in_double_quotes, " --verbose"),
    ("sh -c ", within(shlex.quote, "PGPASSWORD=", shlex.quote, " psql -p 5432"), ""),
    ("sh -c ", within(shlex.quote, "app --password ", shlex.quote, " -v"), ""),
    ("sh -c ", within(in_double_quotes, "mysql -u root -p", shlex.quote, " db"), ""),
    ("bash -lc ", within(shlex.quote, "sh -c ", within(in_double_quotes, "app --api-key=", shlex.quote)), ""),
    ("ssh db ", within(shlex.quote, "psql -c ", within(in_double_quotes, "ALTER ROLE joe PASSWORD ", in_sql)), ""),
    ("export PGPASSWORD=", shlex.quote, "; psql"),
    ("ALTER ROLE joe PASSWORD ", in_sql, " VALID UNTIL 'infinity'"),
    ("ALTER ROLE joe PASSWORD ", in_escaped_sql, ""),
    ("ALTER ROLE joe PASSWORD ", in_dollars, ""),
    ("ALTER ROLE joe PASSWORD ", word_of_letters, " LOGIN"),
    ("CREATE USER joe IDENTIFIED BY ", in_sql, ""),
    ("SET app.password TO ", word_of_letters, ""),
    ("-----BEGIN RSA PRIVATE KEY-----\\n", one_word, "\\n-----END RSA PRIVATE KEY-----"),
    ("Access Key=", one_word, ""),
    ("PASSWORD=", shlex.quote, ""),
    ("пароль=", shlex.quote, ""),
    ("p%61ssword=", encoded, ""),
    ("url=postgres:\\/\\/app:", encoded, "@db\\/app"),
    ("scram_client_key=", one_word, ""),
    ("eyJhbGciOi.eyJ", lambda text: re.sub(r"[^\w]", "x", text, flags=re.ASCII), ".c2ln"),
    ("ghp_", lambda text: re.sub(r"[^A-Za-z0-9]", "x", text), ""),
    ("AKIA", lambda text: re.sub(r"[^A-Z0-9]", "X", text.upper()), ""),
)

TEXTS: Final = tuple(_texts())
"""Titles, arguments, names, messages."""

_OPTIONS: Final[tuple[str, ...]] = (
    *("--password", "--db-password", "--token", "--api-key", "--pwd", "--client-secret", "-password", "-storepass"),
    *("--access-token", "--PASSWORD", "--auth-token", "--passphrase", "-pass"),
)

COMMANDS: Final = (
    *(Place(("/usr/bin/app", option, "{}", "--verbose"), raw) for option in _OPTIONS),
    *(Place(("/usr/bin/app", f"{option}={{}}", "--verbose"), raw) for option in _OPTIONS),
    Place(("env", "PGPASSWORD={}", "psql", "-p", "5432"), raw),
    Place(("docker", "run", "-e", "DB_PASSWORD={}", "-p", "80:80", "app"), raw),
    Place(("java", "-Dspring.datasource.password={}", "-jar", "app.jar"), raw),
    Place(("mysql", "-u", "root", "-p{}", "db"), raw),
    Place(("sudo", "mysqldump", "-p{}", "db"), raw),
    Place(("sshpass", "-p", "{}", "ssh", "db"), raw),
    Place(("redis-cli", "-a", "{}", "ping"), raw),
    Place(("ldapsearch", "-D", "cn=admin", "-w", "{}"), raw),
    Place(("sqlcmd", "-S", "db", "-P", "{}"), raw),
    Place(("app", "-p", "{}"), lambda text: "x" + text),
    Place(("app", "-p{}"), lambda text: "x9" + text),
    Place(("curl", "-u", "joe:{}", "https://db/"), lambda text: "x" + text),
    Place(("http", "--auth", "joe:{}", "db"), lambda text: "x" + text),
    Place(("curl", "-H", "Authorization: Bearer {}", "https://db/"), one_word),
    Place(("curl", "--header", "X-Api-Key: {}"), one_word),
    Place(("app", "--dsn", "postgresql://app:{}@db/app"), lambda text: "x" + text),
    Place(("app", "--dsn=postgresql://app:{}@db/app"), lambda text: "x" + text),
    Place(("psql", "host=db password={} user=app"), in_conninfo),
    Place(("psql", "password={} user=app"), in_conninfo),
    Place(("psql", "password={} user=app"), bare_in_conninfo),
    Place(("psql", "-v", "password={}", "-f", "x.sql"), raw),
    Place(("psql", "-c", "ALTER ROLE joe PASSWORD {}"), in_sql),
    Place(("git", "config", "github.token", "{}"), raw),
    Place(("mysqladmin", "-u", "root", "password", "{}"), raw),
    Place(("app", '--json={"password":{}}'), in_json),
    Place(("app", "--set", "auth.password={}"), raw),
    Place(("python3", "-c", "import psycopg\npsycopg.connect(host='db', password={})"), repr),
    Place(("ruby", "-e", "PG.connect(host: 'db', password: {})"), in_json),
    Place(("node", "-e", "new Pool({ password: {}, max: 3 })"), in_json),
    Place(("php", "-r", "new PDO('pgsql:host=db', 'app', $password = {});"), in_sql),
    Place(("sh", "-c", "PGPASSWORD={} psql -p 5432"), shlex.quote),
    Place(("sh", "-c", "exec app --password {} -v"), shlex.quote),
    Place(("sh", "-c", "{}"), within(shlex.quote, "exec mysql -uroot -p", shlex.quote)),
    Place(("docker", "--debug", "login", "-u", "joe", "-p", "{}"), raw),
    Place(("podman", "login", "-p{}", "registry.example"), raw),
    Place(("java", "-Dpw={}", "-jar", "app.jar"), raw),
    Place(("xfreerdp", "/u:joe", "/p:{}", "/v:host"), raw),
    Place(("openssl", "rsa", "-passin", "pass:{}"), raw),
    Place(("openssl", "passwd", "-6", "-salt", "xy", "{}"), raw),
    Place(("htpasswd", "-b", "users", "joe", "{}"), raw),
    Place(("htpasswd", "-bcB", "-C", "12", "users", "joe", "{}"), raw),
    Place(("sudo", "htpasswd", "-nb", "joe", "{}"), raw),
    Place(("mosquitto_passwd", "-b", "users", "joe", "{}"), raw),
    Place(("isql", "-v", "dsn", "joe", "{}"), raw),
    Place(("mkpasswd", "-m", "sha-512", "{}"), raw),
    Place(("wpa_passphrase", "network", "{}"), raw),
    Place(("redis-cli", "-h", "cache", "AUTH", "{}"), raw),
    Place(("redis-cli", "AUTH", "joe", "{}"), raw),
    Place(("redis-cli", "ACL", "SETUSER", "joe", "on", ">{}", "~*"), raw),
    Place(("vault", "login", "-no-print", "{}"), raw),
    Place(("vault", "kv", "put", "kv/app", "value={}"), raw),
    Place(("kubectl", "create", "secret", "generic", "x", "--from-literal=dsn={}"), raw),
    Place(("kubectl", "create", "secret", "generic", "x", "--from-literal", "dsn={}"), raw),
    Place(("gh", "secret", "set", "DEPLOY", "--body", "{}"), raw),
    Place(("fly", "secrets", "set", "DSN={}"), raw),
    Place(("rabbitmqctl", "change_password", "joe", "{}"), raw),
    Place(("rabbitmqctl", "add_user", "joe", "{}"), raw),
    Place(("ejabberdctl", "register", "joe", "example.org", "{}"), raw),
    Place(("ipmitool", "user", "set", "password", "2", "{}"), raw),
    Place(("manage.py", "set_password", "joe", "{}"), raw),
    Place(("smbclient", "//files/share", "{}"), raw),
    Place(("sqlplus", "-s", "scott/{}@orcl"), raw),
    Place(("sqlldr", "userid=scott/{}"), raw),
    Place(("lftp", "-u", "joe,{}", "host"), lambda text: "x" + text),
    Place(("curl", "-sSu", "joe:{}", "https://db/"), lambda text: "x" + text),
    Place(("curl", "-sb", "sid={}", "https://db/"), raw),
    Place(("plink", "-pw", "{}", "host"), raw),
    Place(("rar", "a", "-hp{}", "x.rar"), raw),
    Place(("zip", "-rP", "{}", "x.zip", "x"), raw),
    Place(("ldapsearch", "-xw", "{}"), raw),
    Place(("ldappasswd", "-s", "{}", "-a", "{}"), raw),
    Place(("snmpget", "-v3", "-u", "joe", "-A", "{}", "-X", "{}"), raw),
    Place(("pdftotext", "-upw", "{}", "x.pdf"), raw),
    Place(("az", "login", "-u", "joe", "-p", "{}"), raw),
    Place(("app", "--hasło", "{}"), raw),
    Place(("app", "--mot-de-passe", "{}"), raw),
    Place(("sh", "-c", "echo {} | sudo -S ls"), word_of_letters),
    Place(("sh", "-c", "printf '%s' {} | docker login -u joe --password-stdin"), word_of_letters),
    Place(("bash", "-c", "chpasswd <<< joe:{}"), word_of_letters),
    Place(("su", "-", "joe", "-c", "redis-cli AUTH {}"), word_of_letters),
)

TITLES: Final = (
    Place(("app password {}",), word_of_letters),
    Place(("worker: redis-cli AUTH {} ping",), word_of_letters),
    Place(("app --set db.password {}",), word_of_letters),
)
"""What processes write over all of their arguments."""

SQL: Final = (
    *(
        Place((f"ALTER ROLE joe {word} {{}} VALID UNTIL 'infinity'",), escape)
        for word in ("PASSWORD", "ENCRYPTED PASSWORD", "PaSSwoRD", 'SET "app.password" TO')
        for escape in (in_sql, in_escaped_sql, in_dollars, word_of_letters)
    ),
    Place(("CREATE ROLE joe LOGIN PASSWORD /* now */ {}",), in_sql),
    Place(("CREATE USER joe PASSWORD {}; SELECT 1",), in_sql),
    Place(("CREATE USER MAPPING FOR u SERVER s OPTIONS (user 'u', password {})",), in_sql),
    Place(('ALTER USER MAPPING FOR u SERVER s OPTIONS (SET "password" {})',), in_sql),
    Place(("CREATE SUBSCRIPTION s CONNECTION {} PUBLICATION p",), within(in_sql, "host=db password=", in_conninfo)),
    Place(("SELECT * FROM dblink({}, 'SELECT 1')",), within(in_sql, "host=db password=", in_conninfo)),
    Place(("SELECT dblink_connect('postgresql://app:{}@db/app')",), encoded),
    Place(("DO $$ BEGIN ALTER ROLE joe PASSWORD {}; END $$",), in_sql_between_dollars),
    Place(("DO {}",), within(in_sql, "BEGIN ALTER ROLE joe PASSWORD ", in_sql, "; END")),
    Place(("COPY t FROM PROGRAM {}",), within(in_sql, "curl --token ", shlex.quote, " https://db/")),
    Place(("COPY t FROM PROGRAM {}",), within(in_sql, "PGPASSWORD=", shlex.quote, " psql")),
    Place(("SET app.password = {}",), word_of_letters),
    Place(("SET app.jwt TO {}",), in_sql),
    Place(("SET LOCAL app.api_key = {}, b",), word_of_letters),
    Place(("ALTER SYSTEM SET app.secret = {}",), in_sql),
    Place(("ALTER DATABASE d SET app.secret = {}",), word_of_letters),
    Place(("SELECT set_config('app.token', {}, false)",), in_sql),
    Place(("EXPLAIN ANALYZE ALTER ROLE joe PASSWORD {}",), word_of_letters),
    Place(("INSERT INTO users (name, password) VALUES ('joe', {})",), in_sql),
    Place(("UPDATE users SET password = {} WHERE id = 3",), in_sql),
    Place(("UPDATE users SET password = {} WHERE id = 3",), word_of_letters),
    Place(("SELECT id FROM users WHERE token IN ('a', {})",), in_sql),
    Place(("SELECT id FROM users WHERE password = crypt({}, password)",), in_sql),
    Place(("SELECT 1 /* password='{}' */",), in_comment),
    Place(("SELECT 1 /*db_url='postgresql://app:{}@db'*/",), in_comment),
    Place(("SELECT 1 -- token: {}\n, 2",), one_word),
    Place(("SELECT E'pass\\x77ord={}'",), one_word),
    Place(("SELECT U&'p\\0061ssword={}'",), one_word),
    Place(("postgres://app:{}@db/app",), one_word),
    Place(("host=db password={} user=app",), in_conninfo),
    Place(("password={}",), word_of_letters),
    Place(("CREATE USER joe IDENTIFIED BY {}",), word_of_letters),
    *(
        Place((f"SELECT id FROM users WHERE h = {call}",), in_sql)
        for call in (
            "crypt({}, h)",
            "pg_catalog.md5({} || salt)",
            "hmac('data', {}, 'sha256')",
            "digest({}::text, 'sha256')",
            "encode(encrypt ('d', {}, 'aes'), 'hex')",
            "pgp_sym_decrypt/**/(c, {})",
            '"crypt"({}, h)',
        )
    ),
    Place(('SELECT 1 AS "password={}"',), word_of_letters),
    Place(("SELECT {}",), within(in_sql, '{"password": ', in_json, "}")),
)
"""What clients send as SQL, whether it is or not."""
