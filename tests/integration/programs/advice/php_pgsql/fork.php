<?php // A child that works with what its parent has connected, and then goes its way.
$connection = pg_connect('');

function work($connection) {
    assert(pg_fetch_result(pg_query($connection, 'SELECT 42'), 0, 0) == 42);
}

work($connection);
usleep(200000); // so that it can be looked at
// here goes the advice, in the place of
$pid = pcntl_fork();
// up to here
$connection = $pid === null ? $connection : connected($connection);
work($connection);
if ($pid) {
    pcntl_waitpid($pid, $status);
    work($connection);
}

// Connects anew where the connection has been closed.
function connected($connection) {
    try {
        return pg_connection_status($connection) === PGSQL_CONNECTION_OK ? $connection : pg_connect('');
    } catch (Error) {
        return pg_connect('');
    }
}
