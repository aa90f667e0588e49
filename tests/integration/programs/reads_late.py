"""Asks for a row of 40 MB, reads it only when it is told to, and says how that ended.

Over standard output, an object in JSON a line: its backend's pid, then the error's text.
"""

import json
import sys

import psycopg

connection = psycopg.connect("")
print(json.dumps({"backend": connection.info.backend_pid}), flush=True)
connection.pgconn.send_query(b"SELECT repeat('x', 40000000)")
sys.stdin.readline()
result = connection.pgconn.get_result()
assert result is not None
print(json.dumps({"status": result.status, "error": result.error_message.decode()}), flush=True)
