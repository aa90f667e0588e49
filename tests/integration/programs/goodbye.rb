# The scenario that the first argument names. last_user: A parent connects and forks a child, which asks something and exits:
# the finalizer of its copy of the object says goodbye to the server, with Terminate, on the parent's connection. daemon: The
# parent exits instead, likewise, and the child asks when it has. Says both processes, and whether who was left could go on.
require "json"
require "pg"

connection = PG.connect
connection.exec("SELECT 1")
parent = Process.pid

case ARGV[0]
when "last_user"
  child = fork { connection.exec("SELECT 1") }
  Process.wait(child)
when "daemon"
  exit if fork
  sleep 0.01 while Process.ppid == parent
  child = Process.pid
end
sleep 0.2

alive =
  begin
    connection.exec("SELECT 1").ntuples
  rescue PG::Error
    0
  end
puts JSON.generate({ parent: parent, child: child, alive: alive })
