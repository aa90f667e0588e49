require "sequel"

DB = Sequel.connect(ENV.fetch("DATABASE_URL"), max_connections: 5)
DB.get(1)

run(lambda do |env|
  asked = Integer(env["QUERY_STRING"])
  [200, { "content-type" => "text/plain" }, [DB.get(Sequel.cast(asked, Integer)).to_s]]
end)
