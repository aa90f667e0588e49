// Asks something within a transaction; with "within", asks again before it has read the answer to its end.
package main

import (
	"database/sql"
	"fmt"
	"os"

	_ "github.com/lib/pq"
)

func main() {
	db, err := sql.Open("postgres", "sslmode=disable")
	must(err)
	tx, err := db.Begin()
	must(err)
	// More than the sockets on the way have room for, so that the server is still sending.
	rows, err := tx.Query("SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
	must(err)
	count := 0
	for rows.Next() {
		count++
		if count == 1 && len(os.Args) > 1 && os.Args[1] == "within" {
			_, err = tx.Query("SELECT 1")
			fmt.Println(err)
			os.Exit(0)
		}
	}
	must(rows.Err())
	_, err = tx.Exec("SELECT 1")
	must(err)
	must(tx.Commit())
	must(db.Close())
	fmt.Println(count)
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
