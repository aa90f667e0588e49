"""What secrets are called: passwords, tokens, keys, as settings, options, columns, headers and variables name them."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Final
from urllib.parse import unquote

NAME_LENGTH: Final = 64
"""Characters of a name that are looked at, the last ones: what it is a name of stands at its end."""

STEM: Final = re.compile(
    r"pass|p[ws]|secret|token|key|cred|auth|cookie|jwt|bearer|mdp|otp|sig|pin|scram|kennwort|contrase|wachtwoord|senha"
    r"|geheim|has[lł]o|heslo|lozink|лозинк|salasana|şifre"
    r"|парол|κωδικ|סיסמ|密[码碼]|パスワード|비밀번호|identified|%[2-7][0-9a-f]",
    re.IGNORECASE,
)
"""Each name of a secret has one of these in it, or a percent-encoded letter."""

_IDENTIFIER: Final = re.compile(r"[^\W\d][\w.-]*")
_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD: Final = re.compile(r"[^\W\d_]+")

_STRONG: Final = re.compile(
    r"(?:passw(?:or)?d?s?|passw[oö]rt|kennwort|pass?phrase|passcode|secrets?(?!ar[iy]|e|ion)|credentials?"
    r"|contrase[nñ]a|motdepasse|wachtwoord|senha|geheim|has[lł]o|heslo|lozink|лозинк|salasana|şifre"
    r"|парол|κωδικ|סיסמ|密[码碼]|パスワード|비밀번호)(?P<rest>.*)"
)
"""Means a secret in whichever word it is a part of."""


def word_list(text: str) -> frozenset[str]:
    """The words of a text that lists some."""
    return frozenset(text.split())


_KEYS: Final = word_list("""
    access account admin aes api app auth aws azure bot cipher client consumer crypto datadog deploy encrypt
    encryption github gitlab google hmac jwt license master oauth priv private root rsa scram secret sendgrid
    service session shared sign signing slack ssh storage stripe subscription token twilio webhook
""")
_KEY: Final = re.compile(rf"(?:{'|'.join(sorted(_KEYS))})keys?")
"""Of the many keys that there are, those that open something: no primary key, sort key or cache key."""

_ANYWHERE: Final = word_list(
    "authorization bearer cookie cookies cred creds jwt mdp opw otp pswd psw pw pwd token tokens totp upw"
)
_AT_THE_END: Final = word_list("auth pass passe passin passout pin sig signature")
_ENDINGS: Final = ("pass", "apikey", "pwd", "token", "tokens", "cookie", "creds", "masterauth", "basicauth")
_NO_SECRETS: Final = word_list("""
    bandpass bypass compass encompass highpass lowpass multipass overpass singlepass surpass trespass twopass underpass
""")
_BEHIND_PASS: Final = word_list("code key phrase word wort wd")

_ABOUT: Final = word_list("""
    file files filename path paths dir directory folder url uri endpoint host hostname port domain fd stdin env
    program command cmd manager helper store provider backend class server service handler middleware module
    table column columns field fields header headers bucket issuer audience scope scopes
    type types kind method methods mode length len size count limit min max minimum maximum ttl timeout timeouts
    expiry expires expiration expire expired lifetime duration age ages name names policy policies encoding
    encryption algorithm alg algo rounds iterations interval rate format version address
    prompt message enabled required require optional validation validator validators authentication strength reset
    changed change updated created deleted at by used attempts retries less samesite httponly secure
    py rb js ts pl php sh exe jar go java conf cfg ini yml yaml json toml txt pem crt cer log sock pid html css sql
""")
"""A name that ends in one of these tells something about a secret, not the secret: where it is and who handles it, what
it is like, what is done with it, or what kind of file has it in its name."""


@lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether what is called so is a secret, in any spelling: ``PGPASSWORD``, ``db-pass``, ``SecretAccessKey``."""
    name = name.removeprefix("-D")  # java -Dpw=…
    if "%" in name:
        name = unquote(name)
    name = name[-NAME_LENGTH:]
    if STEM.search(name) is None:
        return False
    split = _WORD.findall(_HUMP.sub("_", name).lower())
    return _is_secret(split) or _is_secret(_WORD.findall(name.lower()))


def mentions_secret(text: str) -> bool:
    """Whether any of a text's words is the name of a secret."""
    return STEM.search(text) is not None and any(is_secret_name(name) for name in _IDENTIFIER.findall(text))


def _is_secret(words: list[str]) -> bool:
    if not words or words[-1] in _ABOUT:
        return False
    return (
        words[-1] in _AT_THE_END
        or any(map(_is_secret_word, words))
        or any(before in _KEYS and word in {"key", "keys"} for before, word in pairwise(words))
        or ("scram" in words and "key" in words)
        or any(word == "pass" and then in _BEHIND_PASS for word, then in pairwise(words))
    )


def _is_secret_word(word: str) -> bool:
    strong = _STRONG.search(word)
    if strong is not None:
        return strong["rest"] not in _ABOUT
    if word in _NO_SECRETS or word == "pass":  # that depends on where it stands
        return False
    return word in _ANYWHERE or word.endswith(_ENDINGS) or _KEY.fullmatch(word) is not None
