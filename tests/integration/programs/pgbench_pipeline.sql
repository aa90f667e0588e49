-- A pipeline as libpq makes them: three requests and a Sync, answered together.
\set id random(1, 100000)
\startpipeline
SELECT abalance FROM pgbench_accounts WHERE aid = :id;
SELECT :id + 1;
SELECT count(*) FROM generate_series(1, 50);
\endpipeline
