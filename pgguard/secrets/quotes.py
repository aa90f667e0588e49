"""Where quotations end."""

from __future__ import annotations

import re
from functools import lru_cache


@lru_cache(64)
def rest_of_quotation(quote: str) -> re.Pattern[str]:
    """What is left of a quotation behind its opening quote. Doubled, or behind a backslash, a quote doesn't end it.

    Where the quotes themselves stand behind backslashes, within another quotation, those with as many end it.
    """
    escapes, mark = quote[:-1], quote[-1]
    if escapes:
        return re.compile(rf".*?(?<!\\){re.escape(escapes)}{mark}", re.DOTALL)
    return re.compile(rf"[^{mark}\\]*+(?:(?:{mark}{mark}|\\.)[^{mark}\\]*+)*+{mark}", re.DOTALL)
