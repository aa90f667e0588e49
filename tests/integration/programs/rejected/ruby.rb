# Connects with ruby-pg once for each state that is named, and is rejected there; see python.py.
require "pg"
require "json"

$stdout.sync = true
ROWS = "SELECT repeat('x', 8000), nextval('rows_sent'), pg_sleep(0.01) FROM generate_series(1, 6000)"

def arrived(state) = puts({state: state}.to_json)

def outcome
  yield
  nil
rescue PG::Error => error
  error.message
end

ARGV.each do |state|
  connection = PG.connect
  begin
    connection.exec("BEGIN") if state == "transaction"
    arrived(state) unless state == "copy"
    $stdin.gets if %w[idle transaction torn].include?(state)
    case state
    when "query" then connection.exec("SELECT pg_sleep(60)")
    when "extended" then connection.exec_params("SELECT pg_sleep(60), $1::int", [1])
    when "rows" then connection.exec(ROWS)
    when "copy"
      connection.copy_data("COPY copied FROM STDIN") do
        connection.put_copy_data("1\n")
        arrived(state)
        $stdin.gets
        3000.times { connection.put_copy_data("2\n" * 1000) }
      end
    else connection.exec("SELECT 2")
    end
    abort "#{state}: it has not been rejected"
  rescue PG::Error => error
    result = error.result
    said = {class: error.class.name, text: error.message, again: [1, 2, 3].map { outcome { connection.exec("SELECT 3") } }}
    if result
      said[:sqlstate] = result.error_field(PG::PG_DIAG_SQLSTATE)
      said[:detail] = result.error_field(PG::PG_DIAG_MESSAGE_DETAIL)
      said[:hint] = result.error_field(PG::PG_DIAG_MESSAGE_HINT)
    end
    puts said.to_json
  end
end
