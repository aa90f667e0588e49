# A timeout interrupts a query, and its answer is left in the socket, until the connection is used again.
# Says so when the timeout has struck, then what the next query got, each as JSON in a line.

require "json"
require "pg"
require "timeout"

$stdout.sync = true
connection = PG.connect
connection.setnonblocking(true)
begin
  Timeout.timeout(0.2) do
    connection.send_query("SELECT pg_sleep(0.5), 'first'")
    connection.block
    connection.get_last_result
  end
rescue Timeout::Error
  puts JSON.generate({})
end
$stdin.gets
begin
  connection.send_query("SELECT 'second'")
  puts JSON.generate({ error: "" })
rescue PG::Error => e
  puts JSON.generate({ error: e.message.strip })
end
connection.finish
