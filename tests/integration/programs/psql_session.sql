-- What people do in psql: several statements in one message, errors, COPY both ways, transactions, cursors.
\pset pager off
SELECT 1 AS one \; SELECT 2 AS two;
CREATE TEMP TABLE items (id int PRIMARY KEY, name text);
COPY items FROM STDIN;
1	apple
2	pear
3	a\ttab
\.
COPY items FROM STDIN;
4	fig
1	duplicate
\.
COPY items TO STDOUT;
\copy (SELECT id FROM items ORDER BY id) TO STDOUT
SELECT id, 1 / (id - 2) FROM items;
BEGIN;
INSERT INTO items VALUES (9, 'gone');
SELECT nonsense;
SELECT 'ignored until the transaction ends';
ROLLBACK;
SELECT count(*) FROM items;
DO $$ BEGIN RAISE NOTICE 'a notice in the middle'; END $$;
SET application_name = 'renamed';
BEGIN;
DECLARE numbers CURSOR FOR SELECT generate_series(1, 1000);
FETCH 2 FROM numbers;
MOVE FORWARD 500 IN numbers;
FETCH 1 FROM numbers;
COMMIT;
\set FETCH_COUNT 100
SELECT sum(length(repeat('x', n))) FROM generate_series(1, 300) AS n;
SELECT generate_series(1, 250) % 100 = 0 AS hundred \g | sort | uniq -c
SELECT id, name FROM items ORDER BY id \gdesc
LISTEN news;
NOTIFY news, 'extra';
SELECT md5(string_agg(n::text, ',')) FROM generate_series(1, 100000) AS n;
