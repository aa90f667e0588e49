"""Which SQL texts certainly make no prepared statement, and drop none.

PREPARE and DEALLOCATE, DISCARD and EXECUTE act on the same names as the extended query protocol does, and functions can
do all of that out of sight. A text is *quiet* if it consists of statements that don't, and calls no function that isn't
known to be one of PostgreSQL's own. Whatever is in doubt is not: another's function, a backslash in a literal, what is
cut off. What can't be seen in a text is the function behind a trigger, a view or an operator that another session has
made; those that this session makes are told by their CREATE.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

from pgguard.wire.messages import NAME_LENGTH

SIMPLY_QUIET: Final = frozenset(b"SsIiUuBbRrVv")
"""First bytes of texts that are quiet if there is no parenthesis in them, and no semicolon but the last: SELECT, SET,
SHOW, START, SAVEPOINT, INSERT, UPDATE, BEGIN, ROLLBACK, RELEASE, RESET, VALUES and others, of which none is not."""

_STATEMENTS: Final = frozenset(
    b"""
    abort alter analyze begin checkpoint close cluster comment commit copy create declare delete drop end explain fetch
    grant insert listen lock merge move notify refresh reindex release reset revoke rollback savepoint select set show
    start table truncate unlisten update vacuum values with
    """.split()
)
_LASTING: Final = re.compile(rb"\b(?:create|alter|declare)\b")
"""What makes something that may run a function later, without a text that says so."""
_NAMED_AHEAD: Final = frozenset(b"as copy exists into recursive references table with".split())
"""Words between which and a parenthesis a table or an alias stands, with its columns behind."""
KNOWN: Final = frozenset(
    b"""
    all and any array as between by case cast check coalesce conflict constraint cross cube current_time
    current_timestamp distinct else except exclude exists extract filter from full greatest group grouping having ilike
    in include inner intersect into is isnull join key lateral least left like limit localtime localtimestamp
    materialized natural not notnull null nullif offset on only or order outer over overlaps partition primary
    references returning right rollup row select set sets similar some symmetric tablesample then trim union unique
    using values when where window with within

    bit bpchar char character decimal float interval numeric time timestamp timestamptz timetz varbit varchar varying

    abs acos age array_agg array_append array_cat array_dims array_length array_lower array_ndims array_position
    array_positions array_prepend array_remove array_replace array_to_json array_to_string array_upper ascii asin atan
    atan2 avg bit_and bit_length bit_or bool_and bool_or btrim cardinality cbrt ceil ceiling char_length
    character_length chr clock_timestamp col_description concat concat_ws convert convert_from convert_to corr cos cot
    count covar_pop covar_samp cume_dist current_catalog current_database current_query current_schema current_schemas
    current_setting currval date_bin date_part date_trunc daterange decode degrees dense_rank div encode enum_first
    enum_last enum_range every exp family first_value floor format format_type gcd gen_random_uuid generate_series
    generate_subscripts get_bit get_byte has_database_privilege has_schema_privilege has_table_privilege host
    inet_client_addr inet_server_addr inet_server_port initcap int4range int8range isfinite json_agg json_array_elements
    json_array_elements_text json_array_length json_build_array json_build_object json_each json_each_text
    json_extract_path json_extract_path_text json_object json_object_agg json_object_keys json_populate_record
    json_populate_recordset json_strip_nulls json_to_record json_to_recordset json_typeof jsonb_agg jsonb_array_elements
    jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_insert jsonb_object jsonb_object_agg jsonb_object_keys
    jsonb_path_exists jsonb_path_match jsonb_path_query jsonb_path_query_array jsonb_path_query_first
    jsonb_populate_record jsonb_populate_recordset jsonb_pretty jsonb_set jsonb_strip_nulls jsonb_to_record
    jsonb_to_recordset jsonb_typeof justify_days justify_hours justify_interval lag last_value lastval lcm lead length
    ln log log10 lower lower_inc lower_inf lpad ltrim make_date make_interval make_time make_timestamp make_timestamptz
    masklen max md5 min mod mode mxid_age netmask network nextval now nth_value ntile nullif num_nonnulls num_nulls
    numrange obj_description octet_length overlay percent_rank percentile_cont percentile_disc pg_advisory_lock
    pg_advisory_lock_shared pg_advisory_unlock pg_advisory_unlock_all pg_advisory_unlock_shared pg_advisory_xact_lock
    pg_advisory_xact_lock_shared pg_backend_pid pg_blocking_pids pg_cancel_backend pg_column_size pg_current_wal_lsn
    pg_current_xact_id pg_database_size pg_encoding_to_char pg_get_constraintdef pg_get_expr pg_get_indexdef
    pg_get_serial_sequence pg_get_userbyid pg_get_viewdef pg_indexes_size pg_is_in_recovery pg_last_wal_receive_lsn
    pg_last_wal_replay_lsn pg_my_temp_schema pg_notify pg_postmaster_start_time pg_relation_size pg_size_pretty pg_sleep
    pg_sleep_for pg_sleep_until pg_table_is_visible pg_table_size pg_terminate_backend pg_total_relation_size
    pg_try_advisory_lock pg_try_advisory_lock_shared pg_try_advisory_xact_lock pg_type_is_visible pg_typeof
    pg_wal_lsn_diff phraseto_tsquery pi plainto_tsquery position pow power quote_ident quote_literal quote_nullable
    radians random range_agg rank regexp_count regexp_instr regexp_like regexp_match regexp_matches regexp_replace
    regexp_split_to_array regexp_split_to_table regexp_substr regr_slope repeat replace reverse round row_number
    row_to_json rpad rtrim scale set_bit set_byte set_config set_masklen setseed setval setweight sha224 sha256 sha384
    sha512 shobj_description sign sin split_part sqrt starts_with statement_timestamp stddev stddev_pop stddev_samp
    string_agg string_to_array string_to_table strip strpos substr substring sum tan timeofday timezone to_ascii to_char
    to_date to_hex to_json to_jsonb to_number to_regclass to_regtype to_timestamp to_tsquery to_tsvector
    transaction_timestamp translate trim_array trunc ts_headline ts_rank ts_rank_cd tsrange tstzrange tsvector_to_array
    txid_current unistr unnest upper upper_inc upper_inf uuidv4 uuidv7 var_pop var_samp variance
    version websearch_to_tsquery width_bucket xmlagg xmlelement
    """.split()
)
"""Keywords that a parenthesis can stand behind, types with a length, and functions of PostgreSQL's that run no text."""

