# Answers each request with what the request asks for, which takes the database: whoever gets another's answer can tell.
require "sequel"

# As many frameworks do while they load: ask something, and keep the connection for later in the pool.
DB = Sequel.connect(
  adapter: "postgres", host: ENV.fetch("PGHOST"), port: ENV.fetch("PGPORT"), user: ENV.fetch("PGUSER"),
  database: ENV.fetch("PGDATABASE"), max_connections: 5
)
DB.get(1)

run(lambda do |env|
  asked = Integer(env["QUERY_STRING"])
  [200, { "content-type" => "text/plain" }, [DB.get(Sequel.cast(asked, Integer)).to_s]]
end)
