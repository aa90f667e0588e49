"""Where quotations end."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(64)
def rest_of_quotation(quote: str) -> re.Pattern[str]:
    """What is left of a quotation behind its opening quote. Doubled, or behind a backslash, a quote doesn't end it.

    A backslash in front of two quotes is one that means itself, as in SQL, if that leaves a quote that ends it all.

    Where the quotes themselves stand behind backslashes, within another quotation, those with as many end it.
    """
    escapes, mark = quote[:-1], quote[-1]
    if escapes:
        return re.compile(rf".*?(?<!\\){re.escape(escapes)}{mark}", re.DOTALL)
    in_sql, escaped = (rf"[^{mark}\\]*+(?:(?:{one}{mark}{mark}|\\.)[^{mark}\\]*+)*+{mark}" for one in (r"\\?", ""))
    return re.compile(rf"(?:{in_sql}|{escaped})", re.DOTALL)