_UNCLEAR: Final = re.compile(rb"\\|\$(?:[a-z_\x80-\xff][\w\x80-\xff]*)?\$")
"""A literal that may end elsewhere than it seems to, or one that is most often a function's body."""
_HIDDEN: Final = re.compile(rb"""'[^']*'|--[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/""")
"""Literals and comments."""
_QUOTED: Final = re.compile(rb'"(?:[^"]|"")*"')
_WORD: Final = rb"(?:(?<![\w$\x80-\xff])[\w$\x80-\xff]++|\x00)"
"""From its first byte to its last: a word is not looked at again from its second on, however long it is."""
_CALL: Final = re.compile(rb"(?:\b(\w++)\s++)?(" + _WORD + rb"(?:\s*+\.\s*+" + _WORD + rb")*+)\s*+\(")
_NAME: Final = rb'([a-z_\x80-\xff][\w$\x80-\xff]*|"(?:[^"]|"")+")'
_ONE_NAME: Final = re.compile(
    rb"\s*(?:deallocate\s+(?:prepare\s+)?(?!all\b|prepare\b)"
    + _NAME
    + rb"\s*;?\s*\Z|prepare\s+"
    + _NAME
    + rb"\s*(?:\(|as\b))",
    re.IGNORECASE,
)


class Effect(Enum):
    """What a text may do to prepared statements."""

    NONE = "none"
    ONE_NAME = "makes or drops one, whose name it says"
    ANY = "may make or drop any"
    LASTING = "may do so later too, by what it makes"


class Judgement(NamedTuple):
    """What a text may do, and to which name if it is one."""

    effect: Effect
    name: bytes = b""


QUIET: Final = Judgement(Effect.NONE)
"""What is judged of every text that leaves them alone."""
_ANY: Final = Judgement(Effect.ANY)
_WHAT_LASTS: Final = Judgement(Effect.LASTING)


@lru_cache(maxsize=2048)
def judge(text: bytes) -> Judgement:
    """Tell what a whole text may do."""
    lowered = text.lower()
    if (match := _ONE_NAME.match(text)) is not None and text.rstrip(b"; \t\r\n").find(b";") < 0:
        return Judgement(Effect.ONE_NAME, folded(match[1] or match[2]))
    if _is_quiet(lowered):
        return QUIET
    return _WHAT_LASTS if _LASTING.search(lowered) else _ANY


def folded(name: bytes) -> bytes:
    """An identifier as it stands in SQL, as the name that it is: downcase_truncate_identifier() in scansup.c."""
    if name.startswith(b'"'):
        return name[1:-1].replace(b'""', b'"')[:NAME_LENGTH]
    return name.lower()[:NAME_LENGTH]


def _is_quiet(text: bytes) -> bool:
    if _UNCLEAR.search(text):
        return False
    text = _QUOTED.sub(b"\x00", _HIDDEN.sub(b" ", text))
    if any(mark in text for mark in (b"'", b'"', b"/*", b"*/")):
        return False
    for statement in text.split(b";"):
        words = statement.split(None, 1)
        if words and (words[0].strip(b"(") or b"select") not in _STATEMENTS:
            return False
    if b"execute" in text:
        return False
    return all(_is_known(ahead, name) for ahead, name in _CALL.findall(text))


def _is_known(ahead: bytes, name: bytes) -> bool:
    """Whether what stands before a parenthesis is no function, or one of PostgreSQL's own."""
    return ahead in _NAMED_AHEAD or name.removeprefix(b"pg_catalog.") in KNOWN
