<?php
// The scenario that the first argument names, with the extension that the second one does, pdo or pgsql.
// last_user: A parent connects and forks a child, which asks something and exits: PHP closes every connection at the end of
// the script, with Terminate, and so the parent's. daemon: The parent exits instead, and the child asks when it has.
// Says both processes, and whether the one that was left could go on.
[, $scenario, $extension] = $argv;

if ($extension === "pdo") {
    $connection = new PDO("pgsql:");
    $ask = fn() => $connection->query("SELECT 1")->fetchColumn() === 1;
} else {
    $connection = pg_connect("");
    $ask = fn() => ($answer = @pg_query($connection, "SELECT 1")) && pg_fetch_result($answer, 0, 0) === "1";
}

function try_it(callable $ask): int
{
    try {
        return (int) $ask();
    } catch (PDOException) {
        return 0;
    }
}

$ask();
$parent = getmypid();
$child = pcntl_fork();
if ($scenario === "last_user") {
    if ($child === 0) {
        $ask();
        exit(0);
    }
    pcntl_waitpid($child, $status);
} else {
    if ($child !== 0) {
        exit(0);
    }
    while (posix_getppid() === $parent) {
        usleep(10000);
    }
    $child = getmypid();
}
usleep(200000);
echo json_encode(["parent" => $parent, "child" => $child, "alive" => try_it($ask)]), "\n";
