require "sequel"

DB = Sequel.connect(ENV.fetch("DATABASE_URL"))
DB.get(1)

def work
  raise unless DB.get(Sequel.cast(42, Integer)) == 42
end

# here goes the advice, in the place of
pid = fork { work }
# up to here
Process.wait(pid)
work
DB.disconnect
