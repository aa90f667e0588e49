require "pg"

$connection = PG.connect(ENV.fetch("DATABASE_URL"))
$connection.exec("SELECT 1")

run(lambda do |env|
  asked = Integer(env["QUERY_STRING"])
  [200, { "content-type" => "text/plain" }, [$connection.exec_params("SELECT $1::int", [asked]).getvalue(0, 0)]]
end)
