<?php
// Connects with PDO once for each state that is named, and is rejected there; see python.py.
$rows = "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)";

function arrived($state) { echo json_encode(['state' => $state]), "\n"; }

function outcome($use) {
    try { $use(); return null; } catch (PDOException $error) { return $error->getMessage(); }
}

foreach (array_slice($argv, 1) as $state) {
    $where = sprintf("host=%s port=%s user=%s", getenv('PGHOST'), getenv('PGPORT'), getenv('PGUSER'));
    $connection = new PDO("pgsql:$where dbname=" . getenv('PGDATABASE'));
    try {
        if ($state == 'transaction') $connection->beginTransaction();
        arrived($state);
        if (in_array($state, ['idle', 'transaction', 'torn'])) fgets(STDIN);
        if ($state == 'extended') {
            $connection->prepare("SELECT pg_sleep(60), ?::int")->execute([1]);
        } else {
            $connection->query(['query' => "SELECT pg_sleep(60)", 'rows' => $rows][$state] ?? "SELECT 2");
        }
        exit("$state: it has not been rejected");
    } catch (PDOException $error) {
        $again = array_map(fn() => outcome(fn() => $connection->query("SELECT 3")), [1, 2, 3]);
        [$sqlstate] = $error->errorInfo;
        $said = ['class' => get_class($error), 'text' => $error->getMessage(), 'sqlstate' => $sqlstate];
        echo json_encode($said + ['again' => $again]), "\n";
    }
    $connection = null;
}
