# Is rejected on a connection from Sequel's pool; see pools.py.
require "sequel"
require "json"

$stdout.sync = true
where = ENV.values_at("PGUSER", "PGHOST", "PGPORT", "PGDATABASE")
DB = Sequel.connect(format("postgres://%s@%s:%s/%s", *where), max_connections: 1)

DB.get(1)
puts({state: "query"}.to_json)
begin
  DB.transaction { DB.fetch("SELECT pg_sleep(60)").all }
rescue Sequel::DatabaseError => error
  afterwards = []
  100.times do
    DB.get(1)
    break
  rescue Sequel::DatabaseError => another
    afterwards << another.message
    sleep 0.05
  end
  puts({text: error.message, afterwards: afterwards}.to_json)
end
