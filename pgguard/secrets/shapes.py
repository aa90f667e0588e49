"""Secrets that are known by their own shape, whatever stands around them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

Span = tuple[int, int]
"""Where in a text a secret begins and ends."""

_SHAPES: Final = re.compile(
    r"""
    -----BEGIN[A-Z0-9 ]{0,40}PRIVATE[ ]KEY(?:[ ]BLOCK)?-----.*?(?:-----END[A-Z0-9 ]{0,60}-----|\Z)   # RFC 7468
    | (?<![A-Za-z0-9])(?:
        A(?:KIA|SIA|BIA|CCA|ROA|IDA|GPA|NPA|NVA|IPA)[A-Z0-9]{6,}            # AWS
      | gh[pousr]_[A-Za-z0-9]{6,} | github_pat_\w{6,}                       # GitHub
      | gl(?:pat|ptt|dt|rt|cbt|ft|soat|imt|agent)-[\w-]{6,}                 # GitLab
      | x(?:ox[a-z]|app)-[\w-]{6,}                                          # Slack
      | [srp]k_(?:live|test)_\w{6,} | whsec_\w{6,}                          # Stripe
      | sk-[\w-]{16,}                                                       # services of several makers
      | AIza[\w-]{16,} | ya29\.[\w.-]{6,} | GOCSPX-[\w-]{6,}                # Google
      | eyJ[\w-]{4,}(?:\.[\w-]*){0,4}                                       # JSON Web Tokens: the beginning is '{"'
      | SG\.[\w-]{6,}\.[\w-]{6,} | npm_\w{16,} | pypi-[\w-]{16,} | dop_v1_\w{6,} | hv[sbr]\.[\w-]{16,}
      | AGE-SECRET-KEY-1\w+
      | SCRAM-SHA-\d+\$[^\s'"]+ | md5[0-9a-f]{32}(?![0-9a-f])               # pg_authid
      )
    | \$2[abxy]\$\d\d\$[./A-Za-z0-9]{6,}                                    # crypt(3)
    | \$(?:[156y]|7|argon2[a-z]*|scrypt)\$[^\s'"$]{1,40}\$[^\s'"]{6,}
    | (?<!\w)(?:pbkdf2_sha\d+|argon2|scrypt|bcrypt[_a-z0-9]*)\$[^\s'"]{6,}  # Django
    | (?<=hooks\.slack\.com/services/)[\w/-]+ | (?<=/api/webhooks/)\d+/[\w-]+  # Slack, Discord
    | (?<=[Bb]earer[ ])[\w.~+/=-]{6,}                                       # RFC 6750
    | (?<=BEARER[ ])[\w.~+/=-]{6,}
    | (?<=[Bb]asic[ ])(?=[A-Za-z]*[0-9=+/]|[a-z]+[A-Z])[A-Za-z0-9+/]{6,}={0,2}  # RFC 7617
    """,
    re.VERBOSE | re.DOTALL,
)

_BLOB: Final = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/_-]{20,}={0,2}")
_SIGNS: Final = re.compile(r"[+/_-]+")
_CHANGE: Final = re.compile(r"(?<=[a-z])[A-Z0-9]|(?<=[A-Z])[a-z0-9]|(?<=[0-9])[A-Za-z]")
_RESTLESS: Final = 0.4
"""Of its characters so many differ in kind from the one before: in base64 nearly two thirds do, in words and numbers
that are strung together less than a third."""


def shaped_spans(text: str) -> Iterator[Span]:
    """Where secrets of a known shape stand: keys, tokens, hashes of passwords, and random letters in plenty."""
    for found in _SHAPES.finditer(text):
        yield found.span()
    for found in _BLOB.finditer(text):
        if _is_random(found.group()):
            yield found.span()


def _is_random(blob: str) -> bool:
    """Whether letters and digits follow each other as by chance. Digests and ids in hexadecimal are told apart so."""
    if blob.islower() or blob.isupper() or not any(map(str.isdigit, blob)):
        return False
    plain = _SIGNS.sub("", blob).rstrip("=")
    return len(plain) >= 18 and sum(1 for _ in _CHANGE.finditer(plain)) >= _RESTLESS * len(plain)
