require "pg"

$connection = PG.connect(ENV.fetch("DATABASE_URL"))
$connection.exec("SELECT 1")

def work
  raise unless $connection.exec("SELECT 42").getvalue(0, 0) == "42"
end

# here goes the advice, in the place of
pid = fork { work }
# up to here
Process.wait(pid)
work
$connection.close
