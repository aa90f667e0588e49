# A parent connects and forks a child that never touches the connection.
# The child exits after as many seconds as the argument says: the finalizer of its copy of the object says goodbye to
# the server, with Terminate, on the parent's connection. Says both processes, and whether the parent could go on.
require "json"
require "pg"

life = Float(ARGV[0])
connection = PG.connect
connection.exec("SELECT 1")

child = fork { sleep life }
Process.wait(child)
sleep 0.2

alive =
  begin
    connection.exec("SELECT 1").ntuples
  rescue PG::Error
    0
  end
puts JSON.generate({ parent: Process.pid, child: child, alive: alive })
