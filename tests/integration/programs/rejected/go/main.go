// Connects with lib/pq once for each state that is named, and is rejected there; see ../python.py.
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/lib/pq"
)

const rows = "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)"

var input = bufio.NewReader(os.Stdin)

func say(what map[string]any) {
	line, _ := json.Marshal(what)
	fmt.Println(string(line))
}

func query(connection *sql.Conn, text string, arguments ...any) error {
	rows, err := connection.QueryContext(context.Background(), text, arguments...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
	}
	return rows.Err()
}

func use(connection *sql.Conn, state string) error {
	if state == "transaction" {
		if err := query(connection, "BEGIN"); err != nil {
			return err
		}
	}
	say(map[string]any{"state": state})
	switch state {
	case "query":
		return query(connection, "SELECT pg_sleep(60)")
	case "extended":
		return query(connection, "SELECT pg_sleep(60), $1::int", 1)
	case "rows":
		return query(connection, rows)
	default:
		input.ReadString('\n')
		return query(connection, "SELECT 2")
	}
}

func outcome(connection *sql.Conn) any {
	if err := query(connection, "SELECT 3"); err != nil {
		return err.Error()
	}
	return nil
}

func main() {
	db, err := sql.Open("postgres", "sslmode=disable")
	if err != nil {
		panic(err)
	}
	for _, state := range os.Args[1:] {
		connection, err := db.Conn(context.Background())
		if err != nil {
			panic(err)
		}
		err = use(connection, state)
		if err == nil {
			panic(state + ": it has not been rejected")
		}
		said := map[string]any{"class": fmt.Sprintf("%T", err), "text": err.Error()}
		var reported *pq.Error
		if errors.As(err, &reported) {
			said["sqlstate"], said["detail"], said["hint"] = string(reported.Code), reported.Detail, reported.Hint
		}
		said["again"] = []any{outcome(connection), outcome(connection), outcome(connection)}
		say(said)
		connection.Close()
	}
}
