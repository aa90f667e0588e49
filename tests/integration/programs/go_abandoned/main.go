// Uses the one connection of a transaction for a second query before the answer to the first has been read.
//
// "within" asks within rows.Next(); "goroutines" has two goroutines share the transaction; "closed" closes the rows
// before it asks, as it should. Says how the second query ended, as JSON, and
// lives on for a while, as programs do.
package main

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"time"

	_ "github.com/lib/pq"
)

func main() {
	db, err := sql.Open("postgres", "sslmode=disable")
	must(err)
	tx, err := db.Begin()
	must(err)
	// More than lib/pq's buffer holds, and less than the socket has room for: the server is done with it.
	rows, err := tx.Query("SELECT repeat('x', 100) FROM generate_series(1, 500)")
	must(err)
	rows.Next()
	time.Sleep(400 * time.Millisecond)
	switch os.Args[1] {
	case "within":
		_, err = tx.Query("SELECT $1::int", 1)
	case "goroutines":
		done := make(chan error)
		go func() {
			_, err := tx.Query("SELECT $1::int", 1)
			done <- err
		}()
		err = <-done
	case "closed":
		must(rows.Close())
		_, err = tx.Query("SELECT $1::int", 1)
	}
	said, _ := json.Marshal(map[string]string{"error": fmt.Sprint(err)})
	fmt.Println(string(said))
	time.Sleep(400 * time.Millisecond)
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
