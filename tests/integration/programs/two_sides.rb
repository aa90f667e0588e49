# One connection, opened before a fork and used on both sides of it at once, from methods that a report is to name.
# Says who they are, as JSON: parent and child. Plays until its standard input ends.
require "json"
require "pg"

def open_shop
  PG.connect
end

def load_user(connection)
  ask(connection)
end

def save_order(connection)
  ask(connection)
end

# libpq would soon lose count, and refuse to go on, so what goes wrong is passed over.
def ask(connection)
  connection.exec("SELECT pg_sleep(0.05)")
rescue PG::Error
  exit! 0
end

def main
  connection = open_shop
  parent = Process.pid
  child = fork do
    load_user(connection) while Process.ppid == parent
  end
  puts JSON.generate({ parent: parent, child: child })
  $stdout.flush
  save_order(connection) until $stdin.wait_readable(0)
  exit! 0
end

main
