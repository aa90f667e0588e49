// Does steps with lib/pq: see playing.py.
package main

import (
	"bufio"
	"context"
	"crypto/md5"
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/lib/pq"
)

type step struct {
	N          int        `json:"n"`
	Do         string     `json:"do"`
	SQL        string     `json:"sql"`
	Values     []string   `json:"values"`
	Lists      [][]string `json:"lists"`
	Statements []string   `json:"statements"`
	Letter     string     `json:"letter"`
	Size       int        `json:"size"`
}

func digest(rows *sql.Rows, err error) interface{} {
	if err == nil {
		defer rows.Close()
		count := 0
		hashed := md5.New()
		var names []string
		if names, err = rows.Columns(); err == nil {
			values := make([]sql.NullString, len(names))
			targets := make([]interface{}, len(names))
			for n := range values {
				targets[n] = &values[n]
			}
			for rows.Next() {
				must(rows.Scan(targets...))
				count++
				fmt.Fprintln(hashed, values)
			}
			err = rows.Err()
		}
		if err == nil {
			return map[string]interface{}{"rows": count, "md5": fmt.Sprintf("%x", hashed.Sum(nil))}
		}
	}
	if failed, is := err.(*pq.Error); is {
		return string(failed.Code)
	}
	return err.Error()
}

func arguments(values []string) []interface{} {
	all := make([]interface{}, len(values))
	for n, value := range values {
		all[n] = value
	}
	return all
}

func main() {
	ctx := context.Background()
	db, err := sql.Open("postgres", "sslmode=disable")
	must(err)
	connection, err := db.Conn(ctx)
	must(err)
	input := bufio.NewScanner(os.Stdin)
	input.Buffer(nil, 16<<20)
	for input.Scan() {
		var doing step
		must(json.Unmarshal(input.Bytes(), &doing))
		got := []interface{}{}
		switch doing.Do {
		case "prepared":
			statement, err := connection.PrepareContext(ctx, doing.SQL)
			must(err)
			for _, values := range doing.Lists {
				got = append(got, digest(statement.Query(arguments(values)...)))
			}
			must(statement.Close())
		case "transaction":
			for _, statement := range doing.Statements {
				got = append(got, digest(connection.QueryContext(ctx, statement)))
			}
		case "big":
			value := strings.Repeat(doing.Letter, doing.Size)
			got = append(got, digest(connection.QueryContext(ctx, doing.SQL, value, value)))
		default:
			got = append(got, digest(connection.QueryContext(ctx, doing.SQL, arguments(doing.Values)...)))
		}
		line, err := json.Marshal(map[string]interface{}{"n": doing.N, "do": doing.Do, "got": got})
		must(err)
		fmt.Println(string(line))
	}
	must(input.Err())
	must(connection.Close())
	must(db.Close())
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
