<?php
// Does steps with the pgsql extension, or with PDO if its argument says so: see playing.py.
function digest($rows) { return ['rows' => count($rows), 'md5' => md5(json_encode($rows))]; }

$pdo = ($argv[1] ?? '') == 'pdo';
if ($pdo) {
    $where = sprintf("host=%s port=%s user=%s dbname=%s", getenv('PGHOST'), getenv('PGPORT'), getenv('PGUSER'), getenv('PGDATABASE'));
    $connection = new PDO("pgsql:$where");
} else {
    $connection = pg_connect('');
}

function execute($connection, $pdo, $sql, $values = []) {
    if ($pdo) {
        try {
            $statement = $connection->prepare(preg_replace('/\$\d+/', '?', $sql));
            $statement->execute($values);
            return digest($statement->fetchAll(PDO::FETCH_NUM));
        } catch (PDOException $error) {
            return $error->errorInfo[0];
        }
    }
    // What is asked without values goes by the simple protocol.
    $values ? pg_send_query_params($connection, $sql, $values) : pg_send_query($connection, $sql);
    $result = pg_get_result($connection);
    while ($more = pg_get_result($connection)) $result = $more;
    return pg_result_error_field($result, PGSQL_DIAG_SQLSTATE) ?: digest(pg_fetch_all($result, PGSQL_NUM));
}

while (($line = fgets(STDIN)) !== false) {
    $step = json_decode($line, true);
    switch ($step['do']) {
        case 'prepared':
            $got = array_map(fn($values) => execute($connection, $pdo, $step['sql'], $values), $step['lists']);
            break;
        case 'transaction':
            $got = array_map(fn($sql) => execute($connection, $pdo, $sql), $step['statements']);
            break;
        case 'big':
            $value = str_repeat($step['letter'], $step['size']);
            $got = execute($connection, $pdo, $step['sql'], [$value, $value]);
            break;
        default:
            $got = execute($connection, $pdo, $step['sql'], $step['values'] ?? []);
    }
    echo json_encode(['n' => $step['n'], 'do' => $step['do'], 'got' => $got]), "\n";
}
if (!$pdo) pg_close($connection);
$connection = null;
