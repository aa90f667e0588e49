"""A parent connects with the driver that is named, and later forks a child that leaves the same ``with`` block.

So the child closes the connection as well, with Terminate, after as many seconds as the second argument says. Says both
processes, and whether the parent could go on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import closing
from importlib import import_module


def main(driver_name: str, life: float) -> None:
    driver = import_module(driver_name)
    with closing(driver.connect("")) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute("SELECT 1")
        child = os.fork()
        if child == 0:
            time.sleep(life)
            sys.exit()
        os.waitpid(child, 0)
        time.sleep(0.2)
        try:
            cursor.execute("SELECT 1")
            alive = len(cursor.fetchall())
        except driver.Error:
            alive = 0
        print(json.dumps({"parent": os.getpid(), "child": child, "alive": alive}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
