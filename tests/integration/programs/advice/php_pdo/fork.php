<?php // A child that works with what its parent has connected, and then goes its way.
$pdo = null;

function work() {
    global $pdo;
    $pdo ??= new PDO('pgsql:', options: [PDO::ATTR_ERRMODE => PDO::ERRMODE_EXCEPTION]);
    assert($pdo->query('SELECT 42')->fetchColumn() == 42);
}

work();
usleep(200000); // so that it can be looked at
// here goes the advice, in the place of
$pid = pcntl_fork();
// up to here
work();
if ($pid) {
    pcntl_waitpid($pid, $status);
    work();
}
