module example.com/asker

go 1.19

require github.com/lib/pq v1.10.7

// Where Debian puts it: golang-github-lib-pq-dev.
replace github.com/lib/pq => /usr/share/gocode/src/github.com/lib/pq
