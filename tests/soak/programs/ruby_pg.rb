# Does steps with ruby-pg: see playing.py.
require "pg"
require "json"
require "digest"

def digest(rows)
  text = rows.to_json
  {rows: rows.size, first: rows.first(3).map { |row| row.map { |value| value && value[0, 80] } }, md5: Digest::MD5.hexdigest(text)}
end

connection = PG.connect
connection.set_notice_processor { |_| }
execute = lambda do |sql, values = []|
  result = values.empty? ? connection.exec(sql) : connection.exec_params(sql, values)
  digest(result.values)
rescue PG::Error => error
  error.result&.error_field(PG::PG_DIAG_SQLSTATE) || error.message
end

$stdin.each_line do |line|
  step = JSON.parse(line)
  got =
    case step["do"]
    when "transaction" then step["statements"].map { |sql| execute.(sql) }
    when "prepared"
      connection.prepare("s#{step["n"]}", step["sql"])
      step["lists"].map { |values| digest(connection.exec_prepared("s#{step["n"]}", values).values) }
    when "big" then execute.(step["sql"], [step["letter"] * step["size"]] * 2)
    when "copy"
      execute.("DROP TABLE IF EXISTS copied")
      execute.("CREATE TEMP TABLE copied (n int, word text)")
      connection.copy_data("COPY copied FROM STDIN") do
        step["rows"].each { |row| connection.put_copy_data(row.join("\t") + "\n") }
      end
      out = []
      connection.copy_data("COPY copied TO STDOUT") do
        while row = connection.get_copy_data
          out << [row]
        end
      end
      digest(out)
    else execute.(step["sql"], step["values"] || [])
    end
  puts({n: step["n"], do: step["do"], got: got}.to_json)
  $stdout.flush
end
connection.finish
