"""``pgguard``, with every fault recorded in full however often its cause comes, for tests that look at each of many.

Of one session's fault by the same processes repeats are recorded as ever. Everything else is what users run.
"""

from __future__ import annotations

import sys

from pgguard.cli.entry import main
from pgguard.faults import causes, docket

if __name__ == "__main__":
    for module in (causes, docket):
        vars(module).update(FULL_RECORDS=sys.maxsize)
    vars(causes).update(ENDS=sys.maxsize)
    main()
